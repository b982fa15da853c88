"""A visual-document set evaluated by our task and by mteb's own, with the same model, side by side.

python benchmarks/visdoc.py [--pages 2000 --queries 100 --width 1240 --height 1754]

Either side runs in a process of its own on the same synthetic Parquet tables: mteb's ViDoRe task with its
SentenceTransformer wrapper, and the same set of MMEB-V2 with our loader. Reported are pages per second, loading
included, processor time, and how far memory rose above that of the process with the model loaded; of ours also the
preflight and the second run, which finds pages and embeddings on disk. A corpus twice as large shows whether memory grows
with it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import in_process, machine, save, where
from mmeb_eval import Meter, _forget_peak
from PIL import Image

KEY = "ViDoRe_tabfquad"
CARD = "---\nconfigs:\n{}---\n"
CONFIG = "- config_name: {0}\n  data_files:\n  - split: test\n    path: {0}/test.parquet\n"
SIDES = ("mteb", "ours", "ours again")


def main() -> None:
    """Write ``benchmarks/results/visdoc.{json,md}``."""
    options = _options()
    if options.side_to_run:
        sys.stdout.write(json.dumps(measure(options.side_to_run)) + "\n")
        return
    runs: dict[str, dict[str, Any]] = {}
    for pages in (options.pages, 2 * options.pages):
        with tempfile.TemporaryDirectory() as scratch:
            write_set(Path(scratch), pages, options)
            for side in SIDES:
                runs[f"{side}, {pages} pages"] = _in_process(side, Path(scratch))
    result = {"name": "visdoc", "machine": machine(), "options": vars(options), "runs": runs}
    sys.stdout.write(save(result, table(result)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=2000, help="pages of the smaller corpus")
    parser.add_argument("--queries", type=int, default=100, help="queries")
    parser.add_argument("--width", type=int, default=1240, help="width of the pages in pixels")
    parser.add_argument("--height", type=int, default=1754, help="height of the pages in pixels")
    parser.add_argument("--side-to-run", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_set(folder: Path, pages: int, options: argparse.Namespace) -> None:
    """Write the tables of a set as the hub has them, with a card that `datasets` reads."""
    target = folder / "annotations" / "vidore" / "tabfquad_test_subsampled_beir"
    for name in ("corpus", "queries", "qrels"):
        (target / name).mkdir(parents=True)
    (target / "README.md").write_text(CARD.format("".join(map(CONFIG.format, ("corpus", "queries", "qrels")))))
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema([("corpus-id", pa.int64()), ("image", image)], metadata={"huggingface": _features()})
    with pq.ParquetWriter(target / "corpus" / "test.parquet", schema) as writer:
        for start in range(0, pages, 100):
            ids = list(range(start, min(start + 100, pages)))
            encoded = [{"bytes": content, "path": None} for content in _pages(ids, options)]
            writer.write_table(pa.table({"corpus-id": ids, "image": pa.array(encoded, image)}, schema=schema))
    ids = list(range(options.queries))
    queries = {"query-id": ids, "query": [f"which page has the number {number}" for number in ids]}
    pq.write_table(pa.table(queries), target / "queries" / "test.parquet")
    judged = {"query-id": ids, "corpus-id": [number % pages for number in ids], "score": [1] * len(ids)}
    pq.write_table(pa.table(judged), target / "qrels" / "test.parquet")


def _features() -> str:
    return json.dumps(
        {"info": {"features": {"corpus-id": {"dtype": "int64", "_type": "Value"}, "image": {"_type": "Image"}}}}
    )


def _pages(ids: list[int], options: argparse.Namespace) -> Iterator[bytes]:
    """JPEG pages with lines of dark strokes, each another one."""
    for page in ids:
        rng = np.random.default_rng(page)
        rows = np.full((options.height // 20, options.width // 4), 255, dtype=np.uint8)
        rows[:, :] = np.where(rng.random(rows.shape) < 0.3, 40, 255)
        rows[::3] = 255
        image = Image.fromarray(rows).resize((options.width, options.height), Image.Resampling.NEAREST).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
        yield buffer.getvalue()


def _in_process(side: str, data: Path) -> dict[str, Any]:
    environment = {"MMEB_V2_DIR": str(data), "MMEB_V2_PROFILE": "model"}
    environment |= {"UNIME_HOME": str(data / "home"), "HF_DATASETS_CACHE": str(data / "datasets")}
    return in_process(__file__, side, environment)


def measure(side: str) -> dict[str, Any]:
    """Evaluate the set by one path in this process."""
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from mteb.tasks import VidoreTabfquadRetrieval
    from sentence_transformers import SentenceTransformer

    from mteb_tasks.loader import UniMELoader
    from mteb_tasks.metadata import model_meta
    from mteb_tasks.mmeb.base_tasks import preflight
    from mteb_tasks.mmeb_v2.visdoc_tasks import VISDOC_TASKS
    from unime_st import UniME
    from unime_st.memory import peak_resident, resident

    data = Path(os.environ["MMEB_V2_DIR"])
    model = (SentenceTransformer if side == "mteb" else UniME)("unime-tiny", device="cpu")
    if side == "mteb":
        wrapped: Any = SentenceTransformerEncoderWrapper(model)
        wrapped.mteb_model_meta = model_meta("stock/tiny", "1")
        folder = data / "annotations" / "vidore" / "tabfquad_test_subsampled_beir"
        source = {"path": str(folder), "revision": "main"}
        metadata = VidoreTabfquadRetrieval.metadata.model_copy(update={"dataset": source})
        task: Any = type("LocalPages", (VidoreTabfquadRetrieval,), {"metadata": metadata})()
    else:
        wrapped = UniMELoader("unime/tiny", "1", model=model, cache_folder=data / "home" / "embeddings")
        task = next(found for found in VISDOC_TASKS if found.key == KEY)()
    model.encode([{"text": "warm up"}])
    meter, before = Meter(model), resident() / 2**20
    _forget_peak()
    started, processor = time.perf_counter(), time.process_time()
    if side != "mteb":
        preflight({task: data})
    checked = time.perf_counter() - started
    result = mteb.evaluate(wrapped, task, cache=None, co2_tracker=False, show_progress_bar=False)
    seconds, peak = time.perf_counter() - started, peak_resident() / 2**20
    pages = pq.ParquetFile(next(data.glob("annotations/*/*/corpus/test.parquet"))).metadata.num_rows
    return {
        "seconds": round(seconds, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
        "preflight_seconds": None if side == "mteb" else round(checked, 2),
        "pages_per_second": round(pages / seconds, 1),
        "forwards": meter.rows,
        "grown_mib": round(peak - before),
        "ndcg_at_5": round(float(result.task_results[0].get_score()), 4),
    }


def table(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    options = result["options"]
    lines = [
        f"{where(result)}; unime-tiny, {options['queries']} queries, JPEG pages of {options['width']} x {options['height']} pixels, one run each",
        "",
        "| path | seconds | of these preflight | processor seconds | pages/s | rows through the model | growth in MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, run in result["runs"].items():
        names = ("seconds", "preflight_seconds", "processor_seconds", "pages_per_second", "forwards", "grown_mib")
        cells = ("" if run[name] is None else str(run[name]) for name in names)
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
