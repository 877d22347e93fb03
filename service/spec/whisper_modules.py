"""Every module of a Whisper in transformers' implementation, with its shape: computed from the dims, no model needed.

Names are as PEFT sees them on WhisperForConditionalGeneration (`model.encoder.layers.0.self_attn.q_proj`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from service.spec.whisper_dims import WhisperDims

ModuleKind = Literal["linear", "conv1d", "embedding", "layer_norm", "activation", "container", "list"]

EMBEDDING = "model.decoder.embed_tokens"
HEAD = "proj_out"
"""The output head; its weight is the token embedding's."""


@dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        parameters: of the module and all below it; the head counts the embedding's weight, to which it is tied.
        kernel: width of a convolution's window, else 1.
    """

    name: str
    kind: ModuleKind
    in_features: int = 0
    out_features: int = 0
    bias: bool = False
    parameters: int = 0
    kernel: int = 1


@cache
def modules(dims: WhisperDims) -> tuple[Module, ...]:
    """All modules below the model itself, parents first."""
    below: dict[str, int] = {}
    named: dict[str, Module | None] = {}
    for leaf in _leaves(dims):
        for parent in _parents(leaf.name):
            named.setdefault(parent, None)
            below[parent] = below.get(parent, 0) + leaf.parameters
        named[leaf.name] = leaf
    return tuple(
        module or Module(name, "list" if name.endswith(".layers") else "container", parameters=below[name])
        for name, module in named.items()
    )


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def total_parameters(dims: WhisperDims) -> int:
    """Parameters of the whole model; the tied output head counts once."""
    return sum(leaf.parameters for leaf in _leaves(dims) if leaf.name != HEAD)


def _leaves(dims: WhisperDims) -> Iterator[Module]:
    width = dims.d_model
    yield _conv("model.encoder.conv1", dims.num_mel_bins, width)
    yield _conv("model.encoder.conv2", width, width)
    yield _embedding("model.encoder.embed_positions", dims.max_source_positions, width)
    for layer in range(dims.encoder_layers):
        yield from _layer(f"model.encoder.layers.{layer}", width, dims.encoder_ffn_dim, ["self_attn"])
    yield _norm("model.encoder.layer_norm", width)
    yield _embedding(EMBEDDING, dims.vocab_size, width)
    yield _embedding("model.decoder.embed_positions", dims.max_target_positions, width)
    for layer in range(dims.decoder_layers):
        yield from _layer(f"model.decoder.layers.{layer}", width, dims.decoder_ffn_dim, ["self_attn", "encoder_attn"])
    yield _norm("model.decoder.layer_norm", width)
    yield _linear(HEAD, width, dims.vocab_size, bias=False)


def _layer(name: str, width: int, ffn: int, attentions: list[str]) -> Iterator[Module]:
    for attention in attentions:
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield _linear(f"{name}.{attention}.{projection}", width, width, bias=projection != "k_proj")
        yield _norm(f"{name}.{attention}_layer_norm", width)
    yield Module(f"{name}.activation_fn", "activation")
    yield _linear(f"{name}.fc1", width, ffn)
    yield _linear(f"{name}.fc2", ffn, width)
    yield _norm(f"{name}.final_layer_norm", width)


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Module:
    return Module(name, "linear", inputs, outputs, bias, inputs * outputs + bias * outputs)


def _conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Module:
    return Module(name, "conv1d", inputs, outputs, True, inputs * outputs * kernel + outputs, kernel)


def _norm(name: str, width: int) -> Module:
    return Module(name, "layer_norm", width, width, True, 2 * width)


def _embedding(name: str, rows: int, width: int) -> Module:
    return Module(name, "embedding", rows, width, False, rows * width)
