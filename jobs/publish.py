"""The end of a job: metrics.json, the model card, the report and, last of all, manifest.json."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from service import artifacts
from service.artifacts import BaseModelRecord, RunManifest
from service.report.page import report_page
from service.spec.job import JobSpec
from service.storage import Storage

REPORTED_PACKAGES = (
    "whisper-jobs",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "ray",
    "optuna",
    "datasets",
    "soundfile",
    "soxr",
    "ctranslate2",
    "faster-whisper",
    "gguf",
    "openai-whisper",
    "pywhispercpp",
)


def publish(
    spec: JobSpec,
    root: Storage,
    metrics: dict[str, Any],
    data: dict[str, Any],
    base: BaseModelRecord,
    warn: Callable[[str], None] = lambda text: None,
    made_by: JobSpec | None = None,
) -> None:
    """Write metrics.json, the card, the report and, last of all, manifest.json: from then on the run is complete.

    Args:
        spec: the job.
        root: its root.
        metrics: the content of metrics.json.
        data: what the data are.
        base: which model it began with.
        warn: told, in a sentence, where there is no report; keeps it in events.jsonl before it returns.
        made_by: the train job that made the model, where that is not the job itself: a search's winner.

    Raises:
        ExistsError: another writer has published here meanwhile.
    """
    root.sweep(resumable=True)  # what a worker that died has left half-written
    root.write_json(artifacts.METRICS, metrics)
    exported = metrics.get("artifacts", {})
    if spec.kind != "evaluate":
        _write_cards(made_by or spec, root, metrics, data, base)
    rates = {name: metrics[name]["wer"] for name in ("base", "tuned", "model") if name in metrics}
    manifest = RunManifest(
        job_id=spec.job_id,
        kind=spec.kind,
        spec_sha256=spec.sha256,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        base=base,
        data=data,
        wer=rates | {name: value["wer"] for name, value in exported.items() if "wer" in value},
        promoted=metrics.get("promoted"),
        refused=refused_artifacts(metrics),
        search=metrics.get("search"),
        files=[],
    )
    _write_report(root, manifest, warn)
    manifest = manifest.model_copy(update={"files": artifacts.file_records(root)})
    root.create_bytes(artifacts.MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


def _write_report(root: Storage, manifest: RunManifest, warn: Callable[[str], None]) -> None:
    """The report, or a warning: it shows what is there already, and no run is lost for the want of it."""
    try:
        page = report_page(root, manifest)
    except Exception as error:  # noqa: BLE001  whatever a page may fall over
        root.remove(artifacts.REPORT)  # of an attempt before this one
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warn(f"there is no {artifacts.REPORT}: {reason}; `whisper-jobs report` makes it once that is mended")
    else:
        root.write_text(artifacts.REPORT, page)


def _write_cards(
    spec: JobSpec, root: Storage, metrics: dict[str, Any], data: dict[str, Any], base: BaseModelRecord
) -> None:
    from jobs.card import model_card
    from jobs.export.card import artifact_card, export_card

    cards = {}
    if spec.kind == "train":
        for folder in ("", artifacts.ADAPTER, *([artifacts.MERGED] if spec.training.merge_lora else [])):
            cards[folder] = model_card(spec, metrics, data, base, folder)
    else:
        cards = {"": export_card(spec, metrics, base)}
    for name, entry in metrics["artifacts"].items():
        folder = artifacts.folder_of(name)
        if "runtime" in entry and folder not in cards:
            cards[folder] = artifact_card(name, metrics, base)
    for folder, card in cards.items():
        root.write_text(f"{folder}/{artifacts.CARD}".lstrip("/"), card)


def versions() -> dict[str, str]:
    """Python's and the libraries' versions."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def refused_artifacts(metrics: dict[str, Any]) -> dict[str, str]:
    """The exports that did not pass their proof, each with the reason."""
    exported = metrics.get("artifacts", {})
    return {name: value["refused"] for name, value in exported.items() if "refused" in value}


def promotion_reasons(metrics: dict[str, Any], clips_in_both: int = 0) -> list[str]:
    """Why the tuned model should not take the base model's place; empty where it should.

    Args:
        metrics: the content of metrics.json so far.
        clips_in_both: validation clips that were trained on.
    """
    base, tuned = metrics["base"]["wer"], metrics["tuned"]["wer"]
    reasons = []
    if clips_in_both:
        count = metrics["tuned"]["utterances"]
        reasons.append(f"its WER says little: {clips_in_both} of the {count} validation clips were trained on")
    if tuned >= base:
        reasons.append(f"its WER, {tuned:.1%}, is not below the base model's, {base:.1%}")
    if why := refused_artifacts(metrics).get("hf"):
        reasons.append(f"its merged checkpoint was refused: {why}")
    return reasons + metrics.get("guard", {}).get("reasons", [])
