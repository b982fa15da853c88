"""Copies: every public model object survives pickle, deepcopy and a pool of processes, unused and used."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from sentence_transformers import CrossEncoder, SentenceTransformer

from mteb_tasks import RecordsRetrieval, TwoStage, register, wrap
from tests.judging.chat_server import Handler, Model
from tests.mteb_tasks.foreign import ForeignRetrieval
from tests.programs import FORKS, import_libraries
from unime_st import Item, UniME, UniMEReranker, losses
from unime_st.data import PairRecord, RecordSet
from unime_st.encoding import TokenCounter, VectorShards, encode_to_shards
from unime_st.judging import CascadeJudge, Group, HttpJudge, LocalJudge
from unime_st.recipes import RELEASED
from unime_st.retrieval import Index, mine
from unime_st.training.evaluation import RankingEvaluator, RetrievalEvaluator

FAMILIES = ("unime-v2", "unime-v1-llava1.6", "unime-v1-phi3.5", "unime-v2-2b", "llava-onevision", "smolvlm")
OTHER_PROCESS = """
import pickle, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.pickle")):
    value, use = pickle.loads(path.read_bytes())
    path.with_suffix(".found").write_bytes(pickle.dumps(use(value)))
"""
STARTED_ANEW = "SentenceTransformer unime-tiny"
"""The pool of this model is processes that import the libraries, as a user's; those of the others are forks."""
ROOT = Path(__file__).resolve().parents[2]
Converted = Callable[[str], Path]


@dataclass(frozen=True)
class Sources:
    """What the objects are made of.

    Args:
        folder: Empty folder.
        converted: Native folder of a tiny checkpoint by the name of a recipe.
        records: Records with texts and images.
    """

    folder: Path
    converted: Converted
    records: RecordSet


def image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((90, 60))


def encode(model: Any) -> np.ndarray:
    return np.concatenate([model.encode([value]) for value in ("a b", {"image": image(), "text": "c"})])


def rank(model: Any) -> object:
    return [entry["score"] for entry in model.rank("a b", ["c", {"image": image()}, "d"])], model.predict([("a", "b")])


def rank_both(model: Any) -> object:
    return rank(model), model.listwise_scores("a b", ["c", {"image": image()}])


def judge(model: Any) -> object:
    return np.concatenate(model.score([Group(Item("a"), [Item("b"), Item(image=image())])]))


def search(index: Any) -> object:
    return [(hit.id, hit.score) for hit in index.search(["a blue star"], k=2)[0]]


def score_task(model: Any) -> float:
    return score_of(model, ForeignRetrieval())


def score_of(model: Any, task: Any) -> float:
    found = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return float(found.task_results[0].get_score())


def loss_value(loss: Any) -> float:
    columns = [[f"{side} {row}" for row in range(3)] for side in "abc"]
    if isinstance(loss, losses.RerankerLoss):
        with torch.no_grad():
            return float(sum(loss(columns).values()))
    scores = torch.tensor([[0.9, 0.5]] * 3)
    labels = {losses.SoftLabelDistillationLoss: scores, losses.SimilarityDistillationLoss: torch.eye(3, 5)}
    used = columns[:1] if isinstance(loss, losses.SimilarityDistillationLoss) else columns
    return float(loss([loss.model.preprocess(column) for column in used], labels.get(type(loss))))


def evaluate(evaluator: Any) -> object:
    model = (
        UniME("unime-tiny", device="cpu")
        if isinstance(evaluator, RetrievalEvaluator)
        else UniMEReranker("unime-tiny", device="cpu")
    )
    return evaluator(model)


def score(task: Any) -> float:
    return score_of(UniME("unime-tiny", device="cpu"), task)


def tiny() -> UniME:
    return UniME("unime-tiny", device="cpu")


def tiny_reranker() -> UniMEReranker:
    return UniMEReranker("unime-tiny", device="cpu")


def trained(sources: Sources) -> SentenceTransformer:
    """A folder as training leaves it: an adapter of an alias."""
    model = SentenceTransformer("unime-tiny", device="cpu")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(str(sources.folder / "trained"))
    return SentenceTransformer(str(sources.folder / "trained"), device="cpu")


def saved_reranker(sources: Sources) -> CrossEncoder:
    UniMEReranker("unime-tiny", device="cpu").save_pretrained(str(sources.folder / "reranker"))
    return CrossEncoder(str(sources.folder / "reranker"), device="cpu")


def built_index(sources: Sources, **options: Any) -> Index:
    return Index.build(["a red circle", "a blue star", image()], tiny(), ids=["circle", "star", "image"], **options)


def loaded_index(sources: Sources) -> Index:
    return built_index(sources, folder=sources.folder / "index", kind="sq8")


def named_task(name: str) -> Any:
    register()
    return mteb.get_task(name)


def shards(sources: Sources) -> VectorShards:
    return encode_to_shards(tiny(), ["a", "b"], sources.folder / "vectors", show_progress_bar=False)


def http_judge(sources: Sources) -> HttpJudge:
    """A judge of a server in this process."""
    Handler.model, Handler.faults, Handler.every = Model(), [], 1
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return HttpJudge(f"http://127.0.0.1:{server.server_port}/v1", "tiny")


def count(counter: Any) -> object:
    return counter(["a b", "c"])


def pools(found: Any) -> object:
    return [(pool.candidates, pool.similarities) for pool in found]


