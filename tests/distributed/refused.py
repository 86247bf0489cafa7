"""Ways of sharding and saving that are not LNGD's, and damage that is done to sharded checkpoints."""

from __future__ import annotations

import pickle
import shutil
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
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


def save_foreign(folder: Any) -> None:
    """A checkpoint of something else in place of one."""
    shutil.rmtree(folder)
    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=folder, no_dist=True)


def change_metadata(change: Any, folder: Any) -> None:
    """Write a checkpoint's metadata anew."""
    file = folder / ".metadata"
    found = pickle.loads(file.read_bytes())
    change(found)
    file.write_bytes(pickle.dumps(found))


def point_elsewhere(found: Any) -> None:
    """Files of another folder."""
    for info in found.storage_data.values():
        info.relative_path = f"../here/{info.relative_path}"


def hide_tensors(found: Any) -> None:
    """Entries that torch would unpickle, with the shapes of the tensors that they were."""
    for name, entry in found.state_dict_metadata.items():
        found.state_dict_metadata[name] = hidden = BytesStorageMetadata()
        hidden.size = entry.size  # type: ignore[attr-defined]


def spoil_entries(found: Any) -> None:
    """Entries of no kind."""
    for name in found.state_dict_metadata:
        found.state_dict_metadata[name] = "nothing"


def spoil(change: Any, folder: Any) -> None:
    """Other bytes in the middle of the largest file."""
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    found = bytearray(file.read_bytes())
    middle = slice(len(found) // 2, len(found) // 2 + 2000)
    found[middle] = change(found[middle])
    file.write_bytes(found)


def spoil_plain(folder: Any) -> None:
    """What is coded in a tensor is none of torch's files."""
    size = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata["optimizer.plain"].size
    shutil.rmtree(folder)
    dcp.save({"optimizer": {"plain": torch.zeros(size, dtype=torch.uint8)}}, checkpoint_id=folder, no_dist=True)
