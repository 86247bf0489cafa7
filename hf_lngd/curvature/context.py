"""A hook, and where it or a step is called: in a backward pass, a transform, a checkpoint, a loss scaler's step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils.checkpoint import CheckpointFunction


class Hook:
    """A hook on a module that copies and pickles of the module do not get: what stands there in its place does nothing.

    Else a copy of the model would hold (or be) a copy of the optimizer, and ``torch.save(model)`` would fail.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        # a callable of the standard library that takes anything and returns None: files load without hf_lngd
        return getattr, (nullcontext(), "__exit__")


def in_backward() -> bool:
    """True within a backward pass, where checkpointing runs forwards again."""
    return torch._C._current_graph_task_id() != -1


def in_transform() -> bool:
    """True within torch.func (vmap, grad, jvp, …), whose tensors may not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def callers() -> Iterator[FrameType]:
    """The stack, from the inside out."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def in_reentrant_checkpoint() -> bool:
    """True within the first forward of a reentrant checkpoint, which switches gradients off."""
    return any(frame.f_code is CheckpointFunction.forward.__code__ for frame in callers())


def calls_under_way(model: nn.Module) -> int:
    """Calls of this module on the stack: one that an interrupt ended is there no more, though no hook saw its end."""
    calls = (frame for frame in callers() if frame.f_code is nn.Module._call_impl.__code__)
    return sum(frame.f_locals.get("self") is model for frame in calls)


def stepping_scaler() -> GradScaler | None:
    """The gradient scaler whose ``step`` is on the stack, if there is one."""
    frame = next((frame for frame in callers() if frame.f_code is GradScaler.step.__code__), None)
    return None if frame is None else frame.f_locals.get("self")
