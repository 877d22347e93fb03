"""A job from spec to manifest.json, in stages. Ray runs the parts that are heavy; what they do knows nothing of it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from rich.markup import escape

from jobs import tasks
from jobs.cluster import Events, Resources, as_user_error, connected, require_resources, run_tasks
from jobs.inputs import require_same_inputs
from jobs.lock import sole_run
from jobs.progress import Reporter
from jobs.publish import promotion_reasons, publish
from jobs.stages import Recorder, Stages, claim_root, holds_run_of
from jobs.stopping import StopSignals
from service import artifacts
from service.artifacts import BaseModelRecord
from service.errors import JobFailedError, StoppedError
from service.spec.job import JobSpec
from service.storage import Storage


@dataclass(frozen=True)
class Job:
    """A job under way: what its stages need.

    Args:
        spec: the job, with the GPUs that its workers really get.
        root: where its artifacts go.
        stages: runs its stages.
        events: takes what happens.
        resources: what each worker asks for.
        signals: what the user asks for meanwhile.
        await_resources: waits until the cluster has room for the workers (again).
    """

    spec: JobSpec
    root: Storage
    stages: Stages
    events: Events
    resources: Resources
    signals: StopSignals
    await_resources: Callable[[], Resources]

    @property
    def gpus(self) -> float:
        """GPUs of a task that computes as one worker does."""
        return min(1.0, self.resources.gpus)

    def run(self, function: Callable[..., Any], *arguments: Any, cpus: float = 1, gpus: float = 0) -> Any:
        """Run a function as a Ray task and return what it returns; see `jobs.cluster.run_tasks`."""
        return run_tasks(function, [arguments], cpus=cpus, gpus=gpus, check=self.signals.check)[0]


def run_job(spec: JobSpec, *, overwrite: bool, reporter: Reporter) -> dict[str, Any]:
    """Do a job, or go on with it; a finished one is only read.

    Args:
        spec: the job, resolved and checked.
        overwrite: delete what an earlier run left under the root.
        reporter: shows progress.

    Returns:
        the content of metrics.json.

    Raises:
        WhisperJobsError: with the exit code of what went wrong.
    """
    root = Storage(spec.root)
    signals = StopSignals()
    signals.install()
    root.local()  # a clear error for what this version cannot hold
    if not overwrite and is_complete(spec, root):
        reporter.show({"event": "notice", "text": f"this job is complete already: {escape(root.path())}"})
        return dict(root.read_json(artifacts.METRICS))
    with sole_run(root):
        claim_root(spec, root, overwrite=overwrite)
        require_same_inputs(spec, root)
        return _run(spec, root, reporter, signals)


def is_complete(spec: JobSpec, root: Storage) -> bool:
    """Whether a run of this very job, on these very inputs, has ended here. Such a run is only read.

    Raises:
        InputError: it has, and its inputs have changed since.
    """
    if not root.exists(artifacts.MANIFEST) or not holds_run_of(spec, root):
        return False
    require_same_inputs(spec, root)
    return True


def _run(spec: JobSpec, root: Storage, reporter: Reporter, signals: StopSignals) -> dict[str, Any]:
    recorder = Recorder(root, reporter)
    if _is_temporary(root):
        text = "results go to a folder that Ray deletes with the job's working directory; give an absolute path or URI"
        recorder.take({"event": "notice", "text": f"[yellow]warning[/yellow]: {text} as outdir or storage.uri"})
    reporter.show({"event": "notice", "text": f"[bold]{spec.job_id}[/bold]  -> {escape(root.path())}"})
    with connected(signals) as local:
        events = Events(recorder.take)

        def tell(text: str) -> None:
            events.emit({"event": "notice", "text": text})

        def await_resources() -> Resources:
            return require_resources(spec, local=local, tell=tell, check=signals.check)

        try:
            resources = await_resources()
            stages = Stages(root, events.emit)
            job = Job(with_gpus(spec, resources), root, stages, events, resources, signals, await_resources)
            return {"train": _train_job, "evaluate": _evaluate_job}[spec.kind](job)
        except ray.exceptions.RayError as error:
            raise as_user_error(error) from error
        except JobFailedError as error:
            events.flush()
            for text in recorder.tracebacks:
                error.add_note(text)  # shown with --debug
            raise
        finally:
            events.close()
            reporter.close()


def with_gpus(spec: JobSpec, resources: Resources) -> JobSpec:
    """The spec with the GPUs that its workers really get, which `null` leaves to the cluster."""
    return spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus_per_worker": resources.gpus})})


def _train_job(job: Job) -> dict[str, Any]:
    spec, training, text = job.spec, job.spec.training, job.spec.to_json()
    if training.fp16 or training.bf16 or spec.engine.attention == "flash_attention_2":
        job.run(tasks.check_hardware, text, gpus=job.gpus)
    # Some seconds of imports, while the data are looked at elsewhere.
    threading.Thread(target=importlib.import_module, args=["jobs.train.on_ray"], daemon=True).start()
    sources = {"train": str(training.train_csv), "val": str(training.val_csv)}
    if spec.data.dataset:
        built = job.stages.run(
            "dataset",
            f"taking clips and transcripts from {spec.data.dataset}",
            lambda: job.run(tasks.build_dataset, text, job.root.uri, job.events.log),
        )
        sources = built["manifests"]
    if spec.guard.csv:
        sources = sources | {"guard": spec.guard.csv}
    data = job.stages.run(
        "prepare",
        f"checking every row of {'all' if spec.guard.csv else 'both'} manifests",
        lambda: job.run(tasks.prepare_data, text, job.root.uri, sources, training.base_model, job.events.log),
    )
    base = _describe(job, "the base model", training.base_model)
    _warn_of_data(job, data)
    workers = job.resources.workers
    trained = job.stages.run(
        "train",
        f"{ {0: 'in this process', 1: '1 worker'}.get(workers, f'{workers} workers') }; scoring the base model first",
        lambda: _train(job, base.revision),
    )
    metrics: dict[str, Any] = {"job_id": spec.job_id, "base": trained["base"], "tuned": trained["tuned"]}
    metrics |= {"adapter": trained["adapter"], "training": trained["training"], "artifacts": {}}
    call = (text, job.root.uri, base.revision, job.events.log)
    if training.merge_lora:
        merged = job.stages.run(
            "merge",
            "merging in float32, comparing logits, transcribing with the merged model",
            lambda: job.run(tasks.merge_adapter, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
        metrics["artifacts"]["hf"] = merged.pop("artifact")
        metrics["merge"] = merged
    if spec.guard.csv:
        metrics["guard"] = job.stages.run(
            "guard",
            "transcribing the guard's clips with the base model and the tuned one",
            lambda: job.run(tasks.guard_model, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
    reasons = promotion_reasons(metrics)
    metrics |= {"promoted": not reasons, "promotion_reasons": reasons, "seconds": job.stages.all_seconds()}
    publish(spec, job.root, metrics, data, base)
    return metrics


def _evaluate_job(job: Job) -> dict[str, Any]:
    spec, text = job.spec, job.spec.to_json()
    model = job.run(tasks.resolve_scored_model, spec.evaluation.model)
    splits = {"val": str(spec.evaluation.csv)}
    data = job.stages.run(
        "prepare",
        "checking every row",
        lambda: job.run(tasks.prepare_data, text, job.root.uri, splits, model["base"], job.events.log),
    )
    _warn_of_data(job, data)
    scored = job.stages.run("evaluate", f"transcribing with {spec.evaluation.model}", lambda: _evaluate(job, model))
    base = _describe(job, "the model", model["base"])
    metrics = {"job_id": spec.job_id, "model": scored, "seconds": job.stages.all_seconds()}
    publish(spec, job.root, metrics, data, base)
    return metrics


def _describe(job: Job, what: str, model: str) -> BaseModelRecord:
    found = job.stages.run("describe", f"hashing {what}", lambda: job.run(tasks.describe_model, model))
    return BaseModelRecord.model_validate(found)


def _train(job: Job, revision: str | None) -> dict[str, Any]:
    from jobs.prepare import split_file

    splits = {name: str(job.root.local(split_file(name))) for name in ("train", "val")}
    if job.resources.workers:
        from jobs.train.on_ray import train_on_ray

        return train_on_ray(job, splits, revision)
    from jobs.train.loop import TrainTask, train
    from jobs.train.session import LocalSession

    session = LocalSession(job.events.emit, stopping=lambda: job.signals.asked)
    task = TrainTask(job.spec, splits["train"], splits["val"], job.root.path(), revision)
    try:
        return train(task, session)
    except StoppedError as error:
        raise job.signals.error(str(error)) from error


def _evaluate(job: Job, model: dict[str, Any]) -> dict[str, Any]:
    from jobs.score_model import collect, score_shard

    shards, spec = max(1, job.resources.workers), job.spec.to_json()
    calls = [(spec, job.root.path(), model, rank, shards, job.events.log) for rank in range(shards)]
    cpus, gpus = job.resources.cpus, job.resources.gpus
    return collect(job.spec, job.root, run_tasks(score_shard, calls, cpus=cpus, gpus=gpus, check=job.signals.check))


def _is_temporary(root: Storage) -> bool:
    """Whether the root lies in the copy of a working directory that `ray job submit --working-dir` made."""
    return root.is_local and "/runtime_resources/working_dir_files/" in root.path()


def _warn_of_data(job: Job, data: dict[str, Any]) -> None:
    warnings = []
    if both := data["sentences_in_both"]:
        warnings.append(f"{both} sentences are in both train and validation data: the WER will look better than it is")
    longest, room = data["val"]["longest_tokens"], job.spec.evaluation.max_new_tokens
    if longest > room:
        warnings.append(
            f"the longest validation text has {longest} tokens, and evaluation.max_new_tokens cuts transcripts at "
            f"{room}: what is cut counts as deleted words"
        )
    for text in warnings:
        job.events.emit({"event": "notice", "text": f"[yellow]warning[/yellow]: {text}"})
