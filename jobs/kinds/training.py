"""What jobs that fine-tune have in common: the way to the training, and the way from it to artifacts."""

from __future__ import annotations

import importlib
import threading
from dataclasses import replace
from typing import Any

from jobs import tasks
from jobs.job import Job, Run, describe, publish_job, warn_of_data
from jobs.kinds.exports import MERGING, formats, make_exports
from jobs.publish import promotion_reasons
from jobs.train.here import train_here
from service.artifacts import BASE_LINES, TUNED_LINES, BaseModelRecord
from service.errors import StoppedError
from service.report.lines import join, read_lines
from service.report.paired import difference
from service.spec.job import JobSpec
from service.storage import Storage


def begin_training(job: Job) -> tuple[dict[str, Any], BaseModelRecord]:
    """Check hardware and formats, take and check the data; returns what they are, and which model is begun with."""
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
    return data, base


def fine_tune(run: Run, revision: str | None, data: Storage) -> dict[str, Any]:
    """Train, in workers or in this process; returns what `jobs.train.loop.train` returns."""
    if run.spec.resources.workers:
        from jobs.train.on_ray import train_on_ray

        return train_on_ray(run, revision, data)
    try:
        return train_here(run.spec, run.root, data, revision, run.events.emit, run.signals)
    except StoppedError as error:
        raise run.signals.error(str(error)) from error


def finish_training(
    job: Job,
    trained: dict[str, Any],
    data: dict[str, Any],
    base: BaseModelRecord,
    made_by: JobSpec | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Merge, export, guard and publish what was trained; returns the content of metrics.json.

    Args:
        job: the job.
        trained: what `fine_tune` returned. Its files lie under the job's root.
        data: what the data are.
        base: which model it began with.
        made_by: the train job that made it, where that is not the job itself.
        more: what else metrics.json is to hold.
    """
    spec, inner = job.spec, replace(job, spec=made_by or job.spec)
    training, text = inner.spec.training, inner.spec.to_json()
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
        make_exports(inner, metrics["artifacts"])
    if spec.guard.csv:
        metrics["guard"] = job.stages.run(
            "guard",
            "transcribing the guard's clips with the base model and the tuned one",
            lambda: job.run(tasks.guard_model, *call, cpus=job.resources.cpus, gpus=job.gpus),
        )
    sides = [read_lines(job.root.read_bytes(name)) for name in (BASE_LINES, TUNED_LINES)]
    if found := difference([(base, tuned) for base, tuned in join(sides)]):
        metrics["difference"] = found.as_dict()
    reasons = promotion_reasons(metrics, data.get("clips_in_both", 0))
    metrics |= {"promoted": not reasons, "promotion_reasons": reasons, "seconds": job.stages.all_seconds()} | more
    publish_job(job, metrics, data, base, inner.spec)
    return metrics
