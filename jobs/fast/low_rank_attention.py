"""Attention of many trials to the same audio, without keys and values of their own.

A trial's keys are k_p = W x_p + s B A x_p, of which W x_p is everyone's, and so are its values. With B taken to the
queries, of T tokens, and to what the weights a_p sum up,

    q . k_p                =  q . W x_p  +  (s B^T q) . A x_p
    sum_p a_p v_p          =  sum_p a_p W x_p  +  s B (sum_p a_p A x_p),

what each trial has for each of the P positions of audio is A x_p, as wide as its rank, and its H T weights. All trials'
queries lie side by side: products with W x are as many as the clips, and W x, which is not trained, has no gradient.

Legend: N trials, B clips, E = B * N in that order, T tokens, M = N * T, P positions of audio, H heads, C width of a
head, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def low_rank_attention(
    q_HBMC: Tensor,
    k_HBPC: Tensor,
    v_HBPC: Tensor,
    q_low_HETR: Tensor | None,
    k_low_ERP: Tensor | None,
    v_low_ERP: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Weights by softmax of q . k, which is not scaled, and what they sum up; all in the precision of q.

    Args:
        q_HBMC: q of each trial and token.
        k_HBPC: W x of keys; never with a gradient.
        v_HBPC: W x of values; never with a gradient.
        q_low_HETR: s B^T q; None: keys have no adapter.
        k_low_ERP: A x of keys; None likewise.
        v_low_ERP: A x of values; None: they have no adapter. Its rank may be another.

    Returns:
        sum a W x (H, B, M, C), and sum a A x (H, E, T, R) where values have an adapter.
    """
    found: tuple[Tensor, Tensor | None] = _Attention.apply(q_HBMC, k_HBPC, v_HBPC, q_low_HETR, k_low_ERP, v_low_ERP)
    return found


class _Attention(torch.autograd.Function):
    """Heads are taken one after the other where trials differ: so each product lies whole in what it is added to."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HBMC: Tensor,
        k_HBPC: Tensor,
        v_HBPC: Tensor,
        q_low_HETR: Tensor | None,
        k_low_ERP: Tensor | None,
        v_low_ERP: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(q_HBMC.device.type, enabled=False):
            score_HBMP = _product(q_HBMC, k_HBPC.mT)
            if q_low_HETR is not None and k_low_ERP is not None:
                _add(score_HBMP, q_low_HETR, k_low_ERP)
            weight_HBMP = score_HBMP.softmax(-1)
            del score_HBMP
            y_HBMC = _product(weight_HBMP, v_HBPC)
            y_low_HETR = None if v_low_ERP is None else _each(weight_HBMP, v_low_ERP.mT)
        ctx.save_for_backward(k_HBPC, v_HBPC, q_low_HETR, k_low_ERP, v_low_ERP, weight_HBMP)
        return y_HBMC, y_low_HETR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_y_HBMC: Tensor, into_y_low_HETR: Tensor | None) -> tuple[Tensor | None, ...]:
        k_HBPC, v_HBPC, q_low_HETR, k_low_ERP, v_low_ERP, weight_HBMP = ctx.saved_tensors
        into_weight_HBMP = _product(into_y_HBMC, v_HBPC.mT)
        into_v_low_ERP = None
        if v_low_ERP is not None:
            assert into_y_low_HETR is not None
            _add(into_weight_HBMP, into_y_low_HETR, v_low_ERP)
            into_v_low_ERP = _over_heads(into_y_low_HETR, weight_HBMP)
        into_score_HBMP = torch._softmax_backward_data(into_weight_HBMP, weight_HBMP, -1, weight_HBMP.dtype)
        del into_weight_HBMP
        into_q_HBMC = _product(into_score_HBMP, k_HBPC)
        into_q_low_HETR = into_k_low_ERP = None
        if q_low_HETR is not None:
            into_q_low_HETR = _each(into_score_HBMP, k_low_ERP.mT)
            into_k_low_ERP = _over_heads(q_low_HETR, into_score_HBMP)
        return into_q_HBMC, None, None, into_q_low_HETR, into_k_low_ERP, into_v_low_ERP


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Of four dimensions: as `matmul`, which asks whether it should broadcast, but by one call."""
    found = torch.bmm(one.flatten(0, 1), other.flatten(0, 1))
    return found.unflatten(0, one.shape[:2])


def _by_trial(each_HBMP: Tensor, count: int) -> Tensor:
    """(H, B, M, P) as (H, E, T, P), for E of `count`: of a head, what is each trial's lies together."""
    return each_HBMP.view(len(each_HBMP), count, -1, each_HBMP.shape[-1])


def _add(to_HBMP: Tensor, one_HETR: Tensor, other_ERP: Tensor) -> None:
    """Add each trial's product where the sum lies."""
    for to_ETP, one_ETR in zip(_by_trial(to_HBMP, len(other_ERP)), one_HETR, strict=True):
        to_ETP.baddbmm_(one_ETR, other_ERP)


def _each(of_HBMP: Tensor, other_EPR: Tensor) -> Tensor:
    """Each trial's product (H, E, T, R)."""
    return torch.stack([torch.bmm(of_ETP, other_EPR) for of_ETP in _by_trial(of_HBMP, len(other_EPR))])


def _over_heads(one_HETR: Tensor, other_HBMP: Tensor) -> Tensor:
    """Each trial's product over its tokens and heads (E, R, P)."""
    found: Tensor | None = None
    for one_ETR, other_ETP in zip(one_HETR, _by_trial(other_HBMP, one_HETR.shape[1]), strict=True):
        found = torch.bmm(one_ETR.mT, other_ETP) if found is None else found.baddbmm_(one_ETR.mT, other_ETP)
    assert found is not None
    return found
