"""Models under torch.compile: their names, and eager runs of the steps that are watched.

Compiled code passes over hooks that came later, and hooks that are there when a model is compiled are traced, layer by
layer. So a watched step runs the code as it was written; what was compiled waits, unchanged, for the steps between.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import nn

_WRAPPED = "_orig_mod"  # what torch.compile calls the module that it wraps

_EAGER = "force_eager"

_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_met: weakref.WeakSet[Any] = weakref.WeakSet()  # whose end is watched for
_ours: list[tuple[weakref.ref[Any], Any]] = []  # stances that were set here, each with the one it was set in place of


def plain_name(name: str) -> str:
    """The name of a parameter or module, without what torch.compile adds to it."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps, or the model itself."""
    inner = model._modules.get(_WRAPPED)
    return model if inner is None else inner


def run_eagerly(watcher: object, wanted: bool) -> None:
    """Compiled functions of this process run eagerly as long as some watcher that is alive wants it.

    A stance of ours, put in the place of the one that was there (`torch.compiler.set_stance`, which costs nothing and
    compiles nothing again), says ``force_eager`` while it is wanted and else what that one said. So it may stay where
    it is, and comes to no harm where a ``with`` of the user's puts it back after LNGD is closed.
    """
    if not wanted:
        _watchers.discard(watcher)
    else:
        _watchers.add(watcher)
        if watcher not in _met:
            _met.add(watcher)
            weakref.finalize(watcher, _take_stance).atexit = False
    _take_stance()


def stance_in_the_way() -> str | None:
    """What the user's stance says that is in the place of ours, which was wanted."""
    stance = torch._dynamo.eval_frame._stance.stance
    return stance if _watchers and stance != _EAGER else None


def _take_stance() -> None:
    wanted = bool(_watchers)
    _ours[:] = [(own, before) for own, before in _ours if own() is not None]
    for own, before in _ours:
        told = dataclasses.replace(before, stance=_EAGER, backend=None) if wanted else before
        vars(own()).update(vars(told))
    if wanted and all(own() is not torch._dynamo.eval_frame._stance for own, _ in _ours):
        placed = torch.compiler.set_stance(_EAGER)
        _ours.append((weakref.ref(placed.stance), dataclasses.replace(placed.prev)))
