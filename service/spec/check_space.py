"""Checks of a search: no point of its space may be an invalid job, and its settings must fit each other."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import ValidationError

from service.spec import words
from service.spec.findings import Finding, Findings, advice
from service.spec.job import JobSpec
from service.spec.search import Dimension
from service.spec.settings import FLAT, nearest
from service.spec.shared import why_separate
from service.spec.space import (
    DEFAULT_TRIALS,
    FIXED,
    Point,
    job_at,
    planned_trials,
    rests_on,
    space_of,
    value_words,
    walk,
    words_of,
)
from service.spec.training import AUTO, TrainingConfig

SPACE = "search.space"

MOST_POINTS = 300
"""A space of so many points is checked whole; of a larger one so many are drawn, after all pairs of values."""

MOST_IN_A_GRID = 10_000

Check = Callable[[JobSpec], Findings]


def space_findings(spec: JobSpec, check: Check) -> Findings:
    """Whether all points of the space are valid train jobs.

    Args:
        spec: the search.
        check: the checks of a train job.
    """
    wrong = list(dimension_findings(spec))
    yield from wrong
    if wrong:
        return
    # What is wrong with the defaults too is no fault of the space, and is reported as theirs.
    known = {finding.message for finding in check(job_at(spec, {})) if finding.fatal}
    seen: set[tuple[str, ...]] = set()
    for point in telling_points(spec):
        for path, message in _faults_at(spec, point, check):
            if message in known:
                continue
            if (path, _kind_of(message)) not in seen:
                seen.add((path, _kind_of(message)))
                yield Finding(
                    (SPACE,), f"holds a point that is no valid job: {path} {message}. It is {words_of(point)}"
                )


def _faults_at(spec: JobSpec, point: Point, check: Check) -> Iterator[tuple[str, str]]:
    """Setting and message of what is wrong at a point."""
    try:
        job = job_at(spec, point)
    except ValidationError as error:
        wrong = {str(entry["loc"][0]): words.message(entry) for entry in error.errors()}
        yield from ((f"{FLAT}.{name}", message) for name, message in wrong.items())
        job = job_at(spec, {name: value for name, value in point.items() if name not in wrong})
    yield from ((each.settings[0], each.message) for each in check(job) if each.fatal)


def search_findings(spec: JobSpec) -> Findings:
    """Whether the settings of a search fit each other."""
    search = spec.search
    if search.sampler == "grid":
        ranges = [name for name, dimension in space_of(spec).items() if not dimension.is_finite]
        if ranges:
            text = f"needs values that can be listed, and {', '.join(ranges)} is a range; give a choice of values"
            yield Finding(("search.sampler", SPACE), text, search.sampler)
        elif math.prod(len(dimension.options) for dimension in space_of(spec).values()) > MOST_IN_A_GRID:
            text = f"is of over {MOST_IN_A_GRID:,} points; leave some out, or take sampler random or tpe"
            yield Finding((SPACE, "search.sampler"), text)
        elif not any(dimension_findings(spec)) and search.trials and search.trials < planned_trials(spec):
            text = f"is less than the grid's {planned_trials(spec)} points, defaults included; leave it out"
            yield Finding(("search.trials", SPACE, "search.sampler"), text, search.trials)
    if search.engine == "shared":
        for reason in why_separate(spec):
            text = f"cannot be: {reason}; take separate, or auto"
            yield Finding(("search.engine", reason.split(" ", 1)[0]), text, search.engine)
    trials = search.trials or (DEFAULT_TRIALS if search.sampler != "grid" else None)
    if trials and search.top_k > trials:
        yield Finding(("search.top_k", "search.trials"), f"is more than the {trials} trials", search.top_k)
    if search.grace > search.evaluations:
        text = f"is more than search.evaluations ({search.evaluations}): no trial would be ended early; lower it"
        yield Finding(("search.grace", "search.evaluations"), text, search.grace)
    elif search.scheduler != "none" and search.evaluations == 1:
        text = f"of 1 leaves `{search.scheduler}` nothing to end early; give 2 or more, or scheduler none"
        yield advice("search.evaluations", text)
    if search.gpu_hours is not None and spec.resources.gpus_per_worker == 0:
        yield advice("search.gpu_hours", "has no effect: resources.gpus_per_worker is 0", search.gpu_hours)


def idle_findings(spec: JobSpec) -> Findings:
    """For jobs of other kinds: what a search's settings do there."""
    if spec.search != type(spec.search)():
        yield Finding(("kind", "search"), f"is {spec.kind}, and `search` is given; write kind: search, or leave it out")


