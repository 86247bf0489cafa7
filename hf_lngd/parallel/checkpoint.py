"""A checkpoint to which every rank writes its own share, in safetensors, by `torch.distributed.checkpoint`: nothing is
gathered, and nothing in it can be run. What FSDP2 has sharded is written, and read, in the shards of whoever does so;
what one rank owns is written by this rank. So it fits any number of ranks, DDP and one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import state
from ..core import Core
from ..topology import Topology
from ..torch_internals import local
from .ranks import is_distributed

# What of the optimizer is no tensor; written last.
PLAIN = "lngd.json"
# Within its folder, where a checkpoint is written, and where it is once it is whole.
PARTIAL, WHOLE = ".partial", "lngd"


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: Any) -> None:
    """Write a model's weights and LNGD's state. Every rank has to call it, with a folder that all of them see.

    What was saved there before stays until the new one is whole, whenever a process dies."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder, core = Path(folder), optimizer.core
    ranks = core.layout.everyone
    if ranks.rank == 0:
        _take_over(folder)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        (folder / PARTIAL).mkdir(parents=True)
    core.states = optimizer.state
    names = _names(core, optimizer.param_groups)
    tensors = {f"model.{name}": value for name, value in untied(get_model_state_dict(model)).items()}
    in_layers = core.routing.in_layers()
    for parameter, own in core.states.items():
        others = {key: value for key, value in own.items() if parameter not in in_layers or key == "lost"}
        tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in others.items() if parameter in names}
    tensors |= _of_layers(core, names)
    ranks.barrier()  # what was left there is gone
    write_tensors(folder / PARTIAL, tensors, ranks.group)
    kept = sorted({name for own in ranks.all_gather_value(sorted(tensors)) for name in own})
    if ranks.rank == 0:
        groups = [{k: _plain(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        members = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        text = json.dumps({"lngd": state.describe(core), "groups": groups, "members": members, "tensors": kept})
        unfinished = folder / PARTIAL / f"{PLAIN}.tmp"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(folder / PARTIAL / PLAIN)  # from here on the folder is whole
        _take_over(folder)
    ranks.barrier()


def _take_over(folder: Path) -> None:
    """Put what was saved in the place of what was there, if it is whole. Begun again where a process was killed in it,
    it ends as it would have."""
    if (folder / PARTIAL / PLAIN).is_file():
        shutil.rmtree(folder / WHOLE, ignore_errors=True)
        (folder / PARTIAL).replace(folder / WHOLE)


def untied(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's state dict, each once: of names that are tied the first one."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, value in weights.items():
        if isinstance(value, Tensor):
            here = local(value)
            key = (here.data_ptr(), here.shape, here.stride()) if here.numel() else name
            found.setdefault(key, (name, value))
    return dict(found.values())


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: Any) -> None:
    """Read what :func:`save_checkpoint` wrote, on any number of ranks. Every rank has to call it.

    Weights and state pass through a copy of this rank's share: nothing is changed before all is read.

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
    described = state.check_origin(core.config, plain["lngd"])
    state.check_parameters(state.parameters_of(core), described)
    before = core.built
    topology = Topology.from_state(described["topology"]) if described["topology"] else None
    try:
        state.empty(core, topology)
        weights, others = _read(folder, plain, model, core, _names(core, optimizer.param_groups))
    except BaseException:
        core.restore(before)
        raise
    set_model_state_dict(model, {**get_model_state_dict(model), **weights})
    core.states = optimizer.state
    state.attach(core, topology, others, described["steps"])
    by_members = {tuple(sorted(own)): group for own, group in zip(plain["members"], plain["groups"], strict=True)}
    names = _names(core, optimizer.param_groups)
    for group in optimizer.param_groups:
        saved = by_members.get(tuple(sorted(names[p] for p in group["params"])), {})
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    optimizer.after_loading()


def _read(
    folder: Path, plain: Mapping[str, Any], model: nn.Module, core: Core, names: Mapping[Any, str]
) -> tuple[dict[str, Any], dict[Any, dict[str, Tensor]]]:
    """This rank's share of the layers' tensors, into these; of weights and of the other states."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    weights = {name: torch.empty_like(value) for name, value in untied(get_model_state_dict(model)).items()}
    states: dict[Any, dict[str, Tensor]] = {}
    kept, in_layers = set(plain["tensors"]), core.routing.in_layers()
    for parameter, name in names.items():
        new = {} if parameter in in_layers else core.new_state(parameter)
        new["lost"] = torch.zeros_like(parameter.detach())
        own = {key: value for key, value in new.items() if f"optimizer.{name}.{key}" in kept}
        if own:
            states[parameter] = own
    wanted = {f"model.{name}": value for name, value in weights.items()}
    wanted |= {f"optimizer.{names[p]}.{key}": value for p, own in states.items() for key, value in own.items()}
    read_tensors(folder / WHOLE, wanted | _of_layers(core, names), core.layout.everyone.group, folder)
    return weights, states


def _of_layers(core: Core, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """This rank's tensors of layers by name; what a group shares once, by the name of its first member."""
    return {
        f"optimizer.{names[e.parameter]}.{e.key}": e.value
        for e in core.entries()
        if e.value is not None and (not e.shared or e.layer == e.group)
    }


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
    shown = shown or folder  # in errors: the folder that a user knows
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:  # a header in which anything can be wrong
        raise _damaged(shown, f"its files cannot be read ({type(error).__name__}: {error})") from error
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


def _read_plain(folder: Path) -> dict[str, Any]:
    file = folder / WHOLE / PLAIN
    if not file.is_file():
        raise _damaged(folder, f"got no {PLAIN}, which is written last: it was not finished, or is none")
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder, f"got a damaged {PLAIN} ({error})") from error
    if not isinstance(plain, dict) or not {"lngd", "groups", "members", "tensors"} <= set(plain):
        raise _damaged(folder, f"got a damaged {PLAIN}")
    return plain


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"checkpoint {folder}: {what}")


def _names(core: Core, groups: list[dict[str, Any]]) -> dict[Any, str]:
    """The names of the model's parameters, and of those added later by group and place."""
    names = {p: name for name, p in core.routing.parameters.items()}
    for number, group in enumerate(groups):
        names.update({p: f"param_groups.{number}.{i}" for i, p in enumerate(group["params"]) if p not in names})
    return names


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value
