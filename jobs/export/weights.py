"""A checkpoint's tensors, one at a time: mapped from its files, so that only what is used is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PREFIX = "model."
HEAD = "proj_out.weight"


class Weights:
    """The tensors of a Whisper checkpoint by their names in transformers.

    Args:
        files: its weight files: safetensors, or pickles of PyTorch.

    Raises:
        ValueError: a file is neither.
    """

    def __init__(self, files: list[Path]) -> None:
        self._where: dict[str, tuple[Any, str]] = {}
        for file in files:
            source: Any = safe_open(file, framework="pt") if file.suffix == ".safetensors" else _pickled(file)
            for key in source.keys():  # noqa: SIM118  # safe_open is no dict
                name = key if key.startswith((PREFIX, "proj_out.")) else PREFIX + key
                self._where[name] = source, key

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, backed by its file.

        Raises:
            KeyError: the checkpoint has none of that name.
        """
        source, key = self._where[name]
        tensor: Tensor = source[key] if isinstance(source, dict) else source.get_tensor(key)
        return tensor


def _pickled(file: Path) -> Any:
    """A pickle's tensors, mapped from the file; one in the form of before PyTorch 1.6 is read whole. No code is run."""
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:
        return torch.load(file, map_location="cpu", weights_only=True)
