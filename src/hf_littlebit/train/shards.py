"""The shards that FSDP2 leaves with SHARDED_STATE_DICT, read without running code that they might hold.

    pytorch_model_fsdp_0/.metadata       which tensor lies where: a pickle, which torch.distributed.checkpoint loads as such
    pytorch_model_fsdp_0/*.distcp        the tensors, which it reads with weights_only

A pickle names functions to call. `Metadata` reads one whose names are those that torch writes there, and refuses any other.
"""

from __future__ import annotations

import os
import pickle
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_shards"]

# What torch 2.13 writes into .metadata: classes that hold numbers, names and places, and what they are made with.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


class _Metadata(pickle.Unpickler):
    """Unpickles .metadata, and nothing that names anything else than ALLOWED and torch's dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which torch does not write there; loading it could run code, so it is not loaded"
        )


def read_shards(folder: str) -> dict[str, Tensor]:
    """The model's state dict from the files of torch.distributed.checkpoint in `folder`, by its public calls.

    Raises:
        UnpicklingError: if .metadata names what torch does not write.
        ValueError: if it points out of the folder, or to what is no file. Torch raises many others for damaged files.
    """
    import torch.distributed.checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(os.path.join(folder, ".metadata"), "rb") as file:
                metadata = _Metadata(file).load()
            for place in (metadata.storage_data or {}).values():
                if place.relative_path != os.path.basename(place.relative_path):
                    raise ValueError(f".metadata points to {place.relative_path!r}, which is not in the folder")
            if metadata.storage_meta is None:
                metadata.storage_meta = dcp.metadata.StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    reader = Reader(folder)
    entries = reader.read_metadata().state_dict_metadata
    whole: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, dcp.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is one process, as is meant here
        try:
            dcp.load(whole, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:
            # It is no Exception, but a BaseException, which holds what happened in each process.
            raise next(iter(error.failures.values()))[0] from error
    return {name.removeprefix("model."): value for name, value in whole.items()}
