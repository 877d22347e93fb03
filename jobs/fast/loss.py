"""Cross-entropy straight from the decoder's output: the head's logits are never kept, and padding is not computed.

transformers makes logits of all positions, and autograd keeps them until the backward pass, in float32: over Whisper's
vocabulary of 51,865 they are the largest thing in the decoder. The gradient of a position's loss,

    dL/dh = (softmax(W h) - onehot(label)) W,

needs nothing but what the forward pass has at hand, so it is computed there, for some rows at a time in one buffer, and
for the positions that have a label alone. softmax(W h) W is attention, of h over the vocabulary: in float32 on a CPU
torch's flash kernel computes it, and the log-sum-exp that the loss needs, in blocks that stay in the cache.

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
        if kind == "cpu" and dtype == torch.float32 and len(hidden):
            found_M, through_MD = _by_attention(hidden, weight, labels_M)
            ctx.save_for_backward(through_MD)
            return found_M
        losses_M = torch.empty(len(hidden), device=hidden.device)
        gradient_MD = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = _ROWS_CPU if kind == "cpu" else _ROWS_GPU
        buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=dtype, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden), rows):
                part, labels = slice(start, start + rows), labels_M[start : start + rows, None]
                logits = torch.mm(hidden[part], weight.t(), out=buffer[: len(labels)])
                said, largest = logits.gather(1, labels).float(), logits.amax(1, keepdim=True).float()
                share = torch.softmax(logits, 1, dtype=torch.float32)
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


def _by_attention(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (M,) and their gradients (M, D) on a CPU."""
    query, keys = hidden_MD[None, None], weight_VD[None, None]
    # scaled_dot_product_attention is this, but keeps the log-sum-exp to itself.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mean, log_sum = attend(query, keys, keys, 0.0, False, scale=1.0)
    said_MD = weight_VD[labels_M]
    return log_sum.view(-1) - (hidden_MD * said_MD).sum(1), mean.view_as(hidden_MD) - said_MD
