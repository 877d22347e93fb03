"""Train nano Whisper from random weights on synthesised speech: `python -m jobs.demo.train_nano`.

Most steps see only the frames that hold speech, at a tenth of the cost of a 30 s window; the last ones see whole
windows, so that the model learns to pass over the silence that fills them.

Shapes: B batch, M mel bins, F frames of 10 ms, T tokens.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jiwer
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration, WhisperTokenizer

from jobs.demo.compact import CompactWhisper, NanoConfig, expand, kept_token_ids, learned_tensors
from jobs.demo.nano import generation_config
from jobs.demo.tokenizer import ASSETS, build_tokenizer
from jobs.demo.training_data import IGNORED, Clip, make_clips, target_ids
from service.spec.counted import counted

WINDOW_FRAMES = 3000
GROUP = 16  # batches sorted by length together


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on how much."""

    clips: int = 12_000
    speech_steps: int = 4000
    speech_batch: int = 32
    window_steps: int = 300
    window_batch: int = 16
    learning_rate: float = 3e-3
    window_learning_rate: float = 1e-3
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate: in each phase a linear warm-up, then a cosine down to a twentieth."""
        if step < self.speech_steps:
            return self.learning_rate * _warm_cosine(step / self.speech_steps)
        return self.window_learning_rate * _warm_cosine((step - self.speech_steps) / self.window_steps)


def _warm_cosine(done: float, warmup: float = 0.05) -> float:
    """Share of the peak rate after a share `done` of a phase."""
    if done < warmup:
        return (done + 0.001) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class Batch:
    """One training batch, in the compact vocabulary's rows."""

    features_BMF: Tensor
    read_BT: Tensor
    targets_BT: Tensor


