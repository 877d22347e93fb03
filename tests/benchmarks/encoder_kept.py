"""Three epochs of decoder-only training with the encoder's outputs kept, beside the same with the encoder in each step.

    python tests/benchmarks/encoder_kept.py [--shape nano] [--clips 48] [--epochs 3] [--batch 4]

Nano Whisper on a CPU in float32; on a GPU random weights of large-v3-turbo's shape (`--shape turbo`) in bf16, and more
clips. `--shape narrow` is turbo's proportion of layers, 8 of the encoder to each of the decoder, at nano's width.
Features are made on the device, as the engine makes them. All sides are run in one process, from the same adapter:
`off` hears each clip in each epoch, `kept` once, and `shared` finds what `kept` has left, as the second trial of a
search does. Prints JSON: seconds, the ratios of `off` to the others (`encoder_kept` and `encoder_kept_shared`), losses
of the last epoch, bytes that are kept, and the peak of memory of each side.

Over N epochs `encoder_kept` is below N, since the first one hears every clip; `encoder_kept_shared` has no such bound.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from bases import SHAPES, default_shape, write_base
from measured import averaged, command, device, machine, peak_memory

from jobs.adapter import attach, trainable_parameters
from jobs.augment import Augmenter
from jobs.batches import Features, Loader, Schedule, label_tokens, seed_everything
from jobs.fast.encoder_outputs import EncoderOutputs, Origin
from jobs.fast.log_mel import LogMel
from jobs.fast.places import Memory
from jobs.model import load_whisper
from jobs.train.step import forward_loss
from service.spec.augment import AugmentConfig
from service.spec.training import TrainingConfig

ON_GPU = {"clips": 256, "batch": 16}
"""Fewer would be gone before a GPU is at work."""

TEXT = "open the window and bring my breakfast to the garden before the others come"


def measure(shape: str, clips: int, epochs: int, batch: int, turns: int) -> dict[str, Any]:
    """Run all sides; see the module."""
    with tempfile.TemporaryDirectory() as place:
        base, records = write_base(Path(place), shape), _clips(Path(place), clips)
        precision = "bf16" if device().type == "cuda" else "no"
        origin = Origin("benchmark", None, "sdpa", precision, device().type, (("train", ""),))
        _train(base, records[:batch], 1, batch, None)  # warm up
        ran: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for _ in range(turns):
            outputs = EncoderOutputs(origin, device(), [Memory("here", device(), 10**11)])
            for name, side in (("off", None), ("kept", outputs), ("shared", outputs)):
                ran[name].append(_train(base, records, epochs, batch, side))
        found = {name: averaged(each) for name, each in ran.items()}
    row = outputs.find("train", 0)
    assert row is not None
    return {
        "ratios": {
            "encoder_kept": round(found["off"]["seconds"] / found["kept"]["seconds"], 2),
            "encoder_kept_shared": round(found["off"]["seconds"] / found["shared"]["seconds"], 2),
        },
        "equality": {
            "loss_apart": max(abs(found["off"]["loss"] - turn["loss"]) for side in ran.values() for turn in side)
        },
        "shape": shape,
        "clips": clips,
        "epochs": epochs,
        "kept_bytes": len(records) * row.numel() * row.element_size(),
        "runs": found,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sizes = {"clips": 48, "epochs": 3, "batch": 4, "turns": 1} | (ON_GPU if device().type == "cuda" else {})
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=SHAPES, default=default_shape())
    options = parser.parse_args()
    found = measure(options.shape, options.clips, options.epochs, options.batch, options.turns)
    print(json.dumps({"command": command()} | machine() | found, indent=2))


def _clips(place: Path, count: int) -> list[dict[str, Any]]:
    generator, found = np.random.default_rng(0), []
    for number in range(count):
        samples = 0.1 * generator.standard_normal(round(16_000 * generator.uniform(2, 10)))
        soundfile.write(place / f"{number}.flac", samples.astype(np.float32), 16_000)
        found.append({"path": str(place / f"{number}.flac"), "text": TEXT, "language": "en"})
    return found


def _train(
    base: Path, records: list[dict[str, Any]], epochs: int, batch: int, outputs: EncoderOutputs | None
) -> dict[str, Any]:
    seed_everything(0)
    whisper = load_whisper(str(base))
    settings = TrainingConfig(freeze_encoder=True, lora_r=8, lora_dropout=0.0)
    model, _ = attach(whisper.model.to(device()), settings)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(model)], lr=1e-3)
    features = Features(LogMel(whisper.processor.feature_extractor, device()))
    loader = Loader(
        records, features, whisper.prompter(), threads=2, prefetch=4,
        augmenter=Augmenter(AugmentConfig(), 0), outputs=outputs.of("train") if outputs is not None else None,
    )  # fmt: skip
    schedule = Schedule(len(records), batch, 1, 1, 0)
    losses = []
    with peak_memory() as peak:
        began = time.perf_counter()
        for batches in loader.steps(schedule, 0, 0, schedule.steps_per_epoch * epochs):
            with torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda"):
                loss = forward_loss(model.train(), batches[0], device(), freeze_encoder=True) / label_tokens(batches)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        mean = float(torch.stack(losses[-schedule.steps_per_epoch :]).mean())
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": mean, "peak": peak[0]}


if __name__ == "__main__":
    main()
