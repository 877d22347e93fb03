"""The merge: adapter and base into one checkpoint, in float32, with the proof that nothing changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from jobs.adapter import load_adapter, require_mergeable
from jobs.batches import Batch, Features, Loader
from jobs.device import autocast, device_of, set_threads
from jobs.evaluate import from_lines, to_lines
from jobs.export.checkpoint import Checkpoint
from jobs.export.hf import write_hf
from jobs.export.limits import why_refused
from jobs.export.weights import HEAD
from jobs.failures import inputs_that_were_there
from jobs.fast.adapters import speed_up
from jobs.fast.log_mel import log_mel_of
from jobs.model import Whisper, load_whisper
from jobs.score import Scorer, Utterance, summarise
from jobs.transcribe import shard, transcribe
from service.artifacts import MERGED, MERGED_LINES, TUNED_LINES
from service.errors import VerificationError
from service.spec.export import HF
from service.spec.job import JobSpec
from service.storage import Storage

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest difference allowed between the logits of adapter and merged model, both in float32."""

COMPARED_CLIPS = 8
PROOF_CLIPS = 200

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Source:
    """What is merged.

    Attributes:
        base: hub id or folder of the base.
        adapter: folder of the adapter; None: the base is all there is.
        revision: commit of the base on the hub.
    """

    base: str
    adapter: Path | None
    revision: str | None = None