def log(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


def collate(
    clips: list[Clip], frames: int, tokenizer: WhisperTokenizer, row_of: dict[int, int], rng: random.Random
) -> Batch:
    """Stack clips over `frames` frames; each is padded with its own silence, which its last frame holds."""
    features_BMF = torch.empty(len(clips), 80, frames)
    pairs = []
    for row, clip in enumerate(clips):
        held = torch.from_numpy(clip.features_MF).float()
        features_BMF[row, :, : held.shape[1]] = held
        features_BMF[row, :, held.shape[1] :] = held[:, -1:]
        pairs.append(target_ids(clip, tokenizer, rng, with_timestamps=rng.random() < 0.5))
    length = max(len(read) for read, _ in pairs)
    read_BT = torch.full((len(clips), length), row_of[tokenizer.eos_token_id])
    targets_BT = torch.full((len(clips), length), IGNORED)
    for row, (read, targets) in enumerate(pairs):
        read_BT[row, : len(read)] = torch.tensor([row_of[token] for token in read])
        targets_BT[row, : len(targets)] = torch.tensor([row_of.get(token, IGNORED) for token in targets])
    return Batch(features_BMF, read_BT, targets_BT)


def speech_batches(clips: list[Clip], batch_size: int, rng: random.Random) -> Iterator[tuple[list[Clip], int]]:
    """Endless batches of clips alike in length, with the number of frames for each: speech and a little silence."""
    while True:
        group = sorted(rng.choices(clips, k=batch_size * GROUP), key=lambda clip: clip.features_MF.shape[1])
        batches = [group[at : at + batch_size] for at in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            longest = max(clip.features_MF.shape[1] for clip in batch)
            yield batch, min(WINDOW_FRAMES, 2 * math.ceil((longest + rng.randint(0, 80)) / 2))


def window_batches(clips: list[Clip], batch_size: int, rng: random.Random) -> Iterator[tuple[list[Clip], int]]:
    """Endless batches over the whole window."""
    while True:
        yield rng.choices(clips, k=batch_size), WINDOW_FRAMES


def train(clips: list[Clip], model: CompactWhisper, tokenizer: WhisperTokenizer, schedule: Schedule) -> None:
    """Train in place: first on speech alone, then on whole windows.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    rng = random.Random(schedule.seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    speech = speech_batches(clips, schedule.speech_batch, rng)
    window = window_batches(clips, schedule.window_batch, rng)
    model.train()
    total, started, mean_loss = schedule.speech_steps + schedule.window_steps, time.monotonic(), 0.0
    for step in range(total):
        chosen, frames = next(speech if step < schedule.speech_steps else window)
        batch = collate(chosen, frames, tokenizer, model.row_of, rng)
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        logits = model(batch.features_BMF, batch.read_BT)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORED)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"loss {loss.item()} at step {step}: lower --learning-rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean_loss += loss.item() / 100
        if step % 100 == 99:
            log(f"step {step + 1}/{total}  loss {mean_loss:.4f}  {time.monotonic() - started:.0f} s")
            mean_loss = 0.0


@torch.inference_mode()
def transcribe(
    model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, clips: list[Clip], *, with_timestamps: bool
) -> list[str]:
    """Transcribe whole windows greedily, each in its own language."""
    texts: list[str] = []
    for at in range(0, len(clips), 32):
        chosen = clips[at : at + 32]
        features = torch.stack([_whole_window(clip) for clip in chosen])
        languages = [clip.language for clip in chosen]
        tokens = model.generate(
            features,
            language=languages,
            task="transcribe",
            return_timestamps=with_timestamps,
            max_new_tokens=40,
        )
        texts += tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def _whole_window(clip: Clip) -> Tensor:
    held = torch.from_numpy(clip.features_MF).float()
    return torch.cat([held, held[:, -1:].expand(-1, WINDOW_FRAMES - held.shape[1])], dim=1)


def word_error_rates(
    model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, clips: list[Clip]
) -> dict[str, float]:
    """WER on clips with speech, by language and by mode, as fractions."""
    rates = {}
    spoken = [clip for clip in clips if clip.segments]
    for mode, with_timestamps in (("text", False), ("timestamps", True)):
        heard = transcribe(model, tokenizer, spoken, with_timestamps=with_timestamps)
        for language in ("en", "es"):
            rows = [row for row, clip in enumerate(spoken) if clip.language == language]
            said = [" ".join(segment.text for segment in spoken[row].segments) for row in rows]
            rates[f"{language}_{mode}"] = round(jiwer.wer(said, [heard[row] for row in rows]), 4)
    return rates


def main() -> None:
    """Train, measure and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model_defaults, defaults = NanoConfig(), Schedule()
    for name, value in (defaults.__dict__ | model_defaults.as_dict()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--output", type=Path, default=ASSETS, help="folder for nano_whisper.safetensors and .json")
    arguments = vars(parser.parse_args())
    config = NanoConfig(**{name: arguments[name] for name in model_defaults.as_dict()})
    schedule = Schedule(**{name: arguments[name] for name in defaults.__dict__})

    started = time.monotonic()
    tokenizer = build_tokenizer()
    clips = make_clips(schedule.clips, schedule.seed)
    log(f"{counted(len(clips), 'clip')} in {time.monotonic() - started:.0f} s")
    torch.manual_seed(schedule.seed)
    kept_ids = kept_token_ids(tokenizer)
    compact = CompactWhisper(config, kept_ids)
    train(clips, compact, tokenizer, schedule)

    tensors = learned_tensors(compact)
    model = expand(tensors, config, kept_ids)
    model.generation_config = generation_config(tokenizer, config)
    rates = word_error_rates(model, tokenizer, make_clips(300, schedule.seed + 1, held_out=True))
    seconds = round(time.monotonic() - started)
    record = {"model": config.as_dict(), "schedule": schedule.__dict__, "seconds": seconds, "wer_held_out": rates}
    arguments["output"].mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments["output"] / "nano_whisper.safetensors")
    (arguments["output"] / "nano_whisper.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