Make = Callable[[Sources], Any]
Use = Callable[[Any], object]
OBJECTS: dict[str, tuple[Make, Use]] = {
    **{
        f"{kind.__name__} {name}": (
            lambda sources, kind=kind, name=name: kind(str(sources.converted(name)), device="cpu"),
            encode,
        )
        for kind in (SentenceTransformer, UniME)
        for name in FAMILIES
    },
    "SentenceTransformer unime-tiny": (lambda sources: SentenceTransformer("unime-tiny", device="cpu"), encode),
    "UniME unime-tiny": (lambda sources: tiny(), encode),
    "SentenceTransformer trained": (trained, encode),
    "CrossEncoder": (saved_reranker, rank),
    "UniMEReranker": (lambda sources: tiny_reranker(), rank_both),
    "UniMEReranker released": (
        lambda sources: UniMEReranker(str(sources.converted("unime-v2-reranker")), device="cpu"),
        rank_both,
    ),
    "LocalJudge": (lambda sources: LocalJudge("unime-tiny", device="cpu"), judge),
    "CascadeJudge": (
        lambda sources: CascadeJudge(*[LocalJudge("unime-tiny", device="cpu")] * 2, band=(-100, 100)),
        judge,
    ),
    "HttpJudge": (http_judge, judge),
    "UniMELoader": (lambda sources: wrap(tiny()), score_task),
    "UniMELoader of a plain model": (
        lambda sources: wrap(SentenceTransformer("unime-tiny", device="cpu")),
        score_task,
    ),
    "TwoStage": (lambda sources: TwoStage(wrap(tiny()), tiny_reranker()), score_task),
    "Index": (built_index, search),
    "Index of a folder": (loaded_index, search),
    "VectorShards": (shards, np.asarray),
    "RecordSet": (lambda sources: sources.records, list),
    "Pools": (lambda sources: mine(sources.records, tiny(), sources.folder / "pools", num_candidates=2), pools),
    "TokenCounter": (lambda sources: TokenCounter(tiny()), count),
    "Recipe": (lambda sources: RELEASED["unime-v2"], repr),
    "HardNegativeRankingLoss": (lambda sources: losses.HardNegativeRankingLoss(tiny()), loss_value),
    "SoftLabelDistillationLoss": (lambda sources: losses.SoftLabelDistillationLoss(tiny()), loss_value),
    "SimilarityDistillationLoss": (lambda sources: losses.SimilarityDistillationLoss(tiny()), loss_value),
    "RerankerLoss": (lambda sources: losses.RerankerLoss(tiny_reranker()), loss_value),
    "RetrievalEvaluator": (lambda sources: RetrievalEvaluator(sources.records), evaluate),
    "RankingEvaluator": (lambda sources: RankingEvaluator(sources.records), evaluate),
    "task of scenes": (lambda sources: named_task("ScenesVQA"), score),
    "task of records": (lambda sources: RecordsRetrieval(sources.records.folder), score),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RecordSet:
    texts = ("a red circle", "a blue star", "a ring")
    pairs = [PairRecord(Item(f"find {text}"), Item(text), negatives=[Item("a square")]) for text in texts]
    pairs.append(PairRecord(Item("find a gradient"), Item(image=image())))
    return RecordSet.write(tmp_path_factory.mktemp("records") / "records", pairs, {})


@pytest.fixture
def sources(tmp_path: Path, converted: Converted, records: RecordSet) -> Sources:
    return Sources(tmp_path, converted, records)


def same(found: object, expected: object) -> bool:
    if isinstance(expected, (list, tuple)):
        return isinstance(found, (list, tuple)) and all(map(same, found, expected)) and len(found) == len(expected)
    if isinstance(expected, (np.ndarray, float)):
        return np.allclose(found, expected, rtol=0, atol=1e-6)  # type: ignore[arg-type]
    return found == expected


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.slow
def test_copies_give_equal_output(sources: Sources, name: str):
    make, use = OBJECTS[name]
    value = make(sources)
    unused = {"pickle": pickle.dumps(value), "deepcopy": copy.deepcopy(value)}
    expected = use(value)
    assert same(use(pickle.loads(unused["pickle"])), expected), "pickled before use"
    assert same(use(unused["deepcopy"]), expected), "copied before use"
    assert same(use(pickle.loads(pickle.dumps(value))), expected), "pickled after use"
    assert same(use(copy.deepcopy(value)), expected), "copied after use"
    assert same(use(value), expected), "the original"


@pytest.mark.slow
def test_used_objects_work_in_another_process(sources: Sources):
    expected = {}
    for number, (name, (make, use)) in enumerate(OBJECTS.items()):
        folder = sources.folder / str(number)
        folder.mkdir()
        value = make(Sources(folder, sources.converted, sources.records))
        expected[f"{number:02d}"] = name, use(value)
        (sources.folder / f"{number:02d}.pickle").write_bytes(pickle.dumps((value, use)))
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, str(sources.folder)], env=environment, check=True)
    for number, (name, output) in expected.items():
        assert same(pickle.loads((sources.folder / f"{number}.found").read_bytes()), output), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, (_, use) in OBJECTS.items() if use is encode])
def test_pool_of_a_used_model(sources: Sources, name: str, monkeypatch: pytest.MonkeyPatch):
    model = OBJECTS[name][0](sources)
    inputs = ["a b", {"image": image(), "text": "c"}, "a b"]
    expected = np.stack([model.encode([value])[0] for value in inputs])
    if name != STARTED_ANEW:
        import_libraries()
        monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: FORKS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        assert same(model.encode(inputs, pool=pool), expected)
    finally:
        model.stop_multi_process_pool(pool)
