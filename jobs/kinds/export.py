"""`kind: export`: merge an adapter that is there already, export it, prove it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jobs import tasks
from jobs.job import Job, describe, publish_job, warn_of_data
from jobs.kinds.exports import MERGING, formats, make_exports
from service.errors import Fault, SpecError
from service.spec.export import HF


def export_job(job: Job) -> dict[str, Any]:
    """Do it; returns the content of metrics.json."""
    spec, text = job.spec, job.spec.to_json()
    if HF not in spec.export.formats:  # what all others are made from, and so proven itself
        export = spec.export.model_copy(update={"formats": [HF, *spec.export.formats]})
        job = replace(job, spec=spec.model_copy(update={"export": export}))
    job.run(tasks.check_exports, formats(job.spec))
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
    warn_of_data(job, data)
    base = describe(job, "the base model", source["base"], source["revision"])
    merged = job.stages.run(
        "merge",
        MERGING,
        lambda: job.run(
            tasks.merge_source, text, job.root.uri, source, job.events.log, cpus=job.resources.cpus, gpus=job.gpus
        ),
    )
    metrics: dict[str, Any] = {"job_id": spec.job_id, "source": source, "model": merged.pop("model")}
    metrics |= {"artifacts": {HF: merged.pop("artifact")}, "merge": merged}
    make_exports(job, metrics["artifacts"])
    metrics["seconds"] = job.stages.all_seconds()
    publish_job(job, metrics, data, base)
    return metrics
