"""Attention without keys and values of each trial's own is attention by them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.fast.low_rank_attention import low_rank_attention

TRIALS, CLIPS, TOKENS, POSITIONS, HEADS, WIDTH, RANKS = 3, 2, 5, 11, 4, 6, {"keys": 3, "values": 2}
ADAPTED = pytest.mark.parametrize(
    "adapted", [("keys", "values"), ("keys",), ("values",), ()], ids=lambda adapted: " and ".join(adapted) or "neither"
)

Inputs = dict[str, Tensor]


def inputs(adapted: tuple[str, ...]) -> Inputs:
    """Queries, what all trials share, and each trial's factors, in float64."""
    torch.manual_seed(0)
    made: Inputs = {"q_NBTHC": torch.randn(TRIALS, CLIPS, TOKENS, HEADS, WIDTH, dtype=torch.float64)}
    for name in ("keys", "values"):
        made[name] = torch.randn(CLIPS, POSITIONS, HEADS, WIDTH, dtype=torch.float64)
    for name in adapted:
        made[f"{name} A x"] = torch.randn(TRIALS, CLIPS, POSITIONS, RANKS[name], dtype=torch.float64)
        made[f"{name} B"] = torch.randn(TRIALS, RANKS[name], HEADS, WIDTH, dtype=torch.float64)
    return {name: each.requires_grad_(name not in ("keys", "values")) for name, each in made.items()}


def by_keys(given: Inputs) -> Tensor:
    """The outputs (N, B, T, H, C) by torch's attention over each trial's keys and values."""
    k, v = (
        given[name] + torch.einsum("nbpr,nrhc->nbphc", given[f"{name} A x"], given[f"{name} B"])
        if f"{name} B" in given
        else given[name].expand(TRIALS, -1, -1, -1, -1)
        for name in ("keys", "values")
    )
    return F.scaled_dot_product_attention(*(x.transpose(2, 3) for x in (given["q_NBTHC"], k, v)), scale=1.0).transpose(
        2, 3
    )


def without(given: Inputs) -> Tensor:
    """The same by low-rank attention."""
    q_low = k_low = v_low = None
    if "keys B" in given:
        q_low = torch.einsum("nbthc,nrhc->hbntr", given["q_NBTHC"], given["keys B"]).flatten(1, 2)
        k_low = given["keys A x"].permute(1, 0, 3, 2).flatten(0, 1)
    if "values B" in given:
        v_low = given["values A x"].permute(1, 0, 3, 2).flatten(0, 1)
    q = given["q_NBTHC"].permute(3, 1, 0, 2, 4).flatten(2, 3)
    y, y_low = low_rank_attention(
        q, *(given[name].permute(2, 0, 1, 3) for name in ("keys", "values")), q_low, k_low, v_low
    )
    found = y.unflatten(2, (TRIALS, TOKENS)).permute(2, 1, 3, 0, 4)
    assert (y_low is None) == (v_low is None)
    if y_low is not None:
        found = found + torch.einsum("hbntr,nrhc->nbthc", y_low.unflatten(1, (CLIPS, TRIALS)), given["values B"])
    return found


@ADAPTED
def test_outputs_and_gradients_are_those_by_keys_and_values(adapted: tuple[str, ...]) -> None:
    found = []
    for attend in (by_keys, without):
        given = inputs(adapted)
        output = attend(given)
        (output * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)).square().sum().backward()
        gradients = {name: each.grad for name, each in given.items() if each.requires_grad}
        found.append({"output": output.detach()} | gradients)
    assert len(found[1]) == 2 + 2 * len(adapted)
    for name, expected in found[0].items():
        assert expected is not None
        assert float(expected.norm()) > 1, name
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-10, msg=name)


@ADAPTED
def test_its_gradients_are_those_of_its_output(adapted: tuple[str, ...]) -> None:
    given = inputs(adapted)
    trained = [name for name, each in given.items() if each.requires_grad]

    def output(*tensors: Tensor) -> Tensor:
        return without(given | dict(zip(trained, tensors, strict=True)))

    assert torch.autograd.gradcheck(output, [given[name] for name in trained])


def test_nothing_that_a_trial_alone_has_is_as_wide_as_the_model() -> None:
    """Of P positions autograd keeps ranks and weights: with keys and values it would be 2 D a trial."""
    given, kept = inputs(("keys", "values")), []

    def pack(tensor: Tensor) -> Tensor:
        if POSITIONS in tensor.shape:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        without(given)
    rows = CLIPS * TRIALS
    assert sorted(map(tuple, kept)) == sorted(
        [
            *[(HEADS, CLIPS, POSITIONS, WIDTH)] * 2,
            *((rows, rank, POSITIONS) for rank in RANKS.values()),
            (HEADS, CLIPS, TRIALS * TOKENS, POSITIONS),
        ]
    )
