"""A merged checkpoint on disk, as the formats read it: configuration, vocabulary, mel filters, tensors one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import GenerationConfig, WhisperConfig, WhisperProcessor

from jobs.export.weights import HEAD, Weights
from jobs.model import weight_files
from service.errors import InputError
from service.spec.export import shape_faults
from service.spec.whisper_dims import WhisperDims


class UnsupportedError(InputError):
    """A format cannot hold the model as it is."""


@dataclass(frozen=True)
class Checkpoint:
    """A merged checkpoint.

    Args:
        folder: with config.json, weights in safetensors, processor and generation config.
    """

    folder: Path

    @cached_property
    def config(self) -> Any:
        """config.json."""
        return WhisperConfig.from_pretrained(self.folder)

    @cached_property
    def generation(self) -> Any:
        """generation_config.json."""
        return GenerationConfig.from_pretrained(self.folder)

    @cached_property
    def processor(self) -> Any:
        """Tokenizer and feature extractor."""
        return WhisperProcessor.from_pretrained(self.folder)

    @cached_property
    def weights(self) -> Weights:
        """The tensors, backed by the files."""
        return Weights(weight_files(str(self.folder)))

    @property
    def mel_filters(self) -> np.ndarray[Any, Any]:
        """Mel filter bank, float32 (mel bins, 201 frequencies)."""
        return np.ascontiguousarray(self.processor.feature_extractor.mel_filters.T, dtype=np.float32)

    def words(self) -> list[bytes]:
        """The bytes of every token of text, in the order of their ids; control tokens come after them.

        Raises:
            UnsupportedError: the tokenizer's ids are not those of a Whisper.
        """
        vocabulary = json.loads((self.folder / "vocab.json").read_text(encoding="utf-8"))
        end = self.processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
        by_id = {index: token for token, index in vocabulary.items() if index < end}
        if sorted(by_id) != list(range(end)):
            raise UnsupportedError(f"the tokenizer has {len(by_id)} tokens of text below {end}, not one for every id")
        letters = _bytes_by_letter()
        return [bytes(letters[letter] for letter in by_id[index]) for index in range(end)]

    def openai_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors by their names in openai-whisper and whisper.cpp, the output head, which those tie, left out."""
        for name in self.weights:
            if name != HEAD:
                yield openai_name(name), self.weights[name]

    def require_shape(self, artifact: str) -> None:
        """Refuse to write what the readers of a format have no place for.

        Raises:
            UnsupportedError: the model is of another shape; the reason says how.
        """
        config = self.config
        faults = shape_faults(artifact, WhisperDims.from_config(config.to_dict()))
        if HEAD in self.weights:
            faults.append("its output head is not tied to the token embedding, and the format has one matrix for both")
        if config.activation_function != "gelu" or config.scale_embedding:
            faults.append("its activation or its scaling of embeddings is not Whisper's")
        if faults:
            raise UnsupportedError("; ".join(faults))


_PLACES = (
    ("model.", ""),
    ("embed_positions.weight", "positional_embedding"),
    ("embed_tokens.weight", "token_embedding.weight"),
    ("layers.", "blocks."),
    ("self_attn_layer_norm.", "attn_ln."),
    ("encoder_attn_layer_norm.", "cross_attn_ln."),
    ("self_attn.", "attn."),
    ("encoder_attn.", "cross_attn."),
    ("q_proj.", "query."),
    ("k_proj.", "key."),
    ("v_proj.", "value."),
    ("out_proj.", "out."),
    ("fc1.", "mlp.0."),
    ("fc2.", "mlp.2."),
    ("final_layer_norm.", "mlp_ln."),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
)


def openai_name(name: str) -> str:
    """A tensor's name in openai-whisper, from its name in transformers."""
    for ours, theirs in _PLACES:
        name = name.replace(ours, theirs)
    return name


def _bytes_by_letter() -> dict[str, int]:
    """The bytes that GPT-2's vocabulary writes as printable letters; transformers has the inverse."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
