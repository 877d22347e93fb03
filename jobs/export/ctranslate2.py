"""CTranslate2 for faster-whisper, by CTranslate2's own converter."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from ctranslate2.converters import TransformersConverter
from ctranslate2.specs.model_spec import PyTorchVariable
from transformers import WhisperForConditionalGeneration

from jobs.export.checkpoint import Checkpoint
from jobs.export.weights import HEAD

BESIDE = ("tokenizer.json", "preprocessor_config.json")
"""What faster-whisper reads beside the model."""


def write_ctranslate2(checkpoint: Checkpoint, folder: Path, precision: str) -> Path:
    """Write the model, its vocabulary and alignment heads, tokenizer and feature extractor; returns the folder."""
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as scratch:
        made = Path(scratch) / "model"
        _Converter(checkpoint).convert(str(made), quantization=precision)
        for path in made.iterdir():
            shutil.move(path, folder / path.name)
    return folder


class _Converter(TransformersConverter):
    """CTranslate2's converter, whose model's weights stay in the checkpoint's files until they are written."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(str(checkpoint.folder), copy_files=list(BESIDE))
        self._checkpoint = checkpoint

    def _load(self) -> Any:
        spec = super()._load()
        spec._visit(_protect)
        return spec

    def load_model(self, *_: Any, **__: Any) -> Any:
        checkpoint = self._checkpoint
        with torch.device("meta"):
            model = WhisperForConditionalGeneration(checkpoint.config)
        weights = {name: checkpoint.weights[name] for name in checkpoint.weights}
        tied = HEAD not in weights
        missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
        if missing != ([HEAD] if tied else []):
            raise ValueError(f"the merged checkpoint lacks {', '.join(missing[:3])}")
        if tied:
            model.proj_out.weight = model.model.decoder.embed_tokens.weight
        model.generation_config = checkpoint.generation
        return model


class _Mapped(PyTorchVariable):
    """A weight in the checkpoint's file, of which CTranslate2 gets a copy: it quantises in place, and so would copy the
    file's pages into memory one by one until all of them are there, changed for every later reader of the checkpoint.
    """

    def numpy(self) -> Any:
        return super().numpy().copy()


def _protect(spec: Any, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        setattr(spec, name.rsplit("/", 1)[-1], _Mapped(value))
