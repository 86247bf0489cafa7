"""The table of faults: rows come from the modules `fault_*`, each one a test of `test_faults`.

``python -m tests.contract.fault_table`` prints it, ``--write`` keeps it as docs/faults.md.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lngd import LNGD
from tests.helpers import Words, equal, hooks_of, seeded, through_a_file

FILE = Path(__file__).parents[2] / "docs" / "faults.md"
MODULES = ("fault_numbers", "fault_calls", "fault_models", "fault_states", "fault_files")
# Settings under which a row runs, one test each.
FAST = ({},)
DIRECTIONS = ({}, {"direction": "natural"})
FAMILIES = tuple({"family": family} for family in ("kfac", "ekfac", "tkfac", "ng+"))
ALL = (*DIRECTIONS, {"preset": "paper"}, *(fields for fields in FAMILIES if fields["family"] != "tkfac"))


def net() -> Any:
    """The model that the faults happen to."""
    return seeded(Words)


@dataclass
class Scene:
    """One run of a row: the model and optimizer that the fault happens to, and what was said."""

    fields: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    optimizer: Any = None
    error: str = ""
    messages: list[str] = field(default_factory=list)
    folder: Path = Path()
    patch: Any = None
    seed: int = 0

    def make(self, model: nn.Module | None = None, steps: int = 2, **fields: Any) -> tuple[Any, Any]:
        """Model and optimizer, every step a factor step, some steps trained."""
        self.fields = {"factor_interval": 1, "inverse_interval": 1, **self.fields, **fields}
        self.model = net() if model is None else model
        self.start_flags = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.optimizer = LNGD(self.model, lr=1e-2, update_interval=1, **self.fields)
        for _ in range(steps):
            self.step()
        return self.model, self.optimizer

    def batch(self, rows: int = 4, length: int = 5) -> dict[str, Tensor]:
        """A new batch."""
        self.seed += 1
        draw = torch.Generator().manual_seed(self.seed)
        return {"ids": torch.randint(0, 12, (rows, length), generator=draw)}

    def backward(self, batch: dict[str, Tensor] | None = None, scale: float = 1.0) -> Tensor:
        """Forward and backward pass; the loss."""
        batch = self.batch() if batch is None else batch
        logits = self.model(**batch)
        if self.optimizer.needs_fisher_pass:
            self.optimizer.fisher_backward(logits)
        loss = logits.square().mean() * scale
        loss.backward()
        return loss.detach()

    def finish(self) -> None:
        """The step, and no gradients after it."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, batch: dict[str, Tensor] | None = None, scale: float = 1.0) -> Tensor:
        """One whole step; the loss."""
        loss = self.backward(batch, scale)
        self.finish()
        return loss

    def weights(self) -> dict[str, Tensor]:
        """A copy of all parameters."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def phi(self, name: str) -> Tensor:
        """A layer's (first) factor."""
        return next(iter(self.optimizer.factors(name).values())).clone()

    @contextmanager
    def refused(self, kind: type[BaseException] = ValueError) -> Iterator[None]:
        """What is done here raises; the row's text is in it."""
        with pytest.raises(kind) as caught:
            yield
        self.error = str(caught.value)

    def refused_step(self, kind: type[BaseException], *arguments: Any) -> None:
        """A step that raises, and changes no weight."""
        before = self.weights()
        with self.refused(kind):
            self.optimizer.step(*arguments)
        assert equal(before, self.weights())


@dataclass(frozen=True)
class Fault:
    """A row: what is injected, what happens, what is said (…: anything), which number of the log counts it."""

    kind: str
    name: str
    outcome: str
    run: Callable[[Scene], None]
    error: str = ""
    log: str = ""
    counts: tuple[str, ...] = ()
    variants: tuple[dict[str, Any], ...] = FAST


ROWS: list[Fault] = []


def fault(kind: str, name: str, outcome: str, **rest: Any) -> Callable[[Callable[[Scene], None]], Any]:
    """Register a row."""

    def add(run: Callable[[Scene], None]) -> Callable[[Scene], None]:
        ROWS.append(Fault(kind, name, outcome, run, **rest))
        return run

    return add


