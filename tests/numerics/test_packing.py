"""Training on windows that clips share: the same steps, fewer windows, and PEFT's gradients on the same windows."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engine import Run, events, job, prepared, run_engine, saved_adapter, watched
from soundfile import read
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from jobs.batches import Loader, label_tokens
from jobs.model import load_whisper
from jobs.search.runner import TrialRun
from jobs.search.shared.engine import SharedEngine
from jobs.train.step import forward_loss
from service.spec.job import JobSpec
from service.storage import Storage

CLIPS, EPOCHS = 13, 4
ON: dict[str, Any] = {"packing": True, "packing_gap_s": 0.05, "timestamps": 0.0}


def spec_of(tiny: Path, tones: Path, root: Path, data: dict[str, Any], **training: Any) -> JobSpec:
    settings = {"epochs": EPOCHS, "per_dev_batch": 6, "lr": 1e-2, "lora_dropout": 0.0, "warmup_ratio": 0.0} | training
    sections = {"data": data, "evaluation": {"metric": "loss"}, "resources": {"workers": 0}}
    return job(tiny, tones, root, sections, **settings)


def windows_heard(spec: JobSpec) -> tuple[Run, list[int]]:
    """A run, and how many windows each training pass of the encoder heard."""
    with watched(WhisperEncoder) as calls:
        run = Run(spec)
    return run, [len(call.given["input_features"]) for call in calls if call.training]


@pytest.fixture(scope="module")
def both(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Run, list[int]]]:
    """The same training without packing and with it."""
    root = tmp_path_factory.mktemp("both")
    return [
        windows_heard(spec_of(tiny, tones, root / str(packing), ON | {"packing": packing})) for packing in (False, True)
    ]


@pytest.mark.setting("data.packing")
def test_a_packed_training_makes_the_same_steps_on_fewer_windows_and_learns(both: list[tuple[Run, list[int]]]) -> None:
    (single, alone), (packed, shared) = both
    for value in ("step", "steps", "epoch", "lr"):
        assert packed.steps(value) == single.steps(value)
    assert len(alone) == len(shared)
    assert sum(alone) == CLIPS * EPOCHS
    assert sum(shared) < 0.8 * sum(alone)
    losses = packed.steps("loss")
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert packed.result["training"]["effective_batch"] == 6
    assert packed.result["tuned"]["utterances"] == single.result["tuned"]["utterances"] == 5


def test_loss_and_gradients_are_transformers_own_on_the_joined_clips(tiny: Path, tones: Path, tmp_path: Path) -> None:
    rows = Dataset.from_file(prepared(spec_of(tiny, tones, tmp_path, ON)).train)
    whisper, model = load_whisper(str(tiny)), WhisperForConditionalGeneration.from_pretrained(tiny).eval()
    processor, windows = whisper.processor, [(0, 2), (1,), (4, 5)]
    loader = Loader(rows, processor.feature_extractor, whisper.prompter(), threads=1, prefetch=1)
    batch = loader.make([window if len(window) > 1 else window[0] for window in windows])
    assert batch.rows == [0, 2, 1, 4, 5]
    loss = forward_loss(whisper.model, batch, torch.device("cpu"), freeze_encoder=False) / label_tokens([batch])
    loss.backward()

    audio = [torch.cat([torch.from_numpy(read(rows[row]["path"])[0]) for row in window]).numpy() for window in windows]
    features = processor.feature_extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features
    labels = []
    for window in windows:
        processor.tokenizer.set_prefix_tokens(language=rows[window[0]]["language"], task="transcribe")
        labels.append(processor.tokenizer(" " + " ".join(rows[row]["text"] for row in window)).input_ids[1:])
    longest = max(map(len, labels))
    padded = torch.tensor([each + [-100] * (longest - len(each)) for each in labels])
    expected = model(input_features=features, labels=padded).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for (name, one), other in zip(whisper.model.named_parameters(), model.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_trials_that_train_together_end_as_they_end_alone(tiny: Path, tones: Path, tmp_path: Path) -> None:
    """One of them with other batches: then a pass's windows differ in number between the trials."""
    points: list[dict[str, Any]] = [{"lora_r": 4}, {"lora_r": 8, "use_dora": True}, {"lora_r": 4, "per_dev_batch": 4}]
    specs, alone = (
        [
            spec_of(tiny, tones, tmp_path / f"{kind}-{index}", ON, freeze_encoder=True, epochs=2, **point)
            for index, point in enumerate(points)
        ]
        for kind in ("together", "alone")
    )
    prepared(specs[0])
    engine, results = SharedEngine(specs[0], None), [{} for _ in specs]

    def go(index: int) -> None:
        run = TrialRun(specs[index], Storage(specs[index].root), Storage(specs[0].root), None)
        *_, results[index] = engine.events(run, lambda: False)

    threads = [threading.Thread(target=go, args=(index,)) for index in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for together, spec, result in zip(specs, alone, results, strict=True):
        expected, _ = run_engine(spec)
        steps = expected["training"]["steps"]
        history = result["result"]["training"]["history"]
        assert history[-1]["loss"] == pytest.approx(expected["training"]["history"][-1]["loss"], rel=1e-4)
        one, other = (
            saved_adapter(Path(each.root) / f"checkpoints/checkpoint-{steps}/adapter") for each in (together, spec)
        )
        assert all(float((one[name] - other[name]).abs().max()) < 1e-4 for name in other)


@pytest.mark.setting("data.packing", "engine.keep_encoder")
def test_a_frozen_encoder_hears_windows_anew_and_says_why(tiny: Path, tones: Path, tmp_path: Path) -> None:
    run = Run(spec_of(tiny, tones, tmp_path / "frozen", ON, freeze_encoder=True, epochs=2))
    told = [event["text"] for event in events(run.session, "notice")]
    assert told[0] == (
        "engine.keep_encoder: no encoder outputs of training clips are kept: data.packing joins them anew in each epoch"
    )
    assert "encoder outputs of 5 val clips are kept" in told[1]
