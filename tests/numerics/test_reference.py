"""With every fast way switched off a training is that of Seq2SeqTrainer with PEFT, to the adapter; with all of them, up
to rounding."""

from __future__ import annotations

import csv
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from engine import Run, job, saved_adapter
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from jobs.batches import Schedule

OFF: dict[str, dict[str, Any]] = {
    "engine": {
        "base_dtype": "float32",
        "fast_features": False,
        "fast_loss": False,
        "fast_lora": False,
        "fast_dora": False,
        "dora_dropout": "peft",
        "keep_encoder": "off",
    },
    "evaluation": {"fast_decoding": False, "batch_size": 1},
    "data": {"keep_audio_gb": 0, "packing": False},
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "frozen encoder": {"freeze_encoder": True, "use_dora": True},
}
CLIPS_A_STEP, EPOCHS = 2, 2
AT_THE_SWITCHES = {
    "adapters.speed_up",
    "base_dtype.cast_base",
    "dora.speed_up",
    "dora.FastDora.__init__",
    "dora.FastDora.refresh",
    "lora.speed_up",
    "plain.is_dora",
    "plain.is_plain",
    "log_mel.LogMel.__init__",
    "log_mel.LogMel.__call__",
    "kept_audio.KeptAudio.__init__",
    "kept_audio.KeptAudio._has_room",
    "kept_audio.KeptAudio.of",
    "kept_audio.KeptAudio.read",
    "kept_audio.SplitAudio.__init__",
    "kept_audio.SplitAudio.read",
    "places.share_of_memory",
    "causal_mask.plain_rows",
    "causal_mask._wrapped.<locals>.create_causal_mask",
}
"""Functions of jobs/fast that ask whether they are switched off, and hand on to transformers and PEFT. (The causal mask
is transformers' own in any case.)"""


class Clips(torch.utils.data.Dataset):  # type: ignore[misc]
    """The rows of a CSV in a certain order, by transformers' processor alone."""

    def __init__(self, processor: Any, table: Path, order: list[int]) -> None:
        with open(table, encoding="utf-8") as file:
            self.rows = list(csv.DictReader(file))
        self.processor, self.folder, self.order = processor, table.parent, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, tokenizer = self.rows[self.order[index]], self.processor.tokenizer
        samples, rate = soundfile.read(self.folder / row["path"], dtype="float32")
        made = self.processor.feature_extractor(samples, sampling_rate=rate, return_tensors="pt")
        tokenizer.set_prefix_tokens(language=row["language"], task="transcribe", predict_timestamps=False)
        return {"input_features": made.input_features[0], "labels": tokenizer(" " + row["text"]).input_ids[1:]}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["labels"]) for row in rows], True, -100)
    return {"input_features": torch.stack([row["input_features"] for row in rows]), "labels": labels}


class InOrder(Seq2SeqTrainer):
    """Takes rows as they come."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def by_seq2seq_trainer(run: Run, tiny: Path, tones: Path, folder: Path) -> dict[str, Tensor]:
    """The adapter of the run's job, from what it began with, on the same clips in the same order."""
    schedule = Schedule(13, CLIPS_A_STEP, 1, 1, run.spec.training.seed)
    order = np.concatenate([schedule.order(epoch) for epoch in range(EPOCHS)])
    # An epoch's last step has one clip, which two epochs in one would not have.
    steps = [rows for half in np.split(order, EPOCHS) for rows in np.split(half, range(CLIPS_A_STEP, 13, CLIPS_A_STEP))]
    model = WhisperForConditionalGeneration.from_pretrained(tiny)
    if run.spec.training.freeze_encoder:
        model.freeze_encoder()
    adapted = PeftModel.from_pretrained(model, str(run.root / "adapter"), is_trainable=True)
    set_peft_model_state_dict(adapted, start_of(run))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=len(steps),
        per_device_train_batch_size=1,
        learning_rate=run.spec.training.lr,
        warmup_steps=0,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
    )
    clips = Clips(WhisperProcessor.from_pretrained(tiny), tones / "train.csv", list(range(13)))
    batches = [collate([clips[int(row)] for row in rows]) for rows in steps]
    trainer = InOrder(model=adapted, args=arguments, train_dataset=batches, data_collator=lambda given: given[0])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return dict(get_peft_model_state_dict(adapted))


def start_of(run: Run) -> dict[str, Tensor]:
    """The adapter as the run began."""
    return saved_adapter(run.root / "checkpoints/initial")


@contextmanager
def fast_functions() -> Iterator[set[str]]:
    """The functions of jobs/fast that are called, by this thread or one that begins meanwhile."""
    called: set[str] = set()

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and "jobs/fast/" in code.co_filename:
            called.add(f"{Path(code.co_filename).stem}.{code.co_qualname}")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield called
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_that_of_seq2seq_trainer(tiny: Path, tones: Path, tmp_path: Path, kind: str) -> None:
    settings = {"epochs": EPOCHS, "lora_dropout": 0.0, "eval_steps": 100, "warmup_ratio": 0.0} | KINDS[kind]
    with fast_functions() as called:
        off = Run(job(tiny, tones, tmp_path / "off", OFF, **settings))
    assert "adapters.speed_up" in called
    assert called <= AT_THE_SWITCHES, "what is fast computes nothing"
    on = Run(job(tiny, tones, tmp_path / "on", **settings))
    steps = len(off.steps())
    assert steps == 14
    expected, start = by_seq2seq_trainer(off, tiny, tones, tmp_path / "trainer"), start_of(off)
    for run in (off, on):
        found = run.adapter(steps)
        assert found.keys() == expected.keys() == start.keys()
        apart = {
            name: float((found[name] - tensor).norm() / (tensor - start[name]).norm())
            for name, tensor in expected.items()
        }
        worst = max(apart, key=lambda name: apart[name])
        print(f"apart by {apart[worst]:.1e} of the way that was trained, at {worst}")
        assert apart[worst] < 1e-4
