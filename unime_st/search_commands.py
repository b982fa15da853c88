"""Subcommands `unime encode`, `unime index` and `unime search`: vectors of images or texts, an index, and its queries."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from itertools import chain, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unime_st.options import OptionError

if TYPE_CHECKING:
    from unime_st.data.items import Item
    from unime_st.model import UniME
    from unime_st.retrieval import Hit


_SOURCE = (
    "folder of images, video files and PDF files, searched recursively; table (.jsonl, .json, .csv, .parquet, "
    "datasets folder); or record folder"
)


def encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `unime encode`."""
    parser.epilog = "example: unime encode photos/ --model unime-tiny --output vectors"
    parser.add_argument("source", help=_SOURCE)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the vectors (.npy) and ids.json")
    parser.add_argument("--prompt", help="instruction of the items (default: the default prompt of the model)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="data type of the vectors (default: float32)",
    )
    _encoding_arguments(parser)


def encode(options: argparse.Namespace) -> int:
    """Encode items to shards on disk."""
    _at_least_one(options, "truncate_dim", "batch_size")
    from unime_st.data.manifest import fingerprint_inputs
    from unime_st.encoding import encode_to_shards
    from unime_st.files import write_json
    from unime_st.model import UniME

    found = _nonempty(options)

    def items() -> Iterator[Item]:
        names = []
        for name, item in found:
            names.append(name)
            yield item
        write_json(Path(options.output) / "ids.json", names)

    columns = f"{options.text_column}, {options.image_column}"
    columns += "" if options.video_column == "video" else f", {options.video_column}"
    chosen = {name: getattr(options, name) for name in ("dtype", "prompt", "truncate_dim", "batch_size", "overwrite")}
    vectors = encode_to_shards(
        UniME(options.model, device=options.device),
        items(),
        options.output,
        on_error="skip",
        source=f"{fingerprint_inputs(options.source)} {columns}",
        **chosen,
    )
    sys.stdout.write(f"{len(vectors)} vectors of dimension {vectors.dim} in {options.output}\n")
    return 0


def _encoding_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="unime-tiny", help="embedding model (default: unime-tiny)")
    parser.add_argument("--truncate-dim", type=int, metavar="N", help="leading dimensions to keep (default: all)")
    _column_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="in units of 256 tokens (default: 64)")
    parser.add_argument("--device", help="device of the model, e.g. cpu or cuda (default: cuda if available)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def index_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `unime index`."""
    parser.epilog = "example: unime index photos/ --model unime-tiny --output photos.index"
    parser.add_argument("source", help=_SOURCE)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the index")
    parser.add_argument(
        "--kind",
        choices=("flat", "hnsw", "ivf", "sq8", "binary"),
        default="flat",
        help="flat is exact, hnsw and ivf are approximate and faster, sq8 takes a quarter of the memory, binary a "
        "thirtieth (default: flat)",
    )
    parser.add_argument("--prompt", help='instruction of the items (default: the model\'s prompt "document")')
    parser.add_argument("--query-prompt", help='instruction of queries (default: the model\'s prompt "query")')
    parser.add_argument("--vectors", metavar="DIR", help="vectors that `unime mine` keeps of the same records")
    parser.add_argument("--embed-images", action="store_true", help="copy image files into the index")
    _encoding_arguments(parser)


def _column_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("text", "image", "video", "id"):
        parser.add_argument(
            f"--{name}-column", metavar="NAME", default=name, help=f"column of a table; '' for none (default: {name})"
        )


def index(options: argparse.Namespace) -> int:
    """Build an index."""
    from unime_st.data.manifest import is_complete
    from unime_st.data.records import RecordSet
    from unime_st.model import UniME
    from unime_st.retrieval import Index
    from unime_st.retrieval.index_items import check_output

    _at_least_one(options, "truncate_dim", "batch_size")
    source = Path(options.source)
    names = ("kind", "prompt", "query_prompt", "truncate_dim", "batch_size", "vectors", "overwrite")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names}
    is_records = source.is_dir() and is_complete(source)
    if options.vectors and not is_records:
        raise OptionError(f"--vectors are those of a record folder, and {source} is not one")
    if is_records:
        what: Any = RecordSet.load(source)
    else:
        for_ids, for_items = tee(_nonempty(options))  # read in step, one item ahead
        what, chosen["ids"] = (item for _, item in for_items), (name for name, _ in for_ids)
        chosen["image_root"] = None if options.embed_images else source if source.is_dir() else source.parent
    check_output(options.output, overwrite=options.overwrite)  # before the model is loaded
    model = UniME(options.model, device=options.device)
    built = Index.build(what, model, folder=options.output, show_progress_bar=True, **chosen)
    recall = "" if options.kind == "flat" else f", recall@10 {built.settings.recall:.3f} on a sample"
    sys.stdout.write(
        f'{len(built)} items in {options.output} ({options.kind}{recall})\nSearch it: unime search {options.output} "..."\n'
    )
    return 0


def _items(source: str | Path, options: argparse.Namespace) -> Iterator[tuple[str, Item]]:
    from unime_st.retrieval.index_sources import Columns, read_items

    return read_items(
        source, Columns(options.text_column, options.image_column, options.id_column, options.video_column)
    )


def _nonempty(options: argparse.Namespace) -> Iterator[tuple[str, Item]]:
    """Items of the source of a command. A wrong one is found here, before the model is loaded."""
    found = _items(options.source, options)
    first = next(found, None)
    if first is None:
        raise ValueError(f"{options.source}: nothing in it can be read, so there is nothing to {options.command}")
    return chain([first], found)


