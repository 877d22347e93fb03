"""For tests of exports: a merged model with its held-out clips, as a job's merge stage leaves them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import fill_adapters, job, merge_of, prepared
from transformers import WhisperForConditionalGeneration

from jobs.adapter import attach
from jobs.export import artifact
from jobs.train.checkpoint import adapter_state, save_adapter
from service.spec.job import JobSpec

LIMITS = {"proof_clips": 12, "max_wer_increase": 0.1}
DECODING = {"max_new_tokens": 60, "bootstrap": 0}


def merged_run(base: Path, data: Path, root: Path, scale: float = 0.003, **settings: Any) -> JobSpec:
    """A root with merged/ and the clips that it was heard with, from an adapter of small random values."""
    spec = job(base, data, root, {"evaluation": DECODING, "export": LIMITS}, lora_r=4, **settings)
    prepared(spec)
    torch.manual_seed(0)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(base), spec.training)
    fill_adapters(model, scale)
    save_adapter(root / "adapter", model, adapter_state(model))
    merge_of(spec)
    return spec


def exported(spec: JobSpec, name: str) -> dict[str, Any]:
    """The stage that makes and proves one artifact."""
    return artifact.export_artifact(spec, spec.root, name, f"{spec.root}/data/val.arrow")


@contextmanager
def broken(family: str, breakage: Callable[[Path], None]) -> Iterator[None]:
    """Have a family's files spoilt after they were written, before they are published."""
    module, function = artifact.WRITERS[family]
    write = getattr(artifact.import_module(module), function)

    def spoil(checkpoint: Any, folder: Path, precision: str) -> Path:
        path: Path = write(checkpoint, folder, precision)
        breakage(folder)
        return path

    original = artifact.import_module

    class Spoilt:
        pass

    def instead(name: str) -> Any:
        if name != module:
            return original(name)
        found = Spoilt()
        setattr(found, function, spoil)
        return found

    artifact.import_module = instead
    try:
        yield
    finally:
        artifact.import_module = original


@dataclass
class GgmlTensor:
    """A tensor of a ggml file: where its data begin, and how they are stored."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    size: int


@dataclass
class GgmlFile:
    """A ggml file, read by the layout of whisper.cpp's loader, independently of our writer."""

    hyperparameters: dict[str, int]
    filters: np.ndarray[Any, Any]
    filters_begin: int
    words: list[bytes]
    tensors: dict[str, GgmlTensor]


NAMES = ("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer", "n_text_ctx", "n_text_state")
NAMES += ("n_text_head", "n_text_layer", "n_mels", "ftype")
BYTES = {0: (1, 4), 1: (1, 2), 6: (32, 22), 8: (32, 34)}
"""By type: weights of a block, and its bytes. 0: f32, 1: f16, 6: q5_0, 8: q8_0 (enum ggml_type)."""


def read_ggml(path: Path) -> GgmlFile:
    """Read a file whole."""
    content, place = path.read_bytes(), 0

    def integers(count: int) -> tuple[int, ...]:
        nonlocal place
        found = struct.unpack_from(f"<{count}i", content, place)
        place += 4 * count
        return found

    (magic,) = integers(1)
    assert magic == 0x67676D6C
    hyperparameters = dict(zip(NAMES, integers(len(NAMES)), strict=True))
    rows, columns = integers(2)
    filters_begin = place
    filters = np.frombuffer(content, "<f4", rows * columns, place).reshape(rows, columns)
    place += filters.nbytes
    (count,) = integers(1)
    words = []
    for _ in range(count):
        (length,) = integers(1)
        words.append(content[place : place + length])
        place += length
    tensors = {}
    while place < len(content):
        dimensions, length, kind = integers(3)
        shape = tuple(reversed(integers(dimensions)))
        name = content[place : place + length].decode()
        place += length
        block, size = BYTES[kind]
        held = int(np.prod(shape)) // block * size
        tensors[name] = GgmlTensor(name, shape, kind, place, held)
        place += held
    return GgmlFile(hyperparameters, filters, filters_begin, words, tensors)


def only(folder: Path, pattern: str) -> Path:
    """The one file of that kind."""
    (path,) = folder.glob(pattern)
    return path


def swap_in_ggml(folder: Path) -> None:
    """Swap two tensors of one shape."""
    path = only(folder, "*.bin")
    tensors, content = read_ggml(path).tensors, bytearray(path.read_bytes())
    one, other = (tensors[f"decoder.blocks.0.cross_attn.{part}.weight"] for part in ("query", "value"))
    first = bytes(content[one.begin : one.begin + one.size])
    content[one.begin : one.begin + one.size] = content[other.begin : other.begin + other.size]
    content[other.begin : other.begin + other.size] = first
    path.write_bytes(content)


def spoil_mel_filters(folder: Path) -> None:
    """Turn the mel filters round, as a bank in the wrong order would be."""
    path = only(folder, "*.bin")
    found, content = read_ggml(path), bytearray(path.read_bytes())
    turned = np.ascontiguousarray(found.filters[::-1]).tobytes()
    content[found.filters_begin : found.filters_begin + len(turned)] = turned
    path.write_bytes(content)


def spoil_scales(folder: Path) -> None:
    """Double the scales of every second block of the quantised feed-forward matrices."""
    path = only(folder, "*.bin")
    content = bytearray(path.read_bytes())
    for tensor in read_ggml(path).tensors.values():
        block, size = BYTES[tensor.type]
        if block == 1 or ".mlp." not in tensor.name:
            continue
        blocks = np.frombuffer(content, np.uint8, tensor.size, tensor.begin).reshape(-1, size)
        blocks[::2, :2] = (blocks[::2, :2].copy().view(np.float16) * 4).view(np.uint8)
    path.write_bytes(content)


def truncate(pattern: str, share: float = 0.6) -> Callable[[Path], None]:
    """Cut a file off."""

    def cut(folder: Path) -> None:
        path = only(folder, pattern)
        with open(path, "r+b") as file:
            file.truncate(int(path.stat().st_size * share))

    return cut


def swap_in_openai(folder: Path) -> None:
    """Swap two tensors of one shape."""
    path = folder / "model.pt"
    content = torch.load(path, weights_only=True)
    state = content["model_state_dict"]
    one, other = ("decoder.blocks.0.cross_attn.query.weight", "decoder.blocks.0.cross_attn.value.weight")
    state[one], state[other] = state[other].clone(), state[one].clone()
    torch.save(content, path)


def drop_in_openai(folder: Path) -> None:
    """Leave a tensor out."""
    path = folder / "model.pt"
    content = torch.load(path, weights_only=True)
    del content["model_state_dict"]["decoder.ln.weight"]
    torch.save(content, path)


def wrong_mel_bins(folder: Path) -> None:
    """Have faster-whisper compute other features than the model knows."""
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"feature_size": 80', '"feature_size": 128'))
