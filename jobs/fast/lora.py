"""LoRA in fewer passes over what is as large as a layer's output.

PEFT's layer makes W x + b, B A d(x), that times s, and the sum of both: four tensors of the output's size, and in the
backward pass the gradient times s, and two of the input's size with their sum. With s taken to B, where it is small,
and each second product added to the first where that lies,

    y = W x + b,  y += (A d(x)) (s B)^T         and back         dx = dy W,  dx += (dy s B) A

it is one tensor each, and what is multiplied is the same.

Letters after names: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jobs.adapter import ADAPTER_NAME, lora_layers
from jobs.fast.plain import is_dora, is_in_use, is_plain, trains_base


def speed_up(model: Any, *, fast: bool = True) -> int:
    """Set how the LoRA layers of a PeftModel compute; parameters, their names, merging and all else stay PEFT's.

    Layers other than plain linear ones stay PEFT's in all; so does every call that the fast path does not cover:
    adapters that are merged or disabled, other adapters, a base that is trained too or, without autocast, that is of
    other precision than its adapter.

    Args:
        model: with LoRA, DoRA or neither; layers with DoRA do not change.
        fast: whether to compute so; if not, PEFT's own layers compute.

    Returns:
        how many layers compute so.
    """
    found = 0
    for _, layer in lora_layers(model):
        if is_plain(layer) and not is_dora(layer):
            layer.__dict__.pop("forward", None)
            if fast:
                layer.forward = _Layer(layer).forward
                found += 1
    return found


class _Layer:
    """One layer's forward pass."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the layer's own."""
        layer = self._layer
        base, a, b = layer.base_layer, layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        alike = torch.is_autocast_enabled(x.device.type) or x.dtype == base.weight.dtype == a.dtype
        if args or kwargs or not alike or not is_in_use(layer) or trains_base(layer):
            output: Tensor = Linear.forward(layer, x, *args, **kwargs)
            return output
        dropout, scale = layer.lora_dropout[ADAPTER_NAME], layer.scaling[ADAPTER_NAME]
        h = dropout(x) if layer.training and not isinstance(dropout, nn.Identity) else None
        if not torch.is_grad_enabled():
            return _added(x, h, base.weight, base.bias, a, b, scale)[0]
        added: Tensor = _Added.apply(x, h, base.weight, base.bias, a, b, scale)
        return added


def _added(
    x: Tensor, h: Tensor | None, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y = W x + b + (s B) A h in the dtype that autocast asks for, or else that of W; h is x where None.

    Returns:
        y, and what its gradients want: h and A h, then W, A and s B as they were used.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight_OI, a_RI = x.to(dtype), weight_OI.to(dtype), a_RI.to(dtype)
        bias_O = None if bias_O is None else bias_O.to(dtype)
    scaled_OR = (scale * b_OR).to(weight_OI.dtype)
    x_TI = x.reshape(-1, x.shape[-1])
    h_TI = x_TI if h is None else h.reshape(x_TI.shape).to(a_RI.dtype)
    low_TR = torch.mm(h_TI, a_RI.t())
    y_TO = nn.functional.linear(x_TI, weight_OI, bias_O).addmm_(low_TR, scaled_OR.t())
    return y_TO.view(*x.shape[:-1], len(weight_OI)), (h_TI, low_TR, weight_OI, a_RI, scaled_OR)


class _Added(torch.autograd.Function):
    """`_added`, and its gradients; W and b get none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        y, kept = _added(x, h, weight_OI, bias_O, a_RI, b_OR, scale)
        ctx.save_for_backward(*kept)
        ctx.like_x, ctx.h_dtype, ctx.scale = (x.shape, x.dtype), h.dtype if h is not None else None, scale
        ctx.b_dtype = b_OR.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_y: Tensor) -> tuple[Tensor | None, ...]:
        h_TI, low_TR, weight_OI, a_RI, scaled_OR = ctx.saved_tensors
        wants_x, wants_h, _, _, wants_a, wants_b, _ = ctx.needs_input_grad
        shape, dtype = ctx.like_x
        into_y_TO = into_y.reshape(-1, into_y.shape[-1])
        into_b = ctx.scale * (into_y_TO.t() @ low_TR).to(ctx.b_dtype) if wants_b else None
        into_low_TR = into_y_TO @ scaled_OR
        into_a = into_low_TR.t() @ h_TI if wants_a else None
        into_x = into_h = None
        if wants_x:
            into_x = into_y_TO @ weight_OI
            if ctx.h_dtype is None:
                into_x.addmm_(into_low_TR, a_RI)
            into_x = into_x.view(shape).to(dtype)
        if wants_h:
            into_h = (into_low_TR @ a_RI).view(shape).to(ctx.h_dtype)
        return into_x, into_h, None, None, into_a, into_b, None
