"""The model cards of single exports, and of a job that only exports: what each has shown, and how to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.card import USES, card_metadata, marks_kept
from jobs.export.table import export_markdown
from service.artifacts import BaseModelRecord, folder_of
from service.spec.counted import counted
from service.spec.export import ARTIFACTS
from service.spec.job import JobSpec

LIBRARIES = {"hf": "transformers", "ggml": "whisper.cpp", "ctranslate2": "ctranslate2", "openai": "whisper"}


def artifact_card(name: str, metrics: dict[str, Any], base: BaseModelRecord) -> str:
    """README.md in the folder of an export.

    Args:
        name: the artifact.
        metrics: metrics.json.
        base: the model that the job began with.
    """
    entry = metrics["artifacts"][name]
    family, _ = ARTIFACTS[name]
    languages = sorted(metrics[_scored(metrics)]["languages"])
    warning = ["", f"**Refused: do not use it.** {entry['refused']}", ""] if "refused" in entry else []
    lines = [
        f"---\n{card_metadata(metrics['job_id'], base, languages, LIBRARIES[family], 'finetune')}\n---",
        "",
        f"# {metrics['job_id']}, {name}",
        "",
        f"`{_shown(base)}`{' after fine-tuning' if _is_tuned(metrics) else ''}, for {entry['runtime']}.",
        *warning,
        "",
        export_markdown({name: entry}),
        *USES.get(family, ()),
    ]
    return "\n".join(lines) + "\n"


def export_card(spec: JobSpec, metrics: dict[str, Any], base: BaseModelRecord) -> str:
    """README.md of a job that only exports."""
    model, merge = metrics["model"], metrics["merge"]
    languages = sorted(model["languages"])
    adapted = metrics["source"]["adapter"]
    folders = [f"- `{folder_of(name)}/`" for name in (*(["adapter"] if adapted else []), *metrics["artifacts"])]
    lines = [
        f"---\n{card_metadata(metrics['job_id'], base, languages, 'transformers', 'finetune')}\n---",
        "",
        f"# {metrics['job_id']}",
        "",
        f"`{_shown(base)}`{' with an adapter' if adapted else ''}: WER {model['wer']:.2%}, CER {model['cer']:.2%} on",
        f"{counted(model['utterances'], 'clip')}, after Whisper's own text normaliser{marks_kept(spec)}.",
        *(
            [
                f"Merged in float32: logits within {merge['max_logit_difference']:.0e} of the adapter's, and weights",
                "equal to PEFT's own merge to the last bit.",
            ]
            if adapted
            else []
        ),
        "",
        export_markdown(metrics["artifacts"]),
        *folders,
    ]
    return "\n".join(lines) + "\n"


def _is_tuned(metrics: dict[str, Any]) -> bool:
    return metrics.get("source", {}).get("adapter", True) is not None


def _scored(metrics: dict[str, Any]) -> str:
    return "tuned" if "tuned" in metrics else "model"


def _shown(base: BaseModelRecord) -> str:
    return base.name if base.revision else Path(base.name).name
