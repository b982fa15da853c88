"""Upload of a finished model to the hub (``push_to_hub``): one repository, made before any work."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from unime_st.data.manifest import is_complete
from unime_st.options import OptionError
from unime_st.training.arguments import StageArguments
from unime_st.training.processes import partial_state

_LEFT_HERE = ["checkpoints/*", "*.npy", "token_budget.json", "*.lock", "*.tmp"]


def check_hub(args: StageArguments) -> None:
    """Make the repository of ``push_to_hub``, so that a run that cannot upload fails before it trains.

    Args:
        args: Options of the stage.

    Raises:
        OptionError: If there is no token, no connection or no permission.
    """
    done = is_complete(args.output) and not args.overwrite
    if done or not args.push_to_hub or not partial_state().is_main_process:
        return
    try:
        HfApi(token=args.hub_token).create_repo(_repository(args), private=args.hub_private_repo, exist_ok=True)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            f"push_to_hub: the repository {_repository(args)} cannot be made ({reason}). Log in with `hf auth login`, "
            "or leave out push_to_hub."
        ) from error


def upload(args: StageArguments, folder: Path) -> None:
    """Upload a finished model where ``push_to_hub`` is set.

    Args:
        args: Options of the stage.
        folder: The model.
    """
    if args.push_to_hub:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=_repository(args),
            folder_path=folder,
            revision=args.hub_revision,
            commit_message=f"UniME: trained from {args.model}",
            ignore_patterns=_LEFT_HERE,
        )


def _repository(args: StageArguments) -> str:
    return args.hub_model_id or Path(args.output).resolve().name
