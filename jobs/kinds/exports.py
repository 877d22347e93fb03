"""The exports of a merged model, one stage each; the same for every kind of job that ends in one."""

from __future__ import annotations

from functools import partial
from typing import Any

from jobs import tasks
from jobs.job import Job
from service import artifacts
from service.spec.export import ARTIFACTS, FAMILIES, HF
from service.spec.job import JobSpec

MERGING = "merging in float32, comparing logits, transcribing with the merged model"


def formats(spec: JobSpec) -> list[str]:
    """The artifacts that are heard in their own runtimes, in the order of the spec."""
    merged = spec.kind == "export" or spec.training.merge_lora
    return [name for name in spec.export.formats if name != artifacts.ADAPTER] if merged else []


def make_exports(job: Job, entries: dict[str, dict[str, Any]]) -> None:
    """Make, publish and prove every export; adds what each has shown to the artifacts' entries."""
    text = job.spec.to_json()
    for name in formats(job.spec):
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
        if why := entries[name].get("refused"):
            job.events.emit({"event": "notice", "level": "refused", "text": f"{name}: {why}"})
