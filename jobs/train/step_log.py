"""What is told of each step of a training: losses and speed."""

from __future__ import annotations

import math
import time

from jobs.batches import Schedule
from jobs.train.runtime import Runtime
from jobs.train.session import Session


class StepLog:
    """Tells of every step, which moves the progress bar; every logging_steps'th is kept, as means since the last.

    Args:
        session: takes the events.
        runtime: takes the curves.
        steps: of the whole training.
        every: `training.logging_steps`.
    """

    def __init__(self, session: Session, runtime: Runtime, steps: int, every: int) -> None:
        self._session, self._runtime, self._steps, self._every = session, runtime, steps, every
        self._window, self._whole = Window(), Window()

    @property
    def clips_per_s(self) -> float | None:
        """Of the whole training, over all workers, evaluations left out; None: no step was made."""
        return self._whole.clips_per_s

    def restart(self) -> None:
        """Leave out the time since the last step: an evaluation is no training."""
        for window in (self._window, self._whole):
            window.restart()

    def tell(self, step: int, schedule: Schedule, *, loss: float, norm: float, rate: float) -> None:
        """Tell of a step that was just made.

        Args:
            step: its number (1, 2, ...).
            schedule: says how many clips it had.
            loss: mean per label token.
            norm: of the gradient; not finite in fp16 where the step overflowed.
            rate: the learning rate.
        """
        for window in (self._window, self._whole):
            window.add(loss, schedule, step)
        window, finite_norm = self._window, norm if math.isfinite(norm) else None  # JSON has no infinity
        values = {"loss": window.loss, "lr": rate, "grad_norm": finite_norm, "clips_per_s": window.clips_per_s}
        kept = step % self._every == 0 or step == self._steps
        epoch = step / schedule.steps_per_epoch
        self._session.emit(
            {"event": "step", "step": step, "steps": self._steps, "epoch": epoch, "logged": kept} | values
        )
        if kept:
            known = {f"train/{name}": value for name, value in values.items() if value is not None}
            self._runtime.log(known, step)
            self._window = Window()


class Window:
    """Means over some steps."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._clips = 0
        self._spent = 0.0
        self._since = time.monotonic()

    def add(self, loss: float, schedule: Schedule, step: int) -> None:
        """Count one step (1, 2, ...)."""
        now = time.monotonic()
        self._spent += now - self._since
        self._since = now
        self._losses.append(loss)
        index = (step - 1) % schedule.steps_per_epoch
        self._clips += min(schedule.effective_batch, schedule.rows - index * schedule.effective_batch)

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self._since = time.monotonic()

    @property
    def loss(self) -> float:
        """Mean loss per label token."""
        return sum(self._losses) / len(self._losses)

    @property
    def clips_per_s(self) -> float | None:
        """Clips per second, over all workers; None: no step was made."""
        return round(self._clips / max(self._spent, 1e-9), 3) if self._clips else None
