"""Matrices held as autocast multiplies them, for as long as texts are decoded.

Autocast remembers only casts of weights that are trained: of a frozen model in float32 it casts every matrix anew for
each token, which moves more memory than the products do. Here they are cast once, beside the model's own. What is
multiplied is the same to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def autocast_dtype(model: nn.Module) -> torch.dtype | None:
    """In what precision autocast has a model multiply now; None: there is no autocast."""
    kind = next(model.parameters()).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextlib.contextmanager
def computes_with(layer: Any, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Have a layer be a linear one with these parameters.

    Args:
        layer: which.
        weight_OI: its matrix.
        bias_O: its bias, if it has one.
        dtype: of autocast; None: there is none.
    """
    before = layer.__dict__.get("forward")
    bias_O = None if bias_O is None else cast(bias_O, dtype)
    layer.forward = functools.partial(F.linear, weight=cast(weight_OI, dtype), bias=bias_O)
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def is_cast(layer: Any, dtype: torch.dtype | None) -> bool:
    """Whether a layer is torch's linear one, computes as such, and has a matrix that autocast casts."""
    plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    return plain and dtype is not None and layer.weight.dtype not in (dtype, torch.float64)


@torch.no_grad()
def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What autocast makes of a tensor that it multiplies, and no gradient flows through."""
    return tensor if dtype is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def with_cast_matrix(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """Another layer with the same bias, and the matrix in autocast's precision."""
    twin = copy.copy(layer)
    twin._parameters = layer._parameters | {"weight": nn.Parameter(cast(layer.weight, dtype), requires_grad=False)}
    return twin
