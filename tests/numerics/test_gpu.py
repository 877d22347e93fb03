"""What only a GPU can show of the engine: its precisions, the loss scaler, DoRA's offload, and the CPU's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import Run, batch_of, events, job, logits_of, tone
from layers import linear_layers
from peft import get_peft_model
from transformers import WhisperFeatureExtractor

from jobs.adapter import lora_config, lora_layers, plan_of
from jobs.augment import Augmenter
from jobs.batches import WIDTH_STEP, Features, Loader, Schedule
from jobs.fast.log_mel import LogMel
from jobs.manifest.rows import read_rows
from jobs.model import load_processor, load_prompter, load_whisper
from service.spec.augment import AugmentConfig
from service.spec.training import TrainingConfig

pytestmark = pytest.mark.gpu

GPU = {"resources": {"gpus_per_worker": 1}}


def in_training(spec: Any) -> tuple[Run, set[tuple[str, torch.dtype]]]:
    """A run, and on what devices and in what precisions linear layers computed in training."""
    with linear_layers() as found:
        run = Run(spec)
    return run, {(device, dtype) for training, device, dtype in found if training}


def close(run: Run, other: Run, **bounds: float) -> None:
    assert run.steps("loss") == pytest.approx(other.steps("loss"), **bounds)
    assert len(run.steps("loss")) == 7


@pytest.fixture(scope="module")
def on_cpu(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in float32 on the CPU that those on the GPU are compared with."""
    root = tmp_path_factory.mktemp("cpu") / "run"
    return Run(job(tiny, tones, root, {"resources": {"gpus_per_worker": 0}}, use_dora=True, lora_dropout=0.0))


@pytest.mark.setting("bf16")
@pytest.mark.parametrize("asked", [None, True])
def test_bfloat16_is_on_by_default_where_the_gpu_has_it(
    tiny: Path, tones: Path, tmp_path: Path, on_cpu: Run, asked: bool | None
) -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bfloat16")
    spec = job(tiny, tones, tmp_path / "run", GPU, use_dora=True, lora_dropout=0.0, bf16=asked)
    run, found = in_training(spec)
    assert found == {("cuda", torch.bfloat16)}
    assert run.result["training"]["precision"] == "bf16"
    assert run.result["training"]["device"] == torch.cuda.get_device_name()
    assert {tensor.dtype for tensor in run.adapter().values()} == {torch.float32}
    assert "scaler" not in run.state(7)["parts"], "bfloat16 has the range of float32"
    close(run, on_cpu, rel=0.05)


@pytest.mark.setting("bf16")
def test_float32_on_the_gpu_gives_the_cpus_numbers(tiny: Path, tones: Path, tmp_path: Path, on_cpu: Run) -> None:
    spec = job(tiny, tones, tmp_path / "run", GPU, use_dora=True, lora_dropout=0.0, bf16=False)
    run, found = in_training(spec)
    assert found == {("cuda", torch.float32)}
    assert run.result["training"]["precision"] == "no"
    close(run, on_cpu, rel=1e-3)


@pytest.mark.setting("fp16")
def test_float16_scales_its_loss_and_a_step_that_overflowed_moves_no_schedule(
    tiny: Path, tones: Path, tmp_path: Path, on_cpu: Run
) -> None:
    spec = job(tiny, tones, tmp_path / "run", GPU, use_dora=True, lora_dropout=0.0, fp16=True)
    run, found = in_training(spec)
    assert found == {("cuda", torch.float16)}
    assert run.result["training"]["precision"] == "fp16"
    parts = run.state(7)["parts"]
    assert parts["scaler"]["scale"] > 1
    skipped = sum(norm is None for norm in run.steps("grad_norm"))
    assert parts["scheduler"]["last_epoch"] == 7 - skipped
    assert run.steps("loss")[0] == pytest.approx(on_cpu.steps("loss")[0], rel=0.05), "the scale is taken off again"
    norms = [norm for norm in run.steps("grad_norm") if norm is not None]
    assert norms
    assert max(norms) < 10 * max(on_cpu.steps("grad_norm")), "and off the gradients before they are clipped"


