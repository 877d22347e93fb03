"""What all of these tests need: each trains a tiny model in this process, many of them several times."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import WhisperProcessor


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What a test expects are the CPU's numbers unless its mark is `gpu`: the others see no GPU, wherever they run. Not
    a fixture, since those of a class or a module train too, before any of a test's own."""
    with pytest.MonkeyPatch.context() as patch:
        # pytest calls this for the tests of all folders.
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        return (yield)


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
