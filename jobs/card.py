"""The model card, in the hub's format: metadata block, then what a reader needs to trust and use the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from jobs.guard.words import card_lines
from service.artifacts import ADAPTER, MERGED, BaseModelRecord
from service.spec.job import JobSpec
from service.spec.languages import LANGUAGES
from service.spec.training import CHANGES_BASE, init_family

RATES = (("WER", "wer"), ("CER", "cer"), ("WER, raw text", "wer_raw"), ("CER, raw text", "cer_raw"))


def model_card(
    spec: JobSpec, metrics: dict[str, Any], data: dict[str, Any], base: BaseModelRecord, folder: str = ""
) -> str:
    """README.md of a run, from its figures.

    Args:
        spec: the job.
        metrics: metrics.json.
        data: what is known of the splits.
        base: the model that it began with.
        folder: which part of the run the card lies in: its root (""), `adapter` or `merged`.
    """
    tuned = metrics["tuned"]
    languages = sorted(tuned["languages"])
    results = [
        EvalResult(
            task_type="automatic-speech-recognition",
            task_name="Automatic Speech Recognition",
            dataset_type="held-out",
            dataset_name="the run's validation split",
            dataset_args=data["val"]["sha256"],
            metric_type=kind,
            metric_name=kind.upper(),
            metric_value=round(100 * tuned[kind], 2),
        )
        for kind in ("wer", "cer")
    ]
    metadata = ModelCardData(
        language=languages,
        library_name="transformers" if folder == MERGED else "peft",
        # A local folder is no model on the hub, and the hub would refuse the card.
        base_model=None if base.revision is None else base.name,
        base_model_relation=None if base.revision is None else "finetune" if folder == MERGED else "adapter",
        license="apache-2.0" if base.name.startswith("openai/whisper-") else None,
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", "dora" if spec.training.use_dora else "lora", "whisper-jobs"],
        metrics=["wer", "cer"],
        model_name=metrics["job_id"],
        eval_results=results,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{_body(spec, metrics, data, base, folder)}"


def _body(spec: JobSpec, metrics: dict[str, Any], data: dict[str, Any], base: BaseModelRecord, folder: str) -> str:
    tuned, before, training = metrics["tuned"], metrics["base"], metrics["training"]
    method = "DoRA" if spec.training.use_dora else "LoRA"
    revision = f" at revision `{base.revision}`" if base.revision else ""
    # Of a local folder only the name: where it lay on the training machine says nothing to a reader.
    shown = base.name if base.revision else Path(base.name).name
    names = ", ".join(LANGUAGES[code].capitalize() for code in sorted(tuned["languages"]))
    verdict = "Promoted." if metrics["promoted"] else f"Not promoted: {'; '.join(metrics['promotion_reasons'])}."
    interval = tuned.get("wer_interval")
    between = f" (95 % interval {interval[0]:.2%} to {interval[1]:.2%})" if interval else ""
    lines = [
        f"# {metrics['job_id']}",
        "",
        f"`{shown}`{revision}, adapted with {method} to {names} speech. {verdict}",
        "",
        "| | base | tuned |",
        "|---|---:|---:|",
        *(f"| {label} | {before[key]:.2%} | {tuned[key]:.2%} |" for label, key in RATES),
        *(
            f"| WER, {LANGUAGES[code].capitalize()} | {before['languages'][code]['wer']:.2%} | {values['wer']:.2%} |"
            for code, values in sorted(tuned["languages"].items())
            if len(tuned["languages"]) > 1
        ),
        "",
        f"Measured on {tuned['utterances']} held-out clips{between}, without timestamps, after Whisper's own text",
        "normaliser except where it says raw.",
        "",
        *card_lines(metrics),
        "## Data",
        "",
        "| split | clips | hours | SHA-256 |",
        "|---|---:|---:|---|",
        *(
            f"| {name} | {data[name]['rows']} | {data[name]['hours']} | `{data[name]['sha256']}` |"
            for name in ("train", "val")
        ),
        "",
        f"{data['sentences_in_both']} sentences are in both splits.",
        "",
        "## Training",
        "",
        f"{training['steps']} steps of {training['effective_batch']} clips in {_precision(training['precision'])};"
        f" the adapter of step {training['best_step']} was the best on the validation split.",
        f"{metrics['adapter']['modules']} modules adapted, all of them changed;"
        f" {metrics['adapter']['trainable_parameters']:,} parameters trained.",
        *_beginning(spec.training.lora_init, metrics["adapter"]),
        "",
        "```json",
        json.dumps(
            spec.training.model_dump(mode="json", exclude={"base_model", "train_csv", "val_csv", "outdir"}), indent=2
        ),
        "```",
        "",
        *_use(shown, folder),
    ]
    return "\n".join(lines) + "\n"


def _beginning(init: bool | str, adapter: dict[str, Any]) -> list[str]:
    """What an initialisation made of the ranks that the settings say."""
    lines = []
    if init_family(init) in CHANGES_BASE:
        lines.append(
            f"`{init}` changed the base in training: the adapter here has twice the rank, and fits the untouched base."
        )
    if init == "eva":
        smallest, largest = adapter["ranks"]
        left_out = len(adapter["without_adapter"])
        lines.append(f"`eva` gave ranks of {smallest} to {largest}, and left {left_out} modules without an adapter.")
    return lines


def _use(base: str, folder: str) -> list[str]:
    """How to load what lies in that folder of the run."""
    if folder == MERGED:
        code = [
            "from transformers import pipeline",
            "",
            'recognise = pipeline("automatic-speech-recognition", model=".")',
            'print(recognise("clip.wav")["text"])',
        ]
    else:
        code = [
            "from peft import PeftModel",
            "from transformers import WhisperForConditionalGeneration",
            "",
            f'base = WhisperForConditionalGeneration.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(base, "{"." if folder == ADAPTER else ADAPTER}")',
        ]
    return ["## Use", "", "From this folder:", "", "```python", *code, "```"]


def _precision(name: str) -> str:
    return {"no": "float32", "fp16": "float16 mixed precision", "bf16": "bfloat16 mixed precision"}[name]
