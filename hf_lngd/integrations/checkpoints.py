"""Checkpoints: which of them can be used, and loading their weights without losing any.

The Trainer writes ``trainer_state.json`` last; a folder without it was being written when its process ended. Such a
folder is passed over with a warning, one that is named is refused.

`save_pretrained` writes some models (ViT, Swin, …) under older names of their parameters. The Trainer loads such a
file by today's names, finds none of them, and goes on with the weights that it has. `from_pretrained` knows both.
"""

from __future__ import annotations

import copy
import json
import logging
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import LNGDConfig
from ..parallel.ranks import Ranks
from ..routing import unsaved_parameters
from ..state import check_origin, check_parameters
from ..torch_internals import is_fully_sharded, plain_class
from .usage import UsageError

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"
SHARDED = "pytorch_model_fsdp_"  # accelerate's folder of weights under FSDP: this, and a number
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def restores_by_name(model: nn.Module, folder: str) -> bool:
    """True if :func:`load_weights` can stand in for the Trainer's loading: a model of transformers, no adapters."""
    there = Path(folder)
    adapters = any((there / name).exists() for name in _ADAPTERS)
    return isinstance(model, PreTrainedModel) and not adapters and (there / "config.json").is_file()


def freeze_unsaved(model: nn.Module) -> None:
    """Make constants again of what checkpoints leave out: a resumed run would go another way."""
    for parameter in unsaved_parameters(model):
        parameter.requires_grad_(False)


def load_weights(model: Any, folder: str) -> None:
    """Copy the weights of a checkpoint into a model, bit for bit. Of one that FSDP2 has sharded, on every rank.

    Raises:
        RuntimeError: a parameter that only one of the two has, or of another shape. Nothing is changed then.
    """
    if not is_fully_sharded(model):
        model.load_state_dict(_read_weights(model, folder), strict=True)
        return
    ranks, problem, state = Ranks(), None, dict[str, Any]()
    if ranks.rank == 0:
        try:
            state = _read_weights(model, folder)
        except (OSError, RuntimeError, ValueError) as error:
            problem = str(error)
    problem = ranks.broadcast_value(problem, 0)  # else the others would wait for weights
    if problem is not None:
        raise RuntimeError(problem)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _read_weights(model: Any, folder: str) -> dict[str, Tensor]:
    options = {"config": copy.deepcopy(model.config), "dtype": model.dtype, "output_loading_info": True}
    with torch.random.fork_rng():  # weights are drawn before they are loaded; training's random state stays as it is
        loaded, report = plain_class(model).from_pretrained(folder, **options)
    for kind, what in (("missing_keys", "no weights for"), ("unexpected_keys", "weights of another model:")):
        if report[kind]:
            raise RuntimeError(f"checkpoint {folder}: {what} {', '.join(sorted(report[kind])[:5])}")
    return loaded.state_dict()


