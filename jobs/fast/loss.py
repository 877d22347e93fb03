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
        attends = kind == "cpu" and dtype == torch.float32 and len(hidden_MD) > 0
        compute = _by_attention if attends else _in_chunks
        learns = ctx.needs_input_grad[0]
        with torch.autocast(kind, enabled=False):
            losses_M, gradient_MD = compute(hidden_MD.to(dtype), weight_VD.to(dtype), labels_M, learns)
        if learns:
            ctx.save_for_backward(gradient_MD)
        return losses_M

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Tensor, None, None]:
        (gradient_MD,) = ctx.saved_tensors
        return (gradient_MD * given[0][:, None]).to(gradient_MD.dtype), None, None


def _in_chunks(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
    """Losses (M,), and their gradients (M, D) if they are wanted."""
    device = hidden_MD.device
    losses_M = torch.empty(len(hidden_MD), device=device)
    gradient_MD = torch.empty_like(hidden_MD) if learns else None
    rows = _ROWS_CPU if device.type == "cpu" else _ROWS_GPU
    buffer = torch.empty(min(rows, len(hidden_MD)), len(weight_VD), dtype=hidden_MD.dtype, device=device)
    for start in range(0, len(hidden_MD), rows):
        part, labels = slice(start, start + rows), labels_M[start : start + rows, None]
        logits = torch.mm(hidden_MD[part], weight_VD.t(), out=buffer[: len(labels)])
        said, largest = logits.gather(1, labels).float(), logits.amax(1, keepdim=True).float()
        share = torch.softmax(logits, 1, dtype=torch.float32)
        # log-sum-exp by way of the likeliest token: its share is never near nothing.
        losses_M[part] = (largest - share.amax(1, keepdim=True).log() - said)[:, 0]
        if gradient_MD is not None:
            share.scatter_add_(1, labels, torch.full_like(said, -1.0))
            torch.mm(share.to(weight_VD.dtype), weight_VD, out=gradient_MD[part])
    return losses_M, gradient_MD


def _by_attention(hidden_MD: Tensor, weight_VD: Tensor, labels_M: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
    """The same, in float32 on a CPU."""
    query, keys = hidden_MD[None, None], weight_VD[None, None]
    # scaled_dot_product_attention is this, but keeps the log-sum-exp to itself.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mean, log_sum = attend(query, keys, keys, 0.0, False, scale=1.0)
    said_MD = weight_VD[labels_M]
    return log_sum.view(-1) - (hidden_MD * said_MD).sum(1), mean.view_as(hidden_MD) - said_MD if learns else None
