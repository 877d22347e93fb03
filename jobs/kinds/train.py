"""`kind: train`: check, fine-tune, score, merge, export, publish."""

from __future__ import annotations

import importlib
import threading
from typing import Any

from jobs import tasks
from jobs.job import Job, describe, publish_job, warn_of_data
from jobs.kinds.exports import MERGING, formats, make_exports
from jobs.publish import promotion_reasons
from service.errors import StoppedError


def train_job(job: Job) -> dict[str, Any]:
    """Do it; returns the content of metrics.json."""
    spec, training, text = job.spec, job.spec.training, job.spec.to_json()
    if training.fp16 or training.bf16 or spec.engine.attention == "flash_attention_2":
        job.run(tasks.check_hardware, text, gpus=job.gpus)
    if wanted := formats(spec):
        job.run(tasks.check_exports, wanted)
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
    base = describe(job, "the base model", training.base_model)
    warn_of_data(job, data)
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
            MERGING,
            lambda: job.run(tasks.merge_adapter, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
        metrics["artifacts"]["hf"] = merged.pop("artifact")
        metrics["merge"] = merged
        make_exports(job, metrics["artifacts"])
    if spec.guard.csv:
        metrics["guard"] = job.stages.run(
            "guard",
            "transcribing the guard's clips with the base model and the tuned one",
            lambda: job.run(tasks.guard_model, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
    reasons = promotion_reasons(metrics)
    metrics |= {"promoted": not reasons, "promotion_reasons": reasons, "seconds": job.stages.all_seconds()}
    publish_job(job, metrics, data, base)
    return metrics


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
