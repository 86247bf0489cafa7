"""The Hub's part of a script: what the Trainer, which does the pushing, would find out to be wrong only after training
(no token, one that may not write, a branch that is not there), and the push at the end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.utils import validate_repo_id

from hf_lngd.integrations.hub import HTTP_ERROR, reason_of
from hf_lngd.integrations.usage import RunError, UsageError, blame, one_line, refuse_if

HUB_ERRORS: tuple[type[Exception], ...] = (HTTP_ERROR, errors.OfflineModeIsEnabled)

_TOKEN = "a token with write access: hf auth login, HF_TOKEN or --hub_token"


def check_hub(args: Any) -> None:
    """Raise UsageError for a push that can be told to fail without asking the Hub; nothing without `push_to_hub`."""
    if not args.push_to_hub:
        return
    name = repository_of(args)
    given = f"got {name!r}" if args.hub_model_id else f"got none, and the folder's name {name!r} is no repository's"
    with blame("hub_model_id", f"{given}, accepted: user/name"):
        validate_repo_id(name)
    offline = "got true while HF_HUB_OFFLINE is set, accepted: one of the two"
    refuse_if(constants.is_offline_mode(), "push_to_hub", offline)
    refuse_if(not (args.hub_token or get_token()), "hub_token", f"got none, accepted: {_TOKEN}")


def repository_of(args: Any) -> str:
    """The name that the Trainer makes the repository by."""
    return str(args.hub_model_id or Path(args.output_dir).absolute().name)


def check_repository(trainer: Any) -> None:
    """Raise UsageError where the Trainer's repository, there by now, may not be written or has not the branch."""
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    api = HfApi(token=args.hub_token)
    try:
        api.auth_check(trainer.hub_model_id, write=True)
        if args.hub_revision is not None:
            api.repo_info(trainer.hub_model_id, revision=args.hub_revision)
    except HUB_ERRORS as error:
        raise refusal(error, args, trainer.hub_model_id) from error


def refusal(error: Exception, args: Any, repository: str | None = None) -> UsageError:
    """What the Hub said, as an error of the argument behind it."""
    repository = repository or repository_of(args)
    status, reason = getattr(getattr(error, "response", None), "status_code", None), reason_of(error)
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError("hub_revision", f"got {args.hub_revision!r}, accepted: a branch that {repository} has")
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return UsageError("hub_token", f"{constants.ENDPOINT} refuses it ({reason}), accepted: {_TOKEN}")
    if status in (401, 403, 404):
        what = f"got {repository!r}, which this token may not write ({reason}), accepted: a repository of yours, and "
        return UsageError("hub_model_id", what + _TOKEN)
    return UsageError("push_to_hub", f"got true, but {constants.ENDPOINT} does not answer as it should: {reason}")


def push(trainer: Any) -> None:
    """The Trainer's own push of the output folder, which is whole by now; raises RunError where the Hub does not take
    it, which says where everything lies, and how to push it without training again."""
    try:
        trainer.push_to_hub()
    except Exception as error:  # whatever it is, nothing is lost, and that has to be said
        folder, repository = trainer.args.output_dir, trainer.hub_model_id
        command = ["hf", "upload", repository, folder, ".", "--exclude", "_*", "--exclude", "checkpoint-*"]
        if trainer.args.hub_revision:
            command += ["--revision", trainer.args.hub_revision]
        what = (
            f"{repository} was not pushed ({one_line(reason_of(error), 300)}). All is in {folder}; to push it without "
        )
        raise RunError("push_to_hub", f"{what}training again: {shlex.join(command)}") from error
