"""Cross-attention under the adapters of many trials, in which little is as long as the audio.

A DoRA's gain g and a bias b are taken from keys and values, of P positions, to queries and outputs, of T tokens:

    q . (g * k_p + b)           differs from  (g * q) . k_p  by what is the same for all p, which softmax does not see;
    sum_p a_p (g * v_p + b)     equals  g * sum_p a_p v_p + b,  as the a_p sum to 1.

What is left of keys and values need not be made either, see `jobs.fast.low_rank_attention`; weights are then kept for
the backward pass in place of keys and values, which is less as long as T < 2 C. Longer texts have keys and values, and
so has mixed precision: scores would be rounded, which torch's kernels hold in float32.

Legend: N trials, B clips, R = N * B rows, T tokens, P positions of audio, D width, H heads, C width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.fast.low_rank_attention import low_rank_attention
from jobs.fast.stack import Parts, StackedLinear, with_gain
from service.activations import makes_no_keys


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
        half = q_RTD.dtype != torch.float32
        if attention_mask is None and makes_no_keys(q_RTD.shape[1], self.head_dim, half=half):
            return self.out_proj(self._without_keys(q_RTD, key_value_states)), None
        k_RPD, k_gain_N1D = self.k_proj.before_gain(key_value_states)
        v_RPD, v_gain_N1D = self.v_proj.before_gain(key_value_states)
        if k_gain_N1D is not None:
            q_RTD = with_gain(q_RTD, k_gain_N1D, None)
        # Views: transformers copies all keys and values to have each head's lie together, which no kernel needs.
        q_RHTC, k_RHPC, v_RHPC = (self._heads(x).transpose(1, 2) for x in (q_RTD, k_RPD, v_RPD))
        y_RHTC = F.scaled_dot_product_attention(q_RHTC, k_RHPC, v_RHPC, attn_mask=attention_mask, scale=1.0)
        y_RTD = y_RHTC.transpose(1, 2).flatten(2)
        if v_gain_N1D is not None:
            y_RTD = with_gain(y_RTD, v_gain_N1D, self.v_proj.base.bias)
        return self.out_proj(y_RTD), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _without_keys(self, q_RTD: Tensor, audio: Tensor) -> Tensor:
        """What the weights sum up of the values (R, T, D)."""
        keys, values = self.k_proj.parts(audio), self.v_proj.parts(audio)
        if keys.gain_N1O is not None:
            q_RTD = with_gain(q_RTD, keys.gain_N1O, None)
        layout = self.k_proj.layout
        q_NBTD = q_RTD.unflatten(0, (len(layout.members), -1))
        groups = layout.sources
        y_NBTD = torch.cat([self._of_one(q_NBTD, keys, values, *each) for each in enumerate(groups)])
        order = [trial for group in groups for trial in group]
        y_NBTD = layout.chosen(y_NBTD, sorted(range(len(order)), key=order.__getitem__))
        y_RTD = y_NBTD.flatten(0, 1)
        if values.gain_N1O is not None:
            return with_gain(y_RTD, values.gain_N1O, self.v_proj.base.bias)
        return y_RTD if self.v_proj.base.bias is None else y_RTD + self.v_proj.base.bias.to(y_RTD.dtype)

    def _of_one(self, q_NBTD: Tensor, keys: Parts, values: Parts, source: int, trials: list[int]) -> Tensor:
        """Of the trials that hear one batch of audio (n, B, T, D)."""
        chosen = self.k_proj.layout.chosen
        _, clips, tokens, _ = q_NBTD.shape
        q_HBNTC = self._heads(chosen(q_NBTD, trials)).permute(3, 1, 0, 2, 4)
        k_HBPC, v_HBPC = (self._heads(each.base_UBPO[source]).permute(2, 0, 1, 3) for each in (keys, values))
        q_low_HETR = k_low_ERP = v_low_ERP = None
        if keys.low_BNRP is not None and keys.scaled_b_NRO is not None:
            b_HNRC = self._heads(chosen(keys.scaled_b_NRO, trials)).permute(2, 0, 1, 3)
            q_low_HETR = torch.matmul(q_HBNTC, b_HNRC.mT[:, None]).flatten(1, 2)
            k_low_ERP = chosen(keys.low_BNRP, trials, 1).flatten(0, 1)
        if values.low_BNRP is not None:
            v_low_ERP = chosen(values.low_BNRP, trials, 1).flatten(0, 1)
        y_HBMC, y_low_HETR = low_rank_attention(q_HBNTC.flatten(2, 3), k_HBPC, v_HBPC, q_low_HETR, k_low_ERP, v_low_ERP)
        y_HBNTC = y_HBMC.unflatten(2, (-1, tokens))
        if y_low_HETR is not None and values.scaled_b_NRO is not None:
            b_HNRC = self._heads(chosen(values.scaled_b_NRO, trials)).permute(2, 0, 1, 3)
            y_HBNTC = y_HBNTC + torch.matmul(y_low_HETR.unflatten(1, (clips, -1)), b_HNRC[:, None])
        return y_HBNTC.permute(2, 1, 3, 0, 4).flatten(3)
