"""search/trials.json: the table of a search, as it stands, and what each of its trials did."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from service.artifacts import TRIALS, Files
from service.errors import NotFoundError

UNTUNED = "untuned"
"""Id of the row of the base model."""

DEFAULTS = "defaults"
"""Origin of the trial with the spec's own `training`."""

Status = Literal["pending", "running", "finished", "stopped", "failed"]
"""`stopped`: the scheduler or a budget ended it before its schedule did."""

ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")
"""Of a trial that is not gone on with."""


class Record(BaseModel):
    """A part of the table."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(Record):
    """One evaluation of a trial.

    Attributes:
        number: 1, 2, ... of `Search.evaluations` in a run's schedule.
        step: optimizer steps that were made.
        seed: of the run that it belongs to.
        wer: word error rate of the validation set by generation, as a fraction; None where the metric is the loss.
        cer: character error rate.
        loss: mean loss per label token of the validation set; None where the metric is the WER.
        train_loss: the same of the training clips since the evaluation before.
        score: the best value of the metric so far, which the search judges by: the checkpoint of that value is kept.
        seconds: that the trial has worked until then, in all of its attempts.
    """

    number: int
    step: int
    seed: int
    wer: float | None = None
    cer: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    score: float
    seconds: float


class Trial(Record):
    """One configuration: a row of the table.

    Attributes:
        id: `t000`, ... in the order of their beginning; t000 is the defaults (the spec's own `training`).
        origin: `untuned` (the base model), `defaults`, `grid`, `random` or `tpe`.
        settings: the searched settings by name, as the trial had them; {} for the untuned model.
        status: how it stands.
        cause: why it failed, or was stopped.
        score: the metric's best value, the mean over the repeats; None: none yet.
        scores: the best value of each repeat.
        steps: optimizer steps of its whole schedule.
        step: the last step that was evaluated.
        trainable_parameters: of its adapter.
        seconds: that it has worked, in all of its attempts.
        evaluations: in their order.
        final: WER of the published model, where this trial was taken to the end.
    """

    id: str
    origin: str
    settings: dict[str, Any]
    status: Status
    cause: str | None = None
    score: float | None = None
    scores: list[float] = []
    steps: int | None = None
    step: int | None = None
    trainable_parameters: int | None = None
    seconds: float = 0.0
    evaluations: list[Evaluation] = []
    final: float | None = None


class Search(Record):
    """The table.

    Attributes:
        metric: what trials are scored by; less is better.
        trials: the untuned model first, then in the order of their beginning.
        winner: id of the trial that is shipped; None while it is not known.
        verdict: in a sentence.
        importance: share of each setting in the spread of the scores, 0 to 1, as Optuna's PED-ANOVA tells it; {} where
            there are too few trials.
        ended: why no more trials were begun.
        seconds: that the search has taken, in all of its attempts.
        gpu_hours: that all trials have used.
    """

    format: Literal[1] = 1
    metric: Literal["wer", "loss"]
    sampler: str
    scheduler: str
    seed: int
    repeats: int
    evaluations: int
    planned: int
    trials: list[Trial]
    winner: str | None = None
    verdict: str | None = None
    importance: dict[str, float] = {}
    ended: str | None = None
    seconds: float = 0.0
    gpu_hours: float = 0.0


def score_text(value: float, metric: str) -> str:
    """A score for people: `12.3%`, or a loss as `0.123`."""
    return f"{value:.1%}" if metric == "wer" else f"{value:.3f}"


def read_search(root: Files) -> Search:
    """The table of a search.

    Raises:
        NotFoundError: there is none at this root.
    """
    if not root.exists(TRIALS):
        raise NotFoundError(f"{root.uri}: no {TRIALS}: this is not the root of a search, or it has not begun")
    return Search.model_validate_json(root.read_bytes(TRIALS))
