"""Tensors by name in a folder of safetensors files: one file that holds them whole, or one of each rank
with its parts.

The layout is that of torch.distributed.checkpoint's storage for Hugging Face, which reads it and cuts it anew
for any number of ranks. Its usual storage keeps a pickle beside the tensors, which we read from no disk. Its
writer holds a rank's part twice more in memory; here it is written from where it lies.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.ranks import Ranks
from model.weights import load_tensors, save_tensors

OFFSETS = "DCP_SHARDING_INFO"
"""Name under which torch.distributed.checkpoint looks for where the tensors of a file begin in the whole."""


@dataclass(frozen=True)
class Part:
    """What one process writes of tensors that all of them hold together."""

    tensors: Mapping[str, Tensor]
    """On the host, as far as this process is the first that has them."""
    offsets: Mapping[str, list[int]]
    """Where they begin in the whole."""

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], ranks: Ranks, *, is_copied: bool, is_teller: bool
    ) -> Self:
        """The own part; `is_copied` if it may be written after the tensors have changed, `is_teller` if this
        process tells of whole ones."""
        own = {
            name: value.detach()
            for name, value in tensors.items()
            if (_is_told(value, ranks) if isinstance(value, DTensor) else is_teller)
        }
        return cls(
            {name: _local(value).to("cpu", copy=is_copied) for name, value in own.items()},
            {name: _offsets(value) for name, value in own.items()},
        )

    def write(self, folder: Path, place: int) -> None:
        """Write it as the file of the process number `place`; none where there is nothing to write."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tensors:
            told = {name: {"saved_offsets": offsets} for name, offsets in self.offsets.items()}
            path = folder / f"{place:05d}.safetensors"
            save_tensors(path, self.tensors, {OFFSETS: json.dumps(told, sort_keys=True)})


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, put together, on the CPU."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return load_tensors(files[0])
    found = {
        name: torch.empty_like(outline, device="cpu")
        for name, outline in outlines_in(folder).items()
    }
    read_into(folder, found)
    return found


def outlines_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder without its content, on the meta device."""
    known = _reader(folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(found.size, dtype=found.properties.dtype, device="meta")
        for name, found in cast("Mapping[str, Any]", known).items()
    }


def read_into(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill tensors with those of the same names in a folder, of which ranks read what they hold."""
    from torch.distributed.checkpoint.state_dict_loader import load

    if not targets:
        # Of an optimizer before its first update.
        return
    with warnings.catch_warnings():
        # That ranks read each for itself is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(
            {name: target.detach() for name, target in targets.items()},
            storage_reader=_reader(folder),
            no_dist=True,
        )


def _reader(folder: Path) -> Any:
    # Late: it takes half a second to import, and most trainings hold whole tensors.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))


def _is_told(value: DTensor, ranks: Ranks) -> bool:
    """Whether this process is the first of those that hold the same."""
    mesh = value.device_mesh
    place = mesh.get_coordinate() or ()
    copies = [at for at, how in zip(place, value.placements, strict=True) if how.is_replicate()]
    # Tensors that are not cut between peers are spread over the other mesh alone.
    is_cut = "tensor" in (mesh.mesh_dim_names or ())
    return not any(copies) and (is_cut or ranks.peer == 0) and value.to_local().numel() > 0


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def _offsets(value: Tensor) -> list[int]:
    if not isinstance(value, DTensor):
        return [0] * value.dim()
    [chunk] = value.__create_chunk_list__()
    return list(chunk.offsets)
