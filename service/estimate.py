"""An estimate of a job's GPU-hours and of what they cost, without a GPU.

Work is counted in floating-point operations per clip, each of which is a 30 s window:

    forward     2 per weight and position, 4 P^2 d per attention; P = 1500 positions in the encoder and in the decoder's
                keys and values of the audio, LABEL_TOKENS in the rest of the decoder
    backward    as much again for the gradients of activations (the base has none of its own), and the adapter's
    evaluation  a forward of the encoder, and the decoder once per token

and taken to be done at UTILISATION of the GPU's dense 16-bit peak. No estimate of that kind is within a factor of two
of every machine; a run's own clips per second (metrics.json) are better as soon as there are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import Fault, InputError
from service.plan import Plan
from service.spec.job import JobSpec
from service.spec.look import is_file
from service.spec.read import read_document
from service.spec.settings import nearest
from service.spec.targets import AdaptedModule, adapted_modules
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import modules

PEAK_TFLOPS = {
    "V100": 125, "T4": 65, "A10G": 70, "L4": 121, "L40S": 362, "A100": 312, "A100-40G": 312, "A100-80G": 312,
    "H100": 989, "H200": 989, "B200": 2250,
}  # fmt: skip
"""Dense 16-bit peak of NVIDIA's GPUs, by the names that Ray gives them; from their data sheets."""

UTILISATION = 0.2
"""Share of the peak that is taken to be reached: a guess, since it hangs on batch, clip length and machine."""

DEFAULT_GPU = "H100"
LABEL_TOKENS = 64


class PriceTable(BaseModel):
    """What an hour of a GPU costs, by its name, in YAML or JSON: {"currency": "USD", "gpu_hour": {"H100": 2.99}}."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    currency: str = "USD"
    gpu_hour: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    tflops: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Peaks of GPUs that are not in PEAK_TFLOPS, or other ones."""


@dataclass(frozen=True)
class Estimate:
    """What a job would take.

    Attributes:
        gpu: the kind of GPU.
        gpus: of all workers.
        tflop_per_clip: of training, forward and backward.
        gpu_hours: of all of them.
        hours: by the clock.
        cost: None: no price is known.
    """

    gpu: str
    gpus: float
    tflop_per_clip: float
    gpu_hours: float
    cost: float | None
    currency: str | None

    @property
    def hours(self) -> float:
        """By the clock."""
        return self.gpu_hours / self.gpus

    def as_dict(self) -> dict[str, Any]:
        """As JSON, with what it rests on."""
        return vars(self) | {"hours": self.hours, "assumed_utilisation": UTILISATION}


def read_prices(path: Path) -> PriceTable:
    """A price table.

    Raises:
        InputError: it cannot be read, or is none.
    """
    if not is_file(path):
        raise InputError([Fault("--prices", "is no file; give a YAML such as {gpu_hour: {H100: 2.99}}", str(path))])
    try:
        return PriceTable.model_validate(read_document(path).content)
    except ValidationError as error:
        raise InputError(
            [
                Fault(f"{path}: {'.'.join(map(str, one['loc']))}", one["msg"].lower(), one["input"])
                for one in error.errors()
            ]
        ) from None


def estimate(
    spec: JobSpec, plan: Plan, dims: WhisperDims | None, gpu: str | None, prices: PriceTable | None
) -> Estimate | None:
    """What a planned training would take; None: it uses no GPU, or its rows or model are not known here.

    Args:
        spec: the job.
        plan: its plan.
        dims: of its base model.
        gpu: the kind of GPU; None: the one of the price table, if it has one, else DEFAULT_GPU.
        prices: what they cost.

    Raises:
        InputError: nothing is known of that GPU.
    """
    gpus_per_worker = 1.0 if spec.resources.gpus_per_worker is None else spec.resources.gpus_per_worker
    gpus = gpus_per_worker * max(1, spec.resources.workers)
    if dims is None or plan.schedule is None or not gpus:
        return None
    name = gpu or (next(iter(prices.gpu_hour)) if prices and len(prices.gpu_hour) == 1 else DEFAULT_GPU)
    peaks: Mapping[str, float] = PEAK_TFLOPS | (prices.tflops if prices else {})
    if name not in peaks:
        close = nearest(name, peaks)
        way_out = f"did you mean {close[0]}?" if close else f"give one of {', '.join(peaks)}"
        raise InputError(
            [Fault("--gpu", f"is no GPU that is known here; {way_out} (or add it to tflops of --prices)", name)]
        )
    if prices and name not in prices.gpu_hour:
        raise InputError(
            [Fault("--prices", f"has no price of {name}; it has {', '.join(prices.gpu_hour)}; give --gpu")]
        )
    runs = spec.search.repeats * plan.search.trials if plan.search else 1
    if plan.search and spec.search.final_epochs:
        runs += spec.search.top_k
    adapted = adapted_modules(spec.training, modules(dims))
    work = training_flop(dims, adapted, frozen_encoder=spec.training.freeze_encoder)
    clips, held_out = (plan.rows["train"] or 0) * spec.training.epochs, plan.rows["val"] or 0
    total = runs * (clips * work + held_out * plan.schedule.evaluations * evaluation_flop(dims))
    total += 3 * held_out * evaluation_flop(dims)
    gpu_hours = total / (peaks[name] * 1e12 * UTILISATION) / 3600
    cost = gpu_hours * prices.gpu_hour[name] if prices else None
    return Estimate(name, gpus, work / 1e12, gpu_hours, cost, prices.currency if prices else None)


def training_flop(
    dims: WhisperDims, adapted: list[AdaptedModule], *, frozen_encoder: bool, tokens: int = LABEL_TOKENS
) -> float:
    """Floating-point operations of a clip, forward and backward."""
    encoder, decoder = _encoder(dims), _decoder(dims, tokens)
    low_rank = 0.0
    for module in adapted:
        positions = tokens if module.part.startswith("decoder") else dims.max_source_positions
        low_rank += 2.0 * positions * module.parameters
    return encoder * (1 if frozen_encoder else 2) + 2 * decoder + 3 * low_rank


def evaluation_flop(dims: WhisperDims, tokens: int = LABEL_TOKENS) -> float:
    """Floating-point operations of transcribing a clip."""
    return _encoder(dims) + _decoder(dims, tokens)


def _encoder(dims: WhisperDims) -> float:
    width, positions = dims.d_model, dims.max_source_positions
    weights = 4 * width**2 + 2 * width * dims.encoder_ffn_dim
    layer = 2.0 * positions * weights + 4.0 * positions**2 * width
    stem = 2.0 * 3 * width * (2 * positions * dims.num_mel_bins + positions * width)
    return stem + dims.encoder_layers * layer


def _decoder(dims: WhisperDims, tokens: int) -> float:
    width, positions = dims.d_model, dims.max_source_positions
    by_token = 4 * width**2 + 2 * width**2 + 2 * width * dims.decoder_ffn_dim
    of_audio = 2 * width**2
    attention = 4.0 * width * tokens * (tokens + positions)
    layer = 2.0 * tokens * by_token + 2.0 * positions * of_audio + attention
    return dims.decoder_layers * layer + 2.0 * tokens * width * dims.vocab_size
