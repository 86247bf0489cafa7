"""A checkpoint to which every rank writes its own share, in safetensors, by `torch.distributed.checkpoint`: nothing in
it can be run. What FSDP2 has sharded is written, and read, in the shards of whoever does so; of what several ranks have
each tensor is written by one. So it fits any number of ranks, DDP and one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import state
from ..torch_internals import is_sharded, local
from .ranks import is_distributed

# What of the optimizer is no tensor; written last.
PLAIN = "lngd.json"
# Within its folder, where a checkpoint is written, and where it is once it is whole.
PARTIAL, WHOLE = ".partial", "lngd"


def save_checkpoint(folder: str | Path, model: Any, optimizer: Any) -> None:
    """Write a model's weights and LNGD's state. Every rank has to call it, with a folder that all of them see.

    What was saved there before stays until the new one is whole, whenever a process dies."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder, ranks = Path(folder), optimizer.core.layout.everyone
    if ranks.rank == 0:
        _take_over(folder)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        (folder / PARTIAL).mkdir(parents=True)
    own, parameters = optimizer.state_dict(), _parameters(optimizer)
    tensors = {f"model.{name}": value for name, value in get_model_state_dict(model).items()}
    for number, name in enumerate(parameters):
        tensors |= {f"optimizer.{name}.{key}": value for key, value in own["state"].get(number, {}).items()}
    first_of = ranks.broadcast_value(_first_names(tensors), 0)  # a rank without rows cannot tell
    ranks.barrier()  # what was left there is gone
    write_tensors(folder / PARTIAL, {name: tensors[name] for name in first_of.values()}, ranks.group)
    if ranks.rank == 0:
        groups = [{key: _plain(value) for key, value in group.items()} for group in own["param_groups"]]
        plain = {"lngd": own["lngd"], "groups": groups, "parameters": list(parameters), "tensors": first_of}
        unfinished = folder / PARTIAL / f"{PLAIN}.tmp"
        unfinished.write_text(json.dumps(plain), encoding="utf-8")
        unfinished.replace(folder / PARTIAL / PLAIN)  # from here on the folder is whole
        _take_over(folder)
    ranks.barrier()


def _take_over(folder: Path) -> None:
    """Put what was saved in the place of what was there, if it is whole. Begun again where a process was killed in it,
    it ends as it would have."""
    if (folder / PARTIAL / PLAIN).is_file():
        shutil.rmtree(folder / WHOLE, ignore_errors=True)
        (folder / PARTIAL).replace(folder / WHOLE)


def _first_names(tensors: Mapping[str, Any]) -> dict[str, str]:
    """The name of each tensor → the first name of the same memory: tied weights, factors that layers share."""
    first: dict[Any, str] = {}
    found = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            here = local(value)
            key = (here.data_ptr(), here.shape, here.stride()) if here.numel() else name
            found[name] = first.setdefault(key, name)
    return found


