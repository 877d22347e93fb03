"""Loading a Whisper checkpoint, and knowing exactly which one it was."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from jobs.tokens import Prompter
from service.artifacts import BaseModelRecord
from service.errors import Fault, NotFoundError, SpecError
from service.spec.paths import is_stored
from service.spec.whisper_dims import WhisperDims
from service.storage import Storage, sha256_of

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


BASE_MODEL = "training.base_model"
"""What errors call a checkpoint, if nothing else is said."""

_NOT_READABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, HfHubHTTPError)


@dataclass
class Whisper:
    """A checkpoint in memory: the model in float32, its processor, and the precision that it was stored in."""

    name: str
    model: Any
    processor: Any
    stored_dtype: torch.dtype

    @property
    def multilingual(self) -> bool:
        """Whether it has language and task tokens."""
        return is_multilingual(self.model.generation_config, self.model.config)

    def prompter(self) -> Prompter:
        """What builds decoder tokens for this checkpoint."""
        return Prompter(
            self.processor.tokenizer,
            multilingual=self.multilingual,
            max_tokens=int(self.model.config.max_target_positions),
        )


def whisper_of(model: Any) -> Any:
    """The Whisper model inside a PeftModel; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_multilingual(generation_config: Any, config: Any) -> bool:
    """Whether a checkpoint has language tokens: by its generation config or, where that is silent, its vocabulary."""
    said = getattr(generation_config, "is_multilingual", None)
    return bool(said) if said is not None else int(config.vocab_size) >= 51865


def quiet_libraries() -> None:
    """Keep the libraries' advice and progress bars off the screen; errors still raise."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def at_hand(name: str, setting: str = BASE_MODEL) -> str:
    """What the libraries are given for the name of a model or dataset: the copy, on this machine, of a folder in object
    storage; a hub id or a local folder as it is.

    Raises:
        SpecError: there is no such folder.
    """
    if not is_stored(name):
        return name
    parent, _, folder = name.rstrip("/").rpartition("/")
    try:
        path = Storage(parent).fetch(folder)
    except NotFoundError:
        raise SpecError([Fault(setting, "holds no file; give a hub id, or a folder that exists", name)]) from None
    if not path.is_dir():
        raise SpecError([Fault(setting, "is a file; give the folder of a checkpoint", name)])
    return str(path)


def load_processor(name: str) -> Any:
    """Feature extractor and tokenizer of a checkpoint.

    Raises:
        SpecError: it cannot be had.
    """
    place = at_hand(name)
    with reading(name):
        return WhisperProcessor.from_pretrained(place)


def load_prompter(name: str, setting: str = BASE_MODEL) -> Prompter:
    """The decoder's tokens of a checkpoint, without loading its weights.

    Args:
        name: hub id, local folder, or URI of a folder.
        setting: what an error calls it.

    Raises:
        SpecError: it cannot be had.
    """
    place = at_hand(name, setting)
    with reading(name, setting):
        config = WhisperConfig.from_pretrained(place)
        generation = load_generation(place)
        tokenizer = WhisperProcessor.from_pretrained(place).tokenizer
    return Prompter(tokenizer, multilingual=is_multilingual(generation, config), max_tokens=config.max_target_positions)


def load_generation(place: str, revision: str | None = None) -> Any:
    """A checkpoint's generation config; one that is older than those has its settings in config.json.

    Args:
        place: what `at_hand` gives for its name.
        revision: commit on the hub.
    """
    try:
        return GenerationConfig.from_pretrained(place, revision=revision)
    except OSError:
        return GenerationConfig.from_model_config(WhisperConfig.from_pretrained(place, revision=revision))


def load_dims(name: str) -> WhisperDims:
    """What a checkpoint's config.json says of its shape.

    Raises:
        SpecError: it cannot be had.
    """
    place = at_hand(name)
    with reading(name):
        return WhisperDims.from_config(WhisperConfig.from_pretrained(place).to_dict())


def load_whisper(name: str, revision: str | None = None, *, attention: str = "sdpa") -> Whisper:
    """Load a checkpoint into CPU memory, in float32.

    Args:
        name: hub id, local folder, or URI of a folder.
        revision: commit on the hub; None: the newest, or a folder.
        attention: implementation, as transformers names it.

    Raises:
        SpecError: there is no such checkpoint, it is gated, or it is not a Whisper.
    """
    quiet_libraries()
    place = at_hand(name)
    with reading(name):
        model, report = WhisperForConditionalGeneration.from_pretrained(
            place, revision=revision, dtype="auto", attn_implementation=attention, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):
            # transformers would fill them with random numbers and go on.
            raise ValueError(f"{len(missing)} of its weights are missing: {', '.join(missing[:3])}")
        processor = WhisperProcessor.from_pretrained(place, revision=revision)
    # PEFT writes it down as the adapter's base.
    model.name_or_path = model.config._name_or_path = name
    stored = model.dtype
    # Checkpoints made before generation configs held the prompt; generate() takes language and task as arguments.
    model.generation_config.forced_decoder_ids = None
    return Whisper(name, model.float().eval(), processor, stored)


def describe_base(name: str, revision: str | None = None) -> BaseModelRecord:
    """Which checkpoint this is: the hub's commit, and the SHA-256 of each weight file (the hub shows the same ones)."""
    files = weight_files(name, revision)
    # The hub's cache keeps files under their commit.
    revision = None if is_stored(name) or Path(name).is_dir() or not files else files[0].parent.name
    return BaseModelRecord(name=name, revision=revision, weights_sha256={file.name: sha256_of(file) for file in files})


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """A checkpoint's weight files on this machine, downloaded where they are not yet; none where it has none.

    Args:
        name: hub id, local folder, or URI of a folder.
        revision: commit on the hub.

    Raises:
        SpecError: there is no such checkpoint, or it is gated.
    """
    place = at_hand(name)
    with reading(name):
        for file in WEIGHT_FILES:
            path = cached_file(place, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            if path is None:
                continue
            parts = [file]
            if file.endswith(".index.json"):
                parts = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
            return [Path(cached_file(place, part, revision=revision)) for part in parts]
    return []


class reading:  # noqa: N801  # used as a function is, in `with`
    """Turns the many ways in which a checkpoint cannot be had into one error that says what to do."""

    def __init__(self, name: str, setting: str = BASE_MODEL) -> None:
        self.name, self.setting = name, setting

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, _NOT_READABLE):
            return
        cause: BaseException | None = error
        while cause and not isinstance(cause, GatedRepoError | RepositoryNotFoundError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, GatedRepoError):
            why = "is gated: accept its terms on its hub page, then set HF_TOKEN"
        elif isinstance(cause, RepositoryNotFoundError):
            why = "is not on the hub, or is private: check the name, or set HF_TOKEN"
        elif is_stored(self.name) or Path(self.name).is_dir():
            why = f"is no complete Whisper checkpoint ({_first_line(error)})"
        else:
            why = f"cannot be loaded ({_first_line(error)}); give a hub id or a local folder, and check the network"
        raise SpecError([Fault(self.setting, why, self.name)]) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