def _at_least_one(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise OptionError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `unime search`."""
    parser.epilog = 'example: unime search photos.index "a red circle" --top 20 --html gallery.html'
    parser.add_argument("index", metavar="INDEX", help="folder written by `unime index`")
    parser.add_argument("text", nargs="?", help="text of the query")
    parser.add_argument("--image", metavar="FILE", help="image of the query; alone or with a text")
    parser.add_argument("--video", metavar="PATH", help="video of the query: file, or folder of frames")
    parser.add_argument("--queries", metavar="FILE", help="table or folder of queries, instead of a single query")
    _column_arguments(parser)
    parser.add_argument("--top", type=int, default=10, metavar="N", help="results per query (default: 10)")
    parser.add_argument("--query-prompt", help="instruction of the query (default: that of the index)")
    parser.add_argument("--reranker", metavar="MODEL", help="reranks the results, e.g. unime-v2-reranker")
    parser.add_argument(
        "--pair-order",
        choices=("query_first", "candidate_first", "both"),
        default="query_first",
        help="order of query and result in the reranker's prompt (default: query_first)",
    )
    weight = parser.add_mutually_exclusive_group()
    weight.add_argument(
        "--alpha", type=float, metavar="A", help="rank by A x similarity + the reranker's log-odds (default: log-odds)"
    )
    weight.add_argument("--fit-alpha", metavar="RECORDS", help="record folder of labeled pairs to fit A on")
    parser.add_argument("--model", help="embedding model (default: the model of the index)")
    parser.add_argument("--html", metavar="FILE", help="write a gallery that opens offline")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", help="device of the models, e.g. cpu or cuda (default: cuda if available)")


def search(options: argparse.Namespace) -> int:
    """Query an index."""
    _at_least_one(options, "top")
    from unime_st.data.manifest import is_complete

    queries = _queries(options)
    fusing = options.alpha is not None or options.fit_alpha is not None
    if not options.reranker and (fusing or options.pair_order != "query_first"):
        raise OptionError("--alpha, --fit-alpha and --pair-order are those of a reranker: add --reranker MODEL")
    if options.alpha is not None and not 0 <= options.alpha < math.inf:
        raise OptionError(f"--alpha must be a finite number of at least 0, got {options.alpha}")
    if options.fit_alpha and not is_complete(options.fit_alpha):
        raise OptionError(f"--fit-alpha must name a folder of records (unime import), got {options.fit_alpha}")
    from unime_st.model import UniME
    from unime_st.report.gallery import write_gallery
    from unime_st.retrieval import Index
    from unime_st.retrieval.index_settings import read_settings

    model = UniME(options.model or read_settings(options.index).model_name, device=options.device)
    loaded = Index.load(options.index, model)
    found = loaded.search(list(queries.values()), options.top, query_prompt=options.query_prompt)
    if options.reranker:
        found = _reranked(options, model, list(queries.values()), found)
    if options.html:
        shown_hits = ([(hit.id, hit.score, hit.item) for hit in own] for own in found)
        write_gallery(options.html, zip(queries.values(), shown_hits, strict=True))
    if options.json:
        shown = [{"query": name, "hits": list(map(_as_dict, own))} for name, own in zip(queries, found, strict=True)]
        content: object = shown if options.queries else shown[0]["hits"]
        sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return 0
    for name, own in zip(queries, found, strict=True):
        sys.stdout.write(f"{name}\n" if options.queries else "")
        sys.stdout.writelines(f"{hit.score:.4f}  {hit.id}\n" for hit in own)
    return 0


def _reranked(
    options: argparse.Namespace, model: UniME, queries: list[Item], found: list[list[Hit]]
) -> list[list[Hit]]:
    from unime_st.data.records import RecordSet
    from unime_st.reranking import UniMEReranker
    from unime_st.reranking.fusion import fit_fusion
    from unime_st.reranking.search import rerank_hits

    records = RecordSet.load(options.fit_alpha) if options.fit_alpha else None
    reranker = UniMEReranker(options.reranker, device=options.device)
    alpha: float | None = options.alpha
    if records is not None:
        alpha = fit_fusion(records, model, reranker, top_k=options.top, pair_order=options.pair_order)
        sys.stderr.write(f"fitted alpha: {alpha:.3g}\n")
    return rerank_hits(queries, found, reranker, pair_order=options.pair_order, alpha=alpha)


def _queries(options: argparse.Namespace) -> dict[str, Item]:
    from unime_st.data.items import Item

    if (options.queries is None) == (options.text is options.image is options.video is None):
        raise OptionError(
            "name a text, an image (--image FILE), a video (--video PATH) or several of them; or a table of queries "
            "(--queries FILE)"
        )
    if options.queries is not None:
        return dict(_items(options.queries, options))
    query = Item(options.text, options.image, options.video)
    if query.image is not None:
        query.image.size()  # a missing or damaged file is found before the model is loaded
    if query.video is not None:
        query.video.shape()
    return {"": query}


def _as_dict(hit: Hit) -> dict[str, object]:
    path = hit.item.image.path if hit.item.image is not None else None
    video = {} if hit.item.video is None else {"video": hit.item.video.label}
    known = {"id": hit.id, "score": hit.score, "similarity": hit.similarity, "text": hit.item.text, "image": path}
    return {**known, **video}
