"""What all of these tests need: each trains a tiny model in this process, many of them several times."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState
from transformers import WhisperProcessor


@pytest.fixture(scope="module", autouse=True)
def read_vocabularies_once() -> Iterator[None]:
    """Reading the vocabulary takes longer than training a tiny model. No test here looks at what another one may have
    set in a tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WhisperProcessor, "from_pretrained", functools.cache(WhisperProcessor.from_pretrained))
        yield


@pytest.fixture(autouse=True)
def no_precision_is_left() -> None:
    """A worker's process has one precision, which accelerate keeps; this one has whatever its tests ask for."""
    AcceleratorState._reset_state(reset_partial_state=True)
