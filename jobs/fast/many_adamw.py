"""AdamW for many trials at once: what each of their optimizers would do, in a few operations for all of them.

Each trial has a row in every buffer, in which its parameters, gradients and moments lie in the same places. A trial's
own optimizer says how it learns, and has its moments again when it leaves, or is saved.

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

    def give(self, row: int) -> None:
        """Let a trial's own optimizer know its moments."""
        steps, learner = self._steps[row], self._learners[row]
        if steps:
            for parameter, place in learner.places:
                learner.optimizer.state[parameter] = {
                    "step": torch.tensor(float(steps)),
                    "exp_avg": place(self._means_NP).clone(memory_format=torch.contiguous_format),
                    "exp_avg_sq": place(self._squares_NP).clone(memory_format=torch.contiguous_format),
                }

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
        """torch's AdamW, its operations in its order."""
        options = [self._learners[row].options for row in rows]
        (beta1, beta2), epsilon = options[0]["betas"], options[0]["eps"]
        for row in rows:
            self._steps[row] += 1
        steps = [self._steps[row] for row in rows]

        def column(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float32, device=self._values_NP.device)[:, None]

        grads_nP = _of(grads_NP, rows) * column(shares)
        buffers = (self._values_NP, self._means_NP, self._squares_NP)
        values_nP, means_nP, squares_nP = (_of(buffer, rows) for buffer in buffers)
        values_nP.mul_(column([1 - each["lr"] * each["weight_decay"] for each in options]))
        means_nP.lerp_(grads_nP, 1 - beta1)
        squares_nP.mul_(beta2).addcmul_(grads_nP, grads_nP, value=1 - beta2)
        roots_nP = squares_nP.sqrt().div_(column([(1 - beta2**step) ** 0.5 for step in steps])).add_(epsilon)
        rates = [each["lr"] / (1 - beta1**step) for each, step in zip(options, steps, strict=True)]
        values_nP.addcdiv_(means_nP * column([-rate for rate in rates]), roots_nP)
        if values_nP is not self._values_NP:
            for buffer, found in zip(buffers, (values_nP, means_nP, squares_nP), strict=True):
                buffer[rows] = found


def _of(buffer_NP: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows; all of them in their order, without a copy."""
    return buffer_NP if list(rows) == list(range(len(buffer_NP))) else buffer_NP[list(rows)]
