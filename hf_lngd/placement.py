"""Who inverts what: inverses of factors are the only work of LNGD that processes share. Pure functions.

Each of these is computed once in the job, on one rank, and sent to all others; or on every rank, where sending costs
more than is saved, as with few or small ones. Roots of ``gram`` and an embedding's eigenbasis are made on every rank.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


def placement(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each task: longest processing time first, each to the rank that has least.

    The most loaded rank has at most 4/3 of what it would have in the best placement (Graham 1969). Depends on nothing
    but the arguments.

    Raises:
        ValueError: fewer than one rank, or a negative cost.
    """
    if ranks < 1:
        raise ValueError(f"ranks: got {ranks}, accepted: an integer, at least 1")
    if any(not cost >= 0 for cost in costs):
        raise ValueError(f"costs: got {min(costs)}, accepted: numbers, at least 0")
    owners = [0] * len(costs)
    loads = [(0.0, rank) for rank in range(ranks)]
    for task in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[task] = rank
        heapq.heappush(loads, (load + costs[task], rank))
    return owners


def loads_of(costs: Sequence[float], owners: Sequence[int], ranks: int) -> list[float]:
    """What each rank has to do."""
    loads = [0.0] * ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


@dataclass(frozen=True)
class Speed:
    """Of a kind of device, roughly: it decides between two ways to the same numbers.

    Attributes:
        eigh, newton, cholesky: seconds for an n × n matrix are n³ over this.
        latency: seconds of a collective of nothing.
        bandwidth: bytes a second that a rank receives.
    """

    eigh: float
    newton: float
    cholesky: float
    latency: float
    bandwidth: float


# The CPU's were measured on one thread (width 512) and gloo between two processes of one machine; an accelerator's are
# set by arithmetic at a tenth of a data-centre GPU's peak, and a slow link.
SPEEDS = {
    "cpu": Speed(eigh=4e9, newton=1e9, cholesky=2e10, latency=3e-4, bandwidth=5e8),
    "accelerator": Speed(eigh=1e10, newton=1e11, cholesky=1e11, latency=5e-5, bandwidth=1e10),
}


def spread_pays(costs: Sequence[float], sizes: Sequence[int], owners: Sequence[int], ranks: int, speed: Speed) -> bool:
    """Whether it is quicker to compute each task on its owner and send the result than all of them everywhere.

    Args:
        costs: seconds a task.
        sizes: bytes of a task's result.
        owners: rank of each task.
        ranks: how many.
        speed: of the device.
    """
    busiest = max(loads_of(costs, owners, ranks), default=0.0)
    longest = max(loads_of(sizes, owners, ranks), default=0.0)  # shorter ones are filled up: one collective takes all
    return busiest + speed.latency + ranks * longest / speed.bandwidth < sum(costs)
