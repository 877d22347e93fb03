"""A job under way, and what jobs of every kind do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import tasks
from jobs.cluster.events import Events
from jobs.cluster.resources import Resources
from jobs.cluster.tasks import run_tasks
from jobs.publish import publish
from jobs.recorder import Recorder
from jobs.stages import Stages
from jobs.stopping import StopSignals
from service.artifacts import BaseModelRecord
from service.spec.job import JobSpec
from service.storage import Storage


@dataclass(frozen=True)
class Run:
    """A training under way: a job's, or a trial's of a search.

    Args:
        spec: the job, with the GPUs that its workers really get.
        root: where its artifacts go.
        events: takes what happens.
        resources: what each worker asks for.
        signals: what the user asks for meanwhile.
        await_resources: waits until the cluster has room for the workers (again).
    """

    spec: JobSpec
    root: Storage
    events: Events
    resources: Resources
    signals: StopSignals
    await_resources: Callable[[], Resources]


@dataclass(frozen=True)
class Job(Run):
    """A job under way: what its stages need.

    Args:
        stages: runs its stages.
        recorder: keeps what happens.
    """

    stages: Stages
    recorder: Recorder

    @property
    def gpus(self) -> float:
        """GPUs of a task that computes as one worker does."""
        return min(1.0, self.resources.gpus)

    def run(self, function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0) -> Any:
        """Run a function as a Ray task and return what it returns; see `jobs.cluster.tasks.run_tasks`."""
        wait_s = self.spec.resources.wait_s
        return run_tasks(function, [arguments], cpus=cpus, gpus=gpus, wait_s=wait_s, check=self.signals.check)[0]


def describe(job: Job, what: str, model: str, revision: str | None = None) -> BaseModelRecord:
    """Which checkpoint a model is."""
    found = job.stages.run("describe", f"hashing {what}", lambda: job.run(tasks.describe_model, model, revision))
    return BaseModelRecord.model_validate(found)


def warn_of_data(job: Job, data: dict[str, Any]) -> None:
    """Say what makes the figures to come look better or worse than they are."""
    warnings = []
    if both := data["sentences_in_both"]:
        warnings.append(f"{both} sentences are in both train and validation data: the WER will look better than it is")
    if both := data.get("clips_in_both", 0):
        warnings.append(
            f"{both} of the {data['val']['rows']} validation clips are trained on too: they are not held out"
        )
    longest, room = data["val"]["longest_tokens"], job.spec.evaluation.max_new_tokens
    if longest > room:
        warnings.append(
            f"the longest validation text has {longest} tokens, and evaluation.max_new_tokens cuts transcripts at "
            f"{room}: what is cut counts as deleted words"
        )
    for text in warnings:
        job.events.emit({"event": "notice", "level": "warning", "text": text})


def publish_job(
    job: Job,
    metrics: dict[str, Any],
    data: dict[str, Any],
    base: BaseModelRecord,
    made_by: JobSpec | None = None,
) -> None:
    """The last step of a job: everything that it leaves, manifest.json last.

    Args:
        job: the job.
        metrics: the content of metrics.json.
        data: what the data are.
        base: which model it began with.
        made_by: the train job that made the model, where that is not the job itself.
    """
    job.events.flush()
    job.recorder.copy()  # manifest.json has the hash of events.jsonl
    job.signals.check_watched()

    def warn(text: str) -> None:
        job.events.emit({"event": "notice", "level": "warning", "text": text})
        job.recorder.copy()

    publish(job.spec, job.root, metrics, data, base, warn, made_by)
