"""Cross-entropy straight from the decoder's output: the head's logits are never kept, and padding is not computed.

transformers makes logits of all positions, and autograd keeps them until the backward pass, in float32: over Whisper's
vocabulary of 51,865 they are the largest thing in the decoder. The gradient of a position's loss,

    dL/dh = (softmax(W h) - onehot(label)) W,

needs nothing but what the forward pass has at hand, so it is computed there, for some rows at a time in one buffer, and
for the positions that have a label alone.

Shapes: M positions with a label, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_ROWS_CPU, _ROWS_GPU = 256, 1024


def is_plain_head(head: Any) -> bool:
    """Whether an output layer is one that `token_losses` computes: linear, frozen, without a bias or an adapter."""
    parameters = dict(head.named_parameters())
    return type(head) is nn.Linear and parameters.keys() == {"weight"} and not parameters["weight"].requires_grad


def token_losses(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
    """Cross-entropy of each position, in float32 (M,), as `F.cross_entropy(F.linear(h, W).float(), labels)` has it.

    Args:
        hidden_MD: the decoder's output at positions that have a label.
        weight_VD: of the head; it gets no gradient.
        labels_M: token ids, on the same device.
    """
    found: Tensor = _TokenLosses.apply(hidden_MD, weight_VD, labels_M)
    return found


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> Tensor:
        kind, dtype = hidden_MD.device.type, hidden_MD.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden_MD.to(dtype), weight_VD.to(dtype)
        losses_M = torch.empty(len(hidden), device=hidden.device)
        gradient_MD = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _ROWS_CPU if kind == "cpu" else _ROWS_GPU
        buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=dtype, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), rows):
                part, labels = slice(start, start + rows), labels_M[start : start + rows, None]
                logits = torch.mm(hidden[part], weight.t(), out=buffer[: len(labels)])
                said, largest = logits.gather(1, labels).float(), logits.amax(1, keepdim=True).float()
                share = _softmax(logits)
                # log-sum-exp by way of the likeliest token: its share is never near nothing.
                losses_M[part] = (largest - share.amax(1, keepdim=True).log() - said)[:, 0]
                if gradient_MD is not None:
                    share.scatter_add_(1, labels, torch.full_like(said, -1.0))
                    torch.mm(share.to(dtype), weight, out=gradient_MD[part])
        if gradient_MD is not None:
            ctx.save_for_backward(gradient_MD)
        return losses_M

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor, None, None]:
        (gradient_MD,) = ctx.saved_tensors
        return (gradient_MD * given[0][:, None]).to(gradient_MD.dtype), None, None


def _softmax(logits_MV: Tensor) -> Tensor:
    """In float32; on a CPU where float32 logits are: new memory costs as much as they do."""
    if logits_MV.device.type == "cpu" and logits_MV.dtype == torch.float32:
        return torch.softmax(logits_MV, 1, out=logits_MV)
    return torch.softmax(logits_MV, 1, dtype=torch.float32)
