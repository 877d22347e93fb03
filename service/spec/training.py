"""`training`: the settings of the old toolkit, by its names, flat. An unwrapped file of that toolkit is a train job."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.spec.base import Float, Int, JsonText, Spec, check_regex, parse_json_text, parse_names, refuse_commas
from service.spec.languages import CODE_OF_NAME, LANGUAGES

DEFAULT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

INITS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "lora_ga", "mica")
"""Initialisations that are taken by name, beside true and false."""

PLAIN_INITS = (True, False, "gaussian", "orthogonal")
"""Those that leave the base as it is and look at no data: what LoraConfig does by itself."""

PISSA_NITER = r"pissa_niter_[1-9]\d*"
"""PiSSA by a randomised SVD, with its number of iterations."""

CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Those that take s * B0 @ A0 out of the base weights, so that training begins at the base model all the same."""

READS_DATA = ("eva", "corda", "lora_ga")
"""Those that look at clips of the training set first."""

REFUSED_INITS = {
    "loftq": "it quantises the base, and no low-rank adapter carries that difference; pissa also starts from the "
    "base's own weights, without quantising them",
}


AUTO = "auto"
"""As `per_dev_batch`: passes of the size that fits."""

MOST_CLIPS = 4096
"""Clips of a forward pass that `auto` looks at: more have no room anywhere."""


class LoraRuntime(Spec):
    """Runtime options of PEFT's LoraRuntimeConfig."""

    ephemeral_gpu_offload: bool = False
    """Compute DoRA's norms on the GPU although the adapter lies in CPU memory. No effect without a GPU."""


def _as_targets(value: Any) -> Any:
    value = parse_json_text(value)
    # One plain name is a list of one; PEFT would read it as a regex that must match a whole module path.
    if isinstance(value, str) and re.fullmatch(r"[\w.]*\w", value):
        return [value]
    if isinstance(value, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value):
        refuse_commas(value)  # as a regular expression it could match nothing
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        return value
    raise PydanticCustomError("targets", "is neither a list of module names nor a regular expression")


def _check_targets(value: list[str] | str) -> list[str] | str:
    names = [value] if isinstance(value, str) else value
    if not names or any(not name.strip() for name in names):
        raise PydanticCustomError("targets_empty", "names no module; give at least one, such as q_proj")
    if isinstance(value, str):
        check_regex(value)
    return value


_PASS = TypeAdapter(Annotated[Int, Field(ge=1)])
_NO_PASS = {
    "greater_than_equal": "is too small; give 1 or more, or auto",
    "int_from_float": "is not a whole number; give one such as 4, or auto",
    "int_parsing_size": "is out of all bounds; give a smaller number, or auto",
    "number_not_bool": "is not a number; give one, or auto",
}


def _as_pass_size(value: Any) -> Any:
    if isinstance(value, str) and value.strip() == AUTO:
        return AUTO
    try:
        return _PASS.validate_python(value)
    except ValidationError as error:
        kind = error.errors()[0]["type"]
    raise PydanticCustomError("pass_size", _NO_PASS.get(kind, "is neither a whole number nor auto; give one of them"))


def _check_language(value: str) -> str:
    if value in LANGUAGES:
        return value
    lower = value.lower()
    primary = re.split("[-_]", lower)[0]  # en-US is Whisper's en
    code = CODE_OF_NAME.get(lower) or next((code for code in (lower, primary) if code in LANGUAGES), None)
    hint = f"; did you mean {code!r}?" if code else "; give a code such as 'en', 'es' or 'de'"
    raise PydanticCustomError("language", "is not a language code that Whisper knows{hint}", {"hint": hint})


def _as_runtime(value: Any) -> Any:
    value = parse_json_text(value)
    return None if value == {} else value  # says nothing, so that it contradicts nothing


def init_family(value: bool | str) -> bool | str:
    """An initialisation without its parameters: `pissa_niter_16` is of the family `pissa`."""
    return "pissa" if isinstance(value, str) and re.fullmatch(PISSA_NITER, value) else value


def _unknown_init() -> PydanticCustomError:
    known = f"{', '.join(INITS[:-1])} or {INITS[-1]}"
    return PydanticCustomError(
        "init", "is no known initialisation; give true, false, {known} (or pissa_niter_16)", {"known": known}
    )


def _as_init(value: Any) -> Any:
    value = True if value is None else parse_json_text(value)
    if not isinstance(value, bool | str):
        raise _unknown_init()
    return value


def _check_init(value: bool | str) -> bool | str:
    if isinstance(value, bool) or init_family(value) in INITS:
        return value
    if value in REFUSED_INITS:
        raise PydanticCustomError("init_refused", "is refused: {reason}", {"reason": REFUSED_INITS[value]})
    raise _unknown_init()


