"""A trial: its configuration run with one seed or several, as a stream of results; what was done before comes first."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jobs.failures import GO_ON
from jobs.search.ledger import folder_of, read_entry, repeat_folder
from jobs.search.runner import Event, TrialRun, TrialRunner
from service.artifacts import EVENTS
from service.errors import (
    Fault,
    InputError,
    InputLostError,
    JobFailedError,
    NotFoundError,
    SpecError,
    StoppedError,
    StorageError,
    VerificationError,
    WhisperJobsError,
)
from service.spec.job import JobSpec
from service.spec.space import job_at
from service.storage import Storage
from service.trials import ENDED, Evaluation

OF_THE_TRIAL = (JobFailedError, VerificationError, SpecError)
"""What ends a trial and not the search: another configuration may do better."""

OF_ALL = (StorageError, InputLostError)
"""What would end every other trial too."""

_ADVANCE_EVERY_S = 3.0
"""A search of many short steps has more to do than to count them."""

_KEPT_EVENTS = ("model", "evaluation", "checkpoint", "notice", "traceback")


@dataclass(frozen=True)
class TrialPlan:
    """What all trials of a search share.

    Args:
        spec: the search, as JSON.
        root: the job's root.
        revision: commit of the base model.
        rows: of the training set.
    """

    spec: str
    root: str
    revision: str | None
    rows: int


def steps_of(job: JobSpec, rows: int) -> int:
    """Optimizer steps of a train job's whole schedule."""
    training = job.training
    batch = training.clips_per_step * max(1, job.resources.workers)
    return math.ceil(rows / batch) * training.epochs


def job_of(spec: JobSpec, settings: dict[str, Any], rows: int, repeat: int = 0) -> JobSpec:
    """The train job of a trial: run alone, it gives what the trial gives."""
    steps = steps_of(job_at(spec, settings), rows)
    return job_at(spec, settings, steps=steps, seed=spec.training.seed + repeat)


@dataclass
class Result:
    """What a trial tells its search, now and then.

    Attributes:
        score: the best value of the metric so far, the mean over the repeats that are done; None: there is none.
        evaluation: 1, 2, ... of `search.evaluations`: what schedulers count by. Repeats come after the last one; 0: it
            tells of something else.
        entries: evaluations that were not told yet.
        status: `running`, `finished`, `failed`, or `interrupted`: to be gone on with.
        cause: why it has failed.
        fatal: what would end every other trial too.
        facts: what else has become known of it.
    """

    score: float | None
    evaluation: int
    entries: list[Evaluation] = field(default_factory=list)
    status: str = "running"
    cause: str | None = None
    fatal: WhisperJobsError | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def results(
    plan: TrialPlan,
    trial: str,
    runner: TrialRunner,
    stopping: Callable[[], bool] = lambda: False,
    advance: Callable[[float], None] = lambda share: None,
) -> Generator[Result]:
    """Run a trial, or go on with it; ends after a result whose status is not `running`.

    Args:
        plan: what all trials share.
        trial: its id; its record is on storage already.
        runner: trains it.
        stopping: whether the search is to stop.
        advance: told now and then how much of the trial is done.

    Raises:
        StoppedError: the trial's node is taken away; it goes on elsewhere.
    """
    try:
        found = _Trial(plan, trial, runner, stopping, advance)
    except NotFoundError:
        way_out = "is not seen on every node; give a folder that all nodes share as outdir or storage.uri"
        yield Result(None, 0, status="interrupted", fatal=InputError([Fault(plan.root, way_out)]))
        return
    yield from found.results()


