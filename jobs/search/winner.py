"""The end of a search: the best configurations are trained to the end, and the best of them is shipped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

from jobs.job import Job
from jobs.kinds.training import fine_tune
from jobs.search.ledger import Ledger, folder_of, repeat_folder
from jobs.search.trial import OF_ALL, OF_THE_TRIAL, job_of, read_curves
from service.artifacts import ADAPTER, BASE_LINES, CHECKPOINTS, EVALUATION, FINALISTS, TUNED_LINES, WINNER
from service.errors import JobFailedError, WhisperJobsError
from service.spec.job import JobSpec
from service.spec.space import words_of
from service.storage import Storage
from service.trials import DEFAULTS, Trial, score_text

FINAL = "final"
"""Below a trial's folder: its training anew, where `search.final_epochs` asks for one."""


def final_job(job: Job, trial: Trial, rows: int) -> JobSpec:
    """The train job that makes a trial's model: run alone, it gives the same."""
    spec, epochs = job.spec, job.spec.search.final_epochs
    if epochs is None:
        return job_of(spec, trial.settings, rows)
    longer = spec.model_copy(update={"training": spec.training.model_copy(update={"epochs": epochs})})
    settings = {name: value for name, value in trial.settings.items() if name != "epochs"}
    return job_of(longer, settings, rows)


def take_to_the_end(job: Job, ledger: Ledger, rows: int, revision: str | None) -> tuple[Trial, dict[str, Any]]:
    """Finish the best `top_k` trials; returns the best of them and what `jobs.train.loop.train` says of it.

    One that fails there gives its place to the next best.

    Raises:
        JobFailedError: all have failed.
        WhisperJobsError: what would end all of them.
    """
    finished: list[tuple[Trial, dict[str, Any]]] = []
    last: WhisperJobsError | None = None
    for trial in ledger.ranking():
        if len(finished) == job.spec.search.top_k:
            break
        try:
            finished.append((trial, _finish(job, trial, rows, revision)))
            ledger.finalise(trial.id, finished[-1][1]["tuned"]["wer"])
        except OF_ALL:
            raise
        except OF_THE_TRIAL as error:
            last = error
            ledger.fail(trial.id, f"on its way to the end: {error}")
    if not finished:
        raise last or JobFailedError("search: no trial could be taken to its end")
    return min(finished, key=lambda pair: pair[1]["tuned"]["wer"])


def ship(job: Job, ledger: Ledger, winner: Trial, rows: int) -> None:
    """Put the winner's files where a train job has them, its train job beside them, and the others' adapters aside."""
    from jobs.train.pass_size import as_chosen

    made_by = as_chosen(final_job(job, winner, rows), _root_of(job, winner))
    _copy_folder(_root_of(job, winner), ADAPTER, job.root, ADAPTER)
    job.root.write_bytes(TUNED_LINES, _root_of(job, winner).read_bytes(TUNED_LINES))
    for trial in ledger.trials:
        if trial.final is not None and trial.id != winner.id:
            _copy_folder(_root_of(job, trial), ADAPTER, job.root, f"{FINALISTS}/{trial.id}")
    alone = made_by.training.model_copy(update={"outdir": None})
    job.root.write_text(WINNER, made_by.model_copy(update={"training": alone, "name": winner_name(job)}).to_json())
    job.recorder.keep_once([{**event, "trial": winner.id} for event in read_curves(job.root, winner.id)])


def winner_name(job: Job) -> str:
    """What the winner's train job is called."""
    return f"{job.spec.title[:33].rstrip('-._')}-winner"


def clean_up(job: Job, ledger: Ledger) -> None:
    """Remove what no one goes on from any more: of trials only their records and curves stay."""
    for trial in ledger.trials:
        repeats = map(repeat_folder, range(1, job.spec.search.repeats))
        for name in (CHECKPOINTS, ADAPTER, EVALUATION, FINAL, *repeats):
            job.root.remove(f"{folder_of(trial.id)}/{name}")


def verdict_of(ledger: Ledger, winner: Trial) -> str:
    """Which configuration has won, and against what, in a sentence."""
    rows = {trial.id: trial for trial in ledger.trials}
    shipped, others = rows[winner.id], len(rows) - 1
    wer = f"{shipped.final:.1%}" if shipped.final is not None else "?"
    untuned = f"the untuned model {ledger.untuned['wer']:.1%}"
    first = next((trial for trial in rows.values() if trial.origin == DEFAULTS), None)
    if winner.origin == DEFAULTS:
        return f"none of the {others} other configurations beats the defaults: WER {wer}, {untuned}"
    text = f"{winner.id} wins ({words_of(winner.settings)}): WER {wer}, {untuned}"
    if first is None or first.score is None or first.status == "failed":
        return f"{text}; the defaults {'failed' if first and first.status == 'failed' else 'were not scored'}"
    metric = ledger.spec.evaluation.metric
    best = score_text(first.score, metric) + ("" if metric == "wer" else " in loss")
    return f"{text}, the defaults {best} in {'their trial' if first.status == 'finished' else 'a trial ended early'}"


def _finish(job: Job, trial: Trial, rows: int, revision: str | None) -> dict[str, Any]:
    root, spec = _root_of(job, trial), final_job(job, trial, rows)
    how = f"training {trial.id} anew" if job.spec.search.final_epochs else f"taking {trial.id} to the end"

    # Where trials train in processes of their own, those have had CPUs and GPUs that this one has not: one worker has.
    workers = max(1, spec.resources.workers)
    placed = spec.model_copy(update={"resources": spec.resources.model_copy(update={"workers": workers})})

    def work() -> dict[str, Any]:
        root.write_bytes(BASE_LINES, job.root.read_bytes(BASE_LINES))
        return fine_tune(replace(job, spec=placed, root=root), revision, job.root)

    return job.stages.run(f"train-{trial.id}", f"{how}: {words_of(trial.settings)}", work)


def _root_of(job: Job, trial: Trial) -> Storage:
    """Where a finalist's training lies: its trial's own folder, of whose checkpoints it goes on."""
    folder = folder_of(trial.id)
    return Storage(job.root.path(f"{folder}/{FINAL}" if job.spec.search.final_epochs else folder))


def _copy_folder(source: Storage, name: str, target: Storage, to: str) -> None:
    with target.new_folder(to) as folder:
        shutil.copytree(source.fetch(name), folder, dirs_exist_ok=True)
