"""Sums of one factor step: over calls, micro-batches and processes, divided once at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .linalg import input_statistic, pack, unpack


class Statistics:
    """Sums of one group of layers over the tokens or locations of a step. A subclass says which there are, and what
    becomes of them.

    Attributes:
        sums: name → tensor; those named in `SYMMETRIC` equal their transpose; those of micro-batches, calls and
            processes add up.
        n: tokens or locations, a scalar tensor.
        seen, kept: samples of the batch in the step, and those of them that were summed; tensors over processes."""

    SYMMETRIC: ClassVar[tuple[str, ...]] = ("phi",)

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.n: Tensor | None = None
        self.seen: int | Tensor = 0
        self.kept: int | Tensor = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each sum."""
        raise NotImplementedError

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """What the factors of this step are, each [units, …]; what is not finite is not to be used. Sums are multiplied
        by `scale`; None: one over the number of tokens."""
        raise NotImplementedError

    def accumulate(self, new: Iterable[tuple[str, Tensor]], count: Tensor) -> None:
        """Add the sums of some tokens, by name, and how many they are."""
        for name, value in new:
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.n = count if self.n is None else self.n + count

    def merge(self, other: Statistics) -> None:
        """Add the sums of another one, which stays as it is."""
        if other.n is not None:
            self.accumulate(other.sums.items(), other.n)
        self.seen, self.kept = self.seen + other.seen, self.kept + other.kept

    def all_sums(self, like: Tensor) -> dict[str, Tensor]:
        """Every sum by name, zeros of this dtype and device where there is none yet."""
        zeros = {name: like.new_zeros(shape) for name, shape in self.shapes().items()}
        return zeros | self.sums | {"n": like.new_zeros(()) if self.n is None else self.n}

    def reduced(self, sums: dict[str, Tensor], seen: Tensor, kept: Tensor) -> Self:
        """This one with the sums of all processes in place of its own."""
        self.sums = {name: value for name, value in sums.items() if name != "n"}
        # called, but no gradient came back: nothing was summed, and zeros are not its factors
        self.n, self.seen, self.kept = sums["n"], seen, torch.where(sums["n"] > 0, kept, 0.0)
        return self

    @property
    def tokens(self) -> Tensor | float:
        """Tokens or locations of the step on this process, those of samples that were left out included."""
        return 0.0 if self.n is None else self.n * self.scale_of_samples

    @property
    def scale_of_samples(self) -> Tensor | float:
        """Samples of the step over those of them that were summed; over several processes a tensor, NaN for none."""
        return self.seen / self.kept if isinstance(self.kept, Tensor) or self.kept else 1.0


class InputStatistics(Statistics):
    """Σ_t a_t a_tᵀ over a group's inputs a, with φ' = 1 (Eq. 4): ``phi`` [units, k, b, b]; `blocks`: (k, b)."""

    def __init__(self, units: int, blocks: tuple[int, int]) -> None:
        super().__init__()
        self.units, self.blocks = units, blocks

    def shapes(self) -> dict[str, tuple[int, ...]]:
        k, b = self.blocks
        return {"phi": (self.units, k, b, b)}

    def add(self, a: Tensor, mask: Tensor | None) -> None:
        """Add some tokens: a [units, N, d], mask [N] or None."""
        with exact(a):
            weight = None if mask is None else mask.to(a.dtype)
            count = a.new_full((), a.shape[-2]) if weight is None else weight.sum()
            self.accumulate([("phi", input_statistic(a, weight, *self.blocks))], count)

    def factors(self, scale: Tensor | float | None) -> dict[str, Tensor]:
        """E[a aᵀ]; NaN where there were no tokens."""
        assert self.n is not None
        return {"phi": self.sums["phi"] / self.n}


def exact(like: Tensor) -> Any:
    """A context without autocast: sums in half precision would be off by more than λ."""
    return torch.autocast("cpu" if like.is_meta else like.device.type, enabled=False)  # the meta device knows none


def reduce(
    own: Mapping[str, tuple[Statistics, Tensor]], scalars: Sequence[Tensor | float], layout: Any
) -> tuple[dict[str, Statistics], list[Tensor]]:
    """The statistics of every group over all processes, of those groups that this process keeps, and sums of numbers.
    Symmetric sums travel packed: one collective, and one for the numbers.

    A process that saw nothing of a group adds zeros; where none saw anything ``kept`` is 0.

    Args:
        own: every group, in an order that is the same everywhere → this process's statistics, and a tensor with the
            device and dtype of their sums.
        scalars: the numbers.
        layout: the processes and what each of them keeps, see `parallel.layout`."""
    if layout.everyone.size == 1:
        return {name: one for name, (one, _) in own.items()}, [torch.as_tensor(value) for value in scalars]
    flat = [(name, one, key, v) for name, (one, like) in own.items() for key, v in one.all_sums(like).items()]
    sizes = [value.shape[-1] if key in one.SYMMETRIC else 0 for _, one, key, value in flat]
    parts = [pack(value) if size else value for (*_, value), size in zip(flat, sizes, strict=True)]
    first = next(like for _, like in own.values())
    counts = torch.tensor([float(x) for one, _ in own.values() for x in (one.seen, one.kept)], dtype=first.dtype)
    numbers = [torch.as_tensor(x).to(first.device, first.dtype, non_blocking=True) for x in (counts, *scalars)]
    parts, numbers = layout.reduce(parts, [name for name, *_ in flat], numbers)
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in own}
    for (name, _, key, _), part, size in zip(flat, parts, sizes, strict=True):
        if part is not None:
            totals[name][key] = unpack(part, size) if size else part
    every = zip(own.items(), numbers[0].view(-1, 2), strict=True)
    found = {name: one.reduced(totals[name], *counted) for (name, (one, _)), counted in every if totals[name]}
    return found, numbers[1:]
