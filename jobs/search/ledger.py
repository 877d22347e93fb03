"""What a search has done, on its storage: a record per trial, written before it begins and with each evaluation.

It is the record that a search goes on from, whatever has been killed: Ray Tune's own snapshots come now and then, on
one machine. A trial whose record has ended is only read again; another goes on from its own checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from service.artifacts import CHECKPOINTS, SEARCH, TRIALS
from service.spec.job import JobSpec
from service.spec.space import Point, planned_trials
from service.storage import Storage
from service.trials import DEFAULTS, ENDED, UNTUNED, Evaluation, Search, Status, Trial

FOLDER = f"{SEARCH}/trials"


class Entry(BaseModel):
    """trial.json: a trial's row, and what its sampler called it.

    Attributes:
        trial: the row.
        params: values by the sampler's names, before anything was made of them.
    """

    trial: Trial
    params: dict[str, Any] = {}


def trial_id(number: int) -> str:
    """`t000`, `t001`, ..."""
    return f"t{number:03}"


def folder_of(trial: str) -> str:
    """Where a trial's record, curves and checkpoints stand below the root."""
    return f"{FOLDER}/{trial}"


def read_entry(root: Storage, trial: str) -> Entry:
    """A trial's record.

    Raises:
        NotFoundError: it has none.
    """
    return Entry.model_validate_json(root.read_bytes(f"{folder_of(trial)}/trial.json"))


