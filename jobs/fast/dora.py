"""DoRA at LoRA's cost: row norms once per optimizer step, in float32, and the magnitude folded into one scale.

PEFT adds, in every forward pass of a layer, B @ A to a copy of W for the norms n of its rows, and keeps that for the
backward pass. But n^2 = ||W||^2 + 2 s B . (W A^T) + s^2 B . (B A A^T), row by row: products with the rank as one side,
and the same until a step changes A or B. With g = m / n, and n detached as PEFT has it, a layer is

    y = g * (W x + s B A x) + b

which is one product with W, one of low rank, and one scale. It equals PEFT's at dropout 0 and in evaluation. In
training PEFT drops the input of a base product too, y = W x + b + (g - 1) * W d(x) + g * s B A d(x), and no scale gives
that. The input of the low-rank branch alone can be dropped: y = g * (W x + s B A d(x)) + b.

Letters after names: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jobs.adapter import ADAPTER_NAME, lora_layers
from jobs.fast.plain import is_in_use, is_plain, trains_base

Dropout = Literal["branch", "peft"]


@torch.inference_mode(False)
@torch.no_grad()
def row_squares(weight_OI: Tensor) -> Tensor:
    """||W||^2 of every row (O), in float32 at least."""
    return torch.linalg.vector_norm(weight_OI, dim=-1, dtype=_wide(weight_OI)).square()


@torch.inference_mode(False)  # what was first computed while transcribing is used in training too
@torch.no_grad()
def row_norms(weight_OI: Tensor, squares_O: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float | Tensor) -> Tensor:
    """Norms of the rows of W + s B A, of one adapter or of many over the same base; never with a gradient.

    Args:
        weight_OI: W.
        squares_O: `row_squares` of W.
        a_RI: A (..., R, I).
        b_OR: B (..., O, R).
        scale: s, a number or (...).

    Returns:
        (..., O) in float32, or in float64 where W is; also under autocast and for weights in bfloat16.
    """
    dtype = _wide(weight_OI)
    with torch.autocast(weight_OI.device.type, enabled=False):
        weight_OI, a_RI, b_OR = weight_OI.to(dtype), a_RI.to(dtype), b_OR.to(dtype)
        if isinstance(scale, Tensor):
            scale = scale.to(dtype)[..., None, None]
        a_RI = scale * a_RI
        # All adapters' rows of A as one matrix: one product with W.
        product_OR = nn.functional.linear(a_RI, weight_OI).mT
        change_O = (b_OR * (2 * product_OR + b_OR @ (a_RI @ a_RI.mT))).sum(-1)
        # An update that takes a row away leaves rounding, and may leave less than nothing.
        least_O = squares_O * torch.finfo(dtype).eps
        return torch.maximum(squares_O + change_O, least_O).sqrt()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class BranchDropout(DoraLinearVariant):
    """PEFT's DoRA, with lora_dropout on the low-rank branch alone: what the fast path computes, at PEFT's cost."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """The layer's output, of its base layer's."""
        return result + module.lora_magnitude_vector[active_adapter](
            module.lora_dropout[active_adapter](x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result,
            adapter_name=active_adapter,
        )


def speed_up(model: Any, dropout: Dropout = "branch", *, fast: bool = True) -> FastDora:
    """Set how the DoRA layers of a PeftModel compute; parameters, their names, merging and all else stay PEFT's.

    Layers other than plain linear ones, and those with ephemeral offload, stay PEFT's in all; so does every call that
    the fast path does not cover: adapters that are merged or disabled, other adapters, a base that is trained too.

    Args:
        model: with or without DoRA; without, nothing changes.
        dropout: what `lora_dropout` drops in training: `branch` or, at PEFT's cost, what PEFT drops.
        fast: whether to compute with norms that are kept, and one scale; if not, PEFT's own layers compute.
    """
    found: dict[str, _Layer] = {}
    for name, layer in lora_layers(model):
        if type(layer) is not Linear or not isinstance(layer.lora_variant.get(ADAPTER_NAME), DoraLinearVariant):
            continue
        layer.lora_variant[ADAPTER_NAME] = BranchDropout() if dropout == "branch" else DoraLinearVariant()
        layer.__dict__.pop("forward", None)
        if fast and is_plain(layer) and not layer.ephemeral_gpu_offload:
            found[name] = _Layer(layer, branch=dropout == "branch")
            layer.forward = found[name].forward
    return FastDora(found)


class FastDora:
    """The layers of a model that compute by the fast path.

    A layer notices by itself that A, B, W or the scale have changed, and norms that were kept are then made anew: when
    parameters are assigned, loaded, or changed in place. Two ways of changing them leave no trace: an optimizer with
    `fused=True`, and `parameter.data.add_(...)`. After those, call `refresh`; where it was W, `speed_up` anew.
    """

    def __init__(self, layers: dict[str, _Layer]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def refresh(self) -> None:
        """Have every layer compute its norms anew when they are next needed: to be called after each optimizer step."""
        for layer in self._layers.values():
            layer.forget()

    def norms(self) -> dict[str, Tensor]:
        """The norms (O) by the layers' names."""
        return {name: layer.norm() for name, layer in self._layers.items()}


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was: what shares its memory, so that nothing else can come to be there, and its version."""

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(tensor.detach(), _version(tensor))

    def still(self, tensor: Tensor) -> bool:
        version = _version(tensor)
        return version is not None and version == self.version and tensor.data_ptr() == self.tensor.data_ptr()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class _Layer:
    """One layer's forward pass, and the norms that it keeps."""

    def __init__(self, layer: Any, *, branch: bool) -> None:
        self._layer, self._branch = layer, branch
        self._squares_O: Tensor
        self._norm_O: Tensor
        self._base: _Seen | None = None
        self._factors: tuple[_Seen, _Seen, float] | None = None

    def forget(self) -> None:
        """Compute norms anew when they are next needed; ||W||^2 is kept."""
        self._factors = None

    def norm(self) -> Tensor:
        """The rows' norms, computed if something has changed."""
        layer = self._layer
        weight = layer.base_layer.weight
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        scale = layer.scaling[ADAPTER_NAME]
        based = self._base is not None and self._base.still(weight)
        if based and self._factors is not None:
            seen_a, seen_b, seen_scale = self._factors
            if seen_a.still(a) and seen_b.still(b) and seen_scale == scale:
                return self._norm_O
        if not based:
            self._squares_O, self._base = row_squares(weight), _Seen.of(weight)
        self._norm_O = row_norms(weight, self._squares_O, a, b, scale)
        self._factors = (_Seen.of(a), _Seen.of(b), scale)
        return self._norm_O

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the layer's own."""
        layer = self._layer
        dropout = layer.lora_dropout[ADAPTER_NAME]
        drops = layer.training and not isinstance(dropout, nn.Identity)
        base = layer.base_layer
        if args or kwargs or not is_in_use(layer) or trains_base(layer) or (drops and not self._branch):
            output: Tensor = Linear.forward(layer, x, *args, **kwargs)
            return output
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        magnitude = layer.lora_magnitude_vector[ADAPTER_NAME].weight
        norm_O, scale = self.norm(), layer.scaling[ADAPTER_NAME]
        if not torch.is_grad_enabled():
            return _folded(x, None, base.weight, base.bias, a, b, magnitude / norm_O, scale)[0]
        folded: Tensor = _Folded.apply(
            x, dropout(x) if drops else None, base.weight, base.bias, a, b, magnitude, norm_O, scale
        )
        return folded


