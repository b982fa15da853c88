"""Numbers, words and chart of a demo run, from made-up results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from report_page import Page

from train_scripts.demo.charts import difference_chart
from train_scripts.demo.distillation import paraphrases, rank_agreement
from train_scripts.demo.evaluation import ndcg_at_10
from train_scripts.demo.figure import FIGURE, RECORD, figure
from train_scripts.demo.filters import filtered
from train_scripts.demo.own_data_run import judge_table, own_table
from train_scripts.demo.results import (
    COLUMNS,
    CONTROL,
    DISTILLED,
    DISTILLED_METRICS,
    MAIN,
    MEAN,
    MODELS,
    OTHER_PAIRS,
    DemoResults,
    Difference,
    distillation_rows,
    paired,
    render_table,
    table_rows,
)
from train_scripts.demo.run_demo import mean_seconds
from train_scripts.demo.settings import PAIR_ORDERS, TUNED_RATES, DemoArguments
from train_scripts.demo.tuning import best_rates
from unime_st.files import read_json
from unime_st.options import OptionError

ROOT = Path(__file__).resolve().parents[2]
GAINS = {
    "base": -0.2,
    "warm": -0.1,
    "in_batch": 0.0,
    "in_batch_compute": 0.03,
    "mined": 0.02,
    "judged": 0.04,
    "v2": 0.01,
    "truth": 0.05,
    "reranked": 0.11,
}


def made_up(sign: float = 1.0, seeds: int = 1) -> DemoResults:
    """Results of the main run in which every model is ahead of the control by its gain times ``sign``."""
    rows, compared = [], []
    for seed in range(seeds):
        values = {model: 0.5 + sign * (gain + 0.002 * seed * (gain != 0)) for model, gain in GAINS.items()}
        rows += [
            {"model": model, "seed": seed, "task": task, "metric": metric, "value": value}
            for model, value in values.items()
            for task, metric in COLUMNS.values()
        ]
        # Four families of eight queries. The error is that of the families; differences within a family do not count.
        noise = [(-1) ** (number // 8) * 0.01 + (-1) ** number * 0.1 for number in range(32)]
        ndcg = {
            model: {
                task: {f"q{number}": value + sign * GAINS[model] * error for number, error in enumerate(noise)}
                for task in ("twins_t2i", "twins_i2t")
            }
            for model, value in values.items()
        }
        compared += paired({model: {"ndcg": found} for model, found in ndcg.items()}, seed)
    seconds = {"mine": 2.0, "judge": 4.0, "v2": 20.0, "in_batch": 7.0}
    return DemoResults({"rows": rows, "paired": compared, "seconds": seconds, "distillation": []})


@pytest.mark.parametrize(("sign", "word"), [(1.0, "ahead of"), (-1.0, "behind"), (0.0, "not told apart from")])
def test_sentences_follow_the_sign(sign: float, word: str) -> None:
    oracle, method, limits = made_up(sign).sentences()
    assert f"(oracle) are {word} the equal-steps control" in oracle
    assert f"The judge's filter is {word} the control" in method and f"that filter is {word} no filter" in method
    opposite = {"ahead of": "behind", "behind": "ahead of"}.get(word, word)
    assert f"UniME-V2 is {opposite} the same negatives with hard labels" in method
    assert f"UniME-V2 is {opposite} in-batch training with equal compute" in method
    assert "one seed" in limits and "over families of queries" in limits
    assert limits.endswith("not how large a gain to expect.")


def test_errors_are_over_families_or_seeds() -> None:
    single, several = made_up().difference("truth"), made_up(seeds=3).difference("truth")
    assert single is not None and several is not None
    assert single.mean == pytest.approx(0.05)
    assert single.error == pytest.approx(statistics.stdev([0.0495, 0.0505] * 2) / 2)
    assert several.mean == pytest.approx(0.052)
    assert several.error == pytest.approx(0.002 / 3**0.5)
    assert "3 seeds" in made_up(seeds=3).sentences()[-1]
    assert made_up().difference("stage1") is None


def test_two_standard_errors_tell_apart() -> None:
    assert Difference(0.021, 0.01).verdict("it") == "ahead of it (+2.1 ± 1.0)"
    assert Difference(-0.019, 0.01).verdict("it") == "not told apart from it (−1.9 ± 1.0)"
    assert Difference(-0.03, None).verdict("it") == "not told apart from it (−3.0)"
    assert str(Difference(-0.0004, 0.004)) == "+0.0 ± 0.4"


def test_few_seeds_need_more_standard_errors() -> None:
    """Student's limit is 12.7 errors for two seeds and 2.8 for five."""
    assert Difference.of([0.01, 0.03]).verdict("it") == "not told apart from it (+2.0 ± 1.0)"
    assert Difference.of([0.019, 0.021]).verdict("it") == "ahead of it (+2.0 ± 0.1)"
    assert Difference.of([0.01, 0.01, 0.02, 0.03, 0.03]).limit == pytest.approx(2.776, abs=1e-3)


