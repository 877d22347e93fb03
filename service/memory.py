"""An estimate of the memory that a worker's model takes.

An estimate: kernels, fragmentation and the CUDA context (about 0.5 GB) are not in it, and a clip is taken to have
LABEL_TOKENS tokens.

Training = base + adapter + activations + loss + kept:
    base         4 bytes per parameter, 2 for the matrices that `engine.base_dtype` holds in mixed precision; there 2
                 more for each other weight through which gradients flow, since autograd keeps the cast one
    adapter      16 bytes per trainable parameter: weight, gradient, and AdamW's two moments
    activations  what autograd keeps of the clips of a pass (service.activations); with `per_dev_batch: auto`, of one
    loss         with `engine.fast_loss`, logits and probabilities of LOSS_ROWS tokens at most, and the head cast; where
                 trials train together, a layer's gradients of attention weights and scores if they are more
    kept         encoder outputs that `engine.keep_encoder_gb` has room for in a GPU's memory. By default they take
                 half of what training leaves, and so none that it needs

Trials that train together have one base in float32, and each of them its adapter and its activations in the decoder.

Evaluation = base + weights with adapters folded in (4 bytes each; in mixed precision 2, and so for all other matrices
of the decoder and its head) + keys and values of the decoder's cache and the encoder's working set, for a batch with
beams.

Host = what is kept in main memory as `data.keep_audio_gb` and `engine.keep_encoder_gb` say, as far as there are clips
for it. By default a part of what is free is taken, and given back where it is short: that is not counted.

tests/unit/test_memory.py measures what autograd keeps and holds the estimate to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from service.activations import Layers
from service.spec.job import JobSpec
from service.spec.targets import AdaptedModule, is_saved
from service.spec.training import PLAIN_INITS
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import HEAD, Module, modules, total_parameters

LABEL_TOKENS = 128
"""Tokens of a clip's transcript, taken for the estimate; the most that Whisper knows is 448."""

LOSS_ROWS = 1024
"""Tokens whose logits jobs/fast/loss.py holds at a time, on a GPU. (In float32 on a CPU it holds none.)"""

WINDOW_BYTES = 30 * 16_000 * 4
"""A decoded clip's, at most."""

Rows = Mapping[str, int | None]
"""Clips of the splits `train` and `val`; None: not known here."""


@dataclass(frozen=True)
class Training:
    """Bytes that training takes, by purpose."""

    base: int
    adapter: int
    activations: int
    loss: int = 0
    kept: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapter + self.activations + self.loss + self.kept


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
class Host:
    """Bytes of main memory that clips are kept in at most, by purpose."""

    audio: int = 0
    outputs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.audio + self.outputs


