"""A checkpoint to which every rank writes its own share, by `torch.distributed.checkpoint`: nothing is gathered.

Weights and LNGD's state are in it. What FSDP2 has sharded is written, and read, in the shards of whoever does so; what
one rank owns is written by this rank. So it fits any number of ranks, DDP and one process.
"""

from __future__ import annotations

import io
import pickle
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import serialization
from .adoption import meet_shards
from .curvature.context import callers
from .distributed import is_distributed
from .fallback import ROW_WISE
from .gathering import LOST, gather_flags
from .sharding import local

if TYPE_CHECKING:
    from .optimizer import LNGD
    from .sharded_files import ShardedFiles

# `torch.distributed.checkpoint` writes it last.
METADATA = ".metadata"
# Where a checkpoint is written, within its folder, until it is whole.
PARTIAL = ".partial"
_KINDS = ("groups", "layers", "fallback", "embeddings", "rounding")
_PLAIN = "optimizer.plain"


def save_checkpoint(folder: str | Path, model: nn.Module, optimizer: LNGD) -> None:
    """Write a model's weights and LNGD's state. Every rank has to call it, with a folder that all of them see.

    What was saved there before stays until the new one is whole, whenever a process dies.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    folder = Path(folder)
    if optimizer._ranks.rank == 0:
        _take_over(folder)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    meet_shards(optimizer)
    own = serialization.share_of(optimizer)
    plain = {name: value for name, value in own.items() if name not in _KINDS}
    if optimizer._shards is not None:
        plain["flags"] = gather_flags(optimizer._shards, own["flags"])
    plain["fallback"], plain["rounding"] = list(own["fallback"]), list(own["rounding"])
    plain["embeddings"] = [name for name, state in own["embeddings"].items() if state]
    plain["torch"] = torch.optim.Optimizer.state_dict(optimizer)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    whole = optimizer._ranks.share(buffer.getvalue(), 0)
    tensors = {kind: own[kind] for kind in _KINDS}
    state = {"plain": torch.frombuffer(bytearray(whole), dtype=torch.uint8), **_as_sharded(optimizer, tensors)}
    weights = get_model_state_dict(model)
    optimizer._ranks.everyone(None)  # what was left there is gone
    everything, group = {"model": weights, "optimizer": _without_empty(state)}, optimizer._ranks.group
    dcp.save(everything, checkpoint_id=folder / PARTIAL, process_group=group, no_dist=not is_distributed())
    optimizer._ranks.everyone(None)  # all is written
    if optimizer._ranks.rank == 0:
        _take_over(folder)
    optimizer._ranks.everyone(None)


def _take_over(folder: Path) -> None:
    """Put what was saved in the place of what was there, if it is whole. Begun again where a process was killed in it,
    it ends as it would have."""
    partial = folder / PARTIAL
    if not (partial / METADATA).is_file():
        return
    (folder / METADATA).unlink(missing_ok=True)
    for path in partial.glob("*.distcp"):
        path.replace(folder / path.name)
    (partial / METADATA).replace(folder / METADATA)
    partial.rmdir()


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: LNGD) -> None:
    """Read what :func:`save_checkpoint` wrote, on any number of ranks. Every rank has to call it.

    Weights pass through a copy of this rank's share: nothing is changed before all is read.

    Raises:
        ValueError: a folder that is no checkpoint, or not a whole one, or another model's or optimizer's; says what is
            wrong with it. Nothing in it is run.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    from .sharded_files import ShardedFiles, tensors_of

    folder = Path(folder)
    if optimizer._ranks.rank == 0:
        _take_over(folder)
    optimizer._ranks.everyone(None)
    files, group = ShardedFiles(folder), optimizer._ranks.group
    meet_shards(optimizer)
    plain = _read_plain(files, group)
    serialization.check_plain(optimizer, plain)
    made = serialization.preconditioner_of(optimizer, plain)
    plain_names = {**plain, "embeddings": {e.name: e.name in plain["embeddings"] for e in optimizer._embeddings}}
    named = serialization.fallback_names(optimizer)
    expected = serialization.shapes_of(optimizer, plain_names, made)
    empty = {
        **serialization.bank_states(made),
        "fallback": {name: optimizer._fallback.new_moments(named[name]) for name in plain["fallback"]},
        "rounding": {name: {LOST: torch.zeros_like(local(named[name].detach()))} for name in plain["rounding"]},
        "embeddings": {e.name: e.new_state() if e.name in plain["embeddings"] else {} for e in optimizer._embeddings},
    }
    weights = {k: torch.empty_like(v) if isinstance(v, Tensor) else v for k, v in get_model_state_dict(model).items()}
    wanted = tensors_of(weights, "model")
    for kind, states in expected.items():
        wanted |= {f"optimizer.{kind}.{n}.{key}": shape for n, own in states.items() for key, shape in own.items()}
    files.check_shapes(wanted)
    files.read_into({"model": weights, "optimizer": _without_empty(_as_sharded(optimizer, empty))}, group)
    set_model_state_dict(model, weights)
    torch.optim.Optimizer.load_state_dict(optimizer, plain["torch"])
    serialization.attach(optimizer, plain, made, empty)
    optimizer._ranks_agree = False
    optimizer._arm()


def _read_plain(files: ShardedFiles, group: Any) -> dict[str, Any]:
    """What of LNGD's state is no tensor."""
    if _PLAIN not in files.shapes:
        raise ValueError(f"checkpoint {files.folder}: got one without LNGD's state, accepted: one of save_checkpoint's")
    coded = torch.empty(files.shapes[_PLAIN], dtype=torch.uint8)
    files.read_into({"optimizer": {"plain": coded}}, group)
    try:
        return torch.load(io.BytesIO(coded.numpy().tobytes()), weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {files.folder}: LNGD's state cannot be read ({error})") from error


def refuse_torchs_own() -> None:
    """Raise RuntimeError if torch's get_ or set_optimizer_state_dict is on the stack.

    They keep what is under ``state`` and ``param_groups`` only, so would lose all of LNGD's state, and where that is
    empty they make a step of zeros to fill it.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    if module is not None and any(frame.f_code.co_filename == module.__file__ for frame in callers()):
        raise RuntimeError(
            "LNGD: got a call from torch.distributed.checkpoint.state_dict (get_optimizer_state_dict, accelerate's "
            "save_state under FSDP), which loses LNGD's state, accepted: hf_lngd.save_checkpoint and load_checkpoint, "
            "or optimizer.state_dict() on all ranks"
        )


def _without_empty(state: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts without those that hold nothing: they would be taken for entries."""
    inner = {key: _without_empty(value) if isinstance(value, dict) else value for key, value in state.items()}
    return {key: value for key, value in inner.items() if not isinstance(value, dict) or value}


def _as_sharded(optimizer: LNGD, tensors: dict[str, Any]) -> dict[str, Any]:
    """This rank's share with what has a parameter's rows as sharded tensors of the same memory."""
    shards = optimizer._shards
    if shards is None:
        return tensors
    named = serialization.fallback_names(optimizer)

    def of(own: dict[str, Tensor], keys: tuple[str, ...], parameter: Tensor) -> dict[str, Any]:
        return {key: shards.as_sharded(value, parameter) if key in keys else value for key, value in own.items()}

    return {
        **tensors,
        "fallback": {name: of(own, ROW_WISE, named[name]) for name, own in tensors["fallback"].items()},
        "rounding": {name: of(own, (LOST,), named[name]) for name, own in tensors["rounding"].items()},
        "embeddings": {e.name: of(tensors["embeddings"][e.name], e.row_wise, e.table) for e in optimizer._embeddings},
    }
