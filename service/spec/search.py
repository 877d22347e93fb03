"""`search`: what a search tries, how it chooses, and when it ends."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from service.spec.base import Float, Int, Spec, parse_json_text

KINDS = ("choice", "uniform", "loguniform", "randint", "times")
"""What says how a setting's value is drawn; each setting of a space has one of them."""


class Dimension(Spec):
    """How one setting is drawn."""

    choice: list[Any] | None = Field(default=None, min_length=1)
    """One of these values, of whatever kind the setting takes."""

    uniform: tuple[Float, Float] | None = None
    """A number from the first to the second."""

    loguniform: tuple[Float, Float] | None = None
    """A number from the first to the second, whose logarithm is uniform: for learning rates."""

    randint: tuple[Int, Int] | None = None
    """A whole number from the first to the second, both included, in steps of `step`."""

    step: Int | None = Field(default=None, ge=1)
    """Of `randint`; 1 where it is left out."""

    times: str | None = Field(default=None, min_length=1)
    """Depends on another setting, of the space or of `training`: that one's value times one of `by`."""

    by: list[Float] | None = Field(default=None, min_length=1)
    """The factors of `times`."""

    when: dict[str, Any] | None = None
    """Drawn only where the other settings have these values (a list: one of them); elsewhere `training`'s own value."""

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def is_finite(self) -> bool:
        """Whether its values can be listed."""
        return self.kind in ("choice", "randint", "times")

    @property
    def options(self) -> list[Any]:
        """Its values, or the factors of `times`; of a range of numbers its ends and middle."""
        if self.choice is not None:
            return self.choice
        if self.times is not None:
            return list(self.by or [])
        if self.randint is not None:
            return list(range(self.randint[0], self.randint[1] + 1, self.step or 1))
        low, high = self.uniform or self.loguniform or (0.0, 0.0)
        middle = (low * high) ** 0.5 if self.loguniform else (low + high) / 2
        return list(dict.fromkeys([low, middle, high]))

    @property
    def conditions(self) -> dict[str, list[Any]]:
        """`when`, each value as a list of those that it may be."""
        return {name: value if isinstance(value, list) else [value] for name, value in (self.when or {}).items()}

    @model_validator(mode="after")
    def _check(self) -> Dimension:
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise PydanticCustomError(
                "dimension",
                "says {said}; give one of choice, uniform, loguniform, randint, or times with by",
                {"said": said},
            )
        if (self.times is None) != (self.by is None):
            raise PydanticCustomError("dimension_times", "has `times` and `by` only together: {times: lora_r, by: [2]}")
        if self.step is not None and self.randint is None:
            raise PydanticCustomError("dimension_step", "has a `step`, which belongs to `randint`")
        for name in ("uniform", "loguniform", "randint"):
            if (pair := getattr(self, name)) and not pair[0] < pair[1]:
                raise PydanticCustomError(
                    "dimension_order", "has a {name} whose first number is not below its second", {"name": name}
                )
        if self.loguniform and self.loguniform[0] <= 0:
            raise PydanticCustomError("dimension_log", "has a loguniform that does not begin above 0")
        if self.randint and (self.randint[1] - self.randint[0]) // (self.step or 1) > 10_000:
            raise PydanticCustomError("dimension_many", "has a randint of over 10,000 values; give a larger step")
        return self


def _as_dimension(value: Any) -> Any:
    if isinstance(value, list):
        return {"choice": value}
    if not isinstance(value, dict | Dimension):
        raise PydanticCustomError(
            "dimension_form",
            "is neither a list of values nor an object such as {example}",
            {"example": '{"choice": [8, 16]}'},
        )
    return value


def _as_space(value: Any) -> Any:
    value = parse_json_text(value)
    return value or None


Space = Annotated[
    dict[str, Annotated[Dimension, BeforeValidator(_as_dimension, json_schema_input_type=Dimension | list[Any])]]
    | None,
    BeforeValidator(_as_space),
]


