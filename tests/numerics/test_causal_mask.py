"""In a training step nobody looks for packed sequences, for which the host would wait for the GPU; the masks are the
same."""

from __future__ import annotations

import contextlib
import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, fill_adapters
from transformers import WhisperForConditionalGeneration, masking_utils
from transformers.models.whisper import modeling_whisper
from waits import DEVICE, Waits

from jobs.adapter import attach, trainable_parameters
from jobs.batches import Batch
from jobs.fast.causal_mask import plain_rows
from jobs.fast.many import ManyAdapters, Work
from jobs.model import load_whisper
from jobs.train import step
from jobs.train.step import forward_loss
from service.spec.training import TrainingConfig

CPU = torch.device("cpu")
LOOK = "find_packed_sequence_indices"


@pytest.fixture(scope="module")
def batch(tiny: Path, tones: Path) -> Batch:
    found: Batch = batch_of(tiny, tones / "val.csv", 5)
    return found


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The positions in which transformers looks for packed sequences."""
    look, found = getattr(masking_utils, LOOK), []
    monkeypatch.setattr(masking_utils, LOOK, lambda positions: (found.append(positions), look(positions))[1])
    return found


def adapted(tiny: Path, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration.from_pretrained(tiny, attn_implementation=attention).eval()
    model, _ = attach(whisper, TrainingConfig(lora_dropout=0.0))
    fill_adapters(model, 0.02)
    return model.train()


def called(model: Any, batch: Batch) -> Any:
    return model(input_features=batch.features_BMF, decoder_input_ids=batch.inputs_BT, use_cache=False).logits


def test_transformers_still_looks_for_packed_sequences_in_positions_that_its_decoder_numbers(
    tiny: Path, batch: Batch, looks: list[Any]
) -> None:
    """Where this fails, there may be nothing left to avoid."""
    assert "position_ids=position_ids" in inspect.getsource(modeling_whisper.WhisperDecoder.forward)
    called(adapted(tiny), batch)
    assert len(looks) == 1, "outside of a step transformers is what it was"
    with plain_rows():
        called(adapted(tiny), batch)
        beside = threading.Thread(target=lambda: called(adapted(tiny), batch))
        beside.start()
        beside.join()
    assert len(looks) == 2, "other threads are left alone"
    with contextlib.suppress(ZeroDivisionError), plain_rows():
        1 // 0  # noqa: B018
    called(adapted(tiny), batch)
    assert len(looks) == 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_and_logits_are_the_same_to_the_bit(tiny: Path, batch: Batch, attention: str) -> None:
    model, found = adapted(tiny, attention), []
    given = {"config": model.config, "inputs_embeds": torch.zeros(3, 7, 4), "attention_mask": None}
    positions = torch.arange(7)[None].repeat(3, 1)
    for context in (contextlib.nullcontext(), plain_rows()):
        with context:
            mask = modeling_whisper.create_causal_mask(**given, past_key_values=None, position_ids=positions)
            logits = called(model, batch)
        model.zero_grad()
        logits.square().mean().backward()
        found.append((mask, logits, [p.grad.clone() for _, p in trainable_parameters(model)]))
    (mask, logits, grads), (same_mask, same_logits, same_grads) = found
    assert (mask is None) is (attention == "sdpa")
    assert mask is same_mask or torch.equal(mask, same_mask)
    assert torch.equal(logits, same_logits)
    assert all(map(torch.equal, grads, same_grads))


@pytest.mark.parametrize("fast_loss", [True, False])
@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_a_step_does_not_look(
    tiny: Path, batch: Batch, looks: list[Any], fast_loss: bool, freeze_encoder: bool
) -> None:
    model = adapted(tiny)
    forward_loss(model, batch, CPU, freeze_encoder=freeze_encoder, fast_loss=fast_loss).backward()
    assert looks == []


def test_trials_that_train_together_do_not_look(tiny: Path, batch: Batch, looks: list[Any]) -> None:
    many = ManyAdapters(load_whisper(str(tiny)).model)
    model, _ = attach(many.twin(), TrainingConfig(freeze_encoder=True, lora_dropout=0.0))
    many.add(model)
    many.gradients([Work(model, [batch], 9.0, torch.Generator())], contextlib.nullcontext)
    many.losses([model], many.hear(batch), batch.inputs_BT, batch.labels_BT)
    assert looks == []


@pytest.mark.parametrize("freeze_encoder", [True, False])
def test_the_host_waits_for_nothing_in_a_forward_pass(
    tiny: Path, batch: Batch, freeze_encoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny).to(DEVICE)
    with Waits() as waits:
        forward_loss(model, batch, DEVICE, freeze_encoder=freeze_encoder, fast_loss=False)
    assert waits.found == []
    monkeypatch.setattr(step, "plain_rows", contextlib.nullcontext)
    with Waits() as waits:
        forward_loss(model, batch, DEVICE, freeze_encoder=freeze_encoder, fast_loss=False)
    assert len(waits.found) == 1
