"""AdamW for many trials at once: what each of their optimizers would do, in a few operations for all of them.

Each trial has a row in every buffer, in which its parameters, gradients and moments lie in the same places. Its
optimizer says how it learns, and has its moments again when the trial leaves, or is saved.

Legend: N trials, n of them that make a step, P places of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jobs.fast.stack import Place


@dataclass(frozen=True)
class Learner:
    """A trial as its optimizer has it.

    Attributes:
        optimizer: torch's AdamW.
        places: where each of its parameters lies.
    """

    optimizer: torch.optim.AdamW
    places: Sequence[tuple[nn.Parameter, Place]]

    @property
    def options(self) -> dict[str, Any]:
        """lr, betas, eps and weight_decay."""
        (group,) = self.optimizer.param_groups
        return group


class ManyAdamW:
    """The moments of several trials, and their steps.

    Args:
        values_NP: the parameters.
        learners: the trials, by their rows.
    """

    def __init__(self, values_NP: Tensor, learners: Sequence[Learner]) -> None:
        self._values_NP, self._learners = values_NP, learners
        self._means_NP, self._squares_NP = torch.zeros_like(values_NP), torch.zeros_like(values_NP)
        self._steps = [self._take(learner) for learner in learners]

    def _take(self, learner: Learner) -> int:
        """Take a trial's moments over from its optimizer; returns how many steps it has made."""
        steps = 0
        for parameter, place in learner.places:
            if state := learner.optimizer.state.pop(parameter, None):
                place(self._means_NP).copy_(state["exp_avg"])
                place(self._squares_NP).copy_(state["exp_avg_sq"])
                steps = int(state["step"])
        return steps

    def give(self, row: int, device: torch.device | None = None) -> None:
        """Let a trial's own optimizer know its moments.

        Args:
            row: the trial's.
            device: where they are to lie; None: where the trial is.
        """
        steps, learner = self._steps[row], self._learners[row]
        if steps:
            for parameter, place in learner.places:
                mean, square = (
                    place(moments).to(device, copy=True, memory_format=torch.contiguous_format)
                    for moments in (self._means_NP, self._squares_NP)
                )
                step = torch.tensor(float(steps))
                learner.optimizer.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    @torch.no_grad()
    def step(self, grads_NP: Tensor, rows: Sequence[int], max_norm: float) -> list[float]:
        """Clip the gradients of some trials and let them make a step; whose norm is not finite makes none.

        Args:
            grads_NP: the gradients; where a row has no parameter, zeros.
            rows: of those trials.
            max_norm: of each trial's gradient.

        Returns:
            the norms before clipping.
        """
        norms = torch.linalg.vector_norm(_of(grads_NP, rows), dim=1).tolist()
        steady = [(row, norm) for row, norm in zip(rows, norms, strict=True) if math.isfinite(norm)]
        if steady:
            shares = [min(1.0, max_norm / (norm + 1e-6)) for _, norm in steady]
            self._step(grads_NP, [row for row, _ in steady], shares)
        return norms

    def _step(self, grads_NP: Tensor, rows: list[int], shares: list[float]) -> None:
        """What torch's AdamW does, up to rounding."""
        options = [self._learners[row].options for row in rows]
        steps = [self._steps[row] + 1 for row in rows]
        (beta1, beta2), epsilon = options[0]["betas"], options[0]["eps"]
        columns = torch.tensor(
            [
                shares,
                [1 - each["lr"] * each["weight_decay"] for each in options],
                [math.sqrt(1 - beta2**step) for step in steps],
                [-each["lr"] / (1 - beta1**step) for each, step in zip(options, steps, strict=True)],
            ],
            dtype=torch.float32,
        ).to(self._values_NP.device)  # at once: each copy to a GPU waits for it
        share_n1, decay_n1, correction_n1, rate_n1 = columns[:, :, None]
        grads_nP = _of(grads_NP, rows) * share_n1
        buffers = (self._values_NP, self._means_NP, self._squares_NP)
        values_nP, means_nP, squares_nP = (_of(buffer, rows) for buffer in buffers)
        # Memory is taken before anything is changed: where there is none, no trial has made half a step.
        roots_nP, changes_nP = torch.empty_like(grads_nP), torch.empty_like(grads_nP)
        values_nP.mul_(decay_n1)
        means_nP.lerp_(grads_nP, 1 - beta1)
        squares_nP.mul_(beta2).addcmul_(grads_nP, grads_nP, value=1 - beta2)
        torch.sqrt(squares_nP, out=roots_nP).div_(correction_n1).add_(epsilon)
        torch.mul(means_nP, rate_n1, out=changes_nP)
        values_nP.addcdiv_(changes_nP, roots_nP)
        if values_nP is not self._values_NP:
            for buffer, found in zip(buffers, (values_nP, means_nP, squares_nP), strict=True):
                buffer[rows] = found
        for row, step in zip(rows, steps, strict=True):
            self._steps[row] = step


def _of(buffer_NP: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; all of them in their order, without a copy."""
    return buffer_NP if list(rows) == list(range(len(buffer_NP))) else buffer_NP[list(rows)]
