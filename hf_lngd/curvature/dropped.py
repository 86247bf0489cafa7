"""Gradients that a loop drops in place of making a step: what was gathered of their forward passes is of no step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..sharding import is_sharded
from .fisher import accumulator, origin


class Gradients:
    """Whether gradients have come in this step, and are gone: set to None by anyone, or to zero by ``zero_grad``.

    Nothing waits for the device, so zeros that somebody else writes are not told from gradients. Nor are gradients that
    somebody puts aside told from dropped ones: micro-batches before are not counted then.

    Args:
        weights: the parameters whose gradients are asked after.
    """

    def __init__(self, weights: Callable[[], Iterable[Tensor]]) -> None:
        self._weights = weights
        self.reset()

    def reset(self) -> None:
        """A step begins."""
        self._came = self._dropped = False

    def follow(self, output: Tensor, weight: Tensor) -> None:
        """Learn when the backward pass through a layer's output brings its weight a gradient."""
        if not output.requires_grad:
            return
        node = accumulator(weight)

        def arrive(_: Tensor) -> None:
            if _accumulates(node):
                self._came, self._dropped = True, False

        origin(output).register_hook(arrive)

    def drop(self) -> None:
        """`zero_grad` is called."""
        if self._came and any(weight.grad is not None for weight in self._weights()):
            self._dropped = True

    @property
    def gone(self) -> bool:
        """True where a forward pass that begins now is of a new step. FSDP2 keeps gradients of micro-batches elsewhere,
        so there only `zero_grad` tells."""
        return self._dropped or (
            self._came and all(weight.grad is None and not is_sharded(weight) for weight in self._weights())
        )


def _accumulates(node: Any) -> bool:
    """Whether the backward pass that runs leaves a gradient there; `torch.autograd.grad` returns its own."""
    try:
        return node is not None and bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # it asks for this very parameter
        return False
