"""Three epochs of decoder-only training with the encoder's outputs kept, beside the same with the encoder in each step.

    python tests/benchmarks/encoder_kept.py [--shape nano] [--clips 48] [--epochs 3] [--batch 4] [--threads 1]

Nano Whisper on a CPU in float32; on a GPU random weights of large-v3-turbo's shape (`--shape turbo`) in bf16. `--shape
narrow` is turbo's proportion of layers, 8 of the encoder to each of the decoder, at nano's width. All sides are run in
one process, from the same adapter: `off` hears each clip in each epoch, `kept` once, and `shared` finds what `kept` has
left, as the second trial of a search does. Prints JSON: seconds, the ratios of `off` to the others (`encoder_kept` and
`encoder_kept_shared`), losses of the last epoch, bytes that are kept, and the peak of memory of each side.

Over N epochs `encoder_kept` is below N, since the first one hears every clip; `encoder_kept_shared` has no such bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from jobs.adapter import attach, trainable_parameters
from jobs.augment import Augmenter
from jobs.batches import Loader, Schedule, label_tokens, seed_everything
from jobs.demo.nano import write_nano_whisper
from jobs.fast.encoder_outputs import EncoderOutputs, Origin
from jobs.fast.places import Memory
from jobs.model import load_whisper
from jobs.train.step import forward_loss
from service.spec.augment import AugmentConfig
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import OPENAI

NARROW = {"encoder_layers": 16, "decoder_layers": 2}
TURBO = asdict(OPENAI["openai/whisper-large-v3-turbo"])
TEXT = "open the window and bring my breakfast to the garden before the others come"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("clips", 48), ("epochs", 3), ("batch", 4), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=("nano", "narrow", "turbo"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as place:
        shape = options.shape or ("turbo" if device.type == "cuda" else "nano")
        base, records = _model(Path(place), shape, device), _clips(Path(place), options.clips)
        precision = "bf16" if device.type == "cuda" else "no"
        origin = Origin("benchmark", None, "sdpa", precision, device.type, (("train", ""),))
        outputs = EncoderOutputs(origin, device, [Memory("here", device, 10**11)])
        sides = {"off": None, "kept": outputs, "shared": outputs}
        _train(base, records[: options.batch], device, options, None)  # warm up
        found = {name: _train(base, records, device, options, side) for name, side in sides.items()}
    seconds = {name: round(side["seconds"], 2) for name, side in found.items()}
    row = outputs.find("train", 0)
    assert row is not None
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {options.threads} thread(s)",
        "shape": shape,
        "clips": options.clips,
        "epochs": options.epochs,
        "seconds": seconds,
        "encoder_kept": round(seconds["off"] / seconds["kept"], 2),
        "encoder_kept_shared": round(seconds["off"] / seconds["shared"], 2),
        "loss": {name: side["loss"] for name, side in found.items()},
        "kept_bytes": len(records) * row.numel() * row.element_size(),
        "peak_bytes": {name: side["peak"] for name, side in found.items()},
    }
    print(json.dumps(report, indent=2))


def _model(place: Path, shape: str, device: torch.device) -> Path:
    write_nano_whisper(place / "nano")
    if shape == "nano":
        return place / "nano"
    config = WhisperConfig.from_pretrained(place / "nano")
    config.update({"narrow": NARROW, "turbo": TURBO}[shape])
    with device:
        WhisperForConditionalGeneration(config).save_pretrained(place / shape)
    for file in (place / "nano").iterdir():
        if not (place / shape / file.name).exists():
            (place / shape / file.name).write_bytes(file.read_bytes())
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(place / shape)
    return place / shape


def _clips(place: Path, count: int) -> list[dict[str, Any]]:
    generator, found = np.random.default_rng(0), []
    for number in range(count):
        samples = 0.1 * generator.standard_normal(round(16_000 * generator.uniform(2, 10)))
        soundfile.write(place / f"{number}.flac", samples.astype(np.float32), 16_000)
        found.append({"path": str(place / f"{number}.flac"), "text": TEXT, "language": "en"})
    return found


def _train(
    base: Path, records: list[dict[str, Any]], device: torch.device, options: Any, outputs: EncoderOutputs | None
) -> dict[str, Any]:
    seed_everything(0)
    whisper = load_whisper(str(base))
    settings = TrainingConfig(freeze_encoder=True, lora_r=8, lora_dropout=0.0)
    model, _ = attach(whisper.model.to(device), settings)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable_parameters(model)], lr=1e-3)
    loader = Loader(
        records, whisper.processor.feature_extractor, whisper.prompter(), threads=2, prefetch=4,
        augmenter=Augmenter(AugmentConfig(), 0), outputs=outputs.of("train") if outputs is not None else None,
    )  # fmt: skip
    schedule = Schedule(len(records), options.batch, 1, 1, 0)
    losses = []
    with _peak(device) as peak:
        began = time.perf_counter()
        for batches in loader.steps(schedule, 0, 0, schedule.steps_per_epoch * options.epochs):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = forward_loss(model.train(), batches[0], device, freeze_encoder=True) / label_tokens(batches)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        mean = float(torch.stack(losses[-schedule.steps_per_epoch :]).mean())
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "loss": mean, "peak": peak[0]}


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[list[int]]:
    """The most memory in use meanwhile: of the GPU's allocator, or of the process."""
    found, over = [0], threading.Event()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield found
        found[0] = torch.cuda.max_memory_allocated()
        return

    def watch() -> None:
        process = psutil.Process()
        while not over.wait(0.05):
            found[0] = max(found[0], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    main()
