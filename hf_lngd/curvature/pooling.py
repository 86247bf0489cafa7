"""The statistics of a step, summed over the processes that train one model as they are over micro-batches.

DDP averages gradients, so the loss is the mean of the ranks' own: with W ranks the gradient of it with respect to a
rank's activation is 1/W of the one that this rank's hooks see. Sums of products of two such gradients carry 1/W².
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .family_sums import FamilySums
from .inverses import pack, unpack
from .sums import SYMMETRIC, GroupSums, RowSamples
from .topology import Group


class Pool(Protocol):
    """Processes that sum together, see `distributed.Ranks`."""

    @property
    def size(self) -> int:
        """How many."""

    @property
    def rank(self) -> int:
        """This one's number."""

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum of each tensor over all of them."""

    def gather(self, own: Tensor, most: int) -> Tensor:
        """Bytes of every rank, see `distributed.Ranks.gather`."""

    def everyone(self, value: Any) -> list[Any]:
        """A plain value of every rank."""

    def share(self, value: Any, rank: int) -> Any:
        """A value of one rank, see `distributed.Ranks.share`."""


Sums = GroupSums | FamilySums


def pool_sums(
    sums: Mapping[str, Sums],
    groups: list[Group],
    empty: Callable[[Group], Sums],
    like: Callable[[Group], Tensor],
    scalars: list[Tensor | int],
    pool: Pool,
    to_owners: Callable[[list[Tensor], list[str]], list[Tensor | None]] | None = None,
    halved: bool = False,
) -> tuple[dict[str, Sums], list[Tensor]]:
    """The sums and the rows of every group over all ranks, symmetric ones packed, in one collective.

    A rank that saw nothing of a group adds zeros; where no rank saw anything ``kept`` is 0.

    Args:
        sums: of this rank.
        groups: all of the model, in an order that is the same on every rank.
        empty: makes the sums of a group of which this rank saw nothing.
        like: a tensor with the device and dtype of a group's sums, where they are not there yet.
        scalars: more numbers to sum.
        to_owners: sums tensors, each of the group named beside it, where a group's sums are one rank's alone (None
            elsewhere), see `Owners.sum`.
        halved: symmetric sums travel, and are added up, in bfloat16; all else stays exact, in a collective of its own.

    Returns:
        The sums of each group (with `to_owners` of this rank's), with ``seen`` and ``kept`` as tensors; the sums of the
        scalars.
    """
    own = [sums[group.name] if group.name in sums else empty(group) for group in groups]
    plain = [one.plain(like(group)) for one, group in zip(own, groups, strict=True)]
    parts = [pack(t) if name in SYMMETRIC else t for named in plain for name, t in named.items()]
    sizes = [t.shape[-1] if name in SYMMETRIC else 0 for named in plain for name, t in named.items()]
    dtypes = [t.dtype for t in parts]
    if halved:
        parts = [t.to(torch.bfloat16) if size else t for t, size in zip(parts, sizes, strict=True)]
    first = plain[0]["n"]
    numbers = [_numbers([float(n) for one in own for n in (one.seen, one.kept)], first)]
    numbers += [torch.as_tensor(n).to(first.device, first.dtype, non_blocking=True) for n in scalars]
    found: list[Tensor | None] = []
    if to_owners is None:
        found = [*pool.sum(parts + numbers)]
        found, numbers = found[: len(sizes)], found[len(sizes) :]  # type: ignore[assignment]
    else:
        found = to_owners(parts, [group.name for group, named in zip(groups, plain, strict=True) for _ in named])
        numbers = pool.sum(numbers)
    # as numbers seen and kept would be waited for
    counts = numbers[0].view(-1, 2)
    found = [t if t is None else t.to(dtype) for t, dtype in zip(found, dtypes, strict=True)]
    whole = iter([unpack(t, size) if size and t is not None else t for t, size in zip(found, sizes, strict=True)])
    pooled = {}
    for i, (group, one, named) in enumerate(zip(groups, own, plain, strict=True)):
        sums_of = {name: value for name in named if (value := next(whole)) is not None}
        if not sums_of:
            continue
        # called, but no gradient came back: nothing was summed, and zeros are not its factors
        kept = torch.where(sums_of["n"] > 0, counts[i, 1], 0.0)
        pooled[group.name] = one.pooled(sums_of, counts[i, 0], kept)
    return pooled, numbers[1:]


def _numbers(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def usable(grad: Tensor, pool: Pool | None = None) -> tuple[Tensor, Tensor]:
    """Gradients [..., m, d], those matrices zeroed (in place) whose norm is no number or overflows, and how many.

    A gradient that is not finite would stay in the momentum for good. One whose squares overflow would stop AdamW, and
    the Gram matrix of ``gram``, for good. `pool`: the processes that have the rest of the rows.
    """
    square = torch.linalg.vector_norm(grad, dim=(-2, -1)).square()  # the norm of one number overflows with no square
    if pool is not None and pool.size > 1:
        (square,) = pool.sum([square])
    bad = ~torch.isfinite(square)
    return grad.masked_fill_(bad[..., None, None], 0.0), bad.sum()


def pool_curvature(squares: Tensor, rows: list[RowSamples], terms: Tensor | float, pool: Pool) -> tuple[Tensor, Tensor]:
    """DᵀFD of Eq. 13 for some layers over all ranks, in one collective.

    Args:
        squares: [n], Σ q² over the rows that this rank kept.
        rows: n, what this rank kept.
        terms: T of this rank.

    Returns:
        T Σ q² · rows seen / rows kept [n], and where [n] any rank kept a row and its gradient.
    """
    counts = _numbers([float(n) for own in rows for n in (own.seen, own.kept, bool(own.calls))], squares)
    total = torch.as_tensor(terms).to(squares.device, squares.dtype, non_blocking=True)
    squares, counts, total = pool.sum([squares, counts, total])
    seen, kept, heard = counts.view(-1, 3).unbind(1)
    return squares * (seen / kept.clamp_min(1)) * (total / pool.size**2), (kept > 0) & (heard > 0)
