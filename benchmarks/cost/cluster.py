"""A step on accelerators: `benchmarks.cost.model`'s operations by a data sheet, and what devices exchange."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.cost.model import (
    FLOAT,
    INVERSE,
    PRODUCTS,
    Bank,
    Inventory,
    Op,
    adamw_ops,
    bank_ops,
    invert_ops,
    lngd_ops,
    muon_ops,
    total_seconds,
)

# FLOP/s of inverses on an accelerator: far below that of products, about a tenth of a percent of its peak.
INVERSE_RATE = 1e11


@dataclass(frozen=True)
class Device:
    """An accelerator by its sustained rates: FLOP/s by dtype, bytes/s of memory, seconds to launch a call."""

    float32: float
    bfloat16: float
    bandwidth: float
    launch: float = 5e-6

    def seconds(self, op: Op) -> float:
        """The longer of arithmetic and memory, and the launch."""
        once = Op(op.kind, op.shape)
        if op.kind == INVERSE:
            return once.flops / INVERSE_RATE + self.launch
        rate = self.bfloat16 if op.kind == "bfloat16" else self.float32
        busy = once.flops / rate if op.kind in PRODUCTS else 0.0
        return max(busy, once.bytes / self.bandwidth) + self.launch


@dataclass(frozen=True)
class Cluster:
    """`count` devices under DDP: link bytes/s of each, seconds of a collective's start."""

    device: Device
    count: int
    link: float
    latency: float = 3e-5

    def all_reduce(self, size: float) -> float:
        """Seconds of a ring: 2 (p − 1)/p of the bytes over each link; 0 on one device."""
        return 0.0 if self.count == 1 else 2 * (self.count - 1) / self.count * size / self.link + self.latency

    def all_gather(self, size: float) -> float:
        """Seconds until all have the `size` bytes that they hold a part of each; a reduce-scatter takes as long."""
        return 0.0 if self.count == 1 else (self.count - 1) / self.count * size / self.link + self.latency


def makespan(costs: Iterable[float], devices: int) -> float:
    """The busiest device's load: longest job first, each to the device that has least."""
    loads = [0.0] * devices
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def layers_of(bank: Bank) -> list[Bank]:
    """A bank's layers, each as a bank of its own."""
    return [replace(bank, layers=1, count=bank.count // bank.layers, positions=(each,)) for each in bank.positions]


def cluster_step(inventory: Inventory, cluster: Cluster, optimizer: str, owned: bool = False) -> dict[str, float]:
    """Seconds of a mean step's parts beside forward and backward, and bytes that each device sends, nothing overlapped.

    Args:
        optimizer: adamw, muon or lngd.
        owned: each layer of LNGD belongs to one device, which alone keeps its state and makes its update; updates are
            all-gathered. Else every device makes every layer's.
    """
    gradient = float(FLOAT * sum(inventory.parameters))
    part_of = (cluster.count - 1) / cluster.count
    parts = {"gradients": cluster.all_reduce(gradient), "factors": 0.0, "inverses": 0.0, "gather": 0.0}
    sent = 2 * part_of * gradient
    if optimizer == "adamw":
        parts["update"] = total_seconds(adamw_ops(inventory.parameters), cluster.device)
    elif optimizer == "muon":
        parts["update"] = total_seconds(muon_ops(inventory.matrices, inventory.others), cluster.device)
    elif optimizer == "lngd":
        c = inventory.config
        triangles = float(FLOAT * sum(f.triangle for f in inventory.factors))
        inverses = [total_seconds(invert_ops(f), cluster.device) for f in inventory.factors]
        update = total_seconds(lngd_ops(inventory, masked=True, inverses=False), cluster.device)
        if owned:
            each = [one for bank in inventory.banks for one in layers_of(bank)]
            banks = sum(total_seconds(bank_ops(bank, c), cluster.device) for bank in inventory.banks)
            own = makespan([total_seconds(bank_ops(one, c), cluster.device) for one in each], cluster.count)
            updates = float(FLOAT * sum(bank.elements for bank in inventory.banks))
            parts["factors"] = cluster.all_gather(triangles) / c.factor_interval
            parts["inverses"] = makespan(inverses, cluster.count) / c.inverse_interval
            parts["gather"] = cluster.all_gather(updates)
            parts["update"] = update - banks + own
            sent += part_of * (triangles / c.factor_interval + updates)
        else:
            parts["factors"] = cluster.all_reduce(triangles) / c.factor_interval
            parts["inverses"] = sum(inverses) / c.inverse_interval
            parts["update"] = update
            sent += 2 * part_of * triangles / c.factor_interval
    else:
        raise ValueError(f"optimizer: got {optimizer!r}, accepted: adamw, muon, lngd")
    return {**parts, "total": sum(parts.values()), "bytes_sent": sent}
