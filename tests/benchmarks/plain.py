"""The user's alternative: transformers' Seq2SeqTrainer with PEFT, as its users write it. Nothing of ours is in it.

`tuned` is what an experienced user changes: data loading in workers, evaluation in batches of 64, no encoder in the
graph where it is frozen. Neither checkpoints activations. On a GPU both compute in bf16, in generation too: Trainer's
`bf16` alone would leave that in float32, since accelerate wraps the forward pass of the PeftModel, and generate() calls
that of the model in it.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import soxr
import torch
from measured import Pace, device, peak_memory
from peft import LoraConfig, get_peft_model
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

IGNORE = -100
RATE_HZ = 16_000
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
DECODER = r".*decoder.*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@dataclass(frozen=True)
class Recipe:
    """What is trained, by PEFT's names."""

    rank: int = 16
    dora: bool = False
    frozen_encoder: bool = False
    lr: float = 1e-3


@dataclass(frozen=True)
class Ran:
    """What a training took and came to: seconds, mean loss of its steps, the most memory in bytes, and the seconds of a
    step (see Pace)."""

    seconds: float
    loss: float
    peak: int
    step_seconds: float | None


@dataclass(frozen=True)
class Scored:
    """What an evaluation took and came to."""

    seconds: float
    wer: float
    peak: int


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
        return {"input_features": features, "labels": self.processor.tokenizer(" " + text).input_ids[1:]}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch: labels begin after the start token, which the model puts before them."""
    longest = max(len(row["labels"]) for row in rows)
    labels = [row["labels"] + [IGNORE] * (longest - len(row["labels"])) for row in rows]
    return {
        "input_features": torch.from_numpy(np.stack([row["input_features"] for row in rows])),
        "labels": torch.tensor(labels),
    }


class Paced(TrainerCallback):  # type: ignore[misc]
    """Times the steps."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the optimizer's."""
        self._pace.tell(state.global_step, state.max_steps)


def train(base: Path, rows: list[tuple[Path, str, str]], recipe: Recipe, *, steps: int, batch: int, tuned: bool) -> Ran:
    """One training; loading the base model and its processor counts, as it does for its user."""
    pace = Pace()
    with peak_memory() as peak:
        began = time.perf_counter()
        processor = WhisperProcessor.from_pretrained(base)
        trainer = Seq2SeqTrainer(
            model=adapted(base, recipe, tuned=tuned),
            args=_arguments(max_steps=steps, per_device_train_batch_size=batch, learning_rate=recipe.lr, tuned=tuned),
            train_dataset=Clips(processor, rows),
            data_collator=collate,
            callbacks=[Paced(pace)],
        )
        trainer.remove_callback(PrinterCallback)
        loss = float(trainer.train().training_loss)
        seconds = time.perf_counter() - began
    return Ran(seconds, loss, peak[0], pace.step_seconds)


def score(model: Any, processor: Any, rows: list[tuple[Path, str, str]], *, longest: int, tuned: bool) -> Scored:
    """Evaluate by generation. Trainer also computes the loss of each batch, as it always does."""
    tokenizer = processor.tokenizer

    def measure(found: Any) -> dict[str, float]:
        labels = np.where(found.label_ids == IGNORE, tokenizer.pad_token_id, found.label_ids)
        said = np.where(found.predictions == IGNORE, tokenizer.pad_token_id, found.predictions)
        references, texts = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (labels, said))
        return {"wer": jiwer.wer(references, texts)}

    arguments = _arguments(
        tuned=tuned, predict_with_generate=True, generation_max_length=longest, generation_num_beams=1,
        **({"per_device_eval_batch_size": 64} if tuned else {}),
    )  # fmt: skip
    with peak_memory() as peak, torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
        began = time.perf_counter()
        trainer = Seq2SeqTrainer(
            model=model, args=arguments, eval_dataset=Clips(processor, rows), data_collator=collate,
            compute_metrics=measure, processing_class=processor.feature_extractor,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        wer = float(trainer.evaluate(language=rows[0][2], task="transcribe")["eval_wer"])
        seconds = time.perf_counter() - began
    return Scored(seconds, wer, peak[0])


def adapted(base: Path, recipe: Recipe, *, tuned: bool) -> Any:
    """The base with fresh adapters."""
    model = WhisperForConditionalGeneration.from_pretrained(base)
    targets = DECODER if recipe.frozen_encoder else EVERYWHERE
    config = LoraConfig(
        r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=0.0, use_dora=recipe.dora, target_modules=targets
    )
    wrapped = get_peft_model(model, config)
    if recipe.frozen_encoder and tuned:
        model.freeze_encoder()
    return wrapped


def _arguments(*, tuned: bool, **options: Any) -> Seq2SeqTrainingArguments:
    return Seq2SeqTrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="whisper-jobs-bench-"),
        warmup_steps=0,
        seed=42,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=2 if tuned else 0,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        **options,
    )
