"""The space of a search: its points, and the train job at each of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from service.spec.job import JobSpec
from service.spec.rewrites import rewrite
from service.spec.search import Dimension
from service.spec.training import TrainingConfig

DEFAULT_TRIALS = 16

FIXED = {
    "base_model": "the untuned model in the table is one; make a search per model",
    "train_csv": "all trials share their data; make a search per training set",
    "val_csv": "scores on different clips cannot be compared",
    "outdir": "all of a search lies under one root",
    "language": "the data are prepared once for all trials",
    "seed": "search.repeats runs each configuration with several seeds",
    "logging_steps": "it changes no result",
    "save_steps": "it changes no result",
    "eval_steps": "search.evaluations says when trials are evaluated",
    "merge_lora": "only the winner is merged",
    "dora_ephemeral_offload": "it changes no result",
    "lora_runtime_config": "it changes no result",
    "fp16": "what a worker computes with is its hardware's affair; make a search per precision",
    "bf16": "what a worker computes with is its hardware's affair; make a search per precision",
}
"""Settings of `training` that cannot be searched, and why."""

Point = dict[str, Any]
"""Values of the searched settings by name."""

Choose = Callable[[str, Dimension], Any]
"""Gives a value of a dimension, or a factor of `times`."""

Options = Callable[[str, Dimension], Sequence[Any]]
"""Gives some of them."""


def space_of(spec: JobSpec) -> dict[str, Dimension]:
    """The space, each dimension after those that it rests on: the spec's own, or the default one."""
    space = spec.search.space
    if space is None:
        space = {
            "lora_r": Dimension(choice=[4, 8, 16, 32, 64]),
            "lora_alpha": Dimension(times="lora_r", by=[1, 2, 4]),
            "use_dora": Dimension(choice=[False, True]),
            "lora_dropout": Dimension(choice=[0.0, 0.05, 0.1]),
            "lr": Dimension(loguniform=(2e-5, 2e-3)),
        }
        if spec.training.lora_init == "mica":  # which excludes it
            del space["use_dora"]
    ordered: dict[str, Dimension] = {}
    while len(ordered) < len(space):
        ready = [name for name in space if name not in ordered and not rests_on(space, name) - set(ordered)]
        if not ready:  # a circle, of which the checks tell
            return space
        ordered |= {name: space[name] for name in ready}
    return ordered


def rests_on(space: Mapping[str, Dimension], name: str) -> set[str]:
    """The dimensions that one depends on."""
    dimension = space[name]
    return {other for other in (dimension.times or "", *dimension.conditions) if other in space}


def draw(spec: JobSpec, choose: Choose) -> Point:
    """A point of the space.

    Args:
        spec: the search.
        choose: is asked once for each setting whose condition holds.
    """
    point: Point = {}
    for name, dimension in space_of(spec).items():
        if _holds(dimension, spec.training, point):
            point[name] = _value(dimension, choose(name, dimension), spec.training, point)
    return point


def random_point(spec: JobSpec, number: int) -> Point:
    """Draw number 1, 2, ... of a random search: a function of the seed and of the number alone."""
    generator = random.Random(f"{spec.search.seed} {number}")

    def choose(name: str, dimension: Dimension) -> Any:
        if dimension.uniform:
            return generator.uniform(*dimension.uniform)
        if dimension.loguniform:
            low, high = map(math.log, dimension.loguniform)
            return min(max(math.exp(generator.uniform(low, high)), dimension.loguniform[0]), dimension.loguniform[1])
        return generator.choice(dimension.options)

    return draw(spec, choose)


def walk(spec: JobSpec, options: Options = lambda name, dimension: dimension.options) -> Iterator[Point]:
    """All points that can be made of some values of each dimension; of its `options`, where no others are given."""
    space = list(space_of(spec).items())

    def go_on(index: int, point: Point) -> Iterator[Point]:
        if index == len(space):
            yield point
            return
        name, dimension = space[index]
        if not _holds(dimension, spec.training, point):
            yield from go_on(index + 1, point)
            return
        for option in options(name, dimension):
            value = _value(dimension, option, spec.training, point)
            yield from go_on(index + 1, point | {name: value})

    return go_on(0, {})


def defaults(spec: JobSpec) -> Point:
    """The searched settings as the spec's own `training` has them."""
    return {name: getattr(spec.training, name) for name in space_of(spec)}


def planned_trials(spec: JobSpec) -> int:
    """How many configurations a search tries, the defaults among them."""
    if spec.search.sampler != "grid":
        return spec.search.trials or DEFAULT_TRIALS
    return len(grid(spec)) + 1


def grid(spec: JobSpec) -> list[Point]:
    """All points of a finite space but the defaults, which are a trial already."""
    mine = job_at(spec, {}).training
    return [point for point in walk(spec) if job_at(spec, point).training != mine]


def job_at(spec: JobSpec, point: Point, steps: int | None = None, seed: int | None = None) -> JobSpec:
    """The train job at a point of a search: run alone, it gives what the trial gives.

    Args:
        spec: the search.
        point: values that take the place of `training`'s.
        steps: optimizer steps of its schedule, where they are known: then it has its evaluations.
        seed: of a repeat.

    Raises:
        ValidationError: there is no such job.
    """
    values = spec.training.model_dump() | point
    if steps is not None:
        values["eval_steps"] = values["save_steps"] = max(1, math.ceil(steps / spec.search.evaluations))
    if seed is not None:
        values["seed"] = seed
    training = TrainingConfig.model_validate(values)
    content: dict[str, Any] = {"kind": "train", "training": training, "search": type(spec.search)()}
    return rewrite(spec.model_copy(update=content))[0]


def words_of(point: Mapping[str, Any]) -> str:
    """A point in one line: `lora_r 16, lora_alpha 32, use_dora true, lr 3.1e-04`."""
    return ", ".join(f"{name} {value_words(value)}" for name, value in point.items()) or "no setting"


def value_words(value: Any) -> str:
    """A value for people; floats with three digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3g}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _holds(dimension: Dimension, training: TrainingConfig, point: Point) -> bool:
    """Whether its condition does; what is not in the point is `training`'s own."""
    return all(
        _same_in(point.get(name, getattr(training, name, None)), values)
        for name, values in dimension.conditions.items()
    )


def _same_in(value: Any, values: Sequence[Any]) -> bool:
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _value(dimension: Dimension, option: Any, training: TrainingConfig, point: Point) -> Any:
    if dimension.times is None:
        return option
    value = option * point.get(dimension.times, getattr(training, dimension.times))
    return int(value) if isinstance(value, float) and value.is_integer() else value