def _check_pattern(value: dict[str, int] | None) -> dict[str, int] | None:
    for key in value or {}:
        check_regex(key)
        check_regex(rf"(.*\.)?({key})$")  # what PEFT makes of it
    return value or None


Targets = Annotated[list[str] | str, AfterValidator(_check_targets), BeforeValidator(_as_targets)]
PassSize = Annotated[
    int | Literal["auto"],
    BeforeValidator(_as_pass_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "enum": [AUTO]}]}),
]
Language = Annotated[str, AfterValidator(_check_language)]
Init = Annotated[
    bool | str,
    AfterValidator(_check_init),
    BeforeValidator(_as_init),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "boolean"},
                {"type": "string", "enum": list(INITS)},
                {"type": "string", "pattern": f"^{PISSA_NITER}$"},
                {"type": "null"},
            ]
        }
    ),
]
Pattern = Annotated[dict[str, Annotated[Int, Field(ge=1)]] | None, AfterValidator(_check_pattern), JsonText]


class TrainingConfig(Spec):
    """What is trained, on what, and how."""

    base_model: str = Field(default="openai/whisper-medium.en", min_length=1)
    """Whisper checkpoint to start from: a hub id (`openai/whisper-large-v3-turbo`) or a folder in transformers' format,
    local or a URI (s3://, gs://). Larger ones are more accurate and need more memory; a `.en` checkpoint knows English
    only."""

    train_csv: str | None = Field(default=None, min_length=1, examples=["data/train.csv"])
    """CSV of the training clips with columns `path`, `text` and, optionally, `language`. Audio paths are taken relative
    to the CSV, or absolute. `whisper-jobs manifest build` writes one."""

    val_csv: str | None = Field(default=None, min_length=1, examples=["data/val.csv"])
    """CSV of the held-out clips, in the form of `train_csv`. WER and CER, before and after, are measured on it."""

    outdir: str | None = Field(default=None, min_length=1, examples=["./whisper-medium-calls"])
    """Folder, or URI of object storage, of the run's artifacts (`<outdir>/adapter`, `<outdir>/merged`, ...). The same
    spec resumes there, another one is refused, unless `--overwrite` is given. Default: `<storage.uri>/<job id>`."""

    language: Language = "en"
    """Language of rows that name none, as Whisper's code (`en`, `es`, ...); it sets the decoder's language token."""

    seed: Int = Field(default=42, ge=0, lt=2**32)
    """Seed of shuffling, adapter initialisation and dropout."""

    epochs: Int = Field(default=3, ge=1)
    """Passes over the training set. 3 to 5 are usual; the best checkpoint by WER is the one that is kept."""

    lr: Float = Field(default=5e-5, gt=0, le=1)
    """Peak learning rate of AdamW. LoRA and DoRA mostly want 5e-5 to 1e-3."""

    warmup_ratio: Float = Field(default=0.08, ge=0, lt=1)
    """Share of all optimizer steps over which the learning rate rises linearly; it then goes as `engine.lr_scheduler`
    says. 0 to 0.2 are usual."""

    per_dev_batch: PassSize = Field(default=2, examples=["auto"])
    """Clips per worker in one forward pass, in training, or `auto`. 2 fit a 24 GB GPU with whisper-medium; raise it as
    memory allows. `auto`: `grad_accum` is then the number of clips per worker and optimizer step, and a pass holds the
    largest divisor of it that fits in memory: on a GPU that is tried before the training, with the longest audio and
    labels and a tenth of the memory left free, on a CPU (and for trials that train together) it is estimated. The
    choice is told, kept in the run's root and used whenever the run goes on; the training is that of the number chosen,
    to the bit."""

    grad_accum: Int = Field(default=4, ge=1)
    """Forward passes whose gradients are summed before an optimizer step. Effective batch = per_dev_batch x grad_accum
    x workers; with `per_dev_batch: auto` it is grad_accum x workers."""

    logging_steps: Int = Field(default=50, ge=1)
    """Optimizer steps between two logged values of loss, learning rate and gradient norm."""

    save_steps: Int = Field(default=500, ge=1)
    """Optimizer steps between two checkpoints. Every evaluation writes one too."""

    eval_steps: Int = Field(default=500, ge=1)
    """Optimizer steps between two evaluations (WER by generation over the validation set). The end is always
    evaluated."""

    fp16: bool = False
    """Train in float16 mixed precision with loss scaling; needs a GPU. Excludes `bf16`."""

    bf16: bool | None = Field(default=None, examples=[True])
    """Train in bfloat16 mixed precision. Default (null): on where the worker's GPU has bfloat16 and `fp16` is off."""

    freeze_encoder: bool = False
    """Leave the encoder as it is: no adapter in it, and its forward runs without gradients."""

    lora_r: Int = Field(default=16, ge=1)
    """Rank r of the update B @ A, with A (r, in_features) and B (out_features, r). 8 to 32 are usual."""

    lora_alpha: Int = Field(default=32, ge=1)
    """Scale of the update: it is multiplied by lora_alpha / lora_r. Twice the rank is a good start."""

    lora_dropout: Float = Field(default=0.05, ge=0, lt=1)
    """Dropout probability on the adapters' inputs in training; 0 for large data sets."""

    lora_target_modules: Targets = DEFAULT_TARGETS
    """Modules that get an adapter: a list of names, each taken as a whole name or the end of one, or one regular
    expression that matches whole names. Whisper's attention output is `out_proj`; `o_proj` is taken to mean it. A name
    that matches nothing is an error."""

    modules_to_save: Annotated[list[str] | None, BeforeValidator(parse_names)] = Field(
        default=None, examples=[["embed_tokens"]]
    )
    """Modules that are trained in full and saved beside the adapter, such as `embed_tokens` (which stays tied to the
    output head)."""

    use_dora: bool = False
    """Weight-decomposed LoRA: a trained magnitude per output row, and the low-rank update gives the direction."""

    dora_ephemeral_offload: bool = False
    """Short for `lora_runtime_config: {ephemeral_gpu_offload: true}`. It matters with DoRA and a GPU only."""

    lora_runtime_config: Annotated[LoraRuntime | None, BeforeValidator(_as_runtime)] = Field(
        default=None, examples=[{"ephemeral_gpu_offload": True}]
    )
    """PEFT's LoraRuntimeConfig, as an object or a JSON string: `{"ephemeral_gpu_offload": true}`."""

    lora_init: Init = Field(default=True, examples=["orthogonal", "pissa_niter_16"])
    """How A and B begin, by PEFT's names. All but false start at the base model. true (and null): PEFT's default,
    B = 0; `gaussian` likewise. `orthogonal`: neither is 0 (even ranks only). false: random A and B, not the base model.
    `pissa`, `pissa_niter_16` (a randomised SVD, much faster) and `olora` begin with the largest part of each weight,
    `corda` with the part that moves the outputs on `engine.init_clips` clips most, `lora_ga` with the loss's gradient
    on them; these four take what A and B hold out of the base, and the saved adapter has twice the rank, so that it
    fits the untouched base. `eva`: A has the main directions of each module's inputs on those clips, and ranks move to
    where they say most (up to twice `lora_r`; a module may lose its adapter), so it excludes `lora_rank_pattern`.
    `mica` trains A alone, B stays at each weight's smallest singular vectors; not with DoRA. `loftq` is refused."""

    lora_rank_pattern: Pattern = Field(default=None, examples=[{"decoder.layers.0.encoder_attn.k_proj": 32}])
    """Ranks for single modules: an object from module name or regular expression to rank, also as a JSON string:
    `{"decoder.layers.0.encoder_attn.k_proj": 32}`. The first key that matches wins; one that matches nothing is an
    error."""

    lora_alpha_pattern: Pattern = Field(default=None, examples=[{"decoder.layers.*": 48}])
    """Alphas for single modules, in the form of `lora_rank_pattern`: `{"decoder.layers.*": 48}`."""

    merge_lora: bool = True
    """After training, merge the adapter into the base in float32 and save the result under `<root>/merged` in the
    checkpoint's own precision."""

    @property
    def clips_per_step(self) -> int:
        """Clips of a worker in one optimizer step."""
        return self.grad_accum * (self.per_dev_batch if isinstance(self.per_dev_batch, int) else 1)

    @property
    def pass_sizes(self) -> list[int]:
        """How many clips a forward pass may hold, in order: one number or, with `auto`, those that divide a step."""
        if isinstance(self.per_dev_batch, int):
            return [self.per_dev_batch]
        return [size for size in range(1, min(self.grad_accum, MOST_CLIPS) + 1) if self.grad_accum % size == 0]

    @property
    def ephemeral_gpu_offload(self) -> bool:
        """Whether DoRA's norms are to be computed on the GPU; `lora_runtime_config` wins where it is given."""
        runtime = self.lora_runtime_config
        return runtime.ephemeral_gpu_offload if runtime else self.dora_ephemeral_offload

    def warmup_steps(self, total: int) -> int:
        """Optimizer steps of the warm-up, of `total` in all: at least one step is left at the full rate."""
        return min(math.ceil(self.warmup_ratio * total), max(0, total - 1))