def _folded(
    x: Tensor,
    h: Tensor | None,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    g_O: Tensor,
    scale: float,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y = g * W x + (g s B) A h + b in the dtype that autocast asks for, or else that of W; h is x where None.

    Returns:
        y, and what its gradients want: h, A h and W x, then W, A and g s B as they were used.
    """
    low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    folded_OR = ((g_O * scale).unsqueeze(1) * b_OR).to(low or b_OR.dtype)
    if low is not None:
        x, weight_OI, a_RI = x.to(low), weight_OI.to(low), a_RI.to(low)
    x_TI = x.reshape(-1, x.shape[-1])
    h_TI = (x_TI if h is None else h.reshape(x_TI.shape)).to(a_RI.dtype)
    base_TO, low_TR = torch.mm(x_TI, weight_OI.t()), torch.mm(h_TI, a_RI.t())
    if bias_O is None:
        y_TO = torch.mm(low_TR, folded_OR.t())
    else:
        y_TO = torch.addmm(bias_O.to(folded_OR.dtype), low_TR, folded_OR.t())
    # By `out`: in the precision of the scale, and rounded once, with no pass for a cast.
    y_TO = torch.addcmul(y_TO, base_TO, g_O, out=y_TO if y_TO.dtype == base_TO.dtype else torch.empty_like(base_TO))
    return y_TO.view(*x.shape[:-1], len(weight_OI)), (h_TI, low_TR, base_TO, weight_OI, a_RI, folded_OR)


class _Folded(torch.autograd.Function):
    """`_folded` with g = m / n, and its gradients; W, b and n get none."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor | None,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        magnitude_O: Tensor,
        norm_O: Tensor,
        scale: float,
    ) -> Tensor:
        g_O = magnitude_O / norm_O
        y, kept = _folded(x, h, weight_OI, bias_O, a_RI, b_OR, g_O, scale)
        ctx.save_for_backward(*kept, b_OR, g_O, norm_O)
        ctx.like_x, ctx.h_dtype, ctx.scale = (x.shape, x.dtype), h.dtype if h is not None else None, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, into_y: Tensor) -> tuple[Tensor | None, ...]:
        h_TI, low_TR, base_TO, weight_OI, a_RI, folded_OR, b_OR, g_O, norm_O = ctx.saved_tensors
        wants_x, wants_h, _, _, wants_a, _, _, _, _ = ctx.needs_input_grad
        shape, dtype = ctx.like_x
        into_y_TO = into_y.reshape(base_TO.shape)
        narrow_TO = into_y_TO.to(folded_OR.dtype)
        # Of B, without the scales before it, and of what it adds to the gradient of m.
        product_OR = ctx.scale * (narrow_TO.t() @ low_TR).to(norm_O.dtype)
        into_b = g_O.unsqueeze(1) * product_OR
        # By addcmul: in the norms' precision, with no pass for a cast. In float16 products of a scaled loss overflow.
        into_base_O = torch.addcmul(torch.zeros_like(norm_O), into_y_TO, base_TO).sum(0)
        into_m = (into_base_O + (b_OR * product_OR).sum(1)) / norm_O
        into_low_TR = narrow_TO @ folded_OR
        into_a = into_low_TR.t() @ h_TI if wants_a else None
        into_x = into_h = None
        if wants_x:
            scaled_TO = torch.mul(into_y_TO, g_O, out=torch.empty_like(base_TO))
            into_x = torch.mm(scaled_TO, weight_OI)
            if ctx.h_dtype is None:
                into_x.addmm_(into_low_TR.to(into_x.dtype), a_RI.to(into_x.dtype))
            into_x = into_x.view(shape).to(dtype)
        if wants_h:
            into_h = torch.mm(into_low_TR, a_RI).view(shape).to(ctx.h_dtype)
        return into_x, into_h, None, None, into_a, into_b, into_m, None, None