def test_seconds_are_means_over_seeds_that_may_have_had_other_models() -> None:
    assert mean_seconds({"0": {"warm": 2.0, "stage1": 1.0}, "1": {"warm": 4.0}}) == {"warm": 3.0}


def test_the_filter_in_the_report_is_the_one_of_the_rows() -> None:
    """A positive that is judged below the margin keeps the candidates that score lower still."""
    row = {"logits": [-8.0, -4.0], "positive_logit": -6.0}
    assert filtered(row, 0.01).tolist() == [False, True]
    assert filtered({**row, "positive_logit": -3.0}, 0.01).tolist() == [False, False]
    assert filtered({**row, "positive_logit": 0.0, "logits": [0.1, -1.0]}, 0.01).tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"seeds": 0}, "seeds: expected an integer of at least 1, found 0"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"eval_size": 4}, "eval_size: expected an integer of at least 8"),
        ({"arms": "most"}, "arms: expected one of main, all, found most"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=re.escape(expected)):
        DemoArguments(**options)


def test_table() -> None:
    head, rule, *body = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in render_table(table_rows(made_up())).splitlines()
    ]
    assert set("".join(rule)) == {":", "-"} and len(head) == len(rule)
    assert [row[0] for row in body] == [MODELS[model] for model in MODELS if model in MAIN]
    by_model = {row[0]: dict(zip(head, row)) for row in body}
    control, v2 = by_model[MODELS["in_batch"]], by_model[MODELS["v2"]]
    assert control["− control"] == "–" and control["mean"] == "50.0" and control["CPU s"] == "7"
    assert v2["− control"].startswith("+1.0 ± ") and v2["VQA"] == "51.0"
    assert v2["CPU s"] == "26"  # mining and judging are counted


def test_stage_1_is_shown_with_its_errors() -> None:
    """Errors of one seed are over captions, those of several over seeds."""
    rows = [
        {"seed": seed, "model": model, "metric": metric, "value": 0.5 + 0.1 * seed, "error": 0.01}
        for seed in range(2)
        for model in DISTILLED
        for metric in DISTILLED_METRICS
    ]
    values = [
        {"model": m, "seed": 0, "task": t, "metric": k, "value": 0.25} for m in DISTILLED for t, k in COLUMNS.values()
    ]
    one, two = (
        distillation_rows(DemoResults({"rows": values, "distillation": [row for row in rows if row["seed"] < seeds]}))
        for seeds in (1, 2)
    )
    assert one[1:] == [[MODELS[model], "50.0 ± 1.0", "50.0 ± 1.0", "25.0"] for model in DISTILLED]
    assert two[1][1:] == ["55.0 ± 5.0", "55.0 ± 5.0", "25.0"]


def test_rank_agreement_and_paraphrases() -> None:
    first, second = paraphrases(20, seed=0)
    assert len(set(first)) == 20 and all(one != other for one, other in zip(first, second))
    assert (first, second) == paraphrases(20, seed=0) != paraphrases(20, seed=1)
    theirs = np.random.default_rng(0).normal(size=(6, 6))
    assert rank_agreement(np.exp(theirs), theirs) == pytest.approx(np.ones(6))  # ranks alone count
    assert rank_agreement(-theirs, theirs) == pytest.approx(-np.ones(6))
    changed = theirs + 100 * np.eye(6)  # the similarity of a text to itself does not
    assert rank_agreement(changed, theirs) == pytest.approx(np.ones(6))


def test_best_rate_is_by_the_mean_over_seeds() -> None:
    found = {(1e-3, 0): 0.5, (1e-3, 1): 0.3, (2e-3, 0): 0.2, (2e-3, 1): 0.7}
    rows = [{"model": "v2", "rate": rate, "seed": seed, "ndcg_at_10": value} for (rate, seed), value in found.items()]
    assert best_rates(rows) == {"v2": 2e-3}


def test_learning_rates_are_those_of_their_record() -> None:
    record = read_json(RECORD.with_name("demo_rates.json"))
    assert record["best"] == best_rates(record["rows"]) == TUNED_RATES


