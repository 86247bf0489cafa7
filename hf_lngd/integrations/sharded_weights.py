"""Weights that FSDP2 has sharded, in safetensors, by `torch.distributed.checkpoint`: nothing in these files can be run.
Each rank writes its own share, and of what several ranks have each tensor is written by one."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter, load, save

from ..parallel.ranks import is_distributed
from ..torch_internals import plain_name


def untied(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict with each tensor once: of parameters that are tied under the first name."""
    once, every = ({plain_name(name) for name, _ in model.named_parameters(remove_duplicate=d)} for d in (True, False))
    return {name: value for name, value in weights.items() if name in once or name not in every}


def write_tensors(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Write this rank's share of named tensors into a folder. Every rank has to call it."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer, no_dist=not is_distributed())


def read_tensors(folder: Path, wanted: dict[str, Any]) -> None:
    """Read what :func:`write_tensors` wrote into tensors of the same names, in place. Every rank has to call it.

    Raises:
        RuntimeError: there is something else.
        ValueError: a file that cannot be read, a tensor that is missing, not whole, or has another shape."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    except Exception as error:  # a header in which anything can be wrong
        raise ValueError(f"checkpoint {folder}: its files cannot be read ({type(error).__name__}: {error})") from error
    foreign = sorted(set(found) - set(wanted))
    if foreign:
        raise RuntimeError(f"checkpoint {folder}: weights of another model: {', '.join(foreign[:5])}")
    for name, value in wanted.items():
        there = found.get(name)
        whole = there is not None and sum(prod(chunk.sizes) for chunk in there.chunks) == prod(there.size)
        if there is None or there.size != value.shape or not whole:
            what = "none" if there is None else list(there.size) if whole else "a part"
            raise ValueError(f"checkpoint {folder}: {name}: got {what}, accepted: a tensor {list(value.shape)}")
    load(wanted, storage_reader=reader, no_dist=not is_distributed())
