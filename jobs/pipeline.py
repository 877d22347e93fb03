"""A job from spec to manifest.json, in stages. Ray runs the parts that are heavy; what they do knows nothing of it."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape

from jobs.cluster import Events, Resources, await_tasks, connected, remote_task, require_resources, run_task
from jobs.inputs import require_same_inputs
from jobs.progress import Reporter
from jobs.stages import Recorder, Stages, claim_root
from service import artifacts
from service.artifacts import BaseModelRecord, RunManifest
from service.errors import JobFailedError
from service.spec.checks import require_model
from service.spec.job import JobSpec
from service.storage import Storage

REPORTED_PACKAGES = (
    "whisper-jobs",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "ray",
    "datasets",
    "soundfile",
    "soxr",
)


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
    claim_root(spec, root, overwrite=overwrite)
    require_same_inputs(spec, root)
    if root.exists(artifacts.MANIFEST):
        reporter.show({"event": "notice", "text": f"this job is complete already: {escape(root.path())}"})
        return dict(root.read_json(artifacts.METRICS))
    recorder = Recorder(root, reporter)
    if _is_temporary(root):
        text = "results go to a folder that Ray deletes with the job's working directory; give an absolute path or URI"
        recorder.take({"event": "notice", "text": f"[yellow]warning[/yellow]: {text} as outdir or storage.uri"})
    reporter.show({"event": "notice", "text": f"[bold]{spec.job_id}[/bold]  -> {escape(root.path())}"})
    with connected() as local:
        events = Events(recorder.take)
        try:
            resources = require_resources(
                spec, local=local, tell=lambda text: events.emit({"event": "notice", "text": text})
            )
            stages = Stages(root, events.emit)
            work = {"train": _train_job, "evaluate": _evaluate_job}[spec.kind]
            return work(with_gpus(spec, resources), root, stages, resources, events)
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


def _train_job(spec: JobSpec, root: Storage, stages: Stages, resources: Resources, events: Events) -> dict[str, Any]:
    training, gpus = spec.training, min(1.0, resources.gpus)
    sources = {"train": str(training.train_csv), "val": str(training.val_csv)}
    if spec.data.dataset:
        built = stages.run(
            "dataset",
            f"taking clips and transcripts from {spec.data.dataset}",
            lambda: run_task(_dataset_task, spec.to_json(), root.uri, events.log),
        )
        sources = built["manifests"]
    data = stages.run(
        "prepare",
        "checking every row of both manifests",
        lambda: run_task(_prepare_task, spec.to_json(), root.uri, sources, training.base_model, events.log),
    )
    base = BaseModelRecord.model_validate(
        stages.run("describe", "hashing the base model", lambda: run_task(_describe_task, training.base_model))
    )
    _warn_of_data(spec, data, events)
    workers = {0: "in this process", 1: "1 worker"}.get(resources.workers, f"{resources.workers} workers")
    trained = stages.run(
        "train",
        f"{workers}; scoring the base model first",
        lambda: _train(spec, root, resources, events),
    )
    metrics: dict[str, Any] = {"job_id": spec.job_id, "base": trained["base"], "tuned": trained["tuned"]}
    metrics |= {"adapter": trained["adapter"], "training": trained["training"], "artifacts": {}}
    if training.merge_lora:
        merged = stages.run(
            "merge",
            "merging in float32, comparing logits, transcribing with the merged model",
            lambda: run_task(_merge_task, spec.to_json(), root.uri, events.log, cpus=resources.cpus, gpus=gpus),
        )
        metrics["artifacts"]["hf"] = merged.pop("artifact")
        metrics["merge"] = merged
    reasons = promotion_reasons(metrics)
    metrics |= {"promoted": not reasons, "promotion_reasons": reasons}
    _publish(spec, root, stages, metrics, data, base)
    return metrics


def _evaluate_job(spec: JobSpec, root: Storage, stages: Stages, resources: Resources, events: Events) -> dict[str, Any]:
    model = run_task(_resolve_task, spec.evaluation.model)
    data = stages.run(
        "prepare",
        "checking every row",
        lambda: run_task(
            _prepare_task, spec.to_json(), root.uri, {"val": str(spec.evaluation.csv)}, model["base"], events.log
        ),
    )
    _warn_of_data(spec, data, events)
    scored = stages.run(
        "evaluate",
        f"transcribing with {spec.evaluation.model}",
        lambda: _evaluate(spec, root, model, resources, events),
    )
    base = BaseModelRecord.model_validate(
        stages.run("describe", "hashing the model", lambda: run_task(_describe_task, model["base"]))
    )
    metrics = {"job_id": spec.job_id, "model": scored}
    _publish(spec, root, stages, metrics, data, base)
    return metrics


def promotion_reasons(metrics: dict[str, Any]) -> list[str]:
    """Why the tuned model should not take the base model's place; empty where it should."""
    base, tuned = metrics["base"]["wer"], metrics["tuned"]["wer"]
    reasons = []
    if tuned >= base:
        reasons.append(f"its WER, {tuned:.1%}, is not below the base model's, {base:.1%}")
    return reasons


