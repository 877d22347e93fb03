"""What the benchmarks are run on: base models of real shapes, and clips of a given length."""

from __future__ import annotations

from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from jobs.audio import SAMPLE_RATE_HZ, read_audio
from jobs.demo.make_speech import make_speech
from jobs.demo.nano import write_nano_whisper
from jobs.manifest.build import build
from jobs.manifest.rows import read_rows
from service.spec.whisper_dims import OPENAI

SHAPES = {
    "nano": None,
    "narrow": {"encoder_layers": 16, "decoder_layers": 2},
    "small": asdict(OPENAI["openai/whisper-small"]),
    "turbo": asdict(OPENAI["openai/whisper-large-v3-turbo"]),
}
"""`nano`: the demo's model, as it was trained. The others have random weights: `narrow` has turbo's proportion of
layers, 8 of the encoder to each of the decoder, at nano's width; `small` and `turbo` are those models' exact shapes."""

GAP_S = 0.1

Clip = tuple[Path, str, str]
"""Its file, what is said in it, and the language."""


def default_shape() -> str:
    """Nano on a CPU, turbo on a GPU."""
    return "turbo" if torch.cuda.is_available() else "nano"


def write_base(folder: Path, shape: str) -> Path:
    """Write a checkpoint with nano's tokenizer; returns its folder."""
    nano, changes = folder / "nano", SHAPES[shape]
    if not nano.exists():
        write_nano_whisper(nano)
    if changes is None:
        return nano
    config = WhisperConfig.from_pretrained(nano)
    # The tokenizer stays nano's: a larger vocabulary has tokens that nobody says.
    config.update(changes)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        WhisperForConditionalGeneration(config).save_pretrained(folder / shape)
    for file in nano.iterdir():
        if not (folder / shape / file.name).exists():
            (folder / shape / file.name).write_bytes(file.read_bytes())
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder / shape)
    return folder / shape


def write_clips(folder: Path, count: int, seconds: float, seed: int = 3) -> list[Clip]:
    """Write recordings of one language, joined from the demo's sentences, each as near to a length as they come.

    Args:
        folder: made where missing.
        count: of clips.
        seconds: at most so long, up to 30.
        seed: of the sentences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spoken = folder / "sentences"
    make_speech(spoken, clips=60, seed=seed)
    build(spoken, folder / "manifest", val_ratio=0.1)
    rows = [row for row in read_rows(str(folder / "manifest/train.csv"), "en") if row.language == "en"]
    return join_clips(folder, [(Path(row.path), row.text, row.language) for row in rows], count, seconds)


def join_clips(folder: Path, clips: list[Clip], count: int, seconds: float) -> list[Clip]:
    """Write recordings that are joined from clips, in turn and again from the first one on.

    Args:
        folder: made where missing.
        clips: of one language.
        count: of recordings.
        seconds: a recording is as long as clips fill, and at most so long; it has one clip at least.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = cycle([(read_audio(str(path)), text) for path, text, _ in clips])
    gap, found = np.zeros(round(GAP_S * SAMPLE_RATE_HZ), np.float32), []
    samples, text = next(parts)
    for number in range(count):
        joined, said = [samples], [text]
        while True:
            samples, text = next(parts)
            if sum(map(len, joined)) + len(gap) + len(samples) > seconds * SAMPLE_RATE_HZ:
                break
            joined += [gap, samples]
            said.append(text)
        path = folder / f"{number:04}.flac"
        soundfile.write(path, np.concatenate(joined), SAMPLE_RATE_HZ)
        found.append((path, " ".join(said), clips[0][2]))
    return found
