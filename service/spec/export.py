"""The section `export`: formats that other runtimes read, and the limits of their proof."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from service.spec.base import Float, Int, Names, Spec
from service.spec.whisper_dims import WhisperDims

HF = "hf"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Family:
    """A file format and the runtime that it is made for.

    Attributes:
        runtime: its name, as its users know it.
        packages: modules that write the format and run it.
        extra: the extra of this distribution that installs them.
        precisions: what the weights are stored in; the first one is meant where none is named.
    """

    runtime: str
    packages: tuple[str, ...]
    extra: str
    precisions: tuple[str, ...] = ()


FAMILIES: Mapping[str, Family] = {
    HF: Family("transformers", ("transformers",), "jobs"),
    "ggml": Family("whisper.cpp", ("gguf", "pywhispercpp"), "ggml", ("f16", "q8_0", "q5_0")),
    "ctranslate2": Family(
        "faster-whisper",
        ("ctranslate2", "faster_whisper"),
        "ctranslate2",
        ("float16", "int8", "int8_float16", "float32"),
    ),
    "openai": Family("openai-whisper", ("whisper",), "openai"),
}

ARTIFACTS: Mapping[str, tuple[str, str]] = {
    (f"{name}-{precision}" if precision else name): (name, precision)
    for name, family in FAMILIES.items()
    for precision in (family.precisions or ("",))
}
"""Family and precision of every artifact that a job can make of a merged model, by its name."""

SHAPED_BY_OPENAI = ("ggml", "openai")
"""Families whose readers know no other shapes than OpenAI's own."""

WINDOW_POSITIONS = 1500
"""Encoder positions of a 30 s window."""

VOCABULARIES = (51864, 51865, 51866)
"""English-only; multilingual; large-v3."""

BLOCK = 32
"""Weights of a row that ggml packs together."""


def artifact_name(name: str) -> str:
    """An artifact's full name: `ggml` is `ggml-f16`.

    Raises:
        PydanticCustomError: there is no such format.
    """
    family = FAMILIES.get(name)
    if family and family.precisions:
        return f"{name}-{family.precisions[0]}"
    if name not in ARTIFACTS and name != ADAPTER:
        if "," in name:
            hint = f"name each by itself: {' '.join(name.replace(',', ' ').split())}"
            raise PydanticCustomError("format", "holds {name}; {hint}", {"name": name, "hint": hint})
        close = difflib.get_close_matches(name, [*ARTIFACTS, *FAMILIES], n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(ARTIFACTS)}"
        raise PydanticCustomError("format", "holds {name}, which is no format; {hint}", {"name": name, "hint": hint})
    return name


def _artifact_names(names: list[str]) -> list[str]:
    return list(dict.fromkeys(map(artifact_name, names)))


class ExportConfig(Spec):
    """Which formats a merged model is exported to, and what each must pass before it counts as good."""

    formats: Annotated[Names, AfterValidator(_artifact_names)] = Field(default=[HF], examples=[["ggml-q8_0", "openai"]])
    """Formats beside the adapter: `hf` (the checkpoint that `training.merge_lora` makes), `ggml` (whisper.cpp;
    `ggml-f16`, `ggml-q8_0`, `ggml-q5_0`), `ctranslate2` (faster-whisper; `ctranslate2-float16`, `-int8`,
    `-int8_float16`, `-float32`) and `openai` (openai-whisper). Each is reloaded from where it was published and
    transcribes held-out clips in the runtime that it is made for."""

    proof_clips: Int = Field(default=50, ge=1)
    """Held-out clips that each export transcribes: once so that its words can be compared with the merged model's
    (greedy, no fallback, no timestamps), once with its runtime's own defaults."""

    max_wer_increase: Float = Field(default=0.02, ge=0, le=1)
    """How far an export's WER may lie above the merged model's on the same clips, both greedy. As a fraction: 0.02 is
    two percentage points. An export beyond it is marked as refused, and the job ends with exit code 17."""

    min_identical: Float | None = Field(default=None, ge=0, le=1, examples=[0.9])
    """Share of the clips of which an export must write the merged model's very text. Default: 0.8 for 16 and 32 bits,
    0.7 for 8, 0.5 for 5. (Of `hf` the texts are compared with the adapter's: 0.5, since the cast counts too.)"""

    source: str | None = Field(default=None, min_length=1, examples=["runs/call-centre-nl-1f2e3d4c"])
    """For `kind: export`: what to export. The root of a run, a PEFT adapter, or a checkpoint."""

    base: str | None = Field(default=None, min_length=1, examples=["openai/whisper-small"])
    """For `kind: export`: the base model of an adapter, where it is not the one that its configuration names."""

    def least_identical(self, artifact: str) -> float:
        """The share of its texts that an artifact must have in common with the merged model."""
        if self.min_identical is not None:
            return self.min_identical
        _, precision = ARTIFACTS[artifact]
        return (
            0.5
            if artifact == HF or precision.startswith("q5")
            else 0.7
            if precision.startswith(("q8", "int8"))
            else 0.8
        )

    @property
    def beyond_hf(self) -> list[str]:
        """The artifacts that are made from the merged checkpoint."""
        return [name for name in self.formats if name not in (HF, ADAPTER)]


def shape_faults(name: str, dims: WhisperDims) -> list[str]:
    """Why a format has no place for a model of these dims; empty where it has."""
    family, precision = ARTIFACTS[name]
    faults = []
    if family in SHAPED_BY_OPENAI and dims.max_source_positions != WINDOW_POSITIONS:
        faults.append(f"its encoder has {dims.max_source_positions} positions, and the format {WINDOW_POSITIONS}")
    if family in SHAPED_BY_OPENAI and dims.vocab_size not in VOCABULARIES:
        known = ", ".join(map(str, VOCABULARIES))
        faults.append(f"its vocabulary has {dims.vocab_size} tokens, and the format's readers know {known}")
    wide = next((n for n in (dims.encoder_ffn_dim, dims.decoder_ffn_dim) if n != 4 * dims.d_model), None)
    if family in SHAPED_BY_OPENAI and wide:
        faults.append(f"its layers widen {dims.d_model} to {wide}, and the format's readers know four times the width")
    if family == "ggml" and precision.startswith("q"):
        widths = {dims.d_model, dims.encoder_ffn_dim, dims.decoder_ffn_dim}
        if odd := sorted(width for width in widths if width % BLOCK):
            faults.append(f"{precision} packs {BLOCK} weights of a row, and rows of {odd[0]} cannot be cut so")
    return faults


def missing_extras(names: list[str], found: Callable[[str], bool]) -> dict[str, list[str]]:
    """The extras to install for some artifacts, each with the packages that are missing.

    Args:
        names: the artifacts.
        found: tells whether a module can be imported.
    """
    missing: dict[str, list[str]] = {}
    for family in {ARTIFACTS[name][0]: FAMILIES[ARTIFACTS[name][0]] for name in names}.values():
        if packages := [package for package in family.packages if not found(package)]:
            missing[family.extra] = packages
    return missing
