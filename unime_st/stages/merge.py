"""Merging of models: weighted average of the weights of fine-tuned models or adapters, also chosen greedily."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unime_st.options import OptionError, check_options, check_weights, option, require_options
from unime_st.stages.command import print_usage


@dataclass
class MergeArguments:
    """Options of :func:`run_merge`."""

    models: list[str] | None = option(
        None,
        "Models or adapters to merge, two or more: aliases or folders; may stand first.",
        required=True,
        repeats=True,
    )
    output: str = option("", "Folder for the merged model.", required=True)
    weights: list[float] | None = option(None, "Weight of each model, sum 1; default: equal.", repeats=True)
    greedy: bool = option(False, "Merge only models that do not lower the average's MRR@10 on --eval_data.")
    eval_data: str = option(
        "",
        "Folder of held-out records, for --greedy.",
        path="stage",
        made_by="unime import --source FILE --output FOLDER",
    )
    overwrite: bool = option(False, "Overwrite the output folder.")

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self)
        if self.greedy != bool(self.eval_data):
            raise OptionError(
                "--greedy and --eval-data RECORDS go together: the records decide which models are merged"
            )
        if self.weights:
            check_weights(self.weights)
        if self.greedy and self.weights:
            raise OptionError("--weights do not apply to --greedy, which gives equal weights: leave out one")


def run_merge(args: MergeArguments) -> Path:
    """Average the weights of models, see :mod:`unime_st.training.model_merge`.

    Args:
        args: Options.

    Returns:
        Folder of the merged model.
    """
    require_options(args)
    from unime_st.training.model_merge import greedy_soup, merge_models

    models = args.models or []
    if args.greedy:
        folder = greedy_soup(models, args.output, args.eval_data, overwrite=args.overwrite)
    else:
        folder = merge_models(models, args.output, weights=args.weights, overwrite=args.overwrite)
    print_usage(folder, str(folder))
    return folder
