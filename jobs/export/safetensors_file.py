"""Writing safetensors files tensor by tensor; the library's own writer wants all of them in memory.

The format, by its documentation: the header's length (uint64, little-endian), a JSON header with each tensor's dtype,
shape and place, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


def write_checkpoint(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    max_shard_bytes: int = 4 << 30,
) -> list[Path]:
    """Write tensors as `model.safetensors`, or in shards with an index as transformers names them.

    Args:
        folder: where to.
        tensors: names and tensors, in the order of `shapes`.
        shapes: the shape of each.
        dtype: of all of them.
        max_shard_bytes: how large a file may grow; a single tensor may be larger.

    Returns:
        the weight files.
    """
    shards = _shards(shapes, dtype.itemsize, max_shard_bytes)
    count, source = len(shards), iter(tensors)
    names = [
        "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        for number in range(1, count + 1)
    ]
    for file, shard in zip(names, shards, strict=True):
        with open(folder / file, "wb") as out:
            out.write(_header({name: shapes[name] for name in shard}, dtype))
            for name in shard:
                found, tensor = next(source)
                if found != name or tuple(tensor.shape) != shapes[name] or tensor.dtype != dtype:
                    raise ValueError(f"{found} {tuple(tensor.shape)}: {name} {shapes[name]} expected")
                out.write(tensor.contiguous().view(torch.uint8).numpy().data)
    if count > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    place, entries = 0, {}
    for name, shape in shapes.items():
        end = place + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return struct.pack("<Q", len(header)) + header


def _shards(shapes: dict[str, tuple[int, ...]], item_size: int, most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * item_size
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
