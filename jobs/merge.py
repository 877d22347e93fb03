"""The final task: merge the adapter in float32, prove that nothing changed, save, and prove what was saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from jobs.adapter import load_adapter
from jobs.batches import Batch, Loader
from jobs.device import autocast, device_of, set_threads
from jobs.evaluate import from_lines, to_lines
from jobs.failures import inputs_that_were_there
from jobs.model import Whisper, is_multilingual, load_whisper
from jobs.score import Scorer, summarise
from jobs.transcribe import shard, transcribe
from service.artifacts import ADAPTER, MERGED, MERGED_LINES, TUNED_LINES
from service.errors import VerificationError
from service.spec.job import JobSpec
from service.storage import Storage

MAX_LOGIT_DIFFERENCE = 1e-4
"""Largest difference allowed between the logits of adapter and merged model, both in float32."""

COMPARED_CLIPS = 8
PROOF_CLIPS = 200


def merge(
    spec: JobSpec,
    root: str,
    val: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write merged/ from the base and adapter/, and transcribe with it.

    Args:
        spec: the job.
        root: the run's root, with adapter/ in it.
        val: Arrow file of the validation rows.
        progress: called with (clips transcribed, clips).
        revision: commit of the base model on the hub that the run began with.

    Returns:
        {"max_logit_difference", "max_logit_difference_after_cast", "clips_compared", "dtype", "artifact": {"wer",
        "cer", "utterances", "identical", "rtf", "size_bytes"}}; `identical` is the share of transcripts that are those
        of the adapter, letter by letter.

    Raises:
        VerificationError: merging changed the logits by more than the bound.
    """
    set_threads(spec)
    storage, rows, device = Storage(root), Dataset.from_file(val), device_of(spec)
    with inputs_that_were_there():
        whisper = load_whisper(spec.training.base_model, revision)
    tied = whisper.model.config.tie_word_embeddings  # PEFT clears it where merging takes the two apart
    batch = _compared_batch(spec, whisper, rows)
    model = load_adapter(whisper.model, storage.fetch(ADAPTER))
    logits_BTV = _logits(model.to(device), batch)
    merged = model.merge_and_unload(safe_merge=True)
    difference = max_difference(_logits(merged, batch), logits_BTV, batch)
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise VerificationError(
            f"merge: the logits of adapter and merged model differ by {difference:.2e}; {MAX_LOGIT_DIFFERENCE:.0e} is "
            f"all that rounding explains. Nothing was merged; the adapter is in {storage.path(ADAPTER)}"
        )
    if tied:
        _require_tied(merged)
    with storage.new_folder(MERGED) as folder:
        save_checkpoint(merged.to("cpu", whisper.stored_dtype), whisper.processor, folder, _language_of(rows))
    del model, merged, whisper.model
    saved = load_whisper(str(storage.fetch(MERGED)))
    saved.model.to(device)
    after_cast = max_difference(_logits(saved.model, batch), logits_BTV, batch)
    return {
        "max_logit_difference": difference,
        "max_logit_difference_after_cast": after_cast,
        "clips_compared": len(batch.rows),
        "dtype": str(saved.stored_dtype).removeprefix("torch."),
        "artifact": _prove(spec, storage, saved, rows, progress),
    }


def save_checkpoint(model: Any, processor: Any, folder: Path, language: str | None) -> None:
    """Save a checkpoint that loads back as it is: weights, processor and generation config.

    Args:
        model: the merged model.
        processor: its WhisperProcessor.
        folder: where to.
        language: what a multilingual model transcribes unless told otherwise; None: it detects the language.
    """
    model.generation_config.forced_decoder_ids = None
    if language and is_multilingual(model.generation_config, model.config):
        model.generation_config.language, model.generation_config.task = language, "transcribe"
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def _language_of(rows: Any) -> str | None:
    """The rows' one language, or None where they have several."""
    languages = set(rows["language"][:])
    return str(languages.pop()) if len(languages) == 1 else None


def max_difference(one_BTV: Tensor, other_BTV: Tensor, batch: Batch) -> float:
    """Largest difference between two models' logits at the positions that count."""
    counted_BT = batch.labels_BT >= 0
    return float((one_BTV - other_BTV)[counted_BT].abs().max())


def _compared_batch(spec: JobSpec, whisper: Whisper, rows: Any) -> Batch:
    loader = Loader(rows, whisper.processor.feature_extractor, whisper.prompter(), threads=1, prefetch=1)
    return loader.make(list(range(min(COMPARED_CLIPS, len(rows)))))


def _logits(model: Any, batch: Batch) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(
            input_features=batch.features_BMF.to(model.device),
            decoder_input_ids=batch.inputs_BT.to(model.device),
            use_cache=False,
        ).logits
    return logits.cpu()


def _require_tied(model: Any) -> None:
    # An untied head has no place in formats with one matrix for both, and they would drop it silently.
    if model.proj_out.weight is not model.model.decoder.embed_tokens.weight:
        raise VerificationError("merge: the output head is no longer tied to the token embedding; nothing was saved")


def _prove(
    spec: JobSpec, storage: Storage, saved: Whisper, rows: Any, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Transcribe held-out clips with what was saved, and compare with what the adapter heard."""
    chosen = shard(rows, 0, max(1, len(rows) // PROOF_CLIPS))
    started = time.monotonic()
    with autocast(spec):  # as the adapter was scored, so that only the weights differ
        heard = list(
            transcribe(
                saved.model,
                saved.processor,
                rows,
                chosen,
                spec.evaluation,
                multilingual=saved.multilingual,
                threads=spec.data.threads,
                progress=lambda done: progress(done, len(chosen)),
            )
        )
    texts = {item.row: item.text for item in heard}
    seconds = time.monotonic() - started
    scorer = Scorer(getattr(saved.processor.tokenizer, "english_spelling_normalizer", None), spec.data.text)
    utterances = [scorer.score(rows[row], text) for row, text in sorted(texts.items())]
    storage.write_text(MERGED_LINES, to_lines(utterances))
    tuned = from_lines(storage.read_bytes(TUNED_LINES).decode())
    same = sum(tuned[row].hypothesis == text for row, text in texts.items())
    summary = summarise(utterances, bootstrap=0)
    return {
        "wer": summary["wer"],
        "cer": summary["cer"],
        "utterances": len(utterances),
        "identical": same / len(utterances),
        "rtf": seconds / max(1e-9, sum(u.duration_s for u in utterances)),
        "size_bytes": sum(size for name, size in storage.files() if name.startswith(f"{MERGED}/")),
    }