class _Trial:
    def __init__(
        self,
        plan: TrialPlan,
        trial: str,
        runner: TrialRunner,
        stopping: Callable[[], bool],
        advance: Callable[[float], None],
    ) -> None:
        self._plan, self._runner, self._stopping, self._advance = plan, runner, stopping, advance
        self._advanced = -math.inf
        self._spec = JobSpec.model_validate_json(plan.spec)
        self._job_root = Storage(plan.root)
        self._root = Storage(self._job_root.path(folder_of(trial)))
        self._row = read_entry(self._job_root, trial).trial
        self._told = list(self._row.evaluations)
        self._steps = steps_of(job_at(self._spec, self._row.settings), plan.rows)  # of the whole schedule
        self._began: float | None = None
        self._before_s = self._row.seconds
        self._facts: dict[str, Any] = {}
        self._curves = Curves(self._root)

    def results(self) -> Generator[Result]:
        """See `results`."""
        repeats = self._spec.search.repeats
        yield from self._replayed()
        if self._row.status in ENDED:
            return
        if self._stopping():
            yield self._result(0, status="interrupted")
            return
        try:
            for repeat in range(repeats):
                if not self._is_done(repeat):
                    yield from self._run(repeat)
                status = "finished" if repeat == repeats - 1 else "running"
                yield self._result(self._spec.search.evaluations + repeat, status=status)
                if repeat:
                    self._root.remove(repeat_folder(repeat))
        except OF_ALL as error:
            yield self._result(0, status="interrupted", fatal=error)
        except OF_THE_TRIAL as error:
            yield self._result(0, status="failed", cause=str(error).removesuffix(GO_ON).strip())
        except StoppedError:
            if not self._stopping():
                raise
            yield self._result(0, status="interrupted")
        except WhisperJobsError as error:
            yield self._result(0, status="interrupted", fatal=error)
        finally:
            self._curves.keep()

    def _replayed(self) -> Generator[Result]:
        """What the record holds, told again, for a scheduler and a sampler that begin anew."""
        first = [each for each in self._told if each.seed == self._spec.training.seed]
        has_ended, last = self._row.status in ENDED, first[-1].number if first else 0
        for each in first:
            if each.step < self._steps and not (has_ended and each is first[-1]):
                yield Result(each.score, each.number)
        if self._row.status == "finished":
            last = self._spec.search.evaluations + self._spec.search.repeats - 1
        if has_ended:
            yield Result(self._row.score, last, status=self._row.status, cause=self._row.cause)

    def _run(self, repeat: int) -> Generator[Result]:
        """One training; the first one's evaluations are told as they come, but for the last: it counts at its end."""
        job = job_of(self._spec, self._row.settings, self._plan.rows, repeat)
        root = Storage(self._root.path(repeat_folder(repeat))) if repeat else self._root
        events = self._runner.events(TrialRun(job, root, self._job_root, self._plan.revision), self._stopping)
        try:
            for event in events:
                self._began = self._began or time.monotonic()
                if not repeat:
                    self._curves.take(event)
                if event["event"] == "step":
                    repeats = self._spec.search.repeats
                    self._tell_how_far((repeat + event["step"] / event["steps"]) / repeats)
                if event["event"] == "model":  # waiting for room is over
                    found = self._evaluations(event, job)
                    self._told += found
                    yield self._result(0)
                    continue
                for each in self._evaluations(event, job):
                    self._told.append(each)
                    if not repeat and each.step < self._steps:
                        self._curves.keep()
                        yield self._result(each.number)
        finally:
            events.close()

    def _tell_how_far(self, share: float) -> None:
        if (now := time.monotonic()) - self._advanced >= _ADVANCE_EVERY_S:
            self._advanced = now
            self._advance(share)

    def _evaluations(self, event: Event, job: JobSpec) -> list[Evaluation]:
        """What an event says of evaluations that were not told: a training that goes on tells of those before too."""
        kind, metric, seed = event["event"], job.evaluation.metric, job.training.seed
        found = []
        if kind == "model":
            facts = {"steps": event["steps"], "trainable_parameters": event["trainable_parameters"]}
            self._facts |= {} if seed != self._spec.training.seed else facts
            found = event["history"]
        elif kind == "evaluation" and "step" in event:
            found = [event]
        mine = [each for each in self._told if each.seed == seed]
        new = []
        for each in found:
            if each["step"] > (mine[-1].step if mine else 0):
                best = min([each[metric], *(before.score for before in mine)])
                measured = {name: each[name] for name in ("wer", "cer", "loss") if name in each}
                number = math.ceil(each["step"] / job.training.eval_steps)
                made = Evaluation(
                    number=number, step=each["step"], seed=seed, score=best, seconds=self._seconds, **measured
                )
                mine.append(made)
                new.append(made)
        return new

    def _is_done(self, repeat: int) -> bool:
        seed = self._spec.training.seed + repeat
        return any(each.seed == seed and each.step == self._steps for each in self._told)

    @property
    def _seconds(self) -> float:
        """That it has worked; waiting for room is no work."""
        return round(self._before_s + (time.monotonic() - self._began if self._began else 0.0), 2)

    def _scores(self) -> list[float]:
        """The best value of each repeat that has one."""
        seeds = dict.fromkeys(each.seed for each in self._told)
        return [min(each.score for each in self._told if each.seed == seed) for seed in seeds]

    def _result(self, number: int, **changes: Any) -> Result:
        scores = self._scores()
        score = sum(scores) / len(scores) if scores else None
        facts = self._facts | {"seconds": self._seconds, "score": score, "scores": scores}
        if self._told:
            facts["step"] = max(each.step for each in self._told)
        return Result(score, number, list(self._told), facts=facts, **changes)


class Curves:
    """events.jsonl of a trial: what its training says of how it learns, over all attempts.

    Args:
        root: the trial's root.
    """

    def __init__(self, root: Storage) -> None:
        self._root = root
        self._lines: list[str] = []
        self._kept = 0
        with contextlib.suppress(NotFoundError):
            self._lines = [line for line in root.read_bytes(EVENTS).decode().split("\n") if line]
        self._kept = len(self._lines)

    def take(self, event: Event) -> None:
        """Note an event, if it is of a kind that is kept; a training that goes on from a step does later ones anew."""
        if event["event"] == "model":
            begun = event["resumed_from_step"]
            self._lines = [line for line in self._lines if json.loads(line).get("step", 0) <= begun]
            self._kept = -1
        if event["event"] in _KEPT_EVENTS or (event["event"] == "step" and event.get("logged")):
            kept = {key: value for key, value in event.items() if key not in ("logged", "history")}
            stamp = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
            self._lines.append(json.dumps(stamp | kept, ensure_ascii=False))

    def keep(self) -> None:
        """Write them."""
        if len(self._lines) != self._kept:
            self._root.write_text(EVENTS, "\n".join(self._lines) + "\n")
            self._kept = len(self._lines)


def read_curves(root: Storage, trial: str) -> list[Event]:
    """What a trial's events.jsonl holds."""
    try:
        content = root.read_bytes(f"{folder_of(trial)}/{EVENTS}").decode()
    except NotFoundError:
        return []
    return [json.loads(line) for line in content.split("\n") if line]
