"""One export: written, published, read back from where it was published, and proven there."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from datasets import Dataset

from jobs.evaluate import from_lines
from jobs.export.checkpoint import Checkpoint, UnsupportedError
from jobs.export.limits import why_refused
from jobs.export.proof import COMPARABLE, DEFAULT, RuntimeFailedError, listen, proven
from jobs.export.runtimes import Decoding
from jobs.failures import first_line
from jobs.merge import proof_rows
from jobs.model import is_multilingual
from jobs.score import Scorer
from service.artifacts import MERGED, MERGED_LINES, REFUSED, folder_of
from service.errors import WhisperJobsError
from service.spec.export import ARTIFACTS, FAMILIES, HF
from service.spec.job import JobSpec
from service.storage import Storage

WRITERS = {
    "ggml": ("jobs.export.ggml", "write_ggml"),
    "ctranslate2": ("jobs.export.ctranslate2", "write_ctranslate2"),
    "openai": ("jobs.export.openai", "write_openai"),
}
"""What writes each family, imported on use: a job needs the packages of its own formats alone."""


def export_artifact(
    spec: JobSpec, root: str, name: str, val: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Make an artifact of the merged checkpoint, publish it, and hear it in its own runtime.

    Args:
        spec: the job.
        root: the run's root, with merged/ in it.
        name: the artifact, `ggml-q8_0`; `hf` stands already and is only heard.
        val: Arrow file of the validation rows.
        progress: called with (clips transcribed, clips), over both ways of transcribing.

    Returns:
        its entry in metrics.json. `refused` says why, where it did not pass; its files stay, marked.
    """
    storage = Storage(root)
    family, precision = ARTIFACTS[name]
    entry: dict[str, Any] = {"runtime": FAMILIES[family].runtime}
    merged = Checkpoint(storage.fetch(MERGED))
    if name != HF:
        module, function = WRITERS[family]
        write = getattr(import_module(module), function)
        storage.remove(folder_of(name))
        try:
            with storage.new_folder(folder_of(name)) as folder:
                write(merged, folder, precision)
        except Exception as error:  # see below
            if isinstance(error, UnsupportedError):
                entry["refused"] = f"the format cannot hold this model: {error}"
            elif isinstance(error, OSError | MemoryError | WhisperJobsError):
                raise  # of this machine, not of the artifact
            else:  # whatever a converter raises: the other formats are delivered all the same
                entry["refused"] = f"it could not be written: {type(error).__name__}: {first_line(error)}"
            storage.write_text(f"{folder_of(name)}/{REFUSED}", entry["refused"] + "\n")
            return entry
    storage.remove(f"{folder_of(name)}/{REFUSED}")  # of a run that was cut off
    try:
        entry |= hear(spec, storage, name, storage.fetch(folder_of(name)), merged, val, progress)
    except RuntimeFailedError as error:
        entry["refused"] = f"{FAMILIES[family].runtime} could not run it: {error}"
    else:
        if name != HF and (reason := why_refused(name, entry, spec.export)):
            entry["refused"] = reason
    inside = f"{folder_of(name)}/"
    entry["size_bytes"] = sum(size for file, size in storage.files() if file.startswith(inside))
    if "refused" in entry:
        storage.write_text(inside + REFUSED, entry["refused"] + "\n")
    return entry


def hear(
    spec: JobSpec,
    storage: Storage,
    name: str,
    folder: Path,
    merged: Checkpoint,
    val: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Transcribe held-out clips with an artifact; returns its figures.

    Raises:
        RuntimeFailedError: its runtime could not.
    """
    rows = Dataset.from_file(val)
    known = dict(zip(proof_rows(rows), from_lines(storage.read_bytes(MERGED_LINES).decode()), strict=True))
    wanted = min(spec.export.proof_clips, len(known))
    chosen = [list(known)[index * len(known) // wanted] for index in range(wanted)]
    records = [rows[row] for row in chosen]
    modes = (DEFAULT,) if name == HF else (COMPARABLE, DEFAULT)
    total = len(modes) * len(records)
    heard = listen(
        ARTIFACTS[name][0],
        folder,
        records,
        Decoding(
            multilingual=is_multilingual(merged.generation, merged.config),
            suppress=bool(merged.generation.suppress_tokens),
            suppress_blank=bool(merged.generation.begin_suppress_tokens),
            max_new_tokens=spec.evaluation.max_new_tokens,
            threads=spec.engine.threads or max(1, int(spec.resources.cpus_per_worker)),
        ),
        modes=modes,
        timeout_s=spec.engine.timeout_s,
        progress=lambda done: progress(done, total),
    )
    scorer = Scorer.of(spec, merged.processor)
    return proven(name, [known[row] for row in chosen], heard, scorer, records)
