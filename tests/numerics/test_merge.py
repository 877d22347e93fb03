"""An adapter, its file and the merged model are the same model, for LoRA and DoRA with adapters that are not zero."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, fill_adapters, logits_of
from peft import PeftModel
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from jobs.adapter import attach, lora_layers
from jobs.batches import Batch
from jobs.export.checkpoint import Checkpoint
from jobs.export.hf import write_hf
from jobs.merge import MAX_LOGIT_DIFFERENCE, max_difference, require_same_weights
from jobs.model import load_whisper
from jobs.train.checkpoint import adapter_state, save_adapter
from service.spec.training import TrainingConfig

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rank pattern": {"lora_rank_pattern": {"encoder_attn.k_proj": 32, "fc1": 3}},
    "alpha pattern": {"lora_alpha_pattern": {"decoder.layers.*": 48, "encoder.*": 7}},
    "both patterns": {"lora_rank_pattern": {"q_proj": 2}, "lora_alpha_pattern": {"q_proj": 9}, "lora_dropout": 0.3},
    "embeddings in full": {"modules_to_save": ["embed_tokens"]},
    "embeddings and norms in full": {"modules_to_save": ["embed_tokens", "layer_norm"]},
    "one kind of module": {"lora_target_modules": ["fc1"]},
    "frozen encoder": {"freeze_encoder": True},
    "regular expression": {"lora_target_modules": r".*\.encoder_attn\.[qv]_proj"},
    "false": {"lora_init": False},
    "gaussian": {"lora_init": "gaussian"},
    "orthogonal": {"lora_init": "orthogonal"},
}


@pytest.fixture(scope="module")
def batch(tiny: Path, tones: Path) -> Batch:
    found: Batch = batch_of(tiny, tones / "val.csv", 5)
    return found


def base_model(checkpoint: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()


def adapted_model(checkpoint: Path, use_dora: bool, settings: dict[str, Any]) -> Any:
    """A model with adapters of random values."""
    torch.manual_seed(0)
    model, _ = attach(base_model(checkpoint), TrainingConfig(use_dora=use_dora, lora_r=8, **settings))
    fill_adapters(model, scale=0.03)
    return model


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def check_forms(checkpoint: Path, batch: Batch, folder: Path, model: Any) -> None:
    """A trained model, its saved adapter on the untouched base, the merged model and its checkpoint are one."""
    expected = logits_of(model, batch)
    assert difference(logits_of(base_model(checkpoint), batch), expected) > 0.1, "an adapter that does nothing"

    save_adapter(folder / "adapter", model, adapter_state(model))
    loaded = PeftModel.from_pretrained(base_model(checkpoint), folder / "adapter")
    assert difference(logits_of(loaded, batch), expected) < 1e-6

    merged = model.merge_and_unload(safe_merge=True)
    assert difference(logits_of(merged, batch), expected) <= MAX_LOGIT_DIFFERENCE
    assert merged.proj_out.weight is merged.model.decoder.embed_tokens.weight

    (folder / "merged").mkdir()
    assert write_hf(str(checkpoint), folder / "adapter", folder / "merged") == {"tied": True, "dtype": "float32"}
    require_same_weights(Checkpoint(folder / "merged"), merged, torch.float32)  # PEFT's own, to the last bit
    reloaded = base_model(folder / "merged")
    assert difference(logits_of(reloaded, batch), expected) <= MAX_LOGIT_DIFFERENCE
    assert reloaded.proj_out.weight is reloaded.model.decoder.embed_tokens.weight
    assert {name for name, _ in reloaded.named_parameters()} == dict(base_model(checkpoint).named_parameters()).keys()


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_adapter_file_and_merged_checkpoint_give_the_adapters_logits(
    tiny: Path, batch: Batch, tmp_path: Path, use_dora: bool, settings: dict[str, Any]
) -> None:
    check_forms(tiny, batch, tmp_path, adapted_model(tiny, use_dora, settings))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_so_they_do_for_a_trained_model_on_speech(nano: Path, manifest: Path, tmp_path: Path, use_dora: bool) -> None:
    check_forms(nano, batch_of(nano, manifest / "val.csv", 2), tmp_path, adapted_model(nano, use_dora, {}))


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.setting("modules_to_save")
def test_trained_embeddings_stay_tied_to_the_head_in_every_form(
    tiny: Path, batch: Batch, tmp_path: Path, use_dora: bool
) -> None:
    model = adapted_model(tiny, use_dora, {"modules_to_save": ["embed_tokens"]})
    before = base_model(tiny).model.decoder.embed_tokens.weight
    whisper = model.get_base_model()
    assert whisper.proj_out.weight is whisper.model.decoder.embed_tokens.weight
    save_adapter(tmp_path / "adapter", model, adapter_state(model))
    loaded = PeftModel.from_pretrained(base_model(tiny), tmp_path / "adapter").merge_and_unload()
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    assert difference(loaded.proj_out.weight, before) > 0.05
    assert logits_of(loaded, batch).isfinite().all()


def test_every_rank_and_alpha_is_in_the_saved_configuration(tiny: Path, tmp_path: Path) -> None:
    settings = {"lora_rank_pattern": {"layers.1.*fc1": 3, "fc1": 4}, "lora_alpha_pattern": {"encoder.*": 5}}
    model = adapted_model(tiny, False, settings)
    save_adapter(tmp_path, model, adapter_state(model))
    loaded = PeftModel.from_pretrained(base_model(tiny), tmp_path)
    scales = {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in lora_layers(loaded)}
    assert scales == {name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in lora_layers(model)}
    assert set(scales.values()) == {(8, 32), (8, 5), (4, 32), (4, 5), (3, 32), (3, 5)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_costs_more_than_the_bound_and_is_measured_not_refused(
    tiny: Path, batch: Batch, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = adapted_model(tiny, False, {})
    expected = logits_of(model, batch)
    save_adapter(tmp_path / "adapter", model, adapter_state(model))
    shutil.copytree(tiny, tmp_path / "base")
    base_model(tiny).to(dtype).save_pretrained(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    write_hf(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    whisper = load_whisper(str(tmp_path / "merged"))
    assert whisper.stored_dtype == dtype
    assert MAX_LOGIT_DIFFERENCE < difference(logits_of(whisper.model, batch), expected) < 1.0


def test_only_positions_that_count_are_compared(batch: Batch) -> None:
    one_BTV = torch.zeros(*batch.labels_BT.shape, 3)
    other_BTV = one_BTV + 9.0 * (batch.labels_BT < 0)[..., None]
    assert (batch.labels_BT < 0).any()
    assert max_difference(one_BTV, other_BTV, batch) == 0.0
    other_BTV[0, 0, 1] = -2.0
    assert max_difference(one_BTV, other_BTV, batch) == 2.0