@pytest.mark.setting("dora_ephemeral_offload", "lora_runtime_config")
def test_magnitudes_computed_on_the_gpu_lie_where_the_model_lies(tiny: Path) -> None:
    magnitudes = []
    for settings in ({}, {"dora_ephemeral_offload": True}, {"lora_runtime_config": '{"ephemeral_gpu_offload": true}'}):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        torch.manual_seed(0)
        base, training = load_whisper(str(tiny)).model, TrainingConfig(use_dora=True, **settings)
        # `attach` tells PEFT of a GPU only where the model lies on it.
        model = get_peft_model(base, lora_config(training, plan_of(base, training), on_gpu=True))
        assert (torch.cuda.max_memory_allocated() > before) is bool(settings), "the GPU was used"
        layers = lora_layers(model)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        magnitudes.append([layer.lora_magnitude_vector["default"].weight.detach() for _, layer in layers])
    for found in magnitudes[1:]:
        for one, other in zip(found, magnitudes[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.setting("dora_ephemeral_offload", "merge_lora")
def test_a_run_with_offload_is_the_run_without(tiny: Path, tones: Path, tmp_path: Path, on_cpu: Run) -> None:
    settings: dict[str, Any] = {"use_dora": True, "lora_dropout": 0.0, "bf16": False}
    run = Run(job(tiny, tones, tmp_path / "run", GPU, dora_ephemeral_offload=True, **settings))
    close(run, on_cpu, rel=1e-3)
    assert events(run.session, "notice") == []
    assert run.merge()["max_logit_difference"] <= 1e-4


@pytest.mark.setting("engine.attention")
def test_attentions_agree_on_the_gpu(tiny: Path, tones: Path) -> None:
    batch = batch_of(tiny, tones / "val.csv", 5)
    expected = logits_of(load_whisper(str(tiny)).model, batch)
    for name in ("sdpa", "eager"):
        model = load_whisper(str(tiny), attention=name).model.cuda().eval()
        with torch.inference_mode():
            logits_BTV = model(
                input_features=batch.features_BMF.cuda(), decoder_input_ids=batch.inputs_BT.cuda(), use_cache=False
            ).logits
        torch.testing.assert_close(logits_BTV.cpu()[batch.labels_BT >= 0], expected, rtol=1e-2, atol=1e-2)


@pytest.mark.setting("seed")
def test_a_checkpoint_holds_the_gpus_random_state(tiny: Path, tones: Path, tmp_path: Path) -> None:
    run = Run(job(tiny, tones, tmp_path / "run", GPU, lora_dropout=0.3))
    (state,) = run.state(7)["random"]
    assert state["cuda"].dtype == torch.uint8


@pytest.mark.setting("engine.fast_features")
@pytest.mark.parametrize("mel_bins", [80, 128])
def test_features_are_made_on_the_gpu_and_are_transformers(mel_bins: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    clips = [tone(seconds, 200 + 100 * seconds) for seconds in (0.3, 5, 12.5, 29.999, 30)]
    clips += [0.1 * np.random.default_rng(0).standard_normal(90_000).astype(np.float32), np.zeros(50, np.float32)]
    features_BMF = LogMel(extractor, torch.device("cuda"))(clips)
    assert features_BMF.device.type == "cuda"
    theirs_BMF = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(features_BMF.cpu(), theirs_BMF, rtol=0, atol=1e-4)


@pytest.mark.setting("engine.fast_features")
def test_features_are_on_the_gpu_before_the_step_asks_and_are_masked_there(tiny: Path, tones: Path) -> None:
    rows = [vars(row) for row in read_rows(str(tones / "train.csv"), "en")]
    extractor, made = load_processor(str(tiny)).feature_extractor, []
    for device in ("cuda", "cpu"):
        augmenter = Augmenter(AugmentConfig(mask_time_prob=0.3, mask_feature_prob=0.3), 0)
        features = Features(LogMel(extractor, torch.device(device)))
        loader = Loader(rows, features, load_prompter(str(tiny)), threads=2, prefetch=2, augmenter=augmenter)
        ((batch,),) = loader.steps(Schedule(len(rows), len(rows), 1, 1, 0), 0, 0, 1)
        assert batch.features_BMF.device.type == device
        assert batch.labels_BT.is_pinned() is (device == "cuda")
        assert (batch.labels_BT.shape[1] % WIDTH_STEP == 0) or device == "cpu"
        made.append(batch.features_BMF.cpu())
    assert torch.equal(made[0] == 0, made[1] == 0)
    torch.testing.assert_close(*made, rtol=0, atol=1e-4)


@pytest.mark.setting("engine.base_dtype")
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_base_held_in_half_precision_gives_the_numbers_of_one_that_is_cast(
    tiny: Path, tones: Path, tmp_path: Path, half: str
) -> None:
    runs = []
    for name in ("auto", "float32"):
        sections = GPU | {"engine": {"base_dtype": name}}
        runs.append(Run(job(tiny, tones, tmp_path / name, sections, lora_dropout=0.0, **{half: True})))
    close(*runs, rel=1e-3)
