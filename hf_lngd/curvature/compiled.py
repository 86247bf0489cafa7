"""Models under torch.compile: their names, and eager runs of the steps that are watched.

Compiled code passes over hooks that came later, and hooks that are there when a model is compiled are traced, layer by
layer. So a watched step runs the code as it was written; what was compiled waits, unchanged, for the steps between.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

_WRAPPED = "_orig_mod"  # what torch.compile calls the module that it wraps

_watchers: weakref.WeakSet[Any] = weakref.WeakSet()
_met: weakref.WeakSet[Any] = weakref.WeakSet()  # whose end is watched for
_stance: Any = None  # ours while there are watchers


def plain_name(name: str) -> str:
    """The name of a parameter or module, without what torch.compile adds to it."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps, or the model itself."""
    inner = model._modules.get(_WRAPPED)
    return model if inner is None else inner


def run_eagerly(watcher: object, wanted: bool) -> None:
    """Compiled functions of this process run eagerly as long as some watcher that is alive wants it.

    `torch.compiler.set_stance`, which costs nothing and compiles nothing again. What it was before comes back.
    """
    if not wanted:
        _watchers.discard(watcher)
    else:
        _watchers.add(watcher)
        if watcher not in _met:
            _met.add(watcher)
            weakref.finalize(watcher, _take_stance).atexit = False
    _take_stance()


def _take_stance() -> None:
    global _stance
    if _watchers and _stance is None:
        _stance = torch.compiler.set_stance("force_eager")
    elif not _watchers and _stance is not None:
        before, _stance = _stance, None
        before.__exit__(None, None, None)
