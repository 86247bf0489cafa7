"""A checkpoint of weights and LNGD's state, whole, in one file, for any number of ranks, under DDP, FSDP2 and in one
process. Nothing in it can be run. What is too large for the first rank's memory torch's own functions write in shards
(`torch.distributed.checkpoint`)."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..state import check_parameters
from ..torch_internals import is_sharded

FILE = "lngd.pt"


def save_checkpoint(folder: str | Path, model: Any, optimizer: Any) -> None:
    """Write a model's weights and LNGD's state into a folder that all ranks see. Each has to call it; the first writes.

    What was saved there before stays until the new one is whole, whenever a process dies."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = {"model": get_model_state_dict(model, options=options), "optimizer": whole_state(optimizer)}
    ranks = optimizer.core.layout.everyone
    if ranks.rank == 0:
        file, unfinished = Path(folder, FILE), Path(folder, f"{FILE}.tmp")
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, unfinished)
        unfinished.replace(file)
    ranks.broadcast_value(None, 0)  # wait for it


def whole_state(optimizer: Any) -> dict[str, Any]:
    """The state dict with whole tensors on the CPU of the first rank; every rank has to call it."""
    state, first = optimizer.state_dict(), optimizer.core.layout.everyone.rank == 0
    tensors = {(number, key): value for number, own in state["state"].items() for key, value in own.items()}
    state["state"] = {number: {} for number in state["state"]}
    for (number, key), value in whole_tensors(tensors, first).items():
        state["state"][number][key] = value
    return state


def whole_tensors(tensors: Mapping[Any, Any], keep: bool) -> dict[Any, Any]:
    """These tensors, gathered one by one, on the CPU where they are kept; elsewhere None. One that is there under
    several names stays one."""
    found, known = {}, dict[int, Any]()
    for name in sorted(tensors):  # in an order that is the same on every rank
        value = tensors[name]
        if id(value) not in known:
            whole = value.full_tensor() if is_sharded(value) else value
            known[id(value)] = whole.cpu() if keep else None
        found[name] = known[id(value)]
    return found


def load_checkpoint(folder: str | Path, model: Any, optimizer: Any) -> None:
    """Read what :func:`save_checkpoint` wrote, on any number of ranks. Every rank has to call it.

    Raises:
        ValueError: a folder that is no checkpoint, or a damaged one, or another model's or optimizer's; says what is
            wrong with it. Nothing is changed then."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    file = Path(folder, FILE)
    try:  # mapped: a rank reads its own share
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        weights, own = found["model"], found["optimizer"]
        there = _shapes(weights)
    except (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {file}: cannot be read ({type(error).__name__}: {error})") from error
    check_parameters(_shapes(get_model_state_dict(model)), {"parameters": there})
    optimizer.load_state_dict(own)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def _shapes(weights: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(getattr(value, "shape", ())) for name, value in weights.items()}