@dataclass(frozen=True)
class Memory:
    """Estimated bytes per worker; training and evaluation take turns.

    Attributes:
        clips: in a forward pass of the training.
        trials: that train together; 0: it trains alone.
    """

    training: Training
    evaluation: Evaluation
    host: Host = Host()
    clips: int = 1
    trials: int = 0

    @property
    def peak(self) -> int:
        """The larger of the two; what is kept is there in both."""
        return max(self.training.total, self.evaluation.total + self.training.kept)

    def as_dict(self) -> dict[str, Any]:
        """As JSON, marked as what it is."""
        return {
            "estimate": True,
            "clips_per_pass": self.clips,
            "trials_together": self.trials,
            "training_bytes": {**asdict(self.training), "total": self.training.total},
            "evaluation_bytes": {**asdict(self.evaluation), "total": self.evaluation.total},
            "host_bytes": {**asdict(self.host), "total": self.host.total},
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


def training_memory(
    spec: JobSpec,
    dims: WhisperDims,
    adapted: list[AdaptedModule],
    trainable: int,
    *,
    clips: int | None = None,
    tokens: int = LABEL_TOKENS,
    half: bool | None = None,
    trials: int = 0,
    rows: Rows | None = None,
) -> Training:
    """The estimate for one worker in training.

    Args:
        spec: the train job.
        dims: of its base model.
        adapted: its adapters.
        trainable: parameters.
        clips: in a forward pass; None: as many as the spec says, with `auto` one.
        tokens: of each clip's label.
        half: whether in mixed precision; None: as the spec says.
        trials: that train together, each like this one; 0: it trains alone.
        rows: the splits' clips, where they are known.
    """
    clips = spec.training.pass_sizes[0] if clips is None else clips
    half = is_half(spec) if half is None else half
    layers = Layers(spec, dims, adapted, half=half, tokens=tokens, trials=trials)
    held = _held(spec, dims, adapted) if half and not trials else []
    base = 4 * total_parameters(dims) - 2 * sum(module.parameters for module in held)
    if half:
        base += 2 * (_flowing(layers, modules(dims)) - _flowing(layers, held))
    count, value, loss = max(1, trials), 2 if half else 4, 0
    if layers.fast_loss:
        loss = dims.vocab_size * (
            min(LOSS_ROWS, count * clips * tokens) * (value + 4) + (2 * dims.d_model if half else 0)
        )
    return Training(
        base=base,
        adapter=16 * trainable * count,
        activations=clips * count * (layers.encoder() + layers.decoder() + layers.loss()),
        loss=max(loss, clips * count * layers.passing()),
        kept=_kept_outputs(spec, dims, rows, half=half)[0],
    )


def _held(spec: JobSpec, dims: WhisperDims, adapted: list[AdaptedModule]) -> list[Module]:
    """The modules that lie in memory in mixed precision; jobs/fast/base_dtype.py casts them."""
    if spec.engine.base_dtype == "float32" or spec.training.lora_init not in PLAIN_INITS:
        return []
    dora = {module.name for module in adapted} if spec.training.use_dora else set()
    return [
        module
        for module in modules(dims)
        if module.kind in ("linear", "conv1d")
        and module.name != HEAD  # it is one matrix with the embedding
        and module.name not in dora
        and not is_saved(spec.training.modules_to_save, module.name)
    ]


def _flowing(layers: Layers, among: list[Module] | tuple[Module, ...]) -> int:
    """Weights of linear layers through which gradients flow in the backward pass."""
    return sum(
        module.in_features * module.out_features
        for module in among
        if module.kind == "linear" and layers.flows(module.name) and not (layers.fast_loss and module.name == HEAD)
    )


def keeps_outputs(spec: JobSpec) -> bool:
    """Whether a run takes its encoder outputs from where they are kept, those of the validation set at least."""
    return spec.training.freeze_encoder and spec.engine.keep_encoder != "off"


def keeps_training_outputs(spec: JobSpec) -> bool:
    """Whether those of the training set too: its clips' windows are the same in every epoch."""
    return keeps_outputs(spec) and not spec.augment.varies_audio and not spec.data.packing


def _kept_outputs(spec: JobSpec, dims: WhisperDims, rows: Rows | None, *, half: bool) -> tuple[int, int]:
    """Bytes of encoder outputs in a GPU's memory and in main memory, at most, where the spec bounds them."""
    where, asked = spec.engine.keep_encoder, spec.engine.keep_encoder_gb
    if asked is None or not keeps_outputs(spec) or where == "disk":
        return 0, 0
    each = dims.max_source_positions * dims.d_model * (2 if half else 4)
    wanted = each * _clips(rows, ["val", "train"] if keeps_training_outputs(spec) else ["val"])
    limit, on_gpu = round(asked * 1e9), spec.resources.gpus_per_worker != 0
    first = min(limit, wanted)
    if not on_gpu or where == "host":
        return 0, first
    return first, min(limit, wanted - first) if where == "auto" else 0


def host_memory(spec: JobSpec, dims: WhisperDims, *, half: bool | None = None, rows: Rows | None = None) -> Host:
    """What one worker of a training keeps of clips in main memory, at most, where the spec bounds it.

    Args:
        spec: the train job.
        dims: of its base model.
        half: whether in mixed precision; None: as the spec says.
        rows: the splits' clips, where they are known.
    """
    again = ["val"] if spec.training.epochs == 1 or keeps_training_outputs(spec) else ["val", "train"]
    audio = min(round((spec.data.keep_audio_gb or 0) * 1e9), WINDOW_BYTES * _clips(rows, again))
    return Host(audio, _kept_outputs(spec, dims, rows, half=is_half(spec) if half is None else half)[1])


def _clips(rows: Rows | None, splits: list[str]) -> int:
    """Clips of some splits; where one's are not known, more than any has."""
    found = [None if rows is None else rows.get(split) for split in splits]
    return sum(10**12 if count is None else count for count in found)


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
        folded=_folded(spec, dims, adapted),
        cache=settings.batch_size * settings.num_beams * per_clip,
        encoder=settings.batch_size * max(working, mel),
    )


def _folded(spec: JobSpec, dims: WhisperDims, adapted: list[AdaptedModule]) -> int:
    """Bytes of the weights that a model is scored with beside its own; jobs/fast/fold.py makes them."""
    if not is_folded(spec):
        return 0
    found = {module.name: module.in_features * module.out_features for module in adapted}
    if not is_half(spec):
        return 4 * sum(found.values())
    for module in modules(dims):
        if module.kind == "linear" and (module.name == HEAD or module.name.startswith("model.decoder.")):
            found[module.name] = module.in_features * module.out_features
    return 2 * sum(found.values())
