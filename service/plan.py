"""What a job will do, computed before anything is started: steps, checkpoints, adapters, parameters, memory."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from service.memory import Memory, evaluation_memory, host_memory, training_memory
from service.spec.check_space import telling_points
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.paths import is_uri
from service.spec.shared import is_shared, trials_together
from service.spec.space import job_at, planned_trials, space_of, walk
from service.spec.targets import PARTS, AdaptedModule, adapted_modules, in_encoder, saved_modules
from service.spec.training import AUTO, CHANGES_BASE, init_family
from service.spec.whisper_dims import WhisperDims, known_dims
from service.spec.whisper_modules import EMBEDDING, HEAD, modules, total_parameters

_MOST_COUNTED = 100_000
_MOST_SIZED = 300

SIZING = {
    "lora_r",
    "lora_rank_pattern",
    "lora_target_modules",
    "modules_to_save",
    "use_dora",
    "lora_init",
    "freeze_encoder",
}
"""Settings that decide how many parameters are trained."""


@dataclass(frozen=True)
class Schedule:
    """The optimizer's steps.

    Attributes:
        evaluations: during the training, its end included; the base model is scored once more before it.
        checkpoints: written during the training: one with each evaluation, and those of `save_steps`.
    """

    effective_batch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    evaluations: int
    checkpoints: int


@dataclass(frozen=True)
class Adapter:
    """What is trained.

    Attributes:
        parts: adapted modules and their parameters, by part of the model.
        saved: modules that are trained in full, and their parameters.
        published_parameters: those of the saved adapter; an initialisation that changes the base doubles the ranks.
    """

    modules: int
    parts: dict[str, dict[str, int]]
    saved: dict[str, int]
    trainable_parameters: int
    published_parameters: int
    base_parameters: int

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of the base model's."""
        return self.trainable_parameters / self.base_parameters


@dataclass(frozen=True)
class SearchPlan:
    """What a search tries.

    Attributes:
        trials: configurations, the defaults among them; each has the plan's schedule at most.
        points: of the space; None: it holds ranges.
        trial_bytes: what the checkpoints of a trial under way take at most, at the point with most parameters.
    """

    trials: int
    points: int | None
    sampler: str
    scheduler: str
    evaluations: int
    repeats: int
    trial_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """The plan of a job. What cannot be known here is None: the rows of a remote CSV, the dims of an unknown model."""

    kind: str
    job_id: str
    root: str
    rows: dict[str, int | None]
    schedule: Schedule | None = None
    adapter: Adapter | None = None
    memory: Memory | None = None
    search: SearchPlan | None = None
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        content = asdict(self)
        if self.adapter:
            content["adapter"]["share"] = self.adapter.share
        if self.memory:
            content["memory"] = self.memory.as_dict()
        return content


def make_plan(spec: JobSpec) -> Plan:
    """Plan a checked spec, without torch and without a network."""
    kind, job_id, root = spec.kind, spec.job_id, spec.root
    if kind == "evaluate":
        rows = {"csv": count_rows(spec.evaluation.csv)}
        return Plan(kind, job_id, root, rows, notes=_unknown_rows(rows))
    if kind == "export":
        rows = {"csv": count_rows(spec.evaluation.csv)}
        return Plan(kind, job_id, root, rows, notes=_unknown_rows(rows) if spec.evaluation.csv else [])
    rows = {"train": count_rows(spec.training.train_csv), "val": count_rows(spec.training.val_csv)}
    if spec.guard.csv:
        rows["guard"] = count_rows(spec.guard.csv)
    dims, search = known_dims(spec.training.base_model), None
    together = trials_together(spec) if spec.kind == "search" and is_shared(spec) else 0
    if spec.kind == "search":
        largest = largest_job(spec, rows["train"], dims)
        search, spec = _plan_search(spec, largest, dims), largest
    schedule = make_schedule(spec, rows["train"]) if rows["train"] else None
    notes = _unknown_rows(rows) + _notes(spec, rows["train"], schedule) + _pass_notes(spec)
    if search and dims:
        notes.append("parameters and memory are those of the largest point of the space that was looked at")
    if dims is None:
        notes.append(f"{spec.training.base_model} is not on this machine: parameters and memory are not known here")
        return Plan(kind, job_id, root, rows, schedule, search=search, notes=notes)
    adapted = adapted_modules(spec.training, modules(dims))
    adapter = describe_adapter(spec, dims, adapted)
    notes += _init_notes(spec, adapter)
    memory = Memory(
        training=training_memory(spec, dims, adapted, adapter.trainable_parameters, trials=together, rows=rows),
        evaluation=evaluation_memory(spec, dims, adapted),
        host=host_memory(spec, dims, rows=rows),
        clips=spec.training.pass_sizes[0],
        trials=together,
    )
    return Plan(kind, job_id, root, rows, schedule, adapter, memory, search, notes)


def _plan_search(spec: JobSpec, largest: JobSpec, dims: WhisperDims | None) -> SearchPlan:
    search, space = spec.search, space_of(spec)
    finite = all(dimension.is_finite for dimension in space.values())
    count = sum(1 for _ in itertools.islice(walk(spec), _MOST_COUNTED + 1)) if finite else None
    return SearchPlan(
        trials=planned_trials(spec),
        points=None if count is None or count > _MOST_COUNTED else count,
        sampler=search.sampler,
        scheduler=search.scheduler,
        evaluations=search.evaluations,
        repeats=search.repeats,
        trial_bytes=None if dims is None else trial_bytes(spec, trained_parameters(largest, dims)),
    )


