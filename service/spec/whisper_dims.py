"""The sizes of Whisper checkpoints, known without loading one: a table for OpenAI's, config.json for all others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from service.spec import look

CONFIG = "config.json"
ENGLISH_VOCABULARY = 51864
"""Vocabulary of the `.en` checkpoints; multilingual ones have at least one token more."""


@dataclass(frozen=True)
class WhisperDims:
    """What determines every module's shape. Names and defaults are those of transformers' WhisperConfig."""

    d_model: int = 384
    encoder_layers: int = 4
    decoder_layers: int = 4
    encoder_attention_heads: int = 6
    decoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536
    vocab_size: int = 51865
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WhisperDims:
        """The dims that a config.json holds; a key that it leaves out has transformers' default.

        Raises:
            ValueError: a value is not a positive whole number.
        """
        values = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        for name, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, not a positive whole number")
        return cls(**values)

    @property
    def english_only(self) -> bool:
        """Whether the checkpoint has no language and task tokens."""
        return self.vocab_size <= ENGLISH_VOCABULARY


def _openai(width: int, layers: int, heads: int, **more: int) -> WhisperDims:
    return WhisperDims(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=more.pop("decoder_layers", layers),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        **more,
    )


OPENAI: dict[str, WhisperDims] = {
    "openai/whisper-tiny": _openai(384, 4, 6),
    "openai/whisper-tiny.en": _openai(384, 4, 6, vocab_size=51864),
    "openai/whisper-base": _openai(512, 6, 8),
    "openai/whisper-base.en": _openai(512, 6, 8, vocab_size=51864),
    "openai/whisper-small": _openai(768, 12, 12),
    "openai/whisper-small.en": _openai(768, 12, 12, vocab_size=51864),
    "openai/whisper-medium": _openai(1024, 24, 16),
    "openai/whisper-medium.en": _openai(1024, 24, 16, vocab_size=51864),
    "openai/whisper-large": _openai(1280, 32, 20),
    "openai/whisper-large-v2": _openai(1280, 32, 20),
    "openai/whisper-large-v3": _openai(1280, 32, 20, vocab_size=51866, num_mel_bins=128),
    "openai/whisper-large-v3-turbo": _openai(1280, 32, 20, decoder_layers=4, vocab_size=51866, num_mel_bins=128),
}
"""Source: config.json of each checkpoint on the hub."""


class NotWhisperError(ValueError):
    """A folder or cached checkpoint that is no Whisper; the message says what it is."""


def is_folder(base_model: str) -> bool:
    """Whether a name means a local folder: it exists, or it is written as a path."""
    return base_model.startswith(("./", "../", "/", "~")) or base_model in {".", ".."} or look.exists(base_model)


def dims_of(base_model: str) -> WhisperDims | None:
    """The dims of a checkpoint, from what is on this machine.

    Args:
        base_model: hub id or local folder.

    Returns:
        None for a hub id that is neither in the table nor in the hub's cache: only the cluster can tell.

    Raises:
        NotWhisperError: the folder holds no Whisper checkpoint, or the cached model is none.
    """
    if is_folder(base_model):
        return _dims_in(Path(look.absolute(base_model)))
    if base_model in OPENAI:
        return OPENAI[base_model]
    snapshot = cached_snapshot(base_model)
    return _dims_in(snapshot) if snapshot else None


def cached_snapshot(hub_id: str) -> Path | None:
    """The folder of a hub model in the local cache: the commit that `main` points to, else the newest one there."""
    try:
        home = hub_cache() / ("models--" + hub_id.replace("/", "--"))
        main = home / "refs" / "main"
        if main.is_file():
            snapshot = home / "snapshots" / main.read_text(encoding="utf-8").strip()
            return snapshot if (snapshot / CONFIG).is_file() else None
        found = [path.parent for path in home.glob(f"snapshots/*/{CONFIG}")]
        return max(found, key=lambda folder: folder.stat().st_mtime) if found else None
    except (OSError, ValueError):
        return None  # no readable cache is no cache


def hub_cache() -> Path:
    """Where huggingface_hub keeps its models, by the same variables that it reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _dims_in(folder: Path) -> WhisperDims:
    path = folder / CONFIG
    if look.is_file(folder):
        raise NotWhisperError("is a file; give a hub id, or a folder with a checkpoint in transformers' format")
    if not look.is_dir(folder):
        raise NotWhisperError("is no folder on this machine; give a hub id, or a folder that exists")
    if not look.is_file(path):
        if (folder / "adapter_config.json").is_file():
            raise NotWhisperError("holds a PEFT adapter, not a model; give the folder of the merged model")
        if (folder / "merged" / CONFIG).is_file():
            raise NotWhisperError(f"is the root of a run; its model is in {folder / 'merged'}")
        raise NotWhisperError(f"holds no {CONFIG}; give a folder with a checkpoint in transformers' format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise NotWhisperError(f"has a {CONFIG} that is not the one of a transformers checkpoint") from None
    if kind != "whisper":
        raise NotWhisperError(f"is a {kind!r} model, not a Whisper")
    try:
        return WhisperDims.from_config(config)
    except ValueError as error:
        raise NotWhisperError(f"has a {CONFIG} that cannot be used: {error}") from None


def known_dims(base_model: str) -> WhisperDims | None:
    """The sizes of a model that is OpenAI's or at hand; None: it is neither."""
    try:
        return dims_of(base_model)
    except NotWhisperError:
        return None
