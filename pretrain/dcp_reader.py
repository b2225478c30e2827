"""Reading sharded checkpoints as data: torch's `.metadata` is a pickle, which could run code of whoever wrote it.

`SafeReader` takes the place of `dcp.FileSystemReader` wherever a checkpoint is read. It builds nothing but the classes
that describe tensors and where they lie, refuses entries that are no tensors (torch unpickles those unrestricted when
they are loaded), and files outside the checkpoint's folder.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # a table of names
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath")),
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "WindowsPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ValueError(f"names {module}.{name}, which has no place in a description of tensors")


def read_metadata(file: Path) -> Metadata:
    """The description of a sharded checkpoint. Raises ValueError that says what is wrong with the file."""
    try:
        metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        strange = [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]
        paths = [place.relative_path for place in storage.values()]
        outside = [path for path in paths if path == ".." or len(PurePath(path).parts) != 1]
    except Exception as error:  # whatever a damaged or hostile pickle brings up
        raise ValueError(f"{file}: not read, for it is damaged or no checkpoint of this project: {error}") from None
    if strange:
        raise ValueError(f"{file}: {strange[0]!r} is no tensor; such an entry could run code, and none is read")
    if outside:
        raise ValueError(f"{file}: names a file outside its folder, {outside[0]!r}")
    return metadata


class SafeReader(dcp.FileSystemReader):
    """Reads a folder of torch.distributed.checkpoint whose description is not trusted."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        metadata = read_metadata(Path(self.path) / name)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
