"""A job from spec to manifest.json, in stages. Ray runs the parts that are heavy; what they do knows nothing of it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from rich.markup import escape

from jobs import tasks
from jobs.cluster import Events, Resources, as_user_error, connected, require_resources, run_tasks
from jobs.inputs import require_same_inputs
from jobs.lock import sole_run
from jobs.progress import Reporter, transfer_events
from jobs.publish import promotion_reasons, publish
from jobs.recorder import Recorder
from jobs.stages import Stages, claim_root, holds_run_of
from jobs.stopping import StopSignals
from service import artifacts
from service.artifacts import BaseModelRecord
from service.errors import Fault, JobFailedError, SpecError, StoppedError
from service.spec.export import ARTIFACTS, FAMILIES, HF
from service.spec.job import JobSpec
from service.storage import Storage

_MERGING = "merging in float32, comparing logits, transcribing with the merged model"


@dataclass(frozen=True)
class Job:
    """A job under way: what its stages need.

    Args:
        spec: the job, with the GPUs that its workers really get.
        root: where its artifacts go.
        stages: runs its stages.
        events: takes what happens.
        recorder: keeps it.
        resources: what each worker asks for.
        signals: what the user asks for meanwhile.
        await_resources: waits until the cluster has room for the workers (again).
    """

    spec: JobSpec
    root: Storage
    stages: Stages
    events: Events
    recorder: Recorder
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
    root = Storage(spec.root, transfer_events(reporter.show))
    signals = StopSignals()
    signals.install()
    root.require_access(write=True)
    if not overwrite and is_complete(spec, root):
        reporter.show({"event": "notice", "text": f"this job is complete already: {escape(root.path())}"})
        return dict(root.read_json(artifacts.METRICS))

    def tell(text: str) -> None:
        reporter.show({"event": "notice", "text": escape(text)})

    with sole_run(root, tell) as still_held:
        signals.watch(still_held)
        claim_root(spec, root, overwrite=overwrite)
        require_same_inputs(spec, root)
        with Recorder(root, reporter) as recorder:
            return _run(spec, root, recorder, reporter, signals)


def is_complete(spec: JobSpec, root: Storage) -> bool:
    """Whether a run of this very job, on these very inputs, has ended here. Such a run is only read.

    Raises:
        InputError: it has, and its inputs have changed since.
    """
    if not root.exists(artifacts.MANIFEST) or not holds_run_of(spec, root):
        return False
    require_same_inputs(spec, root)
    return True


def _run(spec: JobSpec, root: Storage, recorder: Recorder, reporter: Reporter, signals: StopSignals) -> dict[str, Any]:
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
            asked = with_gpus(spec, resources)
            job = Job(asked, root, stages, events, recorder, resources, signals, await_resources)
            return {"train": _train_job, "evaluate": _evaluate_job, "export": _export_job}[spec.kind](job)
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
    if formats := _formats(spec):
        job.run(tasks.check_exports, formats)
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
            _MERGING,
            lambda: job.run(tasks.merge_adapter, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
        metrics["artifacts"]["hf"] = merged.pop("artifact")
        metrics["merge"] = merged
        _export(job, metrics["artifacts"])
    if spec.guard.csv:
        metrics["guard"] = job.stages.run(
            "guard",
            "transcribing the guard's clips with the base model and the tuned one",
            lambda: job.run(tasks.guard_model, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
    reasons = promotion_reasons(metrics)
    metrics |= {"promoted": not reasons, "promotion_reasons": reasons, "seconds": job.stages.all_seconds()}
    _publish(job, metrics, data, base)
    return metrics


def _evaluate_job(job: Job) -> dict[str, Any]:
    spec, text = job.spec, job.spec.to_json()
    model = job.run(tasks.resolve_model, spec.evaluation.model, "evaluation.model")
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
    _publish(job, metrics, data, base)
    return metrics


def _export_job(job: Job) -> dict[str, Any]:
    spec, text = job.spec, job.spec.to_json()
    job.run(tasks.check_exports, [HF, *_formats(spec)])
    source = job.run(tasks.resolve_model, spec.export.source, "export.source", spec.export.base)
    if spec.evaluation.csv is None and source["run"] is None:
        text = "is missing: no export leaves without having been heard; give held-out clips (--csv)"
        raise SpecError([Fault("evaluation.csv", text)])

    def rows() -> dict[str, Any]:
        if spec.evaluation.csv is None:
            return dict(job.run(tasks.borrow_rows, job.root.uri, source["run"]))
        splits = {"val": spec.evaluation.csv}
        return dict(job.run(tasks.prepare_data, text, job.root.uri, splits, source["base"], job.events.log))

    data = job.stages.run("prepare", "checking every row", rows)
    _warn_of_data(job, data)
    base = _describe(job, "the base model", source["base"])
    merged = job.stages.run(
        "merge",
        _MERGING,
        lambda: job.run(
            tasks.merge_source, text, job.root.uri, source, job.events.log, cpus=job.resources.cpus, gpus=job.gpus
        ),
    )
    metrics: dict[str, Any] = {"job_id": spec.job_id, "model": merged.pop("model")}
    metrics |= {"artifacts": {HF: merged.pop("artifact")}, "merge": merged}
    _export(job, metrics["artifacts"])
    metrics["seconds"] = job.stages.all_seconds()
    _publish(job, metrics, data, base)
    return metrics


def _formats(spec: JobSpec) -> list[str]:
    """The artifacts that are heard in their own runtimes, in the order of the spec."""
    merged = spec.kind == "export" or spec.training.merge_lora
    return [name for name in spec.export.formats if name != artifacts.ADAPTER] if merged else []


def _export(job: Job, entries: dict[str, dict[str, Any]]) -> None:
    """Make, publish and prove every export; adds what each has shown to the artifacts' entries."""
    text = job.spec.to_json()
    for name in _formats(job.spec):
        runtime = FAMILIES[ARTIFACTS[name][0]].runtime
        what = f"transcribing with {runtime}"
        found = job.stages.run(
            f"export-{name}",
            what if name == HF else f"writing {name}, reading it back, {what}",
            partial(
                job.run,
                tasks.export_artifact,
                text,
                job.root.uri,
                name,
                job.events.log,
                cpus=job.resources.cpus,
                gpus=job.gpus,
            ),
        )
        entries[name] = found | entries.get(name, {})
        if why := found.get("refused"):
            job.events.emit({"event": "notice", "text": f"[red]refused[/red]: {name}: {escape(why)}"})


def _publish(job: Job, metrics: dict[str, Any], data: dict[str, Any], base: BaseModelRecord) -> None:
    job.events.flush()
    job.recorder.copy()  # manifest.json has the hash of events.jsonl
    job.signals.check_watched()
    publish(job.spec, job.root, metrics, data, base)


def _describe(job: Job, what: str, model: str) -> BaseModelRecord:
    found = job.stages.run("describe", f"hashing {what}", lambda: job.run(tasks.describe_model, model))
    return BaseModelRecord.model_validate(found)


def _train(job: Job, revision: str | None) -> dict[str, Any]:
    if job.resources.workers:
        from jobs.train.on_ray import train_on_ray

        return train_on_ray(job, revision)
    from jobs.prepare import fetch_rows
    from jobs.train.loop import TrainTask, train
    from jobs.train.session import LocalSession

    def stopping() -> bool:
        job.signals.check_watched()
        return job.signals.asked

    session = LocalSession(job.events.emit, stopping=stopping)
    train_rows, val_rows = (fetch_rows(job.root, name) for name in ("train", "val"))
    task = TrainTask(job.spec, train_rows, val_rows, job.root.path(), revision)
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
