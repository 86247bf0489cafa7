"""Ways of sharding and saving that are not LNGD's, and damage that is done to sharded checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_lngd import LNGD


def split_tensors(model: nn.Module, plan: Any) -> None:
    """Tensor parallelism."""
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def refused(what: str) -> None:
    """Ways of sharding, and of saving, that are not LNGD's."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    if what == "tensor parallelism":
        split_tensors(model, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    elif what == "tensor parallelism of a part":
        split_tensors(model, {"2": ColwiseParallel()})
    elif what == "last part":
        fully_shard(model[2])
    elif what == "FSDP1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif what == "dimension":
        fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    elif what == "part":
        fully_shard(model[0])
    optimizer = LNGD(model, family="ekfac" if what == "ekfac" else "lngd")
    if what == "FSDP1 later":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif what == "tensor parallelism later":
        split_tensors(model, {"2": ColwiseParallel()})
    elif what == "last part later":
        fully_shard(model[2])
    else:
        fully_shard(model)
    model.set_reshard_after_backward(what != "gathered") if hasattr(model, "set_reshard_after_backward") else None
    model(torch.ones(3, 4)).sum().backward()
    if what == "unscaled":
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
