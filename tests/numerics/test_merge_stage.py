"""The merge stage proves what it saves, and fails where the merged model is not the adapted one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, fill_adapters, job, logits_of, merge_of, prepared, read_lines, run_engine, saved_adapter
from peft import PeftModel
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from jobs.adapter import attach
from jobs.merge import MAX_LOGIT_DIFFERENCE
from jobs.model import load_whisper
from jobs.train.checkpoint import adapter_state, save_adapter
from service.errors import SpecError, VerificationError
from service.spec.job import JobSpec

ADAPTER_FILE = "adapter/adapter_model.safetensors"


def merge_stage(spec: JobSpec, progress: Any = None) -> dict[str, Any]:
    return merge_of(spec, *([progress] if progress else []))


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "DoRA"])
def trained(
    request: pytest.FixtureRequest, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory
) -> JobSpec:
    """A run whose training stage is done, with an adapter that has learned much."""
    root = tmp_path_factory.mktemp("trained") / "run"
    spec = job(tiny, tones, root, use_dora=request.param, epochs=3, lr=0.05, lora_dropout=0.1)
    run_engine(spec)
    return spec


@pytest.fixture
def spec(trained: JobSpec, tmp_path: Path) -> JobSpec:
    """A copy of that run, which a test may spoil."""
    shutil.copytree(trained.root, tmp_path / "run")
    outdir = {"training": trained.training.model_copy(update={"outdir": str(tmp_path / "run")})}
    return trained.model_copy(update=outdir)


def test_the_merged_checkpoint_is_saved_and_transcribes_as_the_adapter_did(spec: JobSpec, tones: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = merge_stage(spec, lambda done, total: seen.append((done, total)))
    assert result["max_logit_difference"] <= MAX_LOGIT_DIFFERENCE
    assert result["max_logit_difference_after_cast"] <= MAX_LOGIT_DIFFERENCE, "float32 needs no cast"
    assert result["clips_compared"] == 5
    assert result["dtype"] == "float32"
    assert result["artifact"]["identical"] == 1.0
    assert result["artifact"]["utterances"] == 5
    assert result["artifact"]["rtf"] > 0
    merged = Path(spec.root) / "merged"
    assert result["artifact"]["size_bytes"] == sum(path.stat().st_size for path in merged.iterdir())
    assert seen == [(5, 5)]

    lines = read_lines(Path(spec.root) / "evaluation/merged.jsonl")
    tuned = read_lines(Path(spec.root) / "evaluation/tuned.jsonl")
    assert sorted(line["hypothesis"] for line in lines) == sorted(line["hypothesis"] for line in tuned)

    base = WhisperForConditionalGeneration.from_pretrained(spec.training.base_model)
    batch = batch_of(Path(spec.training.base_model), tones / "val.csv", 5)
    plain = logits_of(base, batch)
    adapted = logits_of(PeftModel.from_pretrained(base, Path(spec.root) / "adapter"), batch)
    saved = logits_of(WhisperForConditionalGeneration.from_pretrained(merged), batch)
    assert (adapted - saved).abs().max() <= MAX_LOGIT_DIFFERENCE
    assert (adapted - plain).abs().max() > 0.5, "the adapter has learned next to nothing"


def test_a_checkpoint_stored_in_half_precision_stays_so_and_the_cast_is_reported(
    spec: JobSpec, tiny: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(tiny, half)
    WhisperForConditionalGeneration.from_pretrained(tiny).half().save_pretrained(half)
    training = spec.training.model_copy(update={"base_model": str(half)})
    result = merge_stage(spec.model_copy(update={"training": training}))
    assert result["dtype"] == "float16"
    assert result["max_logit_difference"] <= MAX_LOGIT_DIFFERENCE < result["max_logit_difference_after_cast"] < 1.0
    config = json.loads((Path(spec.root) / "merged/config.json").read_text())
    assert config["dtype"] == "float16"


def test_a_merge_that_leaves_a_module_out_is_refused_and_nothing_is_saved(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LoraModel.merge_and_unload

    def partial(self: Any, *arguments: Any, **options: Any) -> Any:
        layer = self.model.model.decoder.layers[0].encoder_attn.v_proj
        layer.lora_B["default"].weight.data.zero_()
        return whole(self, *arguments, **options)

    monkeypatch.setattr(LoraModel, "merge_and_unload", partial)
    with pytest.raises(VerificationError, match=r"differ by .* all that rounding explains") as caught:
        merge_stage(spec)
    assert caught.value.exit_code == 10
    assert not (Path(spec.root) / "merged").exists()
    assert (Path(spec.root) / "adapter").is_dir()


def test_a_merge_that_only_rounds_more_is_refused_too(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LoraModel.merge_and_unload
    monkeypatch.setattr(
        LoraModel, "merge_and_unload", lambda self, **options: whole(self, **options).to(torch.bfloat16).float()
    )
    with pytest.raises(VerificationError, match="differ by"):
        merge_stage(spec)


def test_a_broken_adapter_is_not_merged(spec: JobSpec) -> None:
    state = saved_adapter(Path(spec.root) / "adapter")
    name = next(name for name in state if "decoder.layers.1.fc1.lora_B" in name)
    save_file(state | {name: torch.full_like(state[name], torch.nan)}, Path(spec.root) / ADAPTER_FILE)
    with pytest.raises((VerificationError, ValueError)):
        merge_stage(spec)
    assert not (Path(spec.root) / "merged").exists()

    del state[name]
    save_file(state, Path(spec.root) / ADAPTER_FILE)
    with pytest.raises(SpecError, match="is no adapter for this base model"):
        merge_stage(spec)
    (Path(spec.root) / ADAPTER_FILE).write_bytes(b"torn")
    with pytest.raises(SpecError, match="is no adapter for this base model"):
        merge_stage(spec)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings")
def test_embeddings_that_came_apart_from_the_head_stay_so_in_the_checkpoint(
    tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec = job(tiny, tones, tmp_path / "run", modules_to_save=["embed_tokens"])
    prepared(spec)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(tiny), spec.training)
    fill_adapters(model, 0.01)
    model.peft_config["default"].ensure_weight_tying = False  # as a plain PEFT script would have left it
    save_adapter(tmp_path / "run/adapter", model, adapter_state(model))
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "proj_out" not in name}, file)
    result = merge_stage(spec)
    assert result["tied"] is False
    assert result["max_logit_difference_after_cast"] <= MAX_LOGIT_DIFFERENCE
    saved = load_whisper(str(tmp_path / "run/merged")).model
    assert not torch.equal(saved.proj_out.weight, saved.model.decoder.embed_tokens.weight)