def dimension_findings(spec: JobSpec) -> Findings:
    """Faults of single dimensions: unknown names, values that the setting does not take, circles."""
    space = space_of(spec)
    known = [name for name in TrainingConfig.model_fields if name not in FIXED]
    for name, dimension in space.items():
        if name in FIXED:
            yield Finding((SPACE,), f"holds {name}, which cannot be searched: {FIXED[name]}")
        elif name not in TrainingConfig.model_fields:
            close = nearest(name, known)
            hint = f"; did you mean {close[0]}?" if close else "; `whisper-jobs explain training` lists them"
            yield Finding((SPACE,), f"holds {name}, which is no setting of training{hint}")
        else:
            yield from _value_findings(name, dimension)
        if dimension.times == "per_dev_batch" and AUTO in _values_of(spec, dimension.times):
            yield Finding((SPACE,), f"multiplies per_dev_batch for {name}, and that may be auto, which is no number")
        for other in (dimension.times, *dimension.conditions):
            if other is not None and other not in TrainingConfig.model_fields:
                close = nearest(other, known)
                hint = f"; did you mean {close[0]}?" if close else ""
                yield Finding((SPACE,), f"lets {name} depend on {other}, which is no setting of training{hint}")
        for other, values in dimension.conditions.items():
            if other in TrainingConfig.model_fields and not _can_be(spec, other, values):
                text = f"draws {name} only when {other} is {' or '.join(map(value_words, values))}, which it never is"
                yield Finding((SPACE,), text)
    if circle := _circle(space):
        yield Finding((SPACE,), f"holds settings that depend on each other in a circle: {', '.join(circle)}")


def sound_part(space: Mapping[str, Any], faulty: Collection[str]) -> dict[str, Any]:
    """A space, as it was written, without some dimensions and those that depend on them."""
    left_out = set(faulty)
    while more := {name for name, below in space.items() if name not in left_out and _named_by(below) & left_out}:
        left_out |= more
    return {name: below for name, below in space.items() if name not in left_out}


def _named_by(dimension: Any) -> set[Any]:
    if not isinstance(dimension, dict):
        return set()
    when = dimension.get("when")
    return {dimension.get("times"), *(when if isinstance(when, dict) else ())}


def _values_of(spec: JobSpec, name: str) -> list[Any]:
    """What a setting may be, as far as that is listed: the spec's own value, and those of a choice."""
    dimension = space_of(spec).get(name)
    return [getattr(spec.training, name), *((dimension.choice if dimension else None) or [])]


def _can_be(spec: JobSpec, name: str, values: Sequence[Any]) -> bool:
    """Whether a setting is one of some values at any point."""
    dimension = space_of(spec).get(name)
    if dimension is None:
        return getattr(spec.training, name) in values
    return dimension.kind != "choice" or any(value in dimension.options for value in values)


def _value_findings(name: str, dimension: Dimension) -> Findings:
    if dimension.times is not None:
        base = TrainingConfig.model_fields.get(dimension.times)
        if base is not None and (isinstance(base.default, bool) or not isinstance(base.default, int | float)):
            yield Finding((SPACE,), f"multiplies {dimension.times} for {name}, and that is no number")
        return
    whole = TrainingConfig.model_fields[name].default
    if dimension.kind in ("uniform", "loguniform") and isinstance(whole, int):
        what = "is true or false; give a choice" if isinstance(whole, bool) else "takes whole numbers; give randint"
        yield Finding((SPACE,), f"draws {name} by {dimension.kind}, and it {what}")
        return
    for value in dimension.options if dimension.kind != "randint" else dimension.randint or ():
        try:
            TrainingConfig.model_validate({name: value})
        except ValidationError as error:
            entry = error.errors()[0]
            yield Finding((SPACE,), f"holds a value of {name} that {words.message(entry)}", value)


def _circle(space: dict[str, Dimension]) -> list[str]:
    placed: set[str] = set()
    while ready := [name for name in space if name not in placed and not rests_on(space, name) - placed]:
        placed |= set(ready)
    return [name for name in space if name not in placed]


def telling_points(spec: JobSpec) -> Iterator[Point]:
    """Points among which a fault of the space shows: all, where there are few enough; else pairs of values and a draw.

    A check looks at one value or at how two of them go together.
    """
    space = space_of(spec)
    if math.prod(len(_telling(dimension)) for dimension in space.values()) <= MOST_POINTS:
        yield from walk(spec, lambda name, dimension: _telling(dimension))
        return
    for pair in itertools.combinations(space, 2):
        yield from walk(spec, partial(_of_some, set(pair).union(*(rests_on(space, name) for name in pair))))
    generator = random.Random(0)
    for _ in range(MOST_POINTS):
        yield next(walk(spec, lambda name, dimension: [generator.choice(_telling(dimension))]))


def _of_some(names: set[str], name: str, dimension: Dimension) -> Sequence[Any]:
    return _telling(dimension)[: None if name in names else 1]


def _telling(dimension: Dimension) -> Sequence[Any]:
    """Values at which a check may find something: all of a list; the ends and their neighbours of a range."""
    options = dimension.options
    if dimension.kind == "randint" and len(options) > 8:
        middle = len(options) // 2
        return list(dict.fromkeys([*options[:2], *options[middle : middle + 2], *options[-2:]]))
    return options


def _kind_of(message: str) -> str:
    """A message without its numbers: one fault is told once, not for each value."""
    return "".join(letter for letter in message if not letter.isdigit())[:80]
