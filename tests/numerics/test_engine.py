"""What a training stage leaves behind, and when: schedule, evaluations, checkpoints, the best adapter, its proof."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from engine import Run, events, job, prepared, read_lines, run_engine, saved_adapter
from transformers import WhisperForConditionalGeneration

from jobs.train.session import LocalSession
from service.errors import InputLostError, ManifestError, SpecError, VerificationError
from service.spec.job import JobSpec

STEPS = 14


@pytest.fixture(scope="module")
def run(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of seven steps; evaluated every fifth, saved every third."""
    root = tmp_path_factory.mktemp("engine") / "run"
    spec = job(
        tiny,
        tones,
        root,
        {"engine": {"report_to": ["tensorboard"]}, "evaluation": {"bootstrap": 50}},
        epochs=2,
        eval_steps=5,
        save_steps=3,
        logging_steps=4,
        warmup_ratio=0.25,
        lr=0.01,
    )
    return Run(spec)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.setting("lr", "warmup_ratio")
def test_the_learning_rate_rises_over_the_warmup_and_falls_to_zero(run: Run) -> None:
    warmup = math.ceil(0.25 * STEPS)
    expected = [0.01 * (done / warmup if done < warmup else (STEPS - done) / (STEPS - warmup)) for done in range(STEPS)]
    assert [event["lr"] for event in run.steps()] == pytest.approx(expected)


@pytest.mark.setting("epochs")
def test_steps_and_epochs_are_counted(run: Run) -> None:
    assert [event["step"] for event in run.steps()] == list(range(1, STEPS + 1))
    assert [event["epoch"] for event in run.steps()] == pytest.approx([step / 7 for step in range(1, STEPS + 1)])
    assert run.result["training"]["steps"] == STEPS
    assert run.result["training"]["effective_batch"] == 2
    assert run.result["training"]["clips_per_s"] > 0


@pytest.mark.setting("logging_steps")
def test_every_logging_step_and_the_last_are_kept(run: Run) -> None:
    assert [event["step"] for event in run.steps() if event["logged"]] == [4, 8, 12, STEPS]


@pytest.mark.setting("eval_steps")
def test_the_model_is_scored_at_eval_steps_and_at_the_end(run: Run) -> None:
    at = [event["step"] for event in events(run.session, "evaluation") if "step" in event]
    assert at == [5, 10, STEPS]
    assert [entry["step"] for entry in run.result["training"]["history"]] == at


@pytest.mark.setting("save_steps", "eval_steps")
def test_checkpoints_stand_at_save_steps_and_with_every_evaluation(run: Run) -> None:
    expected = [3, 5, 6, 9, 10, 12, STEPS]
    assert [event["step"] for event in events(run.session, "checkpoint")] == expected
    found = sorted(int(path.name.split("-")[1]) for path in (run.root / "checkpoints").glob("checkpoint-*"))
    assert found == expected


def test_the_published_adapter_is_the_best_by_wer_and_the_first_of_equals(run: Run) -> None:
    history = run.result["training"]["history"]
    best = min(history, key=lambda entry: (entry["wer"], entry["step"]))
    assert run.result["training"]["best_step"] == best["step"]
    assert same(run.adapter(), run.adapter(best["step"]))
    assert run.result["tuned"]["wer"] == best["wer"], "what was published scores as it did in training"
    state = torch.load(run.root / f"checkpoints/checkpoint-{STEPS}/state.pt")
    assert state["progress"]["best"] == best["wer"]
    kept = json.loads((run.root / f"checkpoints/checkpoint-{STEPS}/best/best.json").read_text())
    assert kept == {"step": best["step"], "score": best["wer"]}
    assert same(saved_adapter(run.root / f"checkpoints/checkpoint-{STEPS}/best"), run.adapter())


