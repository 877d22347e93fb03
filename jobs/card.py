"""The model card, in the hub's format: metadata block, then what a reader needs to trust and use the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jobs.export.table import export_markdown
from jobs.guard.words import card_lines
from service.artifacts import ADAPTER, CARD, MERGED, BaseModelRecord
from service.report.paired import in_words
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.languages import LANGUAGES
from service.spec.paths import is_stored
from service.spec.training import CHANGES_BASE, init_family
from service.storage import Storage

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
    library, relation = ("transformers", "finetune") if folder == MERGED else ("peft", "adapter")
    method = "dora" if spec.training.use_dora else "lora"
    metadata = card_metadata(metrics["job_id"], base, languages, library, relation, tags=[method], results=results)
    return f"---\n{metadata}\n---\n\n{_body(spec, metrics, data, base, folder)}"


def card_metadata(
    job_id: str,
    base: BaseModelRecord,
    languages: list[str],
    library: str,
    relation: str,
    *,
    tags: Sequence[str] = (),
    results: list[EvalResult] | None = None,
) -> str:
    """The metadata block of a card, as YAML.

    Args:
        job_id: the job.
        base: the model that it began with.
        languages: their codes.
        library: what opens the model, by the hub's name.
        relation: to the base, by the hub's words.
        tags: more of them.
        results: what was measured.
    """
    metadata = ModelCardData(
        language=languages,
        library_name=library,
        # A local folder is no model on the hub, and the hub would refuse the card.
        base_model=None if base.revision is None else base.name,
        base_model_relation=None if base.revision is None else relation,
        license=_licence(base),
        pipeline_tag="automatic-speech-recognition",
        tags=["whisper", *tags, "whisper-jobs"],
        metrics=["wer", "cer"],
        model_name=job_id if results else None,
        eval_results=results,
    )
    return str(metadata.to_yaml())


MIT = ("openai/whisper-large-v3-turbo",)
"""Checkpoints of OpenAI's under another licence than Apache 2.0, by their cards."""


def _licence(base: BaseModelRecord) -> str | None:
    """The base's licence: of OpenAI's checkpoints as their cards have it, of a local folder as its own card says."""
    if base.name.startswith("openai/whisper-"):
        return "mit" if base.name in MIT else "apache-2.0"
    card = _card_beside(base.name) if base.revision is None else None
    found = ModelCard(card).data.to_dict().get("license") if card else None
    return str(found) if found else None


def _card_beside(folder: str) -> str | None:
    """The model card in the folder of a checkpoint, local or in object storage."""
    if is_stored(folder) or Path(folder).is_dir():
        found = Storage(folder)
        return found.read_bytes(CARD).decode() if found.exists(CARD) else None
    return None


def marks_kept(spec: JobSpec) -> str:
    """What is to be said of the normaliser beside whose it is."""
    return " (combining marks kept)" if spec.evaluation.normalizer == "keep_marks" else ""


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
        f"normaliser{marks_kept(spec)} except where it says raw.",
        *([f"The tuned model's difference is {in_words(found)}."] if (found := metrics.get("difference")) else []),
        "",
        *card_lines(metrics),
        *_exports(metrics.get("artifacts", {})),
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
        f"{counted(training['steps'], 'step')} of {counted(training['effective_batch'], 'clip')} in"
        f" {_precision(training['precision'])};"
        f" the adapter of step {training['best_step']} was the best on the validation split.",
        f"{counted(metrics['adapter']['modules'], 'module')} adapted, all of them changed;"
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
        lines.append(
            f"`eva` gave ranks of {smallest} to {largest}, and left {counted(left_out, 'module')} without an adapter."
        )
    return lines


def _exports(entries: dict[str, dict[str, Any]]) -> list[str]:
    heard = {name: entry for name, entry in entries.items() if "runtime" in entry}
    return ["## Exports", "", export_markdown(heard)] if heard else []


def _python(*code: str) -> tuple[str, ...]:
    return ("## Use", "", "From this folder:", "", "```python", *code, "```")


USES = {
    "hf": _python(
        "from transformers import pipeline",
        "",
        'recognise = pipeline("automatic-speech-recognition", model=".")',
        'print(recognise("clip.wav")["text"])',
    ),
    "ggml": (
        *_python(
            "from glob import glob",
            "",
            "from pywhispercpp.model import Model",
            "",
            'for segment in Model(glob("ggml-model-*.bin")[0]).transcribe("clip.wav", language="en"):',
            "    print(segment.text)",
        ),
        "",
        "Or whisper.cpp itself: `whisper-cli -m ggml-model-*.bin -f clip.wav`.",
    ),
    "ctranslate2": _python(
        "from faster_whisper import WhisperModel",
        "",
        'segments, _ = WhisperModel(".").transcribe("clip.wav")',
        'print("".join(segment.text for segment in segments))',
    ),
    "openai": _python(
        "import whisper",
        "",
        'print(whisper.load_model("model.pt").transcribe("clip.wav")["text"])',
    ),
}
"""How to use what lies in a folder, by its format."""


def _use(base: str, folder: str) -> tuple[str, ...]:
    """How to load what lies in that folder of the run."""
    if folder == MERGED:
        return USES["hf"]
    return _python(
        "from peft import PeftModel",
        "from transformers import WhisperForConditionalGeneration",
        "",
        f'base = WhisperForConditionalGeneration.from_pretrained("{base}")',
        f'model = PeftModel.from_pretrained(base, "{"." if folder == ADAPTER else ADAPTER}")',
    )


def _precision(name: str) -> str:
    return {"no": "float32", "fp16": "float16 mixed precision", "bf16": "bfloat16 mixed precision"}[name]
