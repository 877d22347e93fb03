"""An estimate of the memory that a worker's model takes.

An estimate: kernels, fragmentation and the CUDA context (about 0.5 GB) are not in it, and a clip is taken to have
LABEL_TOKENS tokens.

Training = base + adapter + activations:
    base         4 bytes per parameter (it is held in float32); in mixed precision 2 more for each weight through which
                 gradients flow, since autograd keeps the cast one
    adapter      16 bytes per trainable parameter: weight, gradient, and AdamW's two moments
    activations  what autograd keeps for the backward pass, per clip, over the layers from the first adapted one on.
                 With P positions, width d, feed-forward width f, h bytes per value (2 in mixed precision, else 4):
                     layer norms       4 P d each (their inputs are float32)
                     attention         h P 4 d (q, k, v, output); keys and values of cross-attention span the audio
                     GELU              h P f
                     adapted module    h P (in + r), P in for dropout's mask, and with DoRA h P 2 out
                 and 4 T V for the loss and h T V for the logits, T tokens over a vocabulary of V. With gradient
                 checkpointing only each layer's input (4 P d) and one layer in full.

Evaluation = base + weights with adapters folded in (4 bytes each) + keys and values of the decoder's cache and the
encoder's working set, for a batch with beams.

tests/unit/test_memory.py measures what autograd keeps and holds the estimate to it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from service.spec.job import JobSpec
from service.spec.targets import AdaptedModule, in_encoder
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import modules, total_parameters

LABEL_TOKENS = 128
"""Tokens of a clip's transcript, taken for the estimate; the most that Whisper knows is 448."""


@dataclass(frozen=True)
class Training:
    """Bytes that training takes, by purpose."""

    base: int
    adapter: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.activations


@dataclass(frozen=True)
class Evaluation:
    """Bytes that transcribing takes, by purpose."""

    base: int
    folded: int
    cache: int
    encoder: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.folded + self.cache + self.encoder


@dataclass(frozen=True)
class Memory:
    """Estimated bytes per worker; training and evaluation take turns."""

    training: Training
    evaluation: Evaluation

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.training.total, self.evaluation.total)

    def as_dict(self) -> dict[str, Any]:
        """As JSON, marked as what it is."""
        return {
            "estimate": True,
            "training_bytes": {**asdict(self.training), "total": self.training.total},
            "evaluation_bytes": {**asdict(self.evaluation), "total": self.evaluation.total},
            "peak_bytes": self.peak,
        }


def is_half(spec: JobSpec) -> bool:
    """Whether training runs in mixed precision; where bf16 is automatic, a GPU is taken to have it."""
    training = spec.training
    automatic = training.bf16 is None and spec.resources.gpus_per_worker != 0
    return training.fp16 or bool(training.bf16) or automatic


def is_folded(spec: JobSpec) -> bool:
    """Whether a model is scored with its adapters folded into weights."""
    return spec.evaluation.fast_decoding and spec.evaluation.num_beams == 1 and spec.engine.attention == "sdpa"


def training_memory(spec: JobSpec, dims: WhisperDims, adapted: list[AdaptedModule], trainable: int) -> Training:
    """The estimate for one worker in training."""
    half = is_half(spec)
    layers = _Layers(spec, dims, adapted, half)
    kept = spec.training.per_dev_batch * (layers.encoder() + layers.decoder() + layers.loss())
    base = 4 * total_parameters(dims) + (2 * layers.cast_weights() if half else 0)
    return Training(base=base, adapter=16 * trainable, activations=kept)