def test_every_utterance_is_kept_before_and_after(run: Run) -> None:
    for name in ("base", "tuned"):
        lines = read_lines(run.root / f"evaluation/{name}.jsonl")
        assert [line["path"] for line in lines] == [
            str(run.spec.training.val_csv).replace("val.csv", f"{i}.wav") for i in range(13, 18)
        ]
        assert all(line["hypothesis"] for line in lines)
        low, high = run.result[name]["wer_interval"]
        assert low <= run.result[name]["wer"] <= high
    (told,) = [event for event in events(run.session, "evaluation") if event.get("what") == "base"]
    assert told["wer"] == run.result["base"]["wer"]


def test_the_adapter_is_for_inference_and_names_its_base_and_modules(run: Run) -> None:
    config = json.loads((run.root / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == run.spec.training.base_model
    assert config["inference_mode"] is True
    assert sorted(config["target_modules"]) == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]
    assert sorted(path.name for path in (run.root / "adapter").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.setting("logging_steps", "engine.report_to")
def test_curves_are_in_tensorboard(run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run.root / "tensorboard" / run.spec.title  # below it: the settings, as TensorBoard wants them
    curves = EventAccumulator(str(folder)).Reload()
    logged = [event for event in run.steps() if event["logged"]]
    for name in ("loss", "lr", "grad_norm"):
        points = curves.Scalars(f"train/{name}")
        assert [point.step for point in points] == [4, 8, 12, STEPS]
        assert [point.value for point in points] == pytest.approx([event[name] for event in logged])
    assert [point.step for point in curves.Scalars("eval/wer")] == [5, 10, STEPS]


@pytest.mark.setting("logging_steps")
def test_the_logged_loss_is_the_mean_since_the_last_one(run: Run, tiny: Path, tones: Path, tmp_path: Path) -> None:
    settings = run.spec.training.model_dump(exclude={"base_model", "train_csv", "val_csv", "outdir", "logging_steps"})
    every = Run(job(tiny, tones, tmp_path / "run", logging_steps=1, **settings))
    losses = [event["loss"] for event in every.steps()]
    assert run.steps()[7]["loss"] == pytest.approx(sum(losses[4:8]) / 4)
    assert run.steps()[STEPS - 1]["loss"] == pytest.approx(sum(losses[12:14]) / 2)


def test_the_model_event_counts_what_is_trained(run: Run) -> None:
    (event,) = events(run.session, "model")
    base = WhisperForConditionalGeneration.from_pretrained(run.spec.training.base_model)
    assert event["trainable_parameters"] == sum(tensor.numel() for tensor in run.adapter().values())
    assert event["trainable_parameters"] == run.result["adapter"]["trainable_parameters"]
    assert event["parameters"] == base.num_parameters()
    assert (event["modules"], event["steps"], event["resumed_from_step"]) == (32, STEPS, 0)


def test_the_loss_falls(run: Run) -> None:
    losses = [event["loss"] for event in run.steps()]
    assert sum(losses[-4:]) < sum(losses[:4]) - 1


@pytest.mark.setting("seed")
def test_the_same_seed_gives_the_same_run_and_another_another(tiny: Path, tones: Path, tmp_path: Path) -> None:
    runs = [Run(job(tiny, tones, tmp_path / str(i), seed=seed, lora_dropout=0.3)) for i, seed in enumerate([1, 1, 2])]
    assert same(runs[0].adapter(), runs[1].adapter())
    assert not same(runs[0].adapter(), runs[2].adapter())


def test_the_last_checkpoints_are_kept_as_many_as_asked(tiny: Path, tones: Path, tmp_path: Path) -> None:
    spec = job(tiny, tones, tmp_path / "run", eval_steps=100, save_steps=1)
    run_engine(spec, keep=2)
    found = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert found == ["checkpoint-6", "checkpoint-7", "initial"]


@pytest.mark.setting("engine.weight_decay", "engine.max_grad_norm")
def test_weight_decay_and_clipping_have_their_effect(tiny: Path, tones: Path, tmp_path: Path) -> None:
    def adapter(name: str, **engine: float) -> dict[str, torch.Tensor]:
        return Run(job(tiny, tones, tmp_path / name, {"engine": engine}, eval_steps=99)).adapter()

    plain = adapter("plain")
    assert not same(plain, adapter("decay", weight_decay=1.0))
    # AdamW undoes a factor that is the same in every step; norms differ from step to step, so clipping shows.
    assert not same(plain, adapter("clipped", max_grad_norm=1e-6))


@pytest.mark.setting("engine.gradient_checkpointing")
def test_gradient_checkpointing_changes_no_result(tiny: Path, tones: Path, tmp_path: Path) -> None:
    losses = []
    for flag in (False, True):
        spec = job(tiny, tones, tmp_path / str(flag), {"engine": {"gradient_checkpointing": flag}}, lora_dropout=0.2)
        losses.append([event["loss"] for event in Run(spec).steps()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bfloat16_is_used_where_it_is_asked_for(tiny: Path, tones: Path, tmp_path: Path) -> None:
    half = Run(job(tiny, tones, tmp_path / "half", bf16=True))
    full = Run(job(tiny, tones, tmp_path / "full"))
    assert (half.result["training"]["precision"], full.result["training"]["precision"]) == ("bf16", "no")
    pairs = list(zip(half.steps(), full.steps(), strict=True))
    assert any(one["loss"] != other["loss"] for one, other in pairs)
    assert [one["loss"] for one, _ in pairs] == pytest.approx([other["loss"] for _, other in pairs], rel=0.02)
    assert {tensor.dtype for tensor in half.adapter().values()} == {torch.float32}


@pytest.mark.setting("base_model", "language")
def test_an_english_only_checkpoint_is_trained_without_language_tokens(tiny: Path, tones: Path, tmp_path: Path) -> None:
    base = tmp_path / "tiny.en"
    shutil.copytree(tiny, base)
    generation = json.loads((base / "generation_config.json").read_text())
    for name in ("lang_to_id", "task_to_id"):
        del generation[name]
    (base / "generation_config.json").write_text(json.dumps(generation | {"is_multilingual": False}))
    with pytest.raises(ManifestError, match=r"an English-only \(\.en\) checkpoint takes en alone"):
        prepared(job(base, tones, tmp_path / "run"))
    shutil.copytree(tones, tmp_path / "data")
    for path in (tmp_path / "data").glob("*.csv"):
        path.write_text(path.read_text().replace(",es", ",en"))
    run = Run(job(base, tmp_path / "data", tmp_path / "run"))
    assert list(run.result["tuned"]["languages"]) == ["en"]


class TestRefusals:
    """What cannot be trained ends with a word on what to do, and publishes nothing."""

    def refusal(self, spec: JobSpec, kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught:
            run_engine(spec)
        assert not (Path(spec.root) / "adapter").exists()
        return str(caught.value)

    def test_fp16_without_a_gpu(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        message = self.refusal(job(tiny, tones, tmp_path / "run", fp16=True), SpecError)
        assert message == "training.fp16: true needs a GPU, and this worker has none; leave it out"

    def test_a_tracker_that_is_not_installed(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        spec = job(tiny, tones, tmp_path / "run", {"engine": {"report_to": ["tensorboard", "wandb"]}})
        assert "pip install wandb" in self.refusal(spec, SpecError)

    def test_a_tracker_that_is_none(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        spec = job(tiny, tones, tmp_path / "run", {"engine": {"report_to": ["abacus"]}})
        assert "is no tracker; give any of" in self.refusal(spec, SpecError)

    def test_a_learning_rate_that_moves_nothing(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        # So small a rate that s * B @ A is rounded to zero.
        message = self.refusal(job(tiny, tones, tmp_path / "run", lr=1e-45), VerificationError)
        assert message.startswith("32 of 32 adapted modules did not change in training: model.")
        assert "Raise training.lr" in message

    def test_a_clip_that_vanished_after_it_was_checked(self, tiny: Path, tones: Path, tmp_path: Path) -> None:
        from jobs.train.loop import train

        shutil.copytree(tones, tmp_path / "data")
        task = prepared(job(tiny, tmp_path / "data", tmp_path / "run"))
        (tmp_path / "data/03.wav").unlink()
        with pytest.raises(InputLostError, match=r"03\.wav: no such file; it was there when the job checked it"):
            train(task, LocalSession())
