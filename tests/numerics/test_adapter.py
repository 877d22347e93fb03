"""Adapters go where the plan says, begin as asked, and a module that has not learned is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, fill_adapters, job, logits_of
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

from jobs.adapter import (
    attach,
    coverage,
    load_adapter,
    lora_layers,
    plan_adapter,
    require_coverage,
    snapshot,
    trainable_parameters,
)
from jobs.train.checkpoint import adapter_state, save_adapter
from service.errors import SpecError, VerificationError
from service.plan import make_plan
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import WhisperDims

PARTS = {
    "encoder self-attention": 8,
    "encoder MLP": 4,
    "decoder self-attention": 8,
    "cross-attention": 8,
    "decoder MLP": 4,
}
INITS: list[Any] = [True, False, "gaussian", "orthogonal"]


def adapted(tiny: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(tiny).eval(), TrainingConfig(**settings))
    return model


def layer(model: Any, ending: str) -> Any:
    return next(module for name, module in lora_layers(model) if name.endswith(ending))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_plan_counts_what_peft_trains(tiny: Path, use_dora: bool) -> None:
    settings: dict[str, Any] = {
        "use_dora": use_dora,
        "lora_rank_pattern": {"fc1": 3},
        "lora_target_modules": ["fc1", "q_proj", "encoder_attn.out_proj"],
    }
    model = adapted(tiny, **settings)
    plan = plan_adapter(TrainingConfig(**settings), WhisperDims.from_config(model.config.to_dict()))
    assert [module.name for module in plan] == [
        name.removeprefix("base_model.model.") for name, _ in lora_layers(model)
    ]
    assert sum(module.parameters for module in plan) == sum(p.numel() for _, p in trainable_parameters(model))
    scaling = [module.scaling["default"] for _, module in lora_layers(model)]
    assert scaling == pytest.approx([module.scaling for module in plan])


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("init", INITS)
def test_training_begins_at_the_base_model_with_every_init_but_false(
    tiny: Path, tones: Path, init: Any, use_dora: bool
) -> None:
    batch = batch_of(tiny, tones / "val.csv", 3)
    base = logits_of(WhisperForConditionalGeneration.from_pretrained(tiny), batch)
    model = adapted(tiny, lora_init=init, use_dora=use_dora, lora_r=4)
    difference = float((logits_of(model, batch) - base).abs().max())
    assert (difference < 1e-4) is (init is not False)
    zero = all(not module.lora_B["default"].weight.any() for _, module in lora_layers(model))
    assert zero is (init in (True, "gaussian")), "orthogonal begins neutral with a B that is not zero"


@pytest.mark.parametrize("init", INITS)
def test_the_seed_alone_decides_how_adapters_begin(tiny: Path, init: Any) -> None:
    one, same = adapter_state(adapted(tiny, lora_init=init)), adapter_state(adapted(tiny, lora_init=init))
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_inits_differ_in_how_a_begins(tiny: Path) -> None:
    factors = [layer(adapted(tiny, lora_init=init), "0.fc1").lora_A["default"].weight for init in INITS]
    kaiming, _, gaussian, orthogonal = factors
    assert float(kaiming.detach().abs().max()) == pytest.approx(32**-0.5, rel=0.05)
    assert float(gaussian.detach().std()) == pytest.approx(1 / 16, rel=0.3)
    assert float(orthogonal.detach().abs().max()) > 0.01
    neutral = layer(adapted(tiny, lora_init="orthogonal"), "0.fc1")
    b, a = neutral.lora_B["default"].weight.detach(), neutral.lora_A["default"].weight.detach()
    assert float((b @ a).abs().max()) < 1e-6, "rows of A and columns of B stand at right angles"


def test_freezing_the_encoder_leaves_no_adapter_in_it(tiny: Path) -> None:
    model = adapted(tiny, freeze_encoder=True)
    names = [name for name, _ in trainable_parameters(model)]
    assert names
    assert not any(".encoder." in name for name in names)
    assert any(".encoder_attn." in name for name in names)


def test_the_base_is_frozen_but_for_modules_trained_in_full(tiny: Path) -> None:
    model = adapted(tiny, modules_to_save=["decoder.layer_norm"])
    names = [name for name, _ in trainable_parameters(model)]
    full = [name for name in names if "lora_" not in name]
    assert {name.rsplit(".", 1)[1] for name in full} == {"weight", "bias"}
    assert all("model.decoder.layer_norm.modules_to_save" in name for name in full)


def test_an_adapter_on_a_convolution_is_refused(tiny: Path) -> None:
    with pytest.raises(SpecError, match=r"training\.lora_target_modules: .*model\.encoder\.conv1"):
        adapted(tiny, lora_target_modules=["conv1", "fc1"])


class TestCoverage:
    """The proof that every adapter has learned."""

    def test_counts_are_per_part(self, tiny: Path) -> None:
        model = adapted(tiny)
        before = snapshot(model)
        fill_adapters(model, 0.01)
        result = coverage(model, before)
        assert result["coverage"] == {part: {"adapted": count, "changed": count} for part, count in PARTS.items()}
        assert result["modules"] == sum(PARTS.values())
        assert (result["zero_updates"], result["unchanged"]) == (0, [])
        require_coverage(result)

    @pytest.mark.parametrize("init", INITS)
    @pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
    def test_an_unchanged_module_is_named_and_refused(self, tiny: Path, init: Any, use_dora: bool) -> None:
        model = adapted(tiny, lora_init=init, use_dora=use_dora)
        before = snapshot(model)
        stuck = layer(model, "decoder.layers.1.encoder_attn.k_proj")
        a, b = (stuck.lora_A["default"].weight.clone(), stuck.lora_B["default"].weight.clone())
        fill_adapters(model, 0.01)
        stuck.lora_A["default"].weight.data, stuck.lora_B["default"].weight.data = a, b
        result = coverage(model, before)
        assert result["unchanged"] == ["model.decoder.layers.1.encoder_attn.k_proj"]
        assert result["coverage"]["cross-attention"] == {"adapted": 8, "changed": 7}
        assert result["coverage"]["decoder MLP"] == {"adapted": 4, "changed": 4}
        with pytest.raises(
            VerificationError, match=r"1 of 32 adapted modules did not change .*layers\.1\.encoder_attn"
        ):
            require_coverage(result)

    def test_a_b_that_is_not_zero_proves_nothing(self, tiny: Path) -> None:
        model = adapted(tiny, lora_init="orthogonal")
        result = coverage(model, snapshot(model))
        assert result["zero_updates"] == result["modules"] == 32

    def test_an_a_that_moved_under_a_zero_b_is_no_update(self, tiny: Path) -> None:
        model = adapted(tiny)
        before = snapshot(model)
        for _, module in lora_layers(model):
            module.lora_A["default"].weight.data += 1
        assert coverage(model, before)["zero_updates"] == 32

    def test_a_snapshot_does_not_move_with_the_model(self, tiny: Path) -> None:
        model = adapted(tiny, lora_init=False)
        before = snapshot(model)
        fill_adapters(model, 0.01)
        assert coverage(model, before)["zero_updates"] == 0

    def test_a_module_trained_in_full_is_counted_apart_and_must_move_too(self, tiny: Path) -> None:
        model = adapted(tiny, modules_to_save=["embed_tokens", "decoder.layer_norm"])
        before = snapshot(model)
        fill_adapters(model, 0.01)
        result = coverage(model, before)
        assert (result["modules"], result["saved"], result["zero_updates"]) == (32, 2, 0)
        assert result["coverage"]["saved in full"] == {"adapted": 2, "changed": 2}
        wrapper = model.get_base_model().model.decoder.embed_tokens
        wrapper.modules_to_save["default"].weight.data = wrapper.original_module.weight.data.clone()
        result = coverage(model, before)
        assert result["unchanged"] == ["model.decoder.embed_tokens"]
        assert result["coverage"]["saved in full"] == {"adapted": 2, "changed": 1}
        with pytest.raises(VerificationError, match=r"1 of 34 adapted modules did not change .*embed_tokens"):
            require_coverage(result)

    def test_a_frozen_encoder_keeps_its_saved_modules_out(self, tiny: Path) -> None:
        settings: dict[str, Any] = {"modules_to_save": ["layer_norm"], "freeze_encoder": True}
        model = adapted(tiny, **settings)
        assert not any(".encoder." in name for name, _ in trainable_parameters(model))
        before = snapshot(model)
        fill_adapters(model, 0.01)
        result = coverage(model, before)
        assert (result["saved"], result["zero_updates"]) == (7, 0)
        plan = make_plan(job(tiny, tiny, tiny, **settings)).adapter
        assert plan is not None
        assert plan.trainable_parameters == sum(p.numel() for _, p in trainable_parameters(model))


class TestLoading:
    """What stands in a folder goes on a base whole, or not at all."""

    def save(self, tiny: Path, folder: Path, **settings: Any) -> None:
        model = adapted(tiny, **settings)
        fill_adapters(model, 0.05)
        save_adapter(folder, model, adapter_state(model))

    def base(self, tiny: Path) -> Any:
        return WhisperForConditionalGeneration.from_pretrained(tiny)

    def test_a_saved_adapter_is_put_back_for_inference(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        self.save(tiny, tmp_path, lora_dropout=0.5)
        model = load_adapter(self.base(tiny), tmp_path)
        assert isinstance(model, PeftModel)
        assert not model.training
        assert trainable_parameters(model) == []

    def test_an_adapter_of_another_width_is_refused(self, tiny: Path, nano: Path, tmp_path: Path) -> None:
        self.save(tiny, tmp_path)
        with pytest.raises(SpecError, match="is no adapter for this base model"):
            load_adapter(self.base(nano), tmp_path)

    def test_an_adapter_without_weights_or_without_a_configuration_is_refused(self, tiny: Path, tmp_path: Path) -> None:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            self.save(tiny, tmp_path)
            (tmp_path / name).unlink()
            with pytest.raises(SpecError, match="is no adapter for this base model"):
                load_adapter(self.base(tiny), tmp_path)
