"""What the settings of precision, device and encoder do, and those of the engine that must not change a result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Call, Run, batch_of, job, logits_of, watched
from layers import linear_layers
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder

from jobs.adapter import attach
from jobs.device import precision_of
from jobs.model import load_whisper
from jobs.train.step import encoder_of
from service.errors import SpecError
from service.spec.checks import findings
from service.spec.job import JobSpec


def faults(**training: Any) -> list[str]:
    """What is wrong with a spec, found before anything starts."""
    resources = training.pop("resources", {})
    spec = JobSpec(training={"train_csv": "a.csv", "val_csv": "b.csv"} | training, resources=resources)
    return [
        f"{finding.settings[0]} {finding.message}" for finding in findings(spec, check_files=False) if finding.fatal
    ]


class TestPrecision:
    """fp16 and bf16."""

    @pytest.mark.setting("bf16")
    @pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32), (None, torch.float32)])
    def test_linear_layers_compute_in_bfloat16_where_asked_and_weights_stay_float32(
        self, tiny: Path, tones: Path, tmp_path: Path, bf16: bool | None, dtype: torch.dtype
    ) -> None:
        with linear_layers() as found:
            run = Run(job(tiny, tones, tmp_path / "run", bf16=bf16))
        assert found == {(True, "cpu", dtype), (False, "cpu", dtype)}, "in training and in scoring"
        assert run.result["training"]["precision"] == ("bf16" if bf16 else "no")
        assert {tensor.dtype for tensor in run.adapter().values()} == {torch.float32}
        optimizer = run.state(7)["parts"]["optimizer"]["state"]
        assert {entry["exp_avg"].dtype for entry in optimizer.values()} == {torch.float32}

    @pytest.mark.setting("fp16", "bf16")
    def test_they_exclude_each_other(self) -> None:
        assert faults(fp16=True, bf16=True) == [
            "training.fp16 and bf16 exclude each other; switch one of them off",
        ]
        assert faults(fp16=True, bf16=False) == faults(fp16=True) == faults(bf16=True) == []

    @pytest.mark.setting("fp16")
    def test_fp16_without_a_gpu_is_refused_before_anything_starts(
        self, tiny: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert faults(fp16=True, resources={"gpus_per_worker": 0}) == [
            "training.fp16 needs a GPU, and resources.gpus_per_worker is 0; switch fp16 off or give each worker a GPU",
        ]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with watched(WhisperEncoder) as calls, pytest.raises(SpecError, match="needs a GPU, and this worker has none"):
            Run(job(tiny, tones, tmp_path / "run", fp16=True))
        assert calls == [], "not even the base model was scored"
        assert not (tmp_path / "run/evaluation").exists()

    # What a GPU says of itself is torch's; what follows from it is ours. test_gpu.py looks at a real one.
    @pytest.mark.setting("fp16", "bf16")
    @pytest.mark.parametrize(
        ("training", "gpus", "has_bf16", "expected"),
        [
            ({}, None, True, "bf16"),
            ({}, 1, True, "bf16"),
            ({}, None, False, "no"),
            ({}, 0, True, "no"),
            ({"bf16": False}, 1, True, "no"),
            ({"bf16": True}, 1, True, "bf16"),
            ({"bf16": True}, 0, False, "bf16"),
            ({"fp16": True}, 1, True, "fp16"),
            ({"fp16": True}, 1, False, "fp16"),
            ({"bf16": True}, 1, False, "training.bf16: true is not supported by this GPU; use fp16"),
            ({"fp16": True}, 0, True, "training.fp16: true needs a GPU, and this worker has none; leave it out"),
        ],
    )
    def test_precision_is_what_is_asked_for_or_else_what_the_gpu_has(
        self, monkeypatch: pytest.MonkeyPatch, training: Any, gpus: Any, has_bf16: bool, expected: str
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
        spec = JobSpec(training=training, resources={"gpus_per_worker": gpus})
        if ":" not in expected:
            assert precision_of(spec) == expected
        else:
            with pytest.raises(SpecError) as caught:
                precision_of(spec)
            assert str(caught.value) == expected


class TestFrozenEncoder:
    """freeze_encoder: it is the base's, to the last bit, whatever the training does."""

    @pytest.fixture(scope="class")
    def base(self, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A checkpoint whose config asks for dropout in training, as some of the hub's do."""
        folder: Path = tmp_path_factory.mktemp("dropout") / "base"
        shutil.copytree(tiny, folder)
        config = json.loads((folder / "config.json").read_text())
        dropout = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "encoder_layerdrop": 0.5}
        (folder / "config.json").write_text(json.dumps(config | dropout))
        return folder

    @pytest.fixture(scope="class", params=[False, True], ids=["LoRA", "DoRA"])
    def frozen(
        self, request: pytest.FixtureRequest, base: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Run, list[Call]]:
        """A run that keeps no encoder outputs, merged; and the calls of its encoder."""
        root, off = tmp_path_factory.mktemp("frozen") / "run", {"engine": {"keep_encoder": "off"}}
        with watched(WhisperEncoder) as calls:
            run = Run(job(base, tones, root, off, freeze_encoder=True, lr=0.05, use_dora=request.param))
        run.merge()
        return run, calls

    @pytest.mark.setting("freeze_encoder")
    def test_its_outputs_in_training_are_the_bases_and_have_no_gradient(
        self, frozen: tuple[Run, list[Call]], base: Path
    ) -> None:
        encoder = WhisperForConditionalGeneration.from_pretrained(base).eval().model.encoder
        # Scoring encodes in inference mode; what is left are the steps of the training.
        in_training = [call for call in frozen[1] if not call.output.last_hidden_state.is_inference()]
        assert len(in_training) == len(frozen[0].steps()) == 7
        for call in in_training:
            assert not call.gradients
            with torch.no_grad():
                expected = encoder(call.given["input_features"]).last_hidden_state
            assert torch.equal(call.output.last_hidden_state, expected)

    @pytest.mark.setting("freeze_encoder")
    def test_no_adapter_is_in_it_and_its_merged_weights_are_the_bases(
        self, frozen: tuple[Run, list[Call]], base: Path
    ) -> None:
        run, _ = frozen
        assert run.adapter()
        assert not any(".encoder." in name for name in run.adapter())
        assert all(part.startswith(("decoder", "cross")) for part in run.result["adapter"]["coverage"])
        merged = WhisperForConditionalGeneration.from_pretrained(run.root / "merged").state_dict()
        changed = {
            name
            for name, tensor in WhisperForConditionalGeneration.from_pretrained(base).state_dict().items()
            if not torch.equal(tensor, merged[name])
        }
        assert len(changed) == 20, "the linear layers of two decoder layers"
        assert all(name.startswith("model.decoder.layers.") for name in changed)

    @pytest.mark.setting("freeze_encoder")
    def test_else_it_is_trained(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        with watched(WhisperEncoder) as calls:
            run = Run(job(tiny, tones, tmp_path / "run"))
        assert sum(call.gradients for call in calls) == 7
        assert run.result["adapter"]["coverage"]["encoder MLP"] == {"adapted": 4, "changed": 4}
        assert any(".encoder." in name and "lora_B" in name and tensor.any() for name, tensor in run.adapter().items())

    @pytest.mark.setting("freeze_encoder")
    def test_the_encoder_goes_on_in_the_mode_that_it_was_in(self, tiny: Path, tones: Path) -> None:
        from jobs.train.step import forward_loss
        from service.spec.training import TrainingConfig

        model, _ = attach(load_whisper(str(tiny)).model, TrainingConfig(freeze_encoder=True))
        batch = batch_of(tiny, tones / "val.csv", 2)
        for mode in (True, False):
            model.train(mode)
            forward_loss(model, batch, torch.device("cpu"), freeze_encoder=True)
            assert {module.training for module in encoder_of(model).modules()} == {mode}


class TestAttention:
    """engine.attention: another way to the same numbers."""

    @pytest.mark.setting("engine.attention")
    def test_both_give_the_same_logits(self, tiny: Path, tones: Path) -> None:
        batch = batch_of(tiny, tones / "val.csv", 5)
        logits = [logits_of(load_whisper(str(tiny), attention=name).model, batch) for name in ("sdpa", "eager")]
        assert float((logits[0] - logits[1]).abs().max()) <= 1e-5

    @pytest.mark.setting("engine.attention")
    def test_the_engine_uses_the_one_that_is_asked_for(
        self, tiny: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used, whole = {"sdpa": 0, "eager": 0}, F.scaled_dot_product_attention
        runs = {}
        for name in used:

            def count(*arguments: Any, name: str = name, **options: Any) -> Any:
                used[name] += 1
                return whole(*arguments, **options)

            monkeypatch.setattr(F, "scaled_dot_product_attention", count)
            settings = {"lora_dropout": 0.0, "use_dora": True}
            runs[name] = Run(job(tiny, tones, tmp_path / name, {"engine": {"attention": name}}, **settings))
        assert used["sdpa"] > 0
        assert used["eager"] == 0
        assert runs["eager"].steps("loss") == pytest.approx(runs["sdpa"].steps("loss"), rel=1e-5)


@pytest.mark.setting("engine.gradient_checkpointing", "freeze_encoder")
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_gradient_checkpointing_computes_layers_again_and_changes_no_number(
    tiny: Path, tones: Path, tmp_path: Path, freeze_encoder: bool
) -> None:
    runs, computed = {}, {}
    for flag in (False, True):
        settings = {"freeze_encoder": freeze_encoder, "use_dora": True, "lora_dropout": 0.2}
        with watched(WhisperAttention) as calls:
            engine = {"gradient_checkpointing": flag, "keep_encoder": "off"}
            runs[flag] = Run(job(tiny, tones, tmp_path / str(flag), {"engine": engine}, **settings))
        # Scoring is done in inference mode; what is left are the steps.
        computed[flag] = sum(not call.output[0].is_inference() for call in calls) / len(runs[flag].steps())
    assert computed[False] == 2 + 4, "attentions of encoder and decoder, once per step"
    assert computed[True] == (2 if freeze_encoder else 4) + 8, "and once more in the backward pass"
    assert runs[True].steps("loss") == pytest.approx(runs[False].steps("loss"), rel=1e-6)
    assert runs[True].steps("grad_norm") == pytest.approx(runs[False].steps("grad_norm"), rel=1e-5)
