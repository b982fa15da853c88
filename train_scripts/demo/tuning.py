"""Learning rates of the demo's models: each is trained at several, and measured on scenes that no demo is measured on.

python -m train_scripts.demo.tuning [--record benchmarks/results/demo_rates.json ...]
python -m train_scripts.demo.tuning --models judged truth --seeds 2     # a further seed, where the first does not decide
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from train_scripts.demo.jobs import alone
from train_scripts.demo.results import MEAN, DemoResults
from train_scripts.demo.run_demo import keep_settings, prepare, run_seed
from train_scripts.demo.seed import Seed
from train_scripts.demo.settings import TUNED_RATES, DemoArguments
from unime_st.files import read_json, write_json
from unime_st.options import check_options, option
from unime_st.stages.command import run_script

logger = logging.getLogger(__name__)
_FIRST_SEED = 100  # the demo's seeds are below
_NDCG = "ndcg_at_10"
_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)


@dataclass
class TuningArguments:
    """Options of the tuning of the demo's learning rates."""

    output: str = option("runs/tuning", "Output folder; a killed run resumes from it.")
    seeds: int = option(1, "Seeds of training, none of them the demo's.", at_least=1)
    rates: list[float] | None = option(
        None, f"Peak learning rates to try (AdamW); none: {', '.join(map(str, _RATES))}.", above=0
    )
    models: list[str] | None = option(None, f"Models to tune; none: all, {', '.join(TUNED_RATES)}.")
    record: str = option("", "File to write the results to, too.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        if unknown := set(self.models or ()) - TUNED_RATES.keys():
            raise ValueError(f"models: no {', '.join(sorted(unknown))}; there are {', '.join(TUNED_RATES)}.")


def tune(arguments: TuningArguments, demo: DemoArguments | None = None) -> Path:
    """Train and measure compared models at every rate; what an earlier call measured stays.

    Args:
        arguments: Options.
        demo: Settings of the demo that is tuned. Defaults to its own.

    Returns:
        ``rates.json``: nDCG@10, mean of both directions, by model, rate and seed, and the best rate of each model.
    """
    shared = replace(demo or DemoArguments(), output=f"{arguments.output}/shared", eval_seed=1)
    keep_settings(shared)
    output, models = Path(arguments.output) / "rates.json", tuple(arguments.models or TUNED_RATES)
    known = read_json(output)["rows"] if output.is_file() else []
    measured = {(row["model"], row["rate"], row["seed"]): row for row in known}
    for seed in range(_FIRST_SEED, _FIRST_SEED + arguments.seeds):
        alone(partial(prepare, shared, seed))
        for rate in arguments.rates or _RATES:
            if all((name, rate, seed) in measured for name in models):
                continue
            logger.info("[seed %d] learning rate %g", seed, rate)
            tried = replace(shared, output=f"{arguments.output}/rate-{rate:g}", further_learning_rate=rate)
            _share(Seed(shared, seed), Seed(tried, seed))
            found, _ = run_seed(tried, seed, models)
            for name in models:
                ndcg = DemoResults({"rows": found[name]["rows"]}).value(name, MEAN)
                measured[name, rate, seed] = {"model": name, "rate": rate, "seed": seed, _NDCG: ndcg}
    rows = list(measured.values())
    results = {"rows": rows, "best": best_rates(rows)}
    for file in (output, *([Path(arguments.record)] if arguments.record else ())):
        write_json(file, results)
    logger.info("Best rates: %s\n\nResults: %s", results["best"], output)
    return output


def _share(source: Seed, target: Seed) -> None:
    """Let one seed's folder stand on what another one prepared."""
    for entry in source.folder.iterdir():
        link = target.folder / entry.name
        if entry.is_dir() and not link.exists():
            link.symlink_to(entry.resolve())
    for name, seconds in source.seconds.items():
        target.keep(name, seconds)


def best_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each model whose mean over seeds is the highest."""
    best = pd.DataFrame(rows).pivot_table(_NDCG, "model", "rate").idxmax(axis=1)
    return {str(model): float(rate) for model, rate in best.items()}


if __name__ == "__main__":
    raise SystemExit(run_script(tune, TuningArguments, __doc__))
