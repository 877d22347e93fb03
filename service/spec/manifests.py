"""What `whisper-jobs manifest` takes: one list for the command that reads it and for the program that does it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from service.errors import Fault, InputError
from service.spec import words
from service.spec.languages import LANGUAGES
from service.spec.sections import DataConfig
from service.spec.training import TrainingConfig

AUTO = "auto"
KINDS = (AUTO, "names", "sidecars", "table", "trans-txt", "dataset")
"""Kinds of sources."""

ALLOWED = ("transcript", "audio", "recording")
"""What may be on both sides of a split where a user says so. A group never may."""

LIMITS = ("min_duration_s", "silence_dbfs", "clipped_share")
"""Settings of a spec's `data` that are options here."""

VAL_RATIO: float = DataConfig.model_fields["val_ratio"].default
SEED: int = TrainingConfig.model_fields["seed"].default
LANGUAGE: str = TrainingConfig.model_fields["language"].default


def option(name: str) -> str:
    """A setting as an option of the command."""
    return f"--{name.replace('_', '-')}"


def language_faults(language: str) -> list[Fault]:
    """What is wrong with `--language`."""
    if language in LANGUAGES:
        return []
    return [Fault("--language", "is not a language code that Whisper knows, such as en", language)]


def limits_of(given: Mapping[str, float | None]) -> DataConfig:
    """A spec's `data` with the limits that options have given; None: the default.

    Raises:
        InputError: a limit is out of its range; all of them.
    """
    try:
        return DataConfig(**{name: given[name] for name in LIMITS if given[name] is not None})
    except ValidationError as error:
        raise InputError(
            [Fault(option(str(one["loc"][0])), words.message(one), _number(one["input"])) for one in error.errors()]
        ) from None


def _number(value: float) -> float:
    """A number as its user wrote it: 5, not 5.0."""
    return int(value) if value.is_integer() else value
