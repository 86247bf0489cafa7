"""What the arguments of the package's scripts have in common: checks that come before anything is loaded."""

from __future__ import annotations

import logging
from dataclasses import field
from pathlib import Path
from typing import Any

from .checkpoints import last_checkpoint, last_finished, problem_of
from .hub import check_hub
from .usage import UsageError

logger = logging.getLogger(__name__)


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments."""
    return field(default=default, metadata={"help": help})


def check_counts(arguments: Any) -> None:
    """Raise UsageError for a whole number below 1."""
    for name, value in vars(arguments).items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UsageError(name, f"got {value}, accepted: an integer, at least 1")


def check_file(name: str, path: str | None, endings: tuple[str, ...], kind: str) -> None:
    """Raise UsageError for a path that does not end in one of `endings`, or is no file of that `kind`."""
    if path is None:
        return
    if not path.endswith(endings):
        raise UsageError(name, f"got {path!r}, accepted: a file that ends in {', '.join(endings)}")
    if not Path(path).is_file():
        raise UsageError(name, f"got {path!r}, which is no file, accepted: a file of {kind}")


def check_model(model: Any) -> None:
    """Raise UsageError where neither a model nor a configuration is given."""
    if not model.model_name_or_path and not model.config_name:
        raise UsageError("model_name_or_path", "got none, accepted: a model, or --config_name to begin from nothing")


def check_training(training: Any) -> None:
    """What transformers finds out only in the middle of a run, and the checkpoint, which becomes a folder.

    Raises:
        UsageError: names the argument.
    """
    if not (training.do_train or training.do_eval or training.do_predict):
        raise UsageError("do_train", "got none of --do_train, --do_eval, --do_predict, accepted: at least one")
    least = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
    least |= {"generation_num_beams": 1, "generation_max_length": 1, "learning_rate": 0, "weight_decay": 0}
    least |= {"label_smoothing_factor": 0, "num_train_epochs": 0}
    for name, bound in least.items():
        value = getattr(training, name, None)
        if value is not None and not value >= bound:
            raise UsageError(name, f"got {value}, accepted: a number, at least {bound}")
    if training.label_smoothing_factor >= 1:
        raise UsageError("label_smoothing_factor", f"got {training.label_smoothing_factor}, accepted: in [0, 1)")
    if training.do_train and training.max_steps <= 0 and not training.num_train_epochs:
        raise UsageError("num_train_epochs", "got 0, accepted: above 0, or --max_steps")
    check_hub(training)


def find_checkpoint(training: Any) -> str | None:
    """The folder to resume from; ``true`` and ``last``: the last one in `output_dir`.

    ``last`` is for a command that is run again until it is through: where no checkpoint was ever written to its end, it
    starts anew, with a warning.

    Raises:
        UsageError: no checkpoint there (``true``), or damaged ones.
    """
    if not training.resume_from_checkpoint:
        return None
    given = str(training.resume_from_checkpoint)
    if given.lower() in ("true", "last"):
        return _find_last(given, training.output_dir)
    problem = problem_of(given)
    if problem is not None:
        what = f"got {given!r}, which {problem}, accepted: a folder checkpoint-N, or last"
        raise UsageError("resume_from_checkpoint", what)
    return given


def _find_last(given: str, output_dir: str) -> str | None:
    last, finished = last_checkpoint(output_dir), last_finished(output_dir)
    if last is not None:
        return last
    if finished is not None:  # to start anew would be to lose what it held
        what = f"got {given!r}, but {finished} {problem_of(finished)}, accepted: a whole checkpoint (or none at all)"
        raise UsageError("resume_from_checkpoint", what)
    if given.lower() == "true":
        raise UsageError("resume_from_checkpoint", f"got {given!r}, but {output_dir} has no checkpoint")
    logger.warning("%s has no checkpoint yet: training starts at the beginning (resume_from_checkpoint)", output_dir)
    return None