def trial_bytes(spec: JobSpec, parameters: int) -> int:
    """What a trial's checkpoints take at most: each holds the adapter, the best one and two moments of the optimizer in
    float32; there are `engine.keep_checkpoints` of them, one that is being written, and the adapter as it began."""
    runs = 1 if spec.search.repeats == 1 else 2  # the first one's stay until the trial is judged
    return runs * parameters * 4 * (4 * (spec.engine.keep_checkpoints + 1) + 1)


def trained_parameters(spec: JobSpec, dims: WhisperDims) -> int:
    """Trainable parameters of a train job."""
    return describe_adapter(spec, dims, adapted_modules(spec.training, modules(dims))).trainable_parameters


def largest_job(spec: JobSpec, rows: int | None, dims: WhisperDims | None) -> JobSpec:
    """The train job at the point of a space with most trainable parameters, of those that are looked at."""
    kinds = {repr({k: v for k, v in point.items() if k in SIZING}): point for point in telling_points(spec)}
    jobs = [job_at(spec, point) for point in itertools.islice(kinds.values(), _MOST_SIZED)]
    largest = jobs[0] if dims is None else max(jobs, key=lambda job: trained_parameters(job, dims))
    steps = make_schedule(largest, rows).total_steps if rows else None
    point = {name: getattr(largest.training, name) for name in space_of(spec)}
    return job_at(spec, point, steps=steps)


def count_rows(path: str | None) -> int | None:
    """Rows of a local CSV, its header and blank lines left out; None where it cannot be read here."""
    if path is None or is_uri(path):
        return None
    try:
        with open(Path(path), encoding="utf-8-sig", newline="") as file:
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)
    except (OSError, UnicodeDecodeError, csv.Error):
        return None


def make_schedule(spec: JobSpec, rows: int) -> Schedule:
    """Steps, evaluations and checkpoints of a training on that many rows."""
    training = spec.training
    batch = training.clips_per_step * max(1, spec.resources.workers)
    per_epoch = math.ceil(rows / batch)
    total = per_epoch * training.epochs
    evaluated = total // training.eval_steps + (total % training.eval_steps != 0)
    saved = total // training.save_steps - total // math.lcm(training.save_steps, training.eval_steps)
    saved_at_end = total % training.save_steps == 0 and total % training.eval_steps != 0
    return Schedule(
        effective_batch=batch,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=training.warmup_steps(total),
        evaluations=evaluated,
        checkpoints=evaluated + saved - saved_at_end,
    )


def describe_adapter(spec: JobSpec, dims: WhisperDims, adapted: list[AdaptedModule]) -> Adapter:
    """Adapted and saved modules with their parameters; equal to what PEFT counts."""
    parts = {}
    for part in PARTS:
        inside = [module for module in adapted if module.part == part]
        if inside:
            parts[part] = {"modules": len(inside), "parameters": sum(module.parameters for module in inside)}
    saved = _saved(spec, dims)
    return Adapter(
        modules=len(adapted),
        parts=parts,
        saved=saved,
        trainable_parameters=sum(module.parameters for module in adapted) + sum(saved.values()),
        published_parameters=sum(module.published for module in adapted) + sum(saved.values()),
        base_parameters=total_parameters(dims),
    )


def _saved(spec: JobSpec, dims: WhisperDims) -> dict[str, int]:
    """Parameters of the modules that are trained in full; what lies inside another one counts once."""
    by_name = {module.name: module for module in modules(dims)}
    hits = saved_modules(spec.training.modules_to_save, by_name)
    if spec.training.freeze_encoder:
        hits = [name for name in hits if not in_encoder(name)]
    outer = [name for name in hits if not any(name.startswith(f"{other}.") for other in hits)]
    # The output head is the embedding's own matrix, and stays tied to it.
    outer = [name for name in outer if name != HEAD or EMBEDDING not in outer]
    return {name: by_name[name].parameters for name in outer}


def _pass_notes(spec: JobSpec) -> list[str]:
    """What `per_dev_batch: auto` will do."""
    training = spec.training
    if training.per_dev_batch != AUTO:
        return []
    if training.grad_accum == 1:
        return [
            "training.per_dev_batch is auto and training.grad_accum, the clips of a worker's step, is 1: there is "
            "nothing to choose; raise grad_accum, or give a number"
        ]
    sizes = ", ".join(map(str, training.pass_sizes))
    return [
        f"training.per_dev_batch is auto: a forward pass holds the most clips of {sizes} that fit; the memory is that "
        "of passes of one"
    ]


def _init_notes(spec: JobSpec, adapter: Adapter) -> list[str]:
    init = spec.training.lora_init
    if init == "eva":
        return [
            f"lora_init eva moves ranks between modules, up to {2 * spec.training.lora_r} in one, and may leave some "
            "without an adapter: the parameters are known once it has looked at the clips"
        ]
    if init_family(init) in CHANGES_BASE:
        return [
            f"lora_init {init} changes the base in training; the saved adapter has twice the rank "
            f"({adapter.published_parameters:,} parameters) and fits the untouched base"
        ]
    return []


def _unknown_rows(rows: dict[str, int | None]) -> list[str]:
    unknown = [name for name, count in rows.items() if count is None]
    return [f"the rows of {' and '.join(unknown)} cannot be counted here"] if unknown else []


def _notes(spec: JobSpec, rows: int | None, schedule: Schedule | None) -> list[str]:
    """What a look at the schedule tells that the settings alone do not."""
    if schedule is None or rows is None:
        return []
    notes = []
    training = spec.training
    if schedule.total_steps < training.eval_steps:
        notes.append(
            f"eval_steps is {training.eval_steps} and the training has {counted(schedule.total_steps, 'step')}: "
            "only its end is evaluated"
        )
    if schedule.effective_batch > rows:
        notes.append(f"the effective batch of {schedule.effective_batch} holds all {rows} clips: one step per epoch")
    if spec.data.bad_rows == "reject":
        notes.append("rows that are rejected are still counted here")
    return notes
