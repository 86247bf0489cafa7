"""What the package's scripts do alike once model and data are there: make the trainer, train, save, write the card."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .card_command import command_of
from .diagnostics import lngd_of
from .hub import HUB_ERRORS, check_repository, refusal, repository_of
from .model_card import CardFacts, Score, write_model_card
from .usage import UsageError

ROUTING = "routing.json"


def make_trainer(factory: Callable[..., Any], args: Any, **parts: Any) -> Any:
    """The trainer; what it refuses is the user's to change.

    Args:
        factory: a trainer class.
        args: training arguments.
        **parts: the factory's other arguments.

    Raises:
        UsageError: the output folder cannot be written, the Hub refuses the repository, LNGD cannot run this way.
    """
    try:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError("output_dir", f"got {args.output_dir!r}, which cannot be made: {error.strerror}") from error
    if not os.access(args.output_dir, os.W_OK):
        raise UsageError("output_dir", f"got {args.output_dir!r}, accepted: a folder that can be written")
    try:
        trainer = factory(args=args, **parts)
    except HUB_ERRORS as error:
        raise refusal(error, args) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UsageError(blame(error, args), error) from error
    check_repository(trainer)
    return trainer


def blame(error: Exception, args: Any) -> str:
    """The argument behind an error of the Trainer's construction."""
    if str(error).startswith("LNGD"):
        return "optim"
    if any(name in str(error) for name in args.report_to):
        return "report_to"
    return "arguments"


def train(trainer: Any, checkpoint: str | None) -> None:
    """Train, save the model, its tokenizer or image processor, the metrics, the routing."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(_internal_call=True)  # else it is pushed now, and a Hub that is down costs the evaluation
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_routing(trainer.args.output_dir, trainer.optimizer)


def write_routing(folder: str | Path, optimizer: Any) -> None:
    """``routing.json``: LNGD's config and each parameter's owner and reason; removed where another optimizer ran."""
    path, lngd = Path(folder) / ROUTING, lngd_of(optimizer)
    if lngd is None:
        path.unlink(missing_ok=True)
        return
    routing = {
        "optimizer": "lngd",
        "config": lngd.config.to_dict(),
        "groups": [{"name": group["name"], "tensors": len(group["params"])} for group in lngd.param_groups],
        "memory": lngd.memory_usage(),
        "parameters": [dataclasses.asdict(route) for route in lngd.routing()],
    }
    path.write_text(json.dumps(routing, indent=2) + "\n", encoding="utf-8")


class CardWriter:
    """Writes the card of a model; called again by the Trainer before it pushes. A subclass tells of its task.

    Args:
        trainer: after training or evaluation.
        model: arguments of the run.
        data: arguments of the run.
        command: the script and its arguments, in parts.
    """

    # (the Hub's metric, the name as it is shown) by the key in the Trainer's metrics.
    metrics: dict[str, tuple[str, str]] = {}

    def __init__(self, trainer: Any, model: Any, data: Any, command: Sequence[str]) -> None:
        self.trainer, self.model, self.data = trainer, model, data
        processes = max(1, trainer.args.world_size)
        self.command = command_of(command, processes, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
        self.scores: list[Score] = []
        self._written = False

    def add(self, split: str, metrics: dict[str, Any], prefix: str, signatures: dict[str, str] | None = None) -> None:
        """Take the scores out of the Trainer's metrics."""
        for key, (metric, name) in self.metrics.items():
            value = metrics.get(f"{prefix}_{key}")
            if value is not None:
                signature = (signatures or {}).get(key)
                self.scores.append(Score(metric=metric, name=name, value=value, split=split, signature=signature))

    def __call__(self) -> Path:
        """Write README.md into the output folder; an evaluation alone leaves one that is there as it is."""
        args, net = self.trainer.args, self.trainer.model
        path = Path(args.output_dir) / "README.md"
        if path.is_file() and not args.do_train and not self._written:
            return path
        self._written = True
        lngd = lngd_of(self.trainer.optimizer)
        facts: dict[str, Any] = {
            "name": repository_of(args).split("/")[-1],
            "dataset_config": self.data.dataset_config_name,
            "examples": len(self.trainer.train_dataset or ()),
            "scores": self.scores,
            "command": self.command,
            "base_model": self.model.model_name_or_path,
            "license": self.data.data_license,
            "architecture": type(net).__name__,
            "parameters": sum(p.numel() for p in net.parameters()),
            "routing": None if lngd is None else lngd.routing_table(),
            "log_history": self.trainer.state.log_history,
            "trained": args.do_train,
            "dataset_on_hub": bool(self.data.dataset_name) and not Path(self.data.dataset_name).exists(),
        }
        own = self.own_facts(self.trainer.hub_model_id or args.hub_model_id or args.output_dir)
        return write_model_card(args.output_dir, CardFacts(**{**facts, **own}), args)

    def own_facts(self, name: str) -> dict[str, Any]:
        """Fields of CardFacts that the task knows: `task`, `dataset_name`, `dataset_type` at least.

        Args:
            name: what the model is loaded by.
        """
        raise NotImplementedError


def read_attribution(given: str | None, beside: str | Path | None) -> str | None:
    """The text that was given, or the file ATTRIBUTION.md beside the training data, its headings one level down."""
    if given:
        return given
    path = Path(beside).parent / "ATTRIBUTION.md" if beside else None
    if path is None or not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(f"##{line}" if line.startswith("#") else line for line in lines)