def untied(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's state dict, each once: of names that are tied the first one."""
    return {name: weights[name] for name, first in _first_names(weights).items() if name == first}


def load_checkpoint(folder: str | Path, model: Any, optimizer: Any) -> None:
    """Read what :func:`save_checkpoint` wrote, on any number of ranks. Every rank has to call it.

    Weights and state pass through a copy: nothing is changed before all is read.

    Raises:
        ValueError: a folder that is no checkpoint, or not a whole one, or another model's or optimizer's; says what is
            wrong with it."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    folder, core = Path(folder), optimizer.core
    ranks = core.layout.everyone
    if ranks.rank == 0:
        _take_over(folder)
    ranks.barrier()
    optimizer.adopt()
    plain = _read_plain(folder)
    state.check_parameters(state.parameters_of(core), state.check_origin(core.config, plain["lngd"]))
    parameters, weights = _parameters(optimizer), get_model_state_dict(model)
    if plain["parameters"] != list(parameters):
        raise _damaged(folder, "got other parameter groups, accepted: those of this optimizer")
    stored, first_of = _stored(folder / WHOLE, folder), plain["tensors"]
    own = {name: first_of.get(f"model.{name}", f"model.{name}") for name in untied(weights)}
    wanted = {own[name]: torch.empty_like(value) for name, value in untied(weights).items()}
    numbers = {name: number for number, name in enumerate(parameters)}
    states: dict[int, dict[str, Tensor]] = {}
    for name, first in first_of.items():
        owner, _, key = name.removeprefix("optimizer.").rpartition(".")
        if name.startswith("optimizer."):
            if first not in stored:
                raise _damaged(folder, f"{first}: got none, accepted: a tensor")
            if first not in wanted:
                wanted[first] = _place_for(stored[first], parameters[owner], core.layout)
            states.setdefault(numbers[owner], {})[key] = wanted[first]
    read_tensors(folder / WHOLE, wanted, ranks.group, folder)
    groups = [{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in plain["groups"]]
    optimizer.load_state_dict({"state": states, "param_groups": groups, "lngd": plain["lngd"]})
    set_model_state_dict(model, {**weights, **{name: wanted[first] for name, first in own.items()}})


def _place_for(stored: Any, parameter: Tensor, layout: Any) -> Tensor:
    """Memory for a tensor of a parameter's state as it is stored: this rank's rows where the parameter is sharded."""
    size = stored.size
    if is_sharded(parameter) and (len(size) > 1 or size == parameter.shape):
        return layout.empty(size, stored.properties.dtype, parameter.device)
    return torch.empty(size, dtype=stored.properties.dtype)


def write_tensors(folder: Path, tensors: Mapping[str, Any], group: Any) -> None:
    """Write this rank's share of named tensors into a folder; those that are no DTensors are written by one rank."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer, process_group=group, no_dist=not is_distributed())


def read_tensors(
    folder: Path, wanted: dict[str, Any], group: Any, shown: Path | None = None, all_of: bool = False
) -> None:
    """Read what :func:`write_tensors` wrote into tensors of the same names, in place.

    Args:
        all_of: nothing else may be there.

    Raises:
        RuntimeError: there is something else.
        ValueError: a file that cannot be read, a tensor that is missing or has another shape."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    shown = shown or folder  # in errors: the folder that a user knows
    found = _stored(folder, shown)
    foreign = sorted(set(found) - set(wanted)) if all_of else []
    if foreign:
        raise RuntimeError(f"checkpoint {shown}: weights of another model: {', '.join(foreign[:5])}")
    for name, value in wanted.items():
        size = getattr(found.get(name), "size", None)
        if size != value.shape:
            what = "none" if size is None else list(size)
            raise _damaged(shown, f"{name}: got {what}, accepted: a tensor {list(value.shape)}")
    try:
        reader = HuggingFaceStorageReader(str(folder))
        load(wanted, storage_reader=reader, process_group=group, no_dist=not is_distributed())
    except CheckpointException as error:
        causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        raise _damaged(shown, f"its files cannot be read ({causes})") from error


def _stored(folder: Path, shown: Path) -> dict[str, Any]:
    """The tensors in a folder: name → their metadata."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # a header in which anything can be wrong
        raise _damaged(shown, f"its files cannot be read ({type(error).__name__}: {error})") from error


def _read_plain(folder: Path) -> dict[str, Any]:
    file = folder / WHOLE / PLAIN
    if not file.is_file():
        raise _damaged(folder, f"got no {PLAIN}, which is written last: it was not finished, or is none")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder, f"got a damaged {PLAIN} ({error})") from error
    if not isinstance(plain, dict) or not {"lngd", "groups", "parameters", "tensors"} <= set(plain):
        raise _damaged(folder, f"got a damaged {PLAIN}")
    return plain


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"checkpoint {folder}: {what}")


def _parameters(optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's parameters in its state dict's order, by name; those added later by group and place."""
    names = {p: name for name, p in optimizer.core.routing.parameters.items()}
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        found.update({names.get(p, f"param_groups.{number}.{i}"): p for i, p in enumerate(group["params"])})
    return found


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
