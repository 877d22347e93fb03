"""What autograd keeps of a clip for the backward pass, over the layers from the first adapted one on.

With P positions, width d, feed-forward width f, h bytes per value (2 in mixed precision, else 4):

    layer norms       4 P d each (their inputs are float32)
    attention         h P 4 d (q, k, v, output); keys and values of cross-attention span the audio
    GELU              h P f
    adapted module    h P (in + r), P in for dropout's mask (h P in where trials train together), and with DoRA h P out
                      (h P 2 out where PEFT computes it)

Trials that train together have in cross-attention, in place of keys and values, weights of h P (heads T) each as long
as that is less (`makes_no_keys`), and h P 2 d once for all of them.

and h T d for the gradient of T tokens' loss; where `engine.fast_loss` does not apply 4 T V for the loss and h T V for
the logits, over a vocabulary of V. With gradient checkpointing only each layer's input (4 P d) and one layer in full.
"""

from __future__ import annotations

from service.spec.job import JobSpec
from service.spec.targets import AdaptedModule, in_encoder, is_saved
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import EMBEDDING, HEAD


def makes_no_keys(tokens: int, head_width: int, *, half: bool) -> bool:
    """Whether trials that train together attend to audio without keys and values of each trial's own: not in mixed
    precision, and where texts are so short that their weights, over heads and tokens, are no more than those would be.
    """
    return not half and tokens <= 2 * head_width


class Layers:
    """Bytes that autograd keeps of one clip; of several trials, each one's share.

    Args:
        spec: the train job.
        dims: of its base model.
        adapted: its adapters.
        half: whether it trains in mixed precision.
        tokens: of the clip's label.
        trials: that make the pass together, with stacked adapters; 0: it trains alone.
    """

    def __init__(
        self,
        spec: JobSpec,
        dims: WhisperDims,
        adapted: list[AdaptedModule],
        *,
        half: bool,
        tokens: int,
        trials: int = 0,
    ) -> None:
        self.dims, self.training = dims, spec.training
        self.value, self.trials = 2 if half else 4, trials
        shared = trials > 0
        self.without_keys = shared and makes_no_keys(tokens, dims.d_model // dims.decoder_attention_heads, half=half)
        # PEFT's DoRA keeps the outputs of two products, W x and the scaled one; the folded one keeps W x alone.
        folded = shared or (spec.engine.fast_dora and (spec.engine.dora_dropout == "branch" or not self._drops))
        self.dora_outputs = (1 if folded else 2) if spec.training.use_dora else 0
        self.recompute = spec.engine.gradient_checkpointing
        self.fast_loss = shared or (
            spec.engine.fast_loss
            and not any(is_saved(spec.training.modules_to_save, name) for name in (EMBEDDING, HEAD))
        )
        self.by_layer: dict[str, list[AdaptedModule]] = {}
        for module in adapted:
            self.by_layer.setdefault(_layer_of(module.name), []).append(module)
        # Gradients flow from the first adapted module on; a convolution stands before all layers.
        encoder = [name for name in self.by_layer if in_encoder(name)]
        decoder = [name for name in self.by_layer if not in_encoder(name)]
        self.first_encoder = min(map(_index, encoder), default=dims.encoder_layers)
        self.first_decoder = 0 if encoder else min(map(_index, decoder), default=dims.decoder_layers)
        self.audio, self.text = dims.max_source_positions, tokens

    @property
    def _drops(self) -> bool:
        return self.training.lora_dropout > 0

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
        listening = 2 * width
        if self.without_keys:
            listening = self.dims.decoder_attention_heads * self.text + 2 * width // self.trials
        own += self.audio * self.value * listening
        layers = [
            own + self._adapters(f"model.decoder.layers.{index}")
            for index in range(self.first_decoder, self.dims.decoder_layers)
        ]
        return self._kept(layers, self.text)

    def loss(self) -> int:
        """Bytes of logits and log-probabilities, or of the gradient that is made of them at once."""
        if self.fast_loss:
            return self.text * self.dims.d_model * self.value
        return self.text * self.dims.vocab_size * (4 + self.value)

    def passing(self) -> int:
        """Bytes that the backward pass of a layer makes and gives back: gradients of weights and of scores."""
        return 2 * self.audio * self.value * self.dims.decoder_attention_heads * self.text * self.without_keys

    def flows(self, name: str) -> bool:
        """Whether gradients flow through a module."""
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
        of_audio = module.name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
        over_audio = of_audio or in_encoder(module.name)
        # All these layers have one input, the encoder's output, where it is neither cast nor dropped from.
        shares = of_audio and self.training.freeze_encoder and self.value == 4 and not self._drops
        inputs = 0 if shares else module.in_features
        if of_audio and self.trials and not self._drops:
            inputs //= self.trials
        # Trials that train together take a DoRA's gain from keys and values to what is as long as the text.
        outputs = 0 if of_audio and self.trials else self.dora_outputs
        values = inputs + module.rank + outputs * module.out_features
        mask = module.in_features * (self.value if self.trials else 1) if self._drops else 0
        return (self.audio if over_audio else self.text) * (self.value * values + mask)


def _layer_of(name: str) -> str:
    return ".".join(name.split(".")[:4]) if ".layers." in name else name


def _index(layer: str) -> int:
    """The layer's number; what stands before the layers counts as before the first."""
    last = layer.rsplit(".", 1)[-1]
    return int(last) if last.isdigit() else 0
