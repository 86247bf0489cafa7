"""Steps that a gradient scaler or a loop makes, or leaves out: what the optimizer has to know, and how it learns it.

Statistics of gradients are taken in hooks, where gradients are still those of the scaled loss; and what hooks have
gathered in a step with an inf must not reach the next one. `torch.amp.GradScaler` tells an optimizer neither, so it is
found on the stack: nothing has to be attached, in a plain loop, with accelerate or in a Trainer. Behind a wrapper
that keeps its questions away, or where a loop leaves steps out by itself, the gradients tell: they are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from .curvature.context import stepping_scaler
from .curvature.dropped import Gradients


class Gatherer(Protocol):
    """What gathers statistics between two steps.

    Attributes:
        doubtful: they are of a step that may be left out; the next forward pass then begins anew.
        gradients: of the same step, and whether they were dropped; so does it then.
    """

    doubtful: bool
    gradients: Gradients

    def watch(self, enabled: bool) -> None:
        """Look at forward passes, or look away."""

    def close(self) -> None:
        """Remove every hook."""


class UnderScaler:
    """A mixin for an optimizer: with a GradScaler, or without one.

    Attributes:
        _gatherers: what gathers for the optimizer.
        _loss_scale: in a step, what its loss was multiplied by, a tensor of its own that nobody waited for; None: one.
    """

    _gatherers: Sequence[Gatherer] = ()
    _loss_scale: Tensor | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: the scaler unscales the gradients itself, and leaves a step with an inf in them out.

        It asks every optimizer this when its step begins, and then says no more if it leaves the step out.
        """
        scaler = stepping_scaler()
        if scaler is not None:
            if self._meet_parameters() and scaler._per_optimizer_states[id(self)]["stage"] is OptState.UNSCALED:
                raise RuntimeError(
                    "LNGD: got GradScaler.unscale_ before the first step with parameters that fully_shard has put in "
                    "the place of LNGD's, whose gradients it did not see, accepted: fully_shard before LNGD is made"
                )
            self._doubt(True)
        return False

    def _meet_parameters(self) -> bool:
        """Take over parameters that have replaced the optimizer's, as the scaler unscales what is in its groups; were
        there any?"""
        return False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. If no step was made of these gradients, nothing that was gathered of them is kept."""
        for gatherer in self._gatherers:
            gatherer.gradients.drop()
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def _doubt(self, doubtful: bool) -> None:
        for gatherer in self._gatherers:
            gatherer.doubtful = doubtful

    def _read_scaler(self, device: torch.device) -> None:
        """At the start of a step, which is made: learn `_loss_scale`."""
        self._doubt(False)
        scaler = stepping_scaler()
        self._loss_scale = None if scaler is None else scaler.scale(torch.ones((), device=device))
