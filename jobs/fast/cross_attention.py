"""Cross-attention under the adapters of many trials, in which little is as long as the audio.

A DoRA's gain g and a bias b are taken from keys and values, of P positions, to queries and outputs, of T tokens:

    q . (g * k_p + b)           differs from  (g * q) . k_p  by what is the same for all p, which softmax does not see;
    sum_p a_p (g * v_p + b)     equals  g * sum_p a_p v_p + b,  as the a_p sum to 1.

Legend: N trials, B clips, R = N * B rows, T tokens, P positions of audio, D width, H heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from jobs.fast.stack import StackedLinear, with_gain


class CrossAttention(nn.Module):
    """Takes the place of a decoder layer's cross-attention in the model that all trials share; it has no dropout.

    Args:
        attention: transformers' WhisperAttention, whose projections are StackedLinear.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj: StackedLinear = attention.q_proj
        self.k_proj: StackedLinear = attention.k_proj
        self.v_proj: StackedLinear = attention.v_proj
        self.out_proj: StackedLinear = attention.out_proj
        self.num_heads, self.head_dim, self.scaling = attention.num_heads, attention.head_dim, attention.scaling

    def forward(
        self, hidden_states: Tensor, key_value_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """(R, T, D) and the audio of each distinct batch (U * B, P, D) give (R, T, D) and no weights."""
        q_RTD = self.q_proj(hidden_states) * self.scaling
        k_RPD, k_gain_N1D = self.k_proj.before_gain(key_value_states)
        v_RPD, v_gain_N1D = self.v_proj.before_gain(key_value_states)
        if k_gain_N1D is not None:
            q_RTD = with_gain(q_RTD, k_gain_N1D, None)
        # Views: transformers copies all keys and values to have each head's lie together, which no kernel needs.
        q_RHTC, k_RHPC, v_RHPC = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q_RTD, k_RPD, v_RPD)
        )
        y_RHTC = F.scaled_dot_product_attention(q_RHTC, k_RHPC, v_RHPC, attn_mask=attention_mask, scale=1.0)
        y_RTD = y_RHTC.transpose(1, 2).flatten(2)
        if v_gain_N1D is not None:
            y_RTD = with_gain(y_RTD, v_gain_N1D, self.v_proj.base.bias)
        return self.out_proj(y_RTD), None
