"""For tests: clips, small checkpoints, specs, and runs of the training engine without Ray."""

from __future__ import annotations

import csv
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.audio import SAMPLE_RATE_HZ
from jobs.merge import Source, merge
from jobs.prepare import prepare, split_file
from jobs.train.loop import TrainTask, train
from jobs.train.session import LocalSession
from service.spec.job import JobSpec

TINY_WINDOW_S = 2
TEXTS = (
    "open the window", "turn it on", "call me", "abre la puerta", "close the door now", "bring coffee", "thank you",
    "la mesa verde", "order my breakfast again", "stop", "move slowly please", "mi radio", "find the yellow umbrella",
    "watch the garden", "apaga la radio", "clean every room", "carry it", "follow the teacher",
)  # fmt: skip


def tone(seconds: float, pitch_hz: float = 440.0, rate_hz: int = SAMPLE_RATE_HZ) -> NDArray[np.float32]:
    """A sine of half the full scale."""
    time_S = np.arange(round(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * pitch_hz * time_S)).astype(np.float32)


def write_csv(path: Path, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = ("path", "text", "language")) -> Path:
    """Write a manifest."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_tones(folder: Path, train_rows: int = 13) -> None:
    """Write 18 clips of 0.4 to 1.25 s, train.csv and val.csv."""
    generator = np.random.default_rng(0)
    rows = []
    for index, text in enumerate(TEXTS):
        samples = tone(0.4 + 0.05 * index, 150 + 60 * index)
        noise = 0.05 * generator.standard_normal(len(samples)).astype(np.float32)
        soundfile.write(folder / f"{index:02}.wav", samples + noise, SAMPLE_RATE_HZ)
        rows.append((f"{index:02}.wav", text, "es" if " la " in f" {text} " or " mi " in f" {text} " else "en"))
    write_csv(folder / "train.csv", rows[:train_rows])
    write_csv(folder / "val.csv", rows[train_rows:])


def write_tiny_whisper(folder: Path, nano: Path) -> None:
    """Write a checkpoint of random weights with nano Whisper's vocabulary and a window of 2 s."""
    from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    config = WhisperConfig.from_pretrained(nano)
    config.d_model = 32
    config.encoder_ffn_dim = config.decoder_ffn_dim = 64
    config.max_source_positions = 50 * TINY_WINDOW_S
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():  # of a size that tells inputs apart; transformers' own is near 0
                if parameter.dim() > 1:
                    parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.generation_config = GenerationConfig.from_pretrained(nano)
    model.save_pretrained(folder)
    for file in nano.iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder / file.name)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=TINY_WINDOW_S).save_pretrained(folder)


def job(
    base: Path | str, data: Path, root: Path, sections: dict[str, dict[str, Any]] | None = None, **training: Any
) -> JobSpec:
    """A train job on `data`/train.csv and `data`/val.csv; keywords are settings of `training`."""
    settings = {
        "base_model": str(base),
        "train_csv": str(data / "train.csv"),
        "val_csv": str(data / "val.csv"),
        "outdir": str(root),
        "per_dev_batch": 2,
        "grad_accum": 1,
        "lr": 1e-3,
        "epochs": 1,
        "logging_steps": 1,
    }
    content: dict[str, Any] = {"training": settings | training, "evaluation": {"max_new_tokens": 6, "bootstrap": 10}}
    content["engine"] = {"report_to": []}
    content["export"] = {"formats": []}
    for name, values in (sections or {}).items():
        content[name] = content.get(name, {}) | values
    return JobSpec.model_validate(content)


def prepared(spec: JobSpec) -> TrainTask:
    """Check and store the job's rows, as the first stage does."""
    splits = {"train": str(spec.training.train_csv), "val": str(spec.training.val_csv)}
    prepare(spec, spec.root, splits, spec.training.base_model)
    return TrainTask(spec, *(f"{spec.root}/{split_file(name)}" for name in splits), root=spec.root)


