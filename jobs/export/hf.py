"""The merged checkpoint in transformers' own format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import WhisperConfig, WhisperProcessor

from jobs.export.merging import MergedTensors
from jobs.export.processor_files import save_processor
from jobs.export.safetensors_file import write_checkpoint
from jobs.export.weights import Weights
from jobs.model import at_hand, is_multilingual, load_generation, reading, weight_files

SHARD_BYTES = 4 << 30


def write_hf(
    base: str, adapter: Path | None, folder: Path, *, revision: str | None = None, language: str | None = None
) -> dict[str, Any]:
    """Merge an adapter into its base and save a checkpoint that loads back as it is.

    Weights are merged in float32 and saved in the base's own precision, tensor by tensor.

    Args:
        base: hub id, folder, or URI of a folder.
        adapter: folder of the PEFT adapter; None: the base alone.
        folder: where to.
        revision: commit of the base on the hub.
        language: what a multilingual model transcribes unless told otherwise; None: it detects the language.

    Returns:
        {"tied", "dtype"}: whether output head and token embedding are one matrix, and the precision.

    Raises:
        SpecError: base or adapter cannot be had, or do not fit each other.
    """
    place = at_hand(base)
    with reading(base):
        config = WhisperConfig.from_pretrained(place, revision=revision)
        generation = load_generation(place, revision)
        processor = WhisperProcessor.from_pretrained(place, revision=revision)
        weights = Weights(weight_files(base, revision))
        dtype = _dtype(config, weights)
    merged = MergedTensors(weights, config, adapter, dtype)
    shapes = {name: merged.shapes[name] for name in merged.names}
    write_checkpoint(folder, merged, shapes, dtype, SHARD_BYTES)
    config.tie_word_embeddings = merged.tied
    config.dtype = dtype
    config.architectures = ["WhisperForConditionalGeneration"]
    generation.forced_decoder_ids = None
    if language and is_multilingual(generation, config):
        generation.language, generation.task = language, "transcribe"
    config.save_pretrained(folder)
    # Not save_pretrained(), which refuses flags of sampling and beams that say nothing, and many checkpoints carry.
    (folder / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    save_processor(processor.tokenizer, processor.feature_extractor, folder)
    return {"tied": merged.tied, "dtype": str(dtype).removeprefix("torch.")}


def _dtype(config: Any, weights: Weights) -> torch.dtype:
    """What the checkpoint says that it is stored in, as transformers reads it, else what its first weight is."""
    said = config.dtype
    if isinstance(said, str):
        said = getattr(torch, said)
    if said is not None:
        return said
    return weights[next(iter(weights))].dtype
