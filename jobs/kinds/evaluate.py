"""`kind: evaluate`: score a model on a CSV."""

from __future__ import annotations

from typing import Any

from jobs import tasks
from jobs.cluster.tasks import run_tasks
from jobs.job import Job, describe, publish_job, warn_of_data
from service.artifacts import MODEL_LINES


def evaluate_job(job: Job) -> dict[str, Any]:
    """Do it; returns the content of metrics.json."""
    spec, text = job.spec, job.spec.to_json()
    model = job.run(tasks.resolve_model, spec.evaluation.model, "evaluation.model")
    splits = {"val": str(spec.evaluation.csv)}
    data = job.stages.run(
        "prepare",
        "checking every row",
        lambda: job.run(tasks.prepare_data, text, job.root.uri, splits, model["base"], job.events.log),
    )
    warn_of_data(job, data)
    scored = job.stages.run(
        "evaluate", f"transcribing with {spec.evaluation.model}", lambda: score_rows(job, model, MODEL_LINES)
    )
    base = describe(job, "the model", model["base"])
    metrics = {"job_id": spec.job_id, "model": scored, "seconds": job.stages.all_seconds()}
    publish_job(job, metrics, data, base)
    return metrics


def score_rows(job: Job, model: dict[str, Any], lines_to: str) -> dict[str, Any]:
    """Transcribe the job's validation rows with a model, in as many tasks as it has workers; returns its rates.

    Args:
        job: the job.
        model: what `jobs.sources.resolve_model` has found.
        lines_to: where every utterance is kept.
    """
    from jobs.score_model import collect, score_shard

    shards, spec = max(1, job.resources.workers), job.spec.to_json()
    calls = [(spec, job.root.path(), model, rank, shards, job.events.log) for rank in range(shards)]
    cpus, gpus = job.resources.cpus, job.resources.gpus
    scored = run_tasks(score_shard, calls, cpus=cpus, gpus=gpus, check=job.signals.check)
    return collect(job.spec, job.root, scored, lines_to)
