"""What `torch.distributed.checkpoint` wrote, read without running anything that is in it.

Torch reads ``.metadata``, and entries that are no tensors, with plain pickle, which runs what a file tells it to. Here
only the classes that torch itself puts there are made, and entries are read with ``weights_only=True``. Takes a second
to import, so it is imported where a checkpoint is read.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

from .distributed import is_distributed
from .sharded_checkpoint import METADATA

_FILLED = (
    metadata.ChunkStorageMetadata,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata.BytesStorageMetadata,
    metadata.StorageMeta,
    metadata.Metadata,
    metadata.MetadataIndex,
    _StorageInfo,
)
_MADE = {(made.__module__, made.__qualname__): made for made in (*_FILLED, metadata._MEM_FORMAT_ENCODING, torch.Size)}
_MADE["torch", "Size"] = torch.Size


class _Path:
    """In the place of a path, which nothing here needs: pathlib's classes are not given to a file to play with."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts


def _layout(name: str) -> torch.layout:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise pickle.UnpicklingError(f"got the layout {name!r}")
    return found


# Torch's in Python: that in C cannot be told what may be filled.
_Unpickler: Any = pickle._Unpickler


class _Restricted(_Unpickler):
    """Makes what is in `_MADE`, dtypes, layouts and stand-ins for paths; nothing else, and changes no class."""

    dispatch = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MADE:
            return _MADE[module, name]
        if module.split(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return _Path
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        found = getattr(torch, name, None) if module == "torch" else None
        if not isinstance(found, torch.dtype):
            raise pickle.UnpicklingError(f"got {module}.{name}, which is no part of such a file")
        return found

    def load_build(self) -> None:
        if type(self.stack[-2]) not in (*_FILLED, _Path):  # a class or a function would stay changed
            raise pickle.UnpicklingError(f"got a state for {self.stack[-2]!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class _Reader(FileSystemReader):
    """Torch's reader, of a ``.metadata`` that was read."""

    def __init__(self, folder: Path, read: metadata.Metadata) -> None:
        super().__init__(folder)
        self._read = read

    def read_metadata(self) -> metadata.Metadata:  # type: ignore[override]
        return self._read


class _Planner(DefaultLoadPlanner):
    """Torch's planner, which reads what is no tensor as torch reads tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        found = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)


class ShardedFiles:
    """A folder that `torch.distributed.checkpoint` wrote.

    Attributes:
        shapes: of each tensor in it, by name.

    Raises:
        ValueError: it has no ``.metadata``, or one that is damaged or holds anything else; a file is shorter than it
            should be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / METADATA
        if not file.is_file():
            raise self._refused(f"got no {METADATA}, which is written last: it was not finished, or is none")
        try:
            with file.open("rb") as opened:
                self._metadata = _checked(_Restricted(opened).load())
        except Exception as error:  # a pickle, in which anything can be wrong
            raise self._refused(f"got a damaged {METADATA} ({type(error).__name__}: {error})") from error
        for info in self._metadata.storage_data.values():
            path = self.folder / info.relative_path
            size = path.stat().st_size if path.is_file() else None
            if size is None or size < info.offset + info.length:
                what = "no file" if size is None else f"{size} bytes"
                wanted = f"at least {info.offset + info.length} bytes: it was cut off"
                raise self._refused(f"{info.relative_path}: got {what}, accepted: {wanted}")
        entries = self._metadata.state_dict_metadata
        self.shapes = {n: e.size for n, e in entries.items() if type(e) is metadata.TensorStorageMetadata}

    def check_shapes(self, wanted: Mapping[str, torch.Size]) -> None:
        """Raise ValueError unless all these tensors are there, in these shapes."""
        for name, shape in wanted.items():
            if self.shapes.get(name) != shape:
                found = list(self.shapes[name]) if name in self.shapes else "none"
                raise self._refused(f"{name}: got {found}, accepted: a tensor {list(shape)}")

    def read_into(self, state: dict[str, Any], group: Any = None) -> None:
        """Fill the tensors of a nested dict, replace what else is in it. A collective of the group.

        Raises:
            ValueError: a file that cannot be read; on every rank.
        """
        reader = _Reader(self.folder, self._metadata)
        try:
            load(state, storage_reader=reader, planner=_Planner(), process_group=group, no_dist=not is_distributed())
        except CheckpointException as error:
            causes = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
            raise self._refused(f"its files cannot be read ({causes})") from error

    def _refused(self, what: str) -> ValueError:
        return ValueError(f"checkpoint {self.folder}: {what}")


def _checked(found: Any) -> metadata.Metadata:
    """What was read, if it is made as torch makes it. TypeError or ValueError if it is not."""
    if type(found) is not metadata.Metadata:
        raise TypeError(f"got {type(found).__name__}, accepted: torch's Metadata")
    for entry in found.state_dict_metadata.values():
        if type(entry) not in (metadata.TensorStorageMetadata, metadata.BytesStorageMetadata):
            raise TypeError(f"got an entry of {type(entry).__name__}")
    for info in found.storage_data.values():
        if type(info) is not _StorageInfo or Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"got {info!r}, accepted: a place in a file of this folder")
    if found.storage_meta is None:
        found.storage_meta = metadata.StorageMeta()
    return found


def tensors_of(state: Mapping[str, Any], prefix: str) -> dict[str, torch.Size]:
    """Shapes of a dict's tensors, by the names that they have in a checkpoint of ``{prefix: state}``."""
    return {f"{prefix}.{name}": value.shape for name, value in state.items() if isinstance(value, Tensor)}
