"""The user's alternative: transformers' Seq2SeqTrainer with PEFT, as its users write it. Nothing of ours is in it.

`tuned` is what an experienced user changes: data loading in workers, evaluation in large batches, no checkpointing of
activations, no encoder in the graph where it is frozen.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, WhisperForConditionalGeneration, WhisperProcessor

IGNORE = -100
RATE_HZ = 16_000


@dataclass
class Clips(torch.utils.data.Dataset):  # type: ignore[misc]
    """Features and labels of (path, text, language), made when they are asked for."""

    processor: Any
    rows: list[tuple[Path, str, str]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, text, language = self.rows[index]
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = soxr.resample(samples.mean(axis=1), rate, RATE_HZ)
        features = self.processor.feature_extractor(mono, sampling_rate=RATE_HZ, return_tensors="np").input_features[0]
        self.processor.tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
        return {"input_features": features, "labels": self.processor.tokenizer(text).input_ids[1:]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: labels begin after the start token, which the model puts before them."""
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [IGNORE] * (longest - len(row["labels"])) for row in rows]
    return {
        "input_features": torch.from_numpy(np.stack([row["input_features"] for row in rows])),
        "labels": torch.tensor(labels),
    }


@dataclass(frozen=True)
class Ran:
    """What a run took and came to."""

    seconds: float
    loss: float


def train(
    base: str,
    rows: list[tuple[Path, str, str]],
    *,
    steps: int,
    batch: int,
    lr: float,
    rank: int,
    alpha: int,
    dora: bool,
    dropout: float,
    targets: str | list[str],
    frozen_encoder: bool,
    tuned: bool,
    seed: int = 42,
) -> Ran:
    """One training; loading the base model and its processor counts, as it does for its user."""
    began = time.perf_counter()
    processor = WhisperProcessor.from_pretrained(base)
    model = WhisperForConditionalGeneration.from_pretrained(base)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_dora=dora, target_modules=targets)
    peft_model = get_peft_model(model, config)
    if frozen_encoder and tuned:
        model.freeze_encoder()
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=steps,
            learning_rate=lr,
            warmup_steps=0,
            seed=seed,
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_num_workers=2 if tuned else 0,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
        )
        trainer = Seq2SeqTrainer(
            model=peft_model, args=arguments, train_dataset=Clips(processor, rows), data_collator=collate
        )
        loss = float(trainer.train().training_loss)
    return Ran(time.perf_counter() - began, loss)
