"""A step on accelerators: `benchmarks.cost_model`'s operations by a data sheet, and what devices exchange."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cost_model import (
    FLOAT,
    PRODUCTS,
    Inventory,
    Op,
    adamw_ops,
    invert_ops,
    lngd_ops,
    muon_ops,
    total_seconds,
)
from hf_lngd.placement import SPEEDS, loads_of, placement


@dataclass(frozen=True)
class Device:
    """An accelerator by its sustained rates: FLOP/s by dtype, bytes/s of memory, seconds to launch a call.

    Inverses and the eigenvectors of embeddings are far below the rate of products: what the package itself assumes of
    accelerators when it deals inverses out.
    """

    float32: float
    bfloat16: float
    bandwidth: float
    launch: float = 5e-6

    def seconds(self, op: Op) -> float:
        """The longer of arithmetic and memory, and the launch."""
        once = Op(op.kind, op.shape)
        if op.kind == "eigh":
            batch, n = op.shape
            return batch * n**3 / SPEEDS["accelerator"].eigh + self.launch
        if op.kind == "inverse":
            return once.flops / SPEEDS["accelerator"].cholesky + self.launch
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
        """Seconds until all have the `size` bytes that they hold a part of each."""
        return 0.0 if self.count == 1 else (self.count - 1) / self.count * size / self.link + self.latency


def makespan(costs: Iterable[float], devices: int) -> float:
    """The busiest device's load where jobs are placed as LNGD places inverses."""
    jobs = list(costs)
    return max(loads_of(jobs, placement(jobs, devices), devices))


def cluster_step(inventory: Inventory, cluster: Cluster, optimizer: str, spread: bool = False) -> dict[str, float]:
    """Seconds of a mean step's parts beside forward and backward, and bytes that each device sends, nothing overlapped.

    Args:
        optimizer: adamw, muon or lngd. `spread`: LNGD's inverses go to devices by cost and are gathered once an
            interval; else each device computes all.
    """
    gradient = float(FLOAT * sum(inventory.parameters))
    parts = {"gradients": cluster.all_reduce(gradient), "factors": 0.0, "inverses": 0.0, "gather": 0.0}
    sent = 2 * (cluster.count - 1) / cluster.count * gradient
    if optimizer == "adamw":
        ops = adamw_ops(inventory.parameters)
    elif optimizer == "muon":
        ops = muon_ops(inventory.matrices, inventory.others)
    elif optimizer == "lngd":
        c = inventory.config
        ops = lngd_ops(inventory, masked=True, inverses=False)
        triangles = float(FLOAT * sum(f.triangle for f in inventory.factors))
        parts["factors"] = cluster.all_reduce(triangles) / c.factor_interval
        sent += 2 * (cluster.count - 1) / cluster.count * triangles / c.factor_interval
        costs = [total_seconds(invert_ops(f), cluster.device) for f in inventory.factors]
        parts["inverses"] = (makespan(costs, cluster.count) if spread else sum(costs)) / c.inverse_interval
        if spread:
            parts["gather"] = cluster.all_gather(triangles) / c.inverse_interval
            sent += (cluster.count - 1) / cluster.count * triangles / c.inverse_interval
    else:
        raise ValueError(f"optimizer: got {optimizer!r}, accepted: adamw, muon, lngd")
    parts["update"] = total_seconds(ops, cluster.device)
    return {**parts, "total": sum(parts.values()), "bytes_sent": sent}
