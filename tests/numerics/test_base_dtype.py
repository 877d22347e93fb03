"""A base held in bfloat16 under bfloat16's autocast: the numbers of one that is cast in each forward pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Run, batch_of, fill_adapters, job
from torch import Tensor, nn

from jobs.adapter import attach, trainable_parameters
from jobs.fast.adapters import speed_up
from jobs.fast.base_dtype import cast_base
from jobs.model import load_whisper
from jobs.tokens import Tokens, pad
from jobs.train.step import forward_loss
from service.spec.job import JobSpec

pytestmark = pytest.mark.setting("engine.base_dtype")

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "decoder": {"lora_target_modules": r".*decoder.*q_proj", "freeze_encoder": True},
    "saved": {"modules_to_save": ["embed_tokens"]},
    "saved layer": {"modules_to_save": ["fc1"], "lora_target_modules": ["q_proj"]},
}


def spec_of(tiny: Path, tones: Path, root: Path, base_dtype: str, **training: Any) -> JobSpec:
    settings: dict[str, Any] = {"bf16": True, "lora_dropout": 0.1} | training
    return job(tiny, tones, root, {"engine": {"base_dtype": base_dtype}}, **settings)


def model_of(spec: JobSpec) -> tuple[Any, int]:
    torch.manual_seed(0)
    model, _ = attach(load_whisper(spec.training.base_model).model, spec.training)
    fill_adapters(model, 0.02)
    speed_up(model, spec.engine)
    return model.train(), cast_base(model, spec, "bf16")


def computed(model: Any, batch: Any, *, freeze_encoder: bool) -> dict[str, Tensor]:
    """Loss and gradients under autocast."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = forward_loss(model, batch, CPU, freeze_encoder=freeze_encoder)
    loss.backward()
    return {"loss": loss} | {name: p.grad for name, p in trainable_parameters(model) if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_the_same_to_the_bit(tiny: Path, tones: Path, tmp_path: Path, kind: str) -> None:
    batch, found = batch_of(tiny, tones / "val.csv", 5), []
    for base_dtype in ("auto", "float32"):
        spec = spec_of(tiny, tones, tmp_path, base_dtype, **KINDS[kind])
        model, count = model_of(spec)
        assert (count > 0) is (base_dtype == "auto")
        found.append(computed(model, batch, freeze_encoder=spec.training.freeze_encoder))
    one, other = found
    assert one.keys() == other.keys()
    assert len(one) > 4
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_cast_and_all_that_is_not_only_multiplied_is_not(
    tiny: Path, tones: Path, tmp_path: Path, kind: str
) -> None:
    model, count = model_of(spec_of(tiny, tones, tmp_path, "auto", **KINDS[kind]))
    kinds = Counter(
        type(module).__name__ for module in model.modules() for each in module.parameters(recurse=False)
        if each.dtype == torch.bfloat16
    )  # fmt: skip
    assert set(kinds) == ({"Conv1d"} if kind == "DoRA" else {"Linear", "Conv1d"}), "all linear layers have DoRA here"
    assert {p.dtype for _, p in trainable_parameters(model)} == {torch.float32}
    inner = model.get_base_model().model
    assert inner.encoder.conv1.weight.dtype == torch.bfloat16
    assert inner.decoder.embed_positions.weight.dtype == torch.float32
    assert model.get_base_model().proj_out.weight.dtype == torch.float32
    adapted = [module.get_base_layer() for module in model.modules() if hasattr(module, "lora_A")]
    expected = torch.float32 if kind == "DoRA" else torch.bfloat16
    assert {layer.weight.dtype for layer in adapted} == {expected}
    assert count == sum(
        module.weight.dtype == torch.bfloat16 for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d)
    )


@pytest.mark.parametrize(("precision", "lora_init"), [("no", True), ("bf16", "olora"), ("bf16", "pissa")])
def test_in_float32_and_where_the_base_was_changed_nothing_is_cast(
    tiny: Path, tones: Path, tmp_path: Path, precision: str, lora_init: bool | str
) -> None:
    spec = spec_of(tiny, tones, tmp_path, "auto", lora_init=lora_init)
    model, _ = attach(load_whisper(str(tiny)).model, spec.training)
    assert cast_base(model, spec, precision) == 0


def test_a_run_ends_at_the_same_bits_and_what_it_publishes_fits_the_base(
    tiny: Path, tones: Path, tmp_path: Path
) -> None:
    runs = [Run(spec_of(tiny, tones, tmp_path / name, name, lr=0.01, eval_steps=4)) for name in ("auto", "float32")]
    one, other = runs
    assert one.steps("loss") == other.steps("loss")
    assert one.result["training"]["history"] == other.result["training"]["history"]
    mine, theirs = one.adapter(), other.adapter()
    assert {tensor.dtype for tensor in mine.values()} == {torch.float32}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    assert one.merge()["max_logit_difference"] <= 1e-4


def test_labels_padded_to_a_common_width_have_the_same_loss_and_gradients(
    tiny: Path, tones: Path, tmp_path: Path
) -> None:
    batch, found = batch_of(tiny, tones / "val.csv", 5), []
    spec = spec_of(tiny, tones, tmp_path, "float32", lora_dropout=0.0)
    for width in (0, 48):
        model, _ = model_of(spec)
        if width:
            clips = zip(batch.inputs_BT, batch.labels_BT, strict=True)
            rows = [Tokens(read_T[said_T >= 0].tolist(), said_T[said_T >= 0].tolist()) for read_T, said_T in clips]
            inputs_BT, labels_BT = pad(rows, fill=7, width=width)
            batch = replace(batch, inputs_BT=inputs_BT, labels_BT=labels_BT)
            assert batch.labels_BT.shape == (5, width)
        loss = forward_loss(model, batch, CPU, freeze_encoder=False)
        loss.backward()
        found.append({"loss": loss} | {name: p.grad for name, p in trainable_parameters(model)})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)
