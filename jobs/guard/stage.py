"""The guard's stage: both models transcribe its clips, and are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from jobs.adapter import load_adapter
from jobs.device import autocast, device_of, set_threads
from jobs.failures import inputs_that_were_there
from jobs.fast.adapters import speed_up
from jobs.fast.log_mel import log_mel_of
from jobs.guard.hear import Listener
from jobs.guard.verdict import Checked, check, verdict
from jobs.model import Whisper, load_whisper
from jobs.prepare import split_file
from jobs.score import Scorer
from service.artifacts import ADAPTER, GUARD_BASE_LINES, GUARD_TUNED_LINES, MERGED
from service.spec.job import JobSpec
from service.storage import Storage

Progress = Callable[[str, int, int], None]


def guard(
    spec: JobSpec, root: str, progress: Progress = lambda model, done, total: None, *, revision: str | None = None
) -> dict[str, Any]:
    """Transcribe the guard's clips with the base model and with what was published: merged/ or, without one, adapter/.

    Args:
        spec: the job.
        root: the run's root, with data/guard.arrow in it.
        progress: called with (`base` or `tuned`, clips transcribed, clips).
        revision: commit of the base model on the hub that the run began with.

    Returns:
        see `jobs.guard.verdict.verdict`. Every clip's transcripts and segments go to evaluation/.

    Raises:
        InputLostError: a clip or a model has gone.
    """
    set_threads(spec)
    storage = Storage(root)
    rows = Dataset.from_file(str(storage.fetch(split_file("guard"))))
    with inputs_that_were_there():
        whisper = load_whisper(spec.training.base_model, revision, attention=spec.engine.attention)
        base = _listen(spec, whisper, rows, lambda done: progress("base", done, len(rows)))
        if spec.training.merge_lora:
            del whisper
            whisper = load_whisper(str(storage.fetch(MERGED)), attention=spec.engine.attention)
        else:
            whisper.model = load_adapter(whisper.model, storage.fetch(ADAPTER))
            speed_up(whisper.model, spec.engine)
        tuned = _listen(spec, whisper, rows, lambda done: progress("tuned", done, len(rows)))
    for name, clips in ((GUARD_BASE_LINES, base), (GUARD_TUNED_LINES, tuned)):
        storage.write_text(name, "".join(json.dumps(clip.as_dict(), ensure_ascii=False) + "\n" for clip in clips))
    return verdict(base, tuned, spec.guard)


def _listen(spec: JobSpec, whisper: Whisper, rows: Any, progress: Callable[[int], None]) -> list[Checked]:
    model = whisper.model.to(device_of(spec))
    log_mel = log_mel_of(spec, whisper.processor)
    listener = Listener(model, whisper.processor, spec.evaluation, multilingual=whisper.multilingual, log_mel=log_mel)
    with autocast(spec):
        heard = listener.hear(rows, threads=spec.data.threads, progress=progress)
    scorer = Scorer.of(spec, whisper.processor)
    return [check(rows[item.row], item, scorer) for item in heard]