def _train(spec: JobSpec, root: Storage, resources: Resources, events: Events) -> dict[str, Any]:
    from jobs.prepare import split_file
    from jobs.train.on_ray import train_on_ray

    splits = {name: str(root.local(split_file(name))) for name in ("train", "val")}
    if resources.workers == 0:
        from jobs.train.loop import TrainTask, train
        from jobs.train.session import FolderSession

        folder = root.local(f"{artifacts.CHECKPOINTS}/{spec.sha256[:16]}")
        session = FolderSession(folder, spec.engine.keep_checkpoints, events.emit)
        return train(TrainTask(spec, splits["train"], splits["val"], root.path()), session)
    return train_on_ray(spec, root.path(), splits, resources, events.log)


def _evaluate(
    spec: JobSpec, root: Storage, model: dict[str, Any], resources: Resources, events: Events
) -> dict[str, Any]:
    from jobs.score_model import collect, score_shard

    task = remote_task(score_shard, cpus=resources.cpus, gpus=resources.gpus)
    shards = max(1, resources.workers)
    tasks = [task.remote(spec.to_json(), root.path(), model, rank, shards, events.log) for rank in range(shards)]
    return collect(spec, root, await_tasks(tasks))


def _publish(
    spec: JobSpec, root: Storage, stages: Stages, metrics: dict[str, Any], data: dict[str, Any], base: BaseModelRecord
) -> None:
    """Write metrics.json, the card and, last of all, manifest.json."""
    metrics["seconds"] = stages.seconds | {"total": round(sum(stages.seconds.values()), 3)}
    root.write_json(artifacts.METRICS, metrics)
    if spec.kind == "train":
        from jobs.card import model_card

        for folder in ("", artifacts.ADAPTER, *([artifacts.MERGED] if spec.training.merge_lora else [])):
            card = model_card(spec, metrics, data, base, folder)
            root.write_text(f"{folder}/{artifacts.CARD}".lstrip("/"), card)
    rates = {name: metrics[name]["wer"] for name in ("base", "tuned", "model") if name in metrics}
    manifest = RunManifest(
        job_id=spec.job_id,
        kind=spec.kind,
        spec_sha256=spec.sha256,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        base=base,
        data=data,
        wer=rates | {name: value["wer"] for name, value in metrics.get("artifacts", {}).items()},
        promoted=metrics.get("promoted"),
        files=artifacts.file_records(root),
    )
    root.write_text(artifacts.MANIFEST, manifest.model_dump_json(indent=2) + "\n")


def versions() -> dict[str, str]:
    """Python's and the libraries' versions."""
    found = {"python": platform.python_version()}
    for name in REPORTED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _is_temporary(root: Storage) -> bool:
    """Whether the root lies in the copy of a working directory that `ray job submit --working-dir` made."""
    return root.is_local and "/runtime_resources/working_dir_files/" in root.path()


def _warn_of_data(spec: JobSpec, data: dict[str, Any], events: Events) -> None:
    warnings = []
    if both := data["sentences_in_both"]:
        warnings.append(f"{both} sentences are in both train and validation data: the WER will look better than it is")
    longest, room = data["val"]["longest_tokens"], spec.evaluation.max_new_tokens
    if longest > room:
        warnings.append(
            f"the longest validation text has {longest} tokens, and evaluation.max_new_tokens cuts transcripts at "
            f"{room}: what is cut counts as deleted words"
        )
    for text in warnings:
        events.emit({"event": "notice", "text": f"[yellow]warning[/yellow]: {text}"})


# What runs as a Ray task. Specs travel as JSON; heavy imports happen there, not in the driver.


def _prepare_task(spec: str, root: str, splits: dict[str, str], model: str, log: Any) -> dict[str, Any]:
    from jobs.model import load_dims
    from jobs.prepare import prepare

    job = JobSpec.model_validate_json(spec)
    if job.kind == "train":
        # A hub model's modules are known only here: the same checks as `validate` makes for one that is at hand.
        require_model(job, load_dims(model))

    def progress(split: str, rows: int) -> None:
        log.emit.remote({"event": "rows", "split": split, "rows": rows})

    return prepare(job, root, splits, model, progress)


def _dataset_task(spec: str, root: str, log: Any) -> dict[str, Any]:
    from jobs.manifest.from_spec import build_from_dataset

    def progress(rows: int) -> None:
        log.emit.remote({"event": "rows", "split": "dataset", "rows": rows})

    return build_from_dataset(JobSpec.model_validate_json(spec), Storage(root).local(artifacts.DATASET), progress)


def _merge_task(spec: str, root: str, log: Any) -> dict[str, Any]:
    from jobs.merge import merge
    from jobs.prepare import split_file

    def progress(done: int, total: int) -> None:
        log.emit.remote({"event": "transcribed", "what": "merged", "done": done, "total": total})

    return merge(JobSpec.model_validate_json(spec), root, str(Storage(root).local(split_file("val"))), progress)


def _describe_task(model: str) -> dict[str, Any]:
    from jobs.model import describe_base

    return describe_base(model).model_dump()


def _resolve_task(model: str) -> dict[str, Any]:
    from jobs.score_model import resolve_model

    return resolve_model(model)
