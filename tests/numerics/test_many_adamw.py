"""One step of many trials' optimizers: each comes to what torch's AdamW, clipped by torch, makes of it alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from jobs.fast.many_adamw import Learner, ManyAdamW
from jobs.fast.stack import Rows

SHAPES = [(4, 6), (4, 5), (7,)]
RANKS = [4, 2, 3]
"""Of three trials: what is below in the first two tensors is padding."""
OPTIONS: list[dict[str, Any]] = [{"lr": 1e-2}, {"lr": 3e-3, "weight_decay": 0.1}, {"lr": 1.0, "weight_decay": 0.0}]
MAX_NORM = 1.5


@dataclass
class Trials:
    """Trials in rows, and their twins, each alone."""

    rows: Rows
    learners: list[Learner]
    twins: list[torch.optim.AdamW]

    def compare(self) -> None:
        for learner, twin in zip(self.learners, self.twins, strict=True):
            for (parameter, _), other in zip(learner.places, twin.param_groups[0]["params"], strict=True):
                torch.testing.assert_close(parameter.detach(), other.detach(), rtol=1e-5, atol=1e-7)

    def compare_moments(self) -> None:
        for learner, twin in zip(self.learners, self.twins, strict=True):
            mine, other = learner.optimizer.state_dict()["state"], twin.state_dict()["state"]
            assert mine.keys() == other.keys()
            for name in other:
                torch.testing.assert_close(mine[name], other[name], rtol=1e-5, atol=1e-9)

    def learn(self, adamw: ManyAdamW, at_work: list[int], seed: int, broken: int | None = None) -> list[float]:
        """Random gradients, small ones and large ones, and a step of both sides."""
        torch.manual_seed(seed)
        grads = torch.zeros_like(self.rows.values_NP)
        for index, (learner, twin) in enumerate(zip(self.learners, self.twins, strict=True)):
            own = twin.param_groups[0]["params"]
            for (_, place), parameter in zip(learner.places, own, strict=True):
                parameter.grad = torch.randn(parameter.shape) * 10.0 ** (index - 1)
                if index == broken:
                    parameter.grad.fill_(float("nan"))
                place(grads).copy_(parameter.grad)
            if index in at_work and index != broken:
                nn.utils.clip_grad_norm_(own, MAX_NORM)
                twin.step()
        return adamw.step(grads, at_work, MAX_NORM)


@pytest.fixture
def trials() -> Trials:
    torch.manual_seed(0)
    rows = Rows(len(RANKS), sum(torch.Size(shape).numel() for shape in SHAPES), torch.device("cpu"))
    room = [rows.take(shape)[1] for shape in SHAPES]
    learners, twins = [], []
    for index, (rank, options) in enumerate(zip(RANKS, OPTIONS, strict=True)):
        a, b, magnitude = room
        places = [
            lambda buffer, a=a, index=index, rank=rank: a(buffer)[index, :rank],
            lambda buffer, b=b, index=index, rank=rank: b(buffer)[index, :rank].T,
            lambda buffer, magnitude=magnitude, index=index: magnitude(buffer)[index],
        ]
        parameters = []
        for place in places:
            share = place(rows.values_NP)
            share.copy_(torch.randn(share.shape))
            parameters.append(nn.Parameter(share))
            parameters[-1].data = share
        own = [
            nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format)) for parameter in parameters
        ]
        twins.append(torch.optim.AdamW(own, foreach=False, **options))
        learners.append(Learner(torch.optim.AdamW(parameters, **options), list(zip(parameters, places, strict=True))))
    return Trials(rows, learners, twins)


def test_each_trial_comes_to_what_it_comes_to_alone(trials: Trials) -> None:
    adamw = ManyAdamW(trials.rows.values_NP, trials.learners)
    for seed, at_work in enumerate([[0, 1, 2], [0, 1, 2], [0, 2], [1], [2, 0, 1]]):
        for index in range(3):
            for group in (*trials.learners[index].optimizer.param_groups, *trials.twins[index].param_groups):
                group["lr"] = OPTIONS[index]["lr"] / (1 + seed)
        norms = trials.learn(adamw, at_work, seed)
        assert len(norms) == len(at_work)
        trials.compare()
    for row in range(3):
        adamw.give(row)
    trials.compare_moments()


def test_moments_go_to_a_trials_optimizer_and_come_from_it(trials: Trials) -> None:
    adamw = ManyAdamW(trials.rows.values_NP, trials.learners)
    trials.learn(adamw, [0, 2], 1)
    for row in range(3):
        adamw.give(row)
    trials.compare_moments()  # of the one that has not learned there are none
    saved = copy.deepcopy([learner.optimizer.state_dict() for learner in trials.learners])
    for learner, state in zip(trials.learners, saved, strict=True):
        learner.optimizer.load_state_dict(state)
    again = ManyAdamW(trials.rows.values_NP, trials.learners)
    trials.learn(again, [0, 1, 2], 2)
    trials.compare()


def test_a_trial_whose_gradient_is_no_number_makes_no_step_and_the_others_make_theirs(trials: Trials) -> None:
    adamw = ManyAdamW(trials.rows.values_NP, trials.learners)
    trials.learn(adamw, [0, 1, 2], 1)
    norms = trials.learn(adamw, [0, 1, 2], 2, broken=1)
    assert [norm == norm for norm in norms] == [True, False, True]
    trials.compare()
    trials.learn(adamw, [0, 1, 2], 3)
    trials.compare()
