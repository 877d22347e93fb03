"""What all of these tests need: each trains a tiny model in this process, many of them several times."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from transformers import WhisperProcessor


@pytest.fixture(scope="session", autouse=True)
def read_vocabularies_once() -> Iterator[None]:
    """Reading the vocabulary takes longer than training a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WhisperProcessor, "from_pretrained", functools.cache(WhisperProcessor.from_pretrained))
        yield