def merge(
    spec: JobSpec, root: str, source: Source, val: str, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Write merged/ and transcribe with it.

    Args:
        spec: the job.
        root: the run's root. Without the adapter's transcripts in it (evaluation/tuned.jsonl) they are made first.
        source: base and adapter.
        val: Arrow file of the validation rows.
        progress: called with (clips transcribed, clips).

    Returns:
        {"max_logit_difference", "max_logit_difference_after_cast", "clips_compared", "dtype", "tied", "model",
        "artifact": {"wer", "cer", "utterances", "identical", "rtf", "size_bytes"}}; `identical` is the share of
        transcripts that are those of the adapter, letter by letter, and `model` the rates of the adapter, where they
        were made here.

    Raises:
        VerificationError: merging changed the logits by more than the bound, or the file is not what was merged.
    """
    set_threads(spec)
    storage, rows, device = Storage(root), Dataset.from_file(val), device_of(spec)
    with inputs_that_were_there():
        whisper = load_whisper(source.base, source.revision)
    batch = _compared_batch(spec, whisper, rows)
    adapted = load_adapter(whisper.model, source.adapter) if source.adapter else whisper.model
    require_mergeable(adapted)
    logits_BTV = _logits(adapted.to(device), batch)
    speed_up(adapted, spec.engine)  # the logits above are PEFT's own
    result: dict[str, Any] = {}
    if not storage.exists(TUNED_LINES):
        tuned = _transcribed(spec, whisper, adapted, rows, progress)
        storage.write_text(TUNED_LINES, to_lines(tuned))
    if spec.kind == "export":  # a train job has scored it before
        lines = from_lines(storage.read_bytes(TUNED_LINES).decode())
        result["model"] = summarise(lines, bootstrap=spec.evaluation.bootstrap)
    # On the CPU, as the files are merged: the two are compared bit by bit.
    adapted.to("cpu")
    merged = adapted.merge_and_unload(safe_merge=True) if source.adapter else adapted
    difference = max_difference(_logits(merged.to(device), batch), logits_BTV, batch)
    if not difference <= MAX_LOGIT_DIFFERENCE:
        kept = f"the adapter is in {source.adapter}"
        raise VerificationError(
            f"merge: the logits of adapter and merged model differ by {difference:.2e}; {MAX_LOGIT_DIFFERENCE:.0e} is "
            f"all that rounding explains. Nothing was merged; {kept}"
        )
    merged.to("cpu")
    with storage.new_folder(MERGED) as folder:
        facts = write_hf(source.base, source.adapter, folder, revision=source.revision, language=_language_of(rows))
        require_same_weights(Checkpoint(folder), merged, whisper.stored_dtype)
    del adapted, merged, whisper.model
    saved = load_whisper(str(storage.fetch(MERGED)))
    saved.model.to(device)
    after_cast = max_difference(_logits(saved.model, batch), logits_BTV, batch)
    return (
        result
        | facts
        | {
            "max_logit_difference": difference,
            "max_logit_difference_after_cast": after_cast,
            "clips_compared": len(batch.rows),
            "artifact": _prove(spec, storage, saved, rows, progress),
        }
    )


def require_same_weights(written: Checkpoint, merged: Any, dtype: torch.dtype) -> None:
    """Compare what was merged tensor by tensor with what PEFT has merged in memory.

    Raises:
        VerificationError: a weight is not the same to the last bit.
    """
    weights = written.weights
    expected = {name: tensor for name, tensor in merged.state_dict().items() if name != HEAD or HEAD in weights}
    differing = [
        name
        for name, tensor in expected.items()
        if name not in weights or not torch.equal(weights[name], tensor.to(dtype))
    ]
    if differing:
        raise VerificationError(
            f"merge: {len(differing)} weights are not those that PEFT merges ({', '.join(differing[:3])}); nothing was "
            "saved"
        )


def proof_rows(rows: Any) -> list[int]:
    """The validation rows that the merged model transcribes, in order: at most about PROOF_CLIPS of all lengths."""
    return sorted(shard(rows, 0, max(1, len(rows) // PROOF_CLIPS)))


def _language_of(rows: Any) -> str | None:
    """The rows' one language, or None where they have several."""
    languages = set(rows["language"][:])
    return str(languages.pop()) if len(languages) == 1 else None


def max_difference(one_BTV: Tensor, other_BTV: Tensor, batch: Batch) -> float:
    """Largest difference between two models' logits at the positions that count."""
    counted_BT = batch.labels_BT >= 0
    return float((one_BTV - other_BTV)[counted_BT].abs().max())


def _compared_batch(spec: JobSpec, whisper: Whisper, rows: Any) -> Batch:
    features = Features(log_mel_of(spec, whisper.processor))
    loader = Loader(rows, features, whisper.prompter(), threads=1, prefetch=1)
    return loader.make(list(range(min(COMPARED_CLIPS, len(rows)))))


def _logits(model: Any, batch: Batch) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(
            input_features=batch.features_BMF.to(model.device),
            decoder_input_ids=batch.inputs_BT.to(model.device),
            use_cache=False,
        ).logits
    return logits.cpu()


def _transcribed(
    spec: JobSpec,
    whisper: Whisper,
    model: Any,
    rows: Any,
    progress: Progress,
    chosen: list[int] | None = None,
) -> list[Utterance]:
    """Rows as a model hears them, in their order; all of them where none are chosen."""
    wanted = shard(rows, 0, 1) if chosen is None else [row for row in shard(rows, 0, 1) if row in set(chosen)]
    with autocast(spec):  # as the adapter was scored, so that only the weights differ
        heard = list(
            transcribe(
                model,
                whisper.processor,
                rows,
                wanted,
                spec.evaluation,
                multilingual=whisper.multilingual,
                threads=spec.data.threads,
                progress=lambda done: progress(done, len(wanted)),
                features=Features(log_mel_of(spec, whisper.processor)),
            )
        )
    texts = {item.row: item.text for item in heard}
    scorer = Scorer.of(spec, whisper.processor)
    return [scorer.score(rows[row], text) for row, text in sorted(texts.items())]


def _prove(spec: JobSpec, storage: Storage, saved: Whisper, rows: Any, progress: Progress) -> dict[str, Any]:
    """Transcribe held-out clips with what was saved, and compare with what the adapter heard."""
    chosen = proof_rows(rows)
    started = time.monotonic()
    utterances = _transcribed(spec, saved, saved.model, rows, progress, chosen)
    seconds = time.monotonic() - started
    everything = from_lines(storage.read_bytes(TUNED_LINES).decode())
    tuned = [everything[row] for row in chosen]
    same = sum(one.hypothesis == other.hypothesis for one, other in zip(tuned, utterances, strict=True))
    summary = summarise(utterances, bootstrap=0)
    if spec.evaluation.num_beams > 1:  # the exports are compared greedily
        greedy = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"num_beams": 1})})
        utterances = _transcribed(greedy, saved, saved.model, rows, progress, chosen)
    storage.write_text(MERGED_LINES, to_lines(utterances))
    figures: dict[str, Any] = {
        "wer": summary["wer"],
        "wer_compared": summarise(tuned, bootstrap=0)["wer"],
        "cer": summary["cer"],
        "utterances": len(utterances),
        "identical": same / len(utterances),
    }
    if reason := why_refused(HF, figures, spec.export, "the adapter"):
        figures["refused"] = reason
    return figures | {
        "rtf": seconds / max(1e-9, sum(u.duration_s for u in utterances)),
        "size_bytes": sum(size for name, size in storage.files() if name.startswith(f"{MERGED}/")),
    }
