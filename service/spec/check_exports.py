"""Checks of `export`: what the formats need of the other settings and of the model."""

from __future__ import annotations

from service.spec.export import HF, ExportConfig, shape_faults
from service.spec.findings import Finding, Findings, advice
from service.spec.job import JobSpec
from service.spec.whisper_dims import WhisperDims

FORMATS = "export.formats"


def export_findings(spec: JobSpec) -> Findings:
    """Whether the formats can be made of what the job leaves."""
    export = spec.export
    if spec.kind != "export":
        wanted = export.beyond_hf
        if wanted and not spec.training.merge_lora:
            message = "are made from the merged model, and training.merge_lora is off; switch it on"
            yield Finding((FORMATS, "training.merge_lora"), message, wanted)
        for name in ("source", "base"):
            if getattr(export, name) is not None:
                yield advice(f"export.{name}", f"has no effect in a {spec.kind} job", getattr(export, name))
    if not export.beyond_hf:
        for name in ("max_wer_increase", "min_identical"):
            if getattr(export, name) != ExportConfig.model_fields[name].default:
                yield advice(f"export.{name}", f"has no effect: {FORMATS} names none beside {HF}")


def shape_findings(export: ExportConfig, dims: WhisperDims) -> Findings:
    """Whether the formats have a place for a model of these dims: said before the training, not after it."""
    for name in export.beyond_hf:
        for why in shape_faults(name, dims):
            yield Finding((FORMATS, "training.base_model"), f"holds {name}, which cannot hold this model: {why}")
