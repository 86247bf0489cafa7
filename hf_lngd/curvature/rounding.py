"""bfloat16 weights and running factors: their numbers lie 0.4 to 0.8 % apart, and a smaller change is lost.

Whatever changes one changes it in float32, and hands it back here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..sharding import local
from .fisher import generator_for, seed_of

# float32 is bfloat16 with so many more bits.
_DROPPED = 16


class Draws:
    """Generators for rounding at random, one for each device: a stream for each step, the same in every process.

    Args:
        seed: of the draws.
        what: is rounded; each kind has streams of its own.
    """

    def __init__(self, seed: int, what: str) -> None:
        self.seed, self.what = seed, what
        self.begin(0)

    def begin(self, step: int) -> None:
        """Draw from the stream of this step from now on: a resumed run needs to know the step, and nothing else."""
        self._step = step
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self._generators:
            self._generators[device] = generator_for(device, seed_of(self.seed, self.what, self._step))
        return self._generators[device]


class Rounding:
    """Writes float32 values into bfloat16 weights. Weights of float32 or float64 are left as they are.

    Args:
        mode: ``kahan``: what rounding took off a weight is kept in bfloat16, and comes back at its next change;
            ``stochastic``: up or down at random, so that the mean is right; ``nearest``.
        seed: of the draws: a stream for each step, the same in every process.

    Attributes:
        lost: ``kahan``: weight → what it lacks, in its shape (of sharded ones: the rows that are here) and dtype. Not
            added to a number that somebody else has written since, see `rest_of`.
    """

    def __init__(self, mode: str, seed: int) -> None:
        self.mode, self._draws = mode, Draws(seed, "rounding")
        self.lost: dict[Tensor, Tensor] = {}

    def begin(self, step: int) -> None:
        """Draw from the stream of this step from now on."""
        self._draws.begin(step)

    @contextmanager
    def full(self, weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """The weights to work on in place: themselves, or in bfloat16's place float32, rounded when the block ends.
        Of sharded ones the rows that are here.

        If it raises, weights of bfloat16 stay as they were.
        """
        whole = [self._open(weight) for weight in weights]
        yield whole
        for weight, value in zip(weights, whole, strict=True):
            if weight.dtype == torch.bfloat16:
                self._close(weight, value)

    def _open(self, weight: Tensor) -> Tensor:
        if weight.dtype != torch.bfloat16:
            return local(weight)
        here, lost = local(weight.detach()), self.lost.get(weight)
        return here.float() if lost is None else here.float().add_(rest_of(here, lost))

    def _close(self, weight: Tensor, value: Tensor) -> None:
        if self.mode == "stochastic":
            value = round_at_random(value, self._draws.on(value.device))
        here = local(weight)
        here.copy_(value)
        if self.mode == "kahan":
            lost = value.sub_(here).to(weight.dtype)
            if weight in self.lost:
                self.lost[weight].copy_(lost)
            else:
                self.lost[weight] = lost


def rest_of(weight: Tensor, lost: Tensor) -> Tensor:
    """What rounding took off `weight`, and 0 where `lost` cannot be that: somebody has written another number since.

    Rounding takes off half the gap to the next number at most. Numbers are asked, as versions of tensors do not tell
    of ``weight.data`` nor how a state that was saved belongs to its weights, and change where next to nothing does, as
    by a clamp after each step. A rest that passes is within the rounding of the new number.
    """
    nearest = lost.float().mul_(1 - 2**-8).add_(weight).to(weight.dtype)  # half a gap is the number's own yet
    return torch.where(nearest == weight, lost, 0)


def round_at_random(value: Tensor, generator: torch.Generator) -> Tensor:
    """float32 → float32 that bfloat16 holds: one of the two next to it, each as probable as the other is far."""
    noise = torch.randint(1 << _DROPPED, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = noise.add_(value.view(torch.int32)).bitwise_and_(-1 << _DROPPED)
    return torch.where(torch.isfinite(value), bits.view(torch.float32), value)