class SearchConfig(Spec):
    """What a search tries (`kind: search`), how it chooses, and when it ends."""

    trials: Int | None = Field(default=None, ge=1, examples=[16])
    """Configurations to try, the defaults (the spec's own `training`) among them. Default: 16; with `sampler: grid` all
    points of the space, which it may not cut short."""

    space: Space = Field(
        default=None,
        examples=[
            {
                "lora_r": {"choice": [8, 16, 32]},
                "lora_alpha": {"times": "lora_r", "by": [1, 2]},
                "use_dora": {"choice": [True, False]},
                "lr": {"loguniform": [5e-5, 1e-3]},
            }
        ],
    )
    """What is searched: an object from names of `training`'s settings to how each is drawn, also as a JSON string.
    `{"choice": [8, 16]}` (or the list alone), `{"uniform": [0, 0.2]}`, `{"loguniform": [1e-5, 1e-3]}`,
    `{"randint": [4, 64], "step": 4}` (both ends included), or `{"times": "lora_r", "by": [1, 2, 4]}`, which multiplies
    another setting's value. With `"when": {"use_dora": false}` a setting is drawn only where others have those values,
    and is `training`'s own elsewhere. Default (null): lora_r of 4 to 64, lora_alpha of 1, 2 or 4 times the rank,
    use_dora, lora_dropout of 0, 0.05 or 0.1, and lr from 2e-5 to 2e-3. No point of a space may be an invalid job: that
    is checked before anything is submitted."""

    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How points are chosen: `tpe` (Optuna's tree-structured Parzen estimator) learns from the trials before, `random`
    draws, `grid` takes all."""

    scheduler: Literal["asha", "median", "none"] = "asha"
    """What ends trials early: `asha` (asynchronous successive halving) keeps the best 1 in `reduction` at each rung,
    `median` ends what is worse than the median of the others' means, `none` lets all trials finish."""

    evaluations: Int = Field(default=4, ge=1)
    """Evaluations in a trial's schedule, spread evenly: each is a chance to end it, and leaves a checkpoint. They take
    the place of training.eval_steps and training.save_steps."""

    reduction: Int = Field(default=3, ge=2)
    """Of `asha`: 1 in this many trials goes on at each rung, and the rungs lie at evaluation `grace`, `grace` x
    `reduction`, ..."""

    grace: Int = Field(default=1, ge=1)
    """Evaluations that every trial is given before it may be ended early."""

    repeats: Int = Field(default=1, ge=1)
    """Runs of each configuration, with seeds training.seed, training.seed + 1, ...; it is scored by their mean. The
    scheduler judges by the first run, and the others are made of configurations that it lets finish."""

    engine: Literal["auto", "shared", "separate"] = "auto"
    """How trials are trained. `shared`: in one process per GPU (or per worker's CPUs), over one base model, which hears
    each clip once for all of them; each trial equals its configuration run alone up to rounding. It wants
    `training.freeze_encoder` throughout the space. `separate`: each on its own. `auto`: shared where that is possible,
    else it says why not."""

    seed: Int = Field(default=42, ge=0, lt=2**32)
    """Seed of what the sampler draws."""

    hours: Float | None = Field(default=None, gt=0, examples=[8])
    """Longest time of the search on the clock, in hours; then no trial goes on, and the best one is taken."""

    gpu_hours: Float | None = Field(default=None, gt=0, examples=[40])
    """The most that all trials together may use, in GPU-hours."""

    concurrent: Int | None = Field(default=None, ge=1, examples=[4])
    """Trials at once. Default: as many as the cluster has room for when the search begins, with the shared engine eight
    times as many; more than that wait for nodes that an autoscaler adds."""

    max_failures: Int = Field(default=4, ge=0)
    """How many trials may fail (out of memory, a loss that is no number): they are kept in the table with their cause,
    and one more ends the job."""

    final_epochs: Int | None = Field(default=None, ge=1, examples=[10])
    """Epochs with which the winner is trained anew. Default (null): it keeps what its trial has learnt, and goes on to
    the end of its schedule where it was ended early."""

    top_k: Int = Field(default=1, ge=1)
    """How many of the best configurations are taken to the end of their schedule. The best of them is shipped; the
    adapters of the others stay under `search/adapters/<id>`."""