@dataclass
class Ledger:
    """The trials of a search. Its methods may be called from several threads.

    Args:
        root: the job's root.
        spec: the job.
        untuned: WER, CER and, where it is the metric, loss of the base model.
        tell: takes a trial's row whenever it has changed.
    """

    root: Storage
    spec: JobSpec
    untuned: dict[str, float]
    tell: Callable[[Trial, Search], None] = lambda trial, search: None
    entries: dict[str, Entry] = field(default_factory=dict)
    before_s: float = 0.0
    """Seconds of earlier attempts."""
    closed: bool = False
    """Whether no more trials are to be begun."""
    share: float = 1.0
    """Of a trial in the resources of its process; less where trials train together."""
    planned: int = 0
    """How many there are to be; fewer where the space has no more points."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self.planned = planned_trials(self.spec)
        for name in sorted(self.root.folders(FOLDER), key=lambda name: (len(name), name)):
            if self.root.exists(f"{FOLDER}/{name}/trial.json"):
                self.entries[name] = read_entry(self.root, name)
        if self.root.exists(TRIALS):
            self.before_s = Search.model_validate_json(self.root.read_bytes(TRIALS)).seconds
        self.seconds = self.before_s

    @property
    def trials(self) -> list[Trial]:
        """All rows but the untuned model's, in the order of their beginning."""
        return [entry.trial for entry in self.entries.values()]

    def begin(self, number: int, origin: str, point: Point, params: dict[str, Any]) -> Trial:
        """Write down what a trial is to be, before anything of it is done."""
        with self._lock:
            name = trial_id(number)
            if name not in self.entries:
                trial = Trial(id=name, origin=origin, settings=point, status="pending")
                self.entries[name] = Entry(trial=trial, params=params)
                self._keep(name)
            return self.entries[name].trial

    def add(self, trial: str, evaluations: list[Evaluation], **facts: Any) -> None:
        """Note evaluations of a trial, each once, and what else has become known of it."""
        with self._lock:
            row = self.entries[trial].trial
            known = {(each.seed, each.step) for each in row.evaluations}
            new = [each for each in evaluations if (each.seed, each.step) not in known]
            changes = {name: value for name, value in facts.items() if getattr(row, name) != value}
            if new or changes:
                changes |= {"evaluations": [*row.evaluations, *new]}
                if row.status == "pending" and "status" not in changes:
                    changes["status"] = "running"
                self._change(trial, changes)

    def end(self, trial: str, status: Status, cause: str | None = None) -> None:
        """Note how a trial has ended; what has ended before stays as it was."""
        with self._lock:
            if self.entries[trial].trial.status not in ENDED:
                self._change(trial, {"status": status, "cause": cause})

    def fail(self, trial: str, cause: str) -> None:
        """Note that a trial has failed on its way to the end: it cannot win any more."""
        with self._lock:
            self._change(trial, {"status": "failed", "cause": cause})

    def finalise(self, trial: str, wer: float) -> None:
        """Note the WER of a trial that was taken to its end."""
        with self._lock:
            self._change(trial, {"final": wer}, tell=False)

    def table(self, **facts: Any) -> Search:
        """The table as it stands."""
        search, metric = self.spec.search, self.spec.evaluation.metric
        untuned = Trial(id=UNTUNED, origin=UNTUNED, settings={}, status="finished", score=self.untuned[metric])
        untuned = untuned.model_copy(update={"final": self.untuned["wer"]})
        with self._lock:
            return Search(
                metric=metric,
                sampler=search.sampler,
                scheduler=search.scheduler,
                seed=search.seed,
                repeats=search.repeats,
                evaluations=search.evaluations,
                planned=self.planned,
                trials=[untuned, *self.trials],
                seconds=round(self.seconds, 1),
                gpu_hours=round(self.gpu_hours, 4),
                **facts,
            )

    def publish(self, **facts: Any) -> Search:
        """Write the table; `whisper-jobs trials` reads it."""
        with self._lock:
            table = self.table(**facts)
            self.root.write_text(TRIALS, table.model_dump_json(indent=2) + "\n")
            return table

    @property
    def gpus(self) -> float:
        """GPUs of a trial; of those that train together, its share."""
        resources = self.spec.resources
        return (resources.gpus_per_worker or 0.0) * max(1, resources.workers) * self.share

    @property
    def gpu_hours(self) -> float:
        """What all trials have used, as far as they have told."""
        return sum(trial.seconds for trial in self.trials) * self.gpus / 3600

    @property
    def failures(self) -> int:
        """How many trials have failed."""
        return sum(trial.status == "failed" for trial in self.trials)

    def ranking(self) -> list[Trial]:
        """The trials that may win, the best first; of equals the defaults, then what trains less, then the earlier.

        A score that is the mean of fewer repeats than others' comes after those.
        """
        scored = [trial for trial in self.trials if trial.score is not None and trial.status != "failed"]
        return sorted(scored, key=_rank)

    def forget_losers(self) -> None:
        """Remove the checkpoints of all trials that have ended and are none of the best `top_k`."""
        search = self.spec.search
        with self._lock:
            # What still runs may fail, and the best of the others is then wanted.
            ranking = [trial.id for trial in self.ranking() if trial.status in ENDED]
            best = [] if search.final_epochs else ranking[: search.top_k]
            ended = [trial.id for trial in self.trials if trial.status in ENDED and trial.id not in best]
        for trial in ended:
            self.root.remove(f"{folder_of(trial)}/{CHECKPOINTS}")
            for repeat in range(1, search.repeats):
                self.root.remove(f"{folder_of(trial)}/{repeat_folder(repeat)}")

    def _change(self, trial: str, changes: dict[str, Any], *, tell: bool = True) -> None:
        entry = self.entries[trial]
        self.entries[trial] = entry.model_copy(update={"trial": entry.trial.model_copy(update=changes)})
        self._keep(trial, tell=tell)

    def _keep(self, trial: str, *, tell: bool = True) -> None:
        entry = self.entries[trial]
        self.root.write_text(f"{folder_of(trial)}/trial.json", entry.model_dump_json(indent=2) + "\n")
        table = self.publish()
        if tell:
            self.tell(entry.trial, table)


def repeat_folder(index: int) -> str:
    """Where a trial's run with another seed stands below its folder."""
    return f"repeat{index}"


def _rank(trial: Trial) -> tuple[int, float, bool, int, str]:
    assert trial.score is not None
    return (-len(trial.scores), trial.score, trial.origin != DEFAULTS, trial.trainable_parameters or 0, trial.id)