def load_rows() -> list[Fault]:
    """All rows, in the order of the modules, whichever was imported first."""
    for module in MODULES:
        import_module(f"tests.contract.{module}")
    return sorted(ROWS, key=lambda row: MODULES.index(row.run.__module__.rpartition(".")[2]))


def said(text: str, message: str) -> bool:
    """Whether a message holds a row's text."""
    return re.search(".*".join(re.escape(part) for part in text.split("…")), message, re.DOTALL) is not None


def happen(row: Fault, fields: dict[str, Any], folder: Path, patch: Any) -> None:
    """Let a fault happen, compare with what its row promises, then make sure that nothing was lost."""
    scene = Scene(dict(fields), folder=folder, patch=patch)
    logger, handler = logging.getLogger("hf_lngd"), logging.Handler()
    handler.emit = lambda record: scene.messages.append(record.getMessage())  # type: ignore[method-assign]
    # tiny batches make steps dear, which is no fault
    handler.addFilter(lambda record: not record.name.endswith(".startup"))
    logger.addHandler(handler)
    try:
        row.run(scene)
    finally:
        logger.removeHandler(handler)
    patch.undo()
    assert said(row.error, scene.error) and bool(row.error) == bool(scene.error), scene.error
    assert len(scene.messages) == len(set(scene.messages)), "said twice"
    assert any(said(row.log, m) for m in scene.messages) if row.log else not scene.messages, scene.messages
    if scene.optimizer is None:  # nothing was made
        return
    numbers = scene.optimizer.diagnostics()
    counters = ("failed_inverses", "skipped_factors", "skipped_gradients")
    assert {name for name in counters if numbers.get(name)} == set(row.counts), numbers
    nothing_is_lost(scene)


def nothing_is_lost(scene: Scene) -> None:
    """Three more steps are fine, and a saved state goes on as this one does, to the bit."""
    model, optimizer = scene.model, scene.optimizer
    optimizer.zero_grad()
    for _ in range(3):
        assert scene.step().isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    state = through_a_file(optimizer.state_dict())
    twin, flags = copy.deepcopy(model), {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in twin.named_parameters():
        p.requires_grad_(scene.start_flags.get(name, True))
    other = LNGD(twin, lr=0.3, update_interval=1, **scene.fields)
    twins = dict(twin.named_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        if group.get("name", "added") == "added":
            other.add_param_group({"params": [twins[names[id(p)]] for p in group["params"]]})
    other.load_state_dict(state)
    for name, p in twin.named_parameters():
        p.requires_grad_(flags[name])
    batch = scene.batch()
    scene.step(batch)
    Scene(model=twin, optimizer=other).step(batch)
    assert equal(model, twin)
    optimizer.close()
    assert hooks_of(model) == 0


def table() -> str:
    """The rows as markdown."""
    rows = load_rows()
    lines = [
        "# What goes wrong, and what happens then",
        "",
        f"{len(rows)} faults, written by `python -m tests.contract.fault_table --write` from the rows that",
        "`tests/contract/test_faults.py` runs. After each of them, unless nothing was made, the same is checked:",
        "three more finite losses and weights, then the state is saved, loaded with `weights_only=True` into a new",
        "optimizer, and both make the same next step to the bit.",
        "",
        "“…” stands for names and values. What is logged goes to the logger `hf_lngd`, once a name; what is counted is",
        "in `optimizer.diagnostics()` and, with `lngd_` before it, in the Trainer's log.",
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        lines += ["", f"## {kind}", "", "| what goes wrong | what happens | what is said |", "| --- | --- | --- |"]
        for row in (row for row in rows if row.kind == kind):
            told = f"error: {_code(row.error)}" if row.error else f"logged: {_code(row.log)}" if row.log else ""
            counted = f"counted: {', '.join(f'`{name}`' for name in row.counts)}" if row.counts else ""
            cells = (row.name, row.outcome, "; ".join(text for text in (told, counted) if text))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    from tests.contract import fault_table  # the module that rows register with, not this one as __main__

    if sys.argv[1:] == ["--write"]:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(fault_table.table(), encoding="utf-8")
    else:
        print(fault_table.table(), end="")
