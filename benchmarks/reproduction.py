"""Reproduction matrix: the page docs/reproduce.md, generated from published.json.

python -m benchmarks.reproduction > docs/reproduce.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mteb_tasks.mmeb.subsets import SUBSETS
from mteb_tasks.published import PUBLISHED

_FLOPS_PER_HOUR = 0.4 * 312e12 * 3600
"""Of an A100 at 40 % of its peak in bfloat16."""

_MEANS = ("classification", "vqa", "retrieval", "grounding", "ind", "ood")
_CAPTIONS = {"Flickr30k": "Flickr30k1k", "COCO": "COCO5k", "ShareGPT4V": "ShareGPT4V", "Urban1K": "Urban1K"}
_IMAGES = {"MMEB": 0, "Flickr30k": 1000, "COCO": 5000, "ShareGPT4V": 1000, "Urban1K": 1000, "SugarCrepe": 7511}
"""Images of each benchmark at most; those of MMEB are counted from its subsets."""

_HEAD = """# Reproduce the papers

Every row of the tables of [UniME](https://arxiv.org/abs/2504.17432) and [UniME-V2](https://arxiv.org/abs/2510.13515): the
published value, the command, and the value measured with this package (or by somebody who is named). **An empty cell was
not measured.** No released weights and no GPU were at hand.

This page is generated from `mteb_tasks/published.json`, which also feeds `unime report`:
`python -m benchmarks.reproduction > docs/reproduce.md`. Found a number? Please send it with the
[issue form](https://github.com/unime-st/unime-st/issues/new/choose).
"""

_ESTIMATE = """**GPU hours are estimates** for one A100: visual tokens x 2 x parameters of the language model at 40 % of 312 TFLOPS.
Texts and the vision tower are left out; embeddings are kept, so tasks that share images cost less. `mteb run` logs an
estimate for your device before each task, and every training stage one with `--dry_run`.
"""


def page() -> Iterator[str]:
    """Lines of the page."""
    yield from _HEAD.splitlines()
    yield from ["", "## Data", "", "Look at the size before you download: the hub's client prints it.", ""]
    yield from _commands(
        f"hf download --repo-type dataset {PUBLISHED['data'][key]['hub']} "
        f"--revision {PUBLISHED['data'][key]['revision']} --dry-run"
        for key in ("mmeb_eval", "mmeb_train")
    )
    yield ""
    yield from _table(("data", "GB", "variable", "hub", "revision"), map(_data_row, PUBLISHED["data"].values()))
    yield from ["", *_ESTIMATE.splitlines(), "", "## MMEB", ""]
    yield "hit@1 in percent: classification, VQA, retrieval, grounding, in domain, out of domain, **overall**."
    yield "Overall is the mean of the 36 subsets. † marks rows whose published value is the mean of the four meta-tasks (the"
    yield "table of UniME). The mean of 36, which this package computes, differs by 1 to 4 points there."
    yield ""
    yield from _table(
        (
            "model",
            "class.",
            "VQA",
            "retrieval",
            "grounding",
            "in domain",
            "out of domain",
            "overall",
            "measured",
            "command",
            "GPU h",
        ),
        map(_mmeb_row, _with("mmeb")),
    )
    for name, task in _CAPTIONS.items():
        yield from ["", f"## {name}", "", "Share of queries with a right answer at rank 1, in percent.", ""]
        rows = (_caption_row(alias, name, task) for alias in _with("captions"))
        yield from _table(("model", "t2i", "i2t", "measured t2i, i2t", "command", "GPU h"), rows)
    yield from ["", "## SugarCrepe", "", "Accuracy of a caption against a foil, in percent.", ""]
    rows = (_composition_row(alias) for alias in _with("composition"))
    yield from _table(("model", "replace", "swap", "add", "measured", "command", "GPU h"), rows)
    yield from ["", "## Reranking", "", "Top 10 of the embedder, reordered. Means over the tasks of a column.", ""]
    yield from _table(("embedder", "reranker", *_GROUPS.values(), "measured", "command"), _reranking_rows())
    yield from [
        "",
        "## Single subsets of MMEB",
        "",
        "hit@1 in percent, where a table of the papers could be verified.",
        "",
    ]
    aliases = list(PUBLISHED["mmeb_tasks"])
    head = ("subset", *(_title(alias) for alias in aliases), "measured", "command")
    yield from _table(head, (_subset_row(subset.name, aliases) for subset in SUBSETS))
    yield from ["", "## Ablations", "", "Means as above; train with the command, then evaluate as `unime-local`.", ""]
    for table in PUBLISHED["ablations"]:
        columns = [key for key in _GROUPS if any(key in row for row in table["rows"])]
        yield from [f"### {table['title']} ({_PAPERS[table['paper']]})", ""]
        head = ("setting", *(_GROUPS[key] for key in columns), "measured", "command")
        yield from _table(head, (_ablation_row(row, columns) for row in table["rows"]))
        yield ""
    yield from ["## Train", "", "What a model of the tables is trained with. See [Fine-tune](training.md).", ""]
    for model in PUBLISHED["models"].values():
        if model.get("train"):
            hours = (
                f"{model['train_gpu_hours']} ({model['train_hours_source']})"
                if "train_gpu_hours" in model
                else "not known"
            )
            yield from [f"### {model['title']}", "", f"GPU hours: {hours}.", ""]
            yield from [model["note"][:1].upper() + model["note"][1:] + ".", ""] if "note" in model else []
            yield from [*_commands(model["train"]), ""]
    yield "Training hours of UniME are published (8 A100). Those of UniME-V2 are estimates: 2,000 steps of 1,024 queries with"
    yield "nine candidates, modalities as in the released sample, 6 x parameters x tokens. Released rows need no mining."


_GROUPS = {"mmeb": "MMEB", "short": "short captions", "long": "long captions", "composition": "SugarCrepe"}
_PAPERS = {"v1": "UniME", "v2": "UniME-V2"}


def _with(key: str) -> list[str]:
    """Aliases of the models that have scores of a kind, in the order of the papers."""
    return [alias for alias in PUBLISHED["models"] if alias in PUBLISHED[key]]


def _title(alias: str) -> str:
    return str(PUBLISHED["models"][alias]["title"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _commands(commands: Iterable[str]) -> list[str]:
    return ["<!-- needs: data, weights -->", "```bash", *commands, "```"]


def _data_row(data: dict[str, Any]) -> list[str]:
    size = data["gigabytes"]
    known = f"{size}" if size is not None else "not known"
    if "at_least_gigabytes" in data:
        known = f"more than {data['at_least_gigabytes']}"
    note = f" ({data['note']})" if "note" in data else ""
    revision = data["revision"]
    return [
        data["title"],
        known + note,
        f"`{data['variable']}`" if "variable" in data else "",
        f"`{data['hub']}`" if data["hub"] else "",
        f"`{revision}`" if revision else "not known",
    ]


def _run(alias: str, task: str) -> str:
    name = PUBLISHED["models"][alias].get("mteb")
    return f"`mteb run -m {name} -t {task}`" if name else ""


def _hours(alias: str, images: int) -> str:
    model = PUBLISHED["models"][alias]
    if "parameters" not in model:
        return ""
    hours = images * model["image_tokens"] * 2 * model["parameters"] * 1e9 / _FLOPS_PER_HOUR
    return f"{hours:.1f}" if hours >= 0.1 else "< 0.1"


def _measured(alias: str, *tasks: str) -> str:
    found = PUBLISHED["measured"].get(alias, {})
    return ", ".join(f"{found[task]['value']} ({found[task]['by']})" for task in tasks if task in found)


def _mmeb_row(alias: str) -> list[str]:
    """Image queries and, of subsets whose targets are images, 1,000 candidates."""
    images = 1000 * sum(subset.has_image("query") + subset.has_image("target") for subset in SUBSETS)
    published = PUBLISHED["mmeb"][alias]
    scores = [f"{published[key]:.1f}" for key in _MEANS]
    scores.append(
        f"**{published['mean']:.1f}**" if "mean" in published else f"**{published['mean_of_meta_tasks']:.1f}** †"
    )
    note = PUBLISHED["models"][alias].get("note", "") if "train" not in PUBLISHED["models"][alias] else ""
    title = _title(alias) + (f" ({note})" if note else "")
    return [title, *scores, _measured(alias, "mean"), _run(alias, "MMEB"), _hours(alias, images)]


def _caption_row(alias: str, name: str, task: str) -> list[str]:
    tasks = [f"{task}T2IRetrieval", f"{task}I2TRetrieval"]
    scores = [f"{PUBLISHED['captions'][alias][key]:.1f}" for key in tasks]
    run = _run(alias, " ".join(tasks))
    return [_title(alias), *scores, _measured(alias, *tasks), run, _hours(alias, _IMAGES[name])]


def _composition_row(alias: str) -> list[str]:
    scores = [f"{PUBLISHED['composition'][alias][key]:.1f}" for key in ("replace", "swap", "add")]
    run = _run(alias, "SugarCrepeByCategory")
    hours = _hours(alias, _IMAGES["SugarCrepe"])
    return [_title(alias), *scores, _measured(alias, "SugarCrepeByCategory"), run, hours]


def _reranking_rows() -> Iterator[list[str]]:
    for alias, by_reranker in PUBLISHED["reranking"].items():
        for reranker, scores in by_reranker.items():
            run = f"`mteb run -m {alias}+reranker -t MMEB`" if reranker == "unime-v2-reranker" else ""
            if reranker == "none":
                run = _run(alias, "MMEB")
            yield [_title(alias), reranker, *(f"{scores[key]:.1f}" for key in _GROUPS), "", run]


def _subset_row(name: str, aliases: Sequence[str]) -> list[str]:
    scores = [f"{PUBLISHED['mmeb_tasks'][alias][name]:.1f}" for alias in aliases]
    return [name, *scores, _measured(aliases[0], name), _run(aliases[0], f"MMEB-{name}")]


def _ablation_row(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    command = f"`{row['command']}`" if row["command"] else ""
    return [row["setting"], *(f"{row[key]:.1f}" for key in columns), "", command]


if __name__ == "__main__":
    sys.stdout.write("\n".join(page()).rstrip() + "\n")