def problem_of(folder: str | Path) -> str | None:
    """Why training cannot go on from a checkpoint, naming the file; None: it can, as far as files tell.

    Looks at the ends of files, so it is quick: a file that was cut off anywhere is found. Nothing that is read is run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "is no folder"
    if not (folder / STATE).is_file():
        return f"has no {STATE}, which is written last: it was not finished, or is no checkpoint of a Trainer"
    paths = sorted(folder.iterdir())
    problem = next((found for path in paths if (found := _problem_in(path))), None)
    if problem is not None:
        return problem
    others = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
    weights = (  # whole, sharded (FSDP, DeepSpeed), or those of adapters, one folder each
        path.name.startswith((SHARDED.rstrip("_"), "global_step"))
        or (path.suffix in (".safetensors", ".bin", ".pt", ".pth") and not path.name.startswith(others))
        for path in (*paths, *folder.glob("*/*"))
    )
    if not any(weights):
        return "has no weights"
    names = {path.name for path in paths}
    if "optimizer.pt" in names and "scheduler.pt" not in names:
        return "has no scheduler.pt"
    # FSDP and DeepSpeed keep the optimizer in files and folders of their own
    kept = any(name.startswith(("optimizer", "global_step")) for name in names)
    return "has no optimizer.pt" if "scheduler.pt" in names and not kept else None


def _problem_in(path: Path) -> str | None:
    """What is wrong with one file or folder of a checkpoint."""
    try:
        if path.suffix == ".json":
            parts = json.loads(path.read_text(encoding="utf-8"))
            parts = parts.get("weight_map", {}).values() if path.name.endswith(".index.json") else ()
            missing = sorted(part for part in set(parts) if not (path.parent / part).is_file())
            return f"has no {missing[0]}, which {path.name} names" if missing else None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # whose header is whole, and the file as long as it says
                return None
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):  # as torch.save writes them
            raise ValueError
    except (ValueError, OSError, SafetensorError):
        return f"has a damaged {path.name}: it was cut off, or is of another kind"
    if path.is_dir() and path.name.startswith(SHARDED):
        parts = sorted(path.glob("*.safetensors"))
        if not parts:
            return f"has no weights in {path.name} that this Trainer can read: accepted: safetensors, as it writes them"
        return next((f"{found} in {path.name}" for part in parts if (found := _problem_in(part))), None)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Raise UsageError, naming folder and file, for a checkpoint that :func:`problem_of` finds fault with."""
    problem = problem_of(folder)
    if problem is not None:
        raise _refusal(folder, f"{problem}. Accepted: a whole checkpoint-N of a Trainer")


def _refusal(folder: str | Path, what: str) -> UsageError:
    return UsageError("resume_from_checkpoint", f"checkpoint {folder}: {what}")


def check_optimizer(folder: str | Path, config: LNGDConfig | None, parameters: Mapping[str, list[int]]) -> None:
    """Look into ``optimizer.pt``, if there is one, before anything is loaded. Raises UsageError where it is of another
    optimizer, version or model, or of other settings.

    Args:
        config: the settings of LNGD here; None: another optimizer is used.
        parameters: shapes of those that LNGD trains here, by name.
    """
    path = Path(folder) / "optimizer.pt"
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _refusal(folder, f"optimizer.pt cannot be read ({error})") from error
    own = state.get("lngd") if isinstance(state, dict) else None
    if config is None and own is not None:
        raise _refusal(folder, "optimizer.pt is LNGD's, accepted: that of the optimizer used here (or --optim lngd)")
    if config is not None:
        try:
            check_parameters(parameters, check_origin(config, own))
        except ValueError as error:
            raise _refusal(folder, f"optimizer.pt: {error}") from error


def check_same_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """A hook before `load_state_dict`: UsageError for the state of another optimizer, by the names of its settings, or
    of other groups. torch takes many of them, and fails in the next step."""
    given, own = state.get("param_groups") or [{"params": ()}], optimizer.param_groups
    there, here = set(given[0]), set(own[0])  # one alone may have more: of a later version, or of a scheduler
    sizes = [len(group["params"]) for group in given]
    if not (there <= here or here <= there) or sizes != [len(group["params"]) for group in own]:
        what = ", ".join(sorted(there - here)[:4]) or f"groups of {sizes} parameters"
        accepted = "accepted: that of the optimizer used here"
        raise UsageError("resume_from_checkpoint", f"optimizer.pt is another optimizer's (with {what}), {accepted}")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint in a folder that can be used; None: there is none. Warns of each that is passed over."""
    for path in numbered(output_dir):
        problem = problem_of(path)
        if problem is None:
            return str(path)
        logger.warning("checkpoint %s %s. It is passed over.", path, problem)
    return None


def numbered(output_dir: str | Path) -> list[Path]:
    """Folders that are named as checkpoints, the last one first."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = {path: path.name.removeprefix(prefix) for path in Path(output_dir).glob(f"{prefix}*") if path.is_dir()}
    numbered = {path: int(number) for path, number in found.items() if number.isdigit()}
    return sorted(numbered, key=numbered.__getitem__, reverse=True)