def run_engine(spec: JobSpec, keep: int = 100) -> tuple[dict[str, Any], LocalSession]:
    """The whole training stage in this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a worker's process trains once; this one many times
    session = LocalSession()
    return train(prepared(keeping(spec, keep)), session), session


def keeping(spec: JobSpec, checkpoints: int) -> JobSpec:
    """The spec with as many checkpoints kept."""
    return spec.model_copy(update={"engine": spec.engine.model_copy(update={"keep_checkpoints": checkpoints})})


class Run:
    """A finished training stage, its surroundings and what it left behind."""

    def __init__(self, spec: JobSpec) -> None:
        self.spec, self.root = spec, Path(spec.root)
        self.result, self.session = run_engine(spec)

    def steps(self, value: str | None = None) -> list[Any]:
        """The events of the optimizer's steps, or one of their values."""
        found = events(self.session, "step")
        return [event[value] for event in found] if value else found

    def adapter(self, step: int | None = None) -> dict[str, Tensor]:
        """The published adapter, or that of a step's checkpoint."""
        return saved_adapter(self.root / (f"checkpoints/checkpoint-{step}/adapter" if step else "adapter"))

    def state(self, step: int) -> dict[str, Any]:
        """The state of optimizer, schedule and the like in a step's checkpoint."""
        state: dict[str, Any] = torch.load(self.root / f"checkpoints/checkpoint-{step}/state.pt")
        return state

    def merge(self) -> dict[str, Any]:
        """The merge stage on it."""
        return merge_of(self.spec)


def merge_of(spec: JobSpec, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """The merge stage on a trained adapter."""
    source = Source(spec.training.base_model, Path(spec.root) / "adapter")
    return merge(spec, spec.root, source, f"{spec.root}/{split_file('val')}", progress)


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        training: whether the module was in training.
        gradients: whether they were recorded.
        given: the arguments by name.
        output: what it returned.
    """

    training: bool
    gradients: bool
    given: dict[str, Any]
    output: Any


@contextmanager
def watched(kind: type[torch.nn.Module]) -> Iterator[list[Call]]:
    """The calls of a library's modules while the engine runs; they do what they always do."""
    calls: list[Call] = []
    forward = kind.forward
    names = list(inspect.signature(forward).parameters)[1:]

    def watch(self: Any, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        given = dict(zip(names, arguments, strict=False)) | options
        calls.append(Call(self.training, torch.is_grad_enabled(), given, output))
        return output

    kind.forward = watch  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        kind.forward = forward  # type: ignore[method-assign]


def events(session: LocalSession, kind: str) -> list[dict[str, Any]]:
    """A session's events of one kind."""
    return [event for event in session.events if event["event"] == kind]


def saved_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = load_file(folder / "adapter_model.safetensors")
    return state


def fill_adapters(model: Any, scale: float, seed: int = 0) -> None:
    """Give every trained parameter random values: an untrained adapter has B = 0 and proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def environment() -> dict[str, str]:
    """For child processes: no hub, no cluster from outside."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def batch_of(base: Path, csv_file: Path, count: int) -> Any:
    """The first rows of a manifest as one batch."""
    from jobs.batches import Loader
    from jobs.manifest.rows import read_rows
    from jobs.model import load_processor, load_prompter

    rows = [vars(row) for row in read_rows(str(csv_file), "en")]
    loader = Loader(rows, load_processor(str(base)).feature_extractor, load_prompter(str(base)), threads=1, prefetch=1)
    return loader.make(list(range(count)))


def logits_of(model: Any, batch: Any) -> Tensor:
    """Logits (N, V) at the positions that count, of a model in evaluation."""
    model.eval()
    with torch.inference_mode():
        logits_BTV: Tensor = model(
            input_features=batch.features_BMF.to(model.dtype), decoder_input_ids=batch.inputs_BT, use_cache=False
        ).logits
    return logits_BTV[batch.labels_BT >= 0].float()
