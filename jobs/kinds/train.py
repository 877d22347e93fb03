"""`kind: train`: check, fine-tune, score, merge, export, publish."""

from __future__ import annotations

from typing import Any

from jobs.job import Job
from jobs.kinds.training import begin_training, fine_tune, finish_training


def train_job(job: Job) -> dict[str, Any]:
    """Do it; returns the content of metrics.json."""
    data, base = begin_training(job)
    workers = job.spec.resources.workers
    trained = job.stages.run(
        "train",
        f"{ {0: 'in this process', 1: '1 worker'}.get(workers, f'{workers} workers') }; scoring the base model first",
        lambda: fine_tune(job, base.revision, job.root),
    )
    return finish_training(job, trained, data, base)