def evaluation_memory(spec: JobSpec, dims: WhisperDims, adapted: list[AdaptedModule]) -> Evaluation:
    """The estimate for one worker that transcribes a batch."""
    bytes_per_value = 2 if is_half(spec) else 4
    settings = spec.evaluation
    positions = dims.max_source_positions + settings.max_new_tokens
    per_clip = 2 * dims.decoder_layers * positions * dims.d_model * bytes_per_value
    working = dims.max_source_positions * (6 * dims.d_model + 2 * dims.encoder_ffn_dim) * bytes_per_value
    mel = 2 * dims.max_source_positions * (dims.num_mel_bins + 2 * dims.d_model) * 4
    return Evaluation(
        base=4 * total_parameters(dims),
        folded=4 * sum(module.in_features * module.out_features for module in adapted) if is_folded(spec) else 0,
        cache=settings.batch_size * settings.num_beams * per_clip,
        encoder=settings.batch_size * max(working, mel),
    )


class _Layers:
    """Bytes that autograd keeps of one clip."""

    def __init__(self, spec: JobSpec, dims: WhisperDims, adapted: list[AdaptedModule], half: bool) -> None:
        self.dims, self.training = dims, spec.training
        self.value = 2 if half else 4
        self.recompute = spec.engine.gradient_checkpointing
        self.by_layer: dict[str, list[AdaptedModule]] = {}
        for module in adapted:
            self.by_layer.setdefault(_layer_of(module.name), []).append(module)
        # Gradients flow from the first adapted module on; a convolution stands before all layers.
        encoder = [name for name in self.by_layer if in_encoder(name)]
        decoder = [name for name in self.by_layer if not in_encoder(name)]
        self.first_encoder = min(map(_index, encoder), default=dims.encoder_layers)
        self.first_decoder = 0 if encoder else min(map(_index, decoder), default=dims.decoder_layers)
        self.audio, self.text = dims.max_source_positions, LABEL_TOKENS

    def encoder(self) -> int:
        """Bytes of the encoder's layers."""
        width = self.dims.d_model
        own = self.audio * (2 * 4 * width + self.value * (4 * width + self.dims.encoder_ffn_dim))
        layers = [
            own + self._adapters(f"model.encoder.layers.{index}")
            for index in range(self.first_encoder, self.dims.encoder_layers)
        ]
        return self._kept(layers, self.audio)

    def decoder(self) -> int:
        """Bytes of the decoder's layers."""
        width = self.dims.d_model
        own = self.text * (3 * 4 * width + self.value * (6 * width + self.dims.decoder_ffn_dim))
        own += self.audio * self.value * 2 * width
        layers = [
            own + self._adapters(f"model.decoder.layers.{index}")
            for index in range(self.first_decoder, self.dims.decoder_layers)
        ]
        return self._kept(layers, self.text)

    def loss(self) -> int:
        """Bytes of logits and log-probabilities."""
        return self.text * self.dims.vocab_size * (4 + self.value)

    def cast_weights(self) -> int:
        """Weights of linear layers through which gradients flow."""
        return sum(
            module.in_features * module.out_features
            for module in modules(self.dims)
            if module.kind == "linear" and self._flows(module.name)
        )

    def _flows(self, name: str) -> bool:
        if in_encoder(name):
            return _index(_layer_of(name)) >= self.first_encoder
        return ".layers." not in name or _index(_layer_of(name)) >= self.first_decoder

    def _kept(self, layers: list[int], positions: int) -> int:
        if not self.recompute or not layers:
            return sum(layers)
        return len(layers) * positions * 4 * self.dims.d_model + max(layers)

    def _adapters(self, layer: str) -> int:
        return sum(self._adapter(module) for module in self.by_layer.get(layer, ()))

    def _adapter(self, module: AdaptedModule) -> int:
        over_audio = in_encoder(module.name) or module.name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        values = module.in_features + module.rank + (2 * module.out_features if self.training.use_dora else 0)
        mask = module.in_features if self.training.lora_dropout else 0
        return (self.audio if over_audio else self.text) * (self.value * values + mask)


def _layer_of(name: str) -> str:
    return ".".join(name.split(".")[:4]) if ".layers." in name else name


def _index(layer: str) -> int:
    """The layer's number; what stands before the layers counts as before the first."""
    last = layer.rsplit(".", 1)[-1]
    return int(last) if last.isdigit() else 0
