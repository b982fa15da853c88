"""Upload of a finished model to the hub (``push_to_hub``), to a repository that is made before any work."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from unime_st.options import OptionError
from unime_st.training.arguments import StageArguments

_LEFT_HERE = ["checkpoints/*", "*.npy", "token_budget.json", "*.tmp"]


def make_repository(args: StageArguments) -> str:
    """Make the repository of ``push_to_hub`` and return its name: a run that cannot upload fails before it trains.

    Raises:
        OptionError: If there is no token, no connection or no permission.
    """
    name = args.hub_model_id or Path(args.output).resolve().name
    try:
        return HfApi(token=args.hub_token).create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    except Exception as error:  # of the hub's client, and of the HTTP library below it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"push_to_hub: the repository {name} cannot be made ({reason}). Log in with `hf auth login`, or leave out "
            "push_to_hub."
        ) from error


def upload(args: StageArguments, repository: str) -> None:
    """Upload a finished model to the repository of :func:`make_repository`."""
    HfApi(token=args.hub_token).upload_folder(
        repo_id=repository,
        folder_path=args.output,
        revision=args.hub_revision,
        commit_message=f"UniME: trained from {Path(args.model).name}",
        ignore_patterns=_LEFT_HERE,
    )
