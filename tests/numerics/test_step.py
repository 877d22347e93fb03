"""A training step has the loss and the gradients of transformers' own `model(labels=...)`, however it is cut up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, fill_adapters
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from jobs.adapter import attach, trainable_parameters
from jobs.batches import Batch, label_tokens
from jobs.train.step import encoder_of, encoder_output, forward_loss
from service.spec.training import TrainingConfig

CPU = torch.device("cpu")
METHODS = pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])


@pytest.fixture(scope="module")
def batch(tiny: Path, tones: Path) -> Batch:
    """Five clips of different lengths."""
    found: Batch = batch_of(tiny, tones / "val.csv", 5)
    assert (found.labels_BT < 0).any()
    return found


def adapted(tiny: Path, *, training: bool = False, **settings: Any) -> Any:
    torch.manual_seed(0)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(tiny).eval(), TrainingConfig(**settings))
    fill_adapters(model, 0.02)
    return model.train(training)


def part(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, padded as the whole was."""
    return Batch(batch.features_BMF[rows], batch.inputs_BT[rows], batch.labels_BT[rows], batch.rows[rows])


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients by name; the parameters' own are cleared."""
    found = {name: p.grad.clone() for name, p in trainable_parameters(model) if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def step(model: Any, *batches: Batch, freeze_encoder: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step over these forward passes."""
    tokens, total = label_tokens(list(batches)), torch.zeros(())
    for batch in batches:
        loss = forward_loss(model, batch, CPU, freeze_encoder=freeze_encoder) / tokens
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], bound: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1e-3, float(other[name].abs().max()))
        assert float((one[name] - other[name]).abs().max()) <= bound * scale, name


@METHODS
def test_loss_and_gradients_are_those_of_transformers(tiny: Path, batch: Batch, use_dora: bool) -> None:
    model = adapted(tiny, use_dora=use_dora)
    loss, found = step(model, batch)
    # transformers shifts the labels itself and puts the start token before them; it masks by -100 as we do.
    expected = model(input_features=batch.features_BMF, labels=batch.labels_BT).loss
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert_close(found, gradients(model), 1e-5)
    assert len(found) == len(trainable_parameters(model))
    assert all(gradient.any() for gradient in found.values())


def test_decoder_inputs_are_those_that_transformers_makes_of_the_labels(tiny: Path, batch: Batch) -> None:
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    shifted_BT = shift_tokens_right(batch.labels_BT, 50257, 50258)
    counted_BT = batch.labels_BT >= 0
    assert torch.equal(shifted_BT[counted_BT], batch.inputs_BT[counted_BT])


@METHODS
@pytest.mark.setting("grad_accum")
def test_accumulated_gradients_equal_those_of_one_pass(tiny: Path, batch: Batch, use_dora: bool) -> None:
    model = adapted(tiny, use_dora=use_dora)
    loss, whole = step(model, batch)
    for cut in (1, 2, 3):
        pieces = [part(batch, slice(start, start + cut)) for start in range(0, 5, cut)]
        piecewise_loss, piecewise = step(model, *pieces)
        assert float(piecewise_loss) == pytest.approx(float(loss), rel=1e-6)
        assert_close(piecewise, whole, 1e-5)


def test_what_pads_a_row_does_not_count(tiny: Path, batch: Batch) -> None:
    model = adapted(tiny)
    length = int((batch.labels_BT[0] >= 0).sum())
    assert length < batch.labels_BT.shape[1]
    short = Batch(batch.features_BMF[:1], batch.inputs_BT[:1, :length], batch.labels_BT[:1, :length], [0])
    one_loss, one = step(model, part(batch, slice(0, 1)))
    other_loss, other = step(model, short)
    assert float(one_loss) == pytest.approx(float(other_loss), rel=1e-6)
    assert_close(one, other, 1e-5)


@pytest.mark.setting("freeze_encoder")
def test_a_frozen_encoder_has_no_gradient_and_the_same_loss(tiny: Path, batch: Batch) -> None:
    model = adapted(tiny, freeze_encoder=True)
    calls: list[bool] = []
    hook = encoder_of(model).layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    frozen_loss, frozen = step(model, batch, freeze_encoder=True)
    assert calls == [False], "the encoder runs once, without gradients"
    loss, found = step(model, batch)
    hook.remove()
    assert float(frozen_loss) == pytest.approx(float(loss), rel=1e-6)
    assert_close(frozen, found, 1e-6)
    assert all(parameter.grad is None for parameter in encoder_of(model).parameters())


def test_adapters_in_an_encoder_that_is_not_frozen_have_gradients(tiny: Path, batch: Batch) -> None:
    _, found = step(adapted(tiny), batch)
    assert any(".encoder.layers.0" in name and gradient.any() for name, gradient in found.items())


@METHODS
@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.setting("engine.gradient_checkpointing", "freeze_encoder")
def test_gradient_checkpointing_gives_the_same_gradients(
    tiny: Path, batch: Batch, use_dora: bool, freeze_encoder: bool
) -> None:
    settings = {"use_dora": use_dora, "freeze_encoder": freeze_encoder, "lora_dropout": 0.2}
    results = []
    for checkpointing in (False, True):
        model = adapted(tiny, training=True, **settings)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs = {"count": 0}
        encoder_of(model).layers[0].fc1.register_forward_hook(
            lambda *_, runs=runs: runs.update(count=runs["count"] + 1)
        )
        torch.manual_seed(5)
        results.append((*step(model, batch, freeze_encoder=freeze_encoder), runs["count"]))
    (loss, plain, once), (again, recomputed, twice) = results
    assert float(loss) == float(again)
    assert_close(recomputed, plain, 1e-6)
    assert (once, twice) == (1, 1 if freeze_encoder else 2), "activations are computed again in the backward pass"


@pytest.mark.setting("lora_dropout")
def test_dropout_is_on_in_training_alone(tiny: Path, batch: Batch) -> None:
    losses = {}
    for training in (False, True):
        model = adapted(tiny, training=training, lora_dropout=0.5)
        losses[training] = [float(forward_loss(model, batch, CPU, freeze_encoder=False).detach()) for _ in range(2)]
    assert losses[False][0] == losses[False][1]
    assert losses[True][0] != losses[True][1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_give_the_same_loss(tiny: Path, batch: Batch, attention: str) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(tiny, attn_implementation=attention).eval()
    model.requires_grad_(False)
    expected = model(input_features=batch.features_BMF, labels=batch.labels_BT).loss
    loss = forward_loss(model, batch, CPU, freeze_encoder=False) / label_tokens([batch])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    default = WhisperForConditionalGeneration.from_pretrained(tiny).eval().requires_grad_(False)
    other = forward_loss(default, batch, CPU, freeze_encoder=False) / label_tokens([batch])
    assert float(loss) == pytest.approx(float(other), rel=1e-5)


def test_without_memory_for_all_clips_the_encoder_hears_them_in_halves(tiny: Path, batch: Batch) -> None:
    model = adapted(tiny)
    expected = encoder_output(model, batch.features_BMF, None)
    encoder, sizes = encoder_of(model), []
    forward = encoder.forward

    def short(features_BMF: Tensor, **options: Any) -> Any:
        sizes.append(len(features_BMF))
        if len(features_BMF) > 2:
            raise torch.OutOfMemoryError
        return forward(features_BMF, **options)

    encoder.forward = short
    torch.testing.assert_close(encoder_output(model, batch.features_BMF, None), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [5, 2, 3, 1, 2]
    sizes.clear()
    encoder.forward = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        encoder_output(model, batch.features_BMF[:1], None)