def test_ndcg_counts_all_right_documents() -> None:
    scores = {f"d{number}": 1 - 0.01 * number for number in range(12)}
    relevant = {"two": ["d0", "d1"], "second": ["d1"], "one of three": ["d0", "d11", "missing"], "all": list(scores)}
    found = ndcg_at_10(
        dict.fromkeys(relevant, scores), {query: dict.fromkeys(ids, 1) for query, ids in relevant.items()}
    )
    assert found["two"] == 1.0
    assert found["second"] == pytest.approx(0.6309, abs=1e-4)
    assert found["one of three"] == pytest.approx(1 / 2.1309, abs=1e-4)
    assert found["all"] == 1.0  # only ten documents count


def test_equal_compute_counts_mining_and_judging() -> None:
    """24 items are trained with, 36 read, which are worth 12 more; an in-batch step trains with 4."""
    sizes = {"steps": 3, "batch_size": 2, "num_negatives": 2, "records": 6, "num_candidates": 3}
    assert DemoArguments(**sizes).equal_compute_steps == 9


def test_error_bars_are_where_the_numbers_are() -> None:
    page = Page(difference_chart([("behind", -2.0, 1.0), ("ahead", 4.0, 0.5)], x_label="points"))
    dots = [float(found["cx"] or 0) for tag, found in page.tags if tag == "circle"]
    bars = [found for tag, found in page.tags if tag == "line" and found.get("class") == "stroke"]
    zero = next(float(found["x1"] or 0) for tag, found in page.tags if tag == "line" and found.get("class") == "tick")
    assert dots[0] < zero < dots[1]
    assert (dots[1] - zero) / (zero - dots[0]) == pytest.approx(2.0, rel=0.01)
    widths = [float(bar["x2"] or 0) - float(bar["x1"] or 0) for bar in bars]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)


def test_figure_is_that_of_the_record() -> None:
    assert FIGURE.read_text(encoding="utf-8") == figure(DemoResults(read_json(RECORD)))
    dots = Page(FIGURE.read_text(encoding="utf-8"))
    assert len([tag for tag, _ in dots.tags if tag == "circle"]) == len(MODELS) - 3  # control and two far below


def test_every_difference_in_words_is_one_of_the_record() -> None:
    results = DemoResults(read_json(RECORD))
    pairs = [(model, CONTROL) for model in results.models] + list(OTHER_PAIRS)
    differences = [results.difference(model, other, task) for model, other in pairs for task in (*PAIR_ORDERS, MEAN)]
    known = {str(difference).strip("+−") for difference in differences}
    known |= {cell for row in distillation_rows(results) for cell in row}
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = page.split("## The demo")[1].split("## Near-twins: where")[0]
    earlier = shown.split("**It depends on the start.**")[1].split("\n\n")[0]  # of another record
    found = re.findall(
        r"\d+\.\d ± \d+\.\d", shown.replace(earlier, "") + readme.split("## Results")[1].split("## Speed")[0]
    )
    assert len(found) > 40 and set(found) <= known


def test_documentation_has_the_numbers_of_the_record() -> None:
    results = DemoResults(read_json(RECORD))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert render_table(table_rows(results)) in page
    assert render_table(distillation_rows(results)) in page
    for model, other in OTHER_PAIRS:
        assert str(results.difference(model, other)).strip("+−") in page
    for task in PAIR_ORDERS:
        rows = [row for row in results.content["judge"] if row["task"] == task]
        names = ("auc", "precision", "recall", "dropped", "false_negatives")
        values = [f"{statistics.fmean(row[name] for row in rows):.2f}" for name in names]
        assert " | ".join([task.replace("_", " "), *values]) in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for model in ("in_batch", "in_batch_compute", "mined", "v2", "reranked"):
        difference = results.difference(model)
        assert f" | {100 * results.value(model, 'mean'):.1f} | {difference or '–'} |" in readme


def test_emoji_tables_are_those_of_their_record() -> None:
    """The settings are those of the configuration that is shipped."""
    record = read_json(RECORD.with_name("own_data_emoji.json"))
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for rows in (own_table(record["results"]), judge_table(record["judge"])):
        assert render_table(rows) in page
    results = record["results"]
    pairs = [(model, CONTROL) for model in results] + [("reranked", "trusted")]
    differences = [
        Difference.of(
            [ours[column] - other[column] for ours, other in zip(results[model], results[than], strict=True)]
        )
        for model, than in pairs
        for column in results[model][0]
    ]
    shown = re.findall(r"[+−]\d+\.\d ± \d+\.\d", page.split("## Your own data: emoji")[1].split("\n## ")[0])
    assert len(shown) > 10 and set(shown) <= set(map(str, differences))
    file = ROOT / "train_scripts" / "demo" / "own_data.yaml"
    shipped = json.loads(json.dumps(yaml.safe_load(file.read_text(encoding="utf-8"))))  # as the record was written
    del shipped["output"]
    assert {name: record["settings"][name] for name in shipped} == shipped
