"""Greedy decoding of a batch: keys and values in memory that is allocated once, and rows that have ended are let go.

transformers' generate() is the reference, and the way wherever this one does not apply (`why_not`): beams, a generation
config that asks for more than suppressed tokens, an attention implementation of its own. What is computed is the same,
layer by layer, by the model's own modules, so adapters of any kind are in it; the sums are those of other shapes, and
two logits that are equal to rounding may change places.

Legend: N models that decode the same clips, B clips, R = N * B rows, of which those still at work; T tokens, P
positions of audio, D width, H heads, C width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.model import whisper_of

NEUTRAL = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "forced_decoder_ids": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
    "watermarking_config": (None,),
    "prompt_lookup_num_tokens": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
    "no_speech_threshold": (None,),
    "logprob_threshold": (None,),
    "compression_ratio_threshold": (None,),
}
"""What a generation config may say for a greedy choice to be the likeliest token that is not suppressed."""

SYNC_STEPS = 8
"""Tokens between two looks at which rows have ended, where a look waits for the device."""


@dataclass(frozen=True)
class Rules:
    """What bounds a transcript.

    Attributes:
        end: the token that ends it.
        suppressed: tokens that are never chosen.
        suppressed_first: those that are not chosen as the first.
        max_new_tokens: the longest, its end counted.
    """

    end: int
    suppressed: Tensor
    suppressed_first: Tensor
    max_new_tokens: int

    @classmethod
    def of(cls, model: Any, max_new_tokens: int) -> Rules:
        """As a model's generation config has them.

        Args:
            model: a Whisper model or a PeftModel around one, on its device.
            max_new_tokens: the longest transcript.
        """
        config, device = whisper_of(model).generation_config, next(model.parameters()).device

        def ids(values: Sequence[int] | None) -> Tensor:
            return torch.tensor(list(values or ()), dtype=torch.long, device=device)

        end = config.eos_token_id
        return cls(
            int(end[0] if isinstance(end, list) else end),
            ids(config.suppress_tokens),
            ids(config.begin_suppress_tokens),
            max_new_tokens,
        )


def why_not(model: Any, num_beams: int) -> str | None:
    """What has transformers' generate() transcribe in place of this; None: nothing.

    Args:
        model: a Whisper model or a PeftModel around one.
        num_beams: beams.
    """
    whisper = whisper_of(model)
    config = whisper.generation_config
    if num_beams > 1:
        return f"evaluation.num_beams is {num_beams}"
    if (attention := whisper.config._attn_implementation) != "sdpa":
        return f"engine.attention is {attention}"
    if isinstance(config.eos_token_id, list) and len(config.eos_token_id) > 1:
        return "the checkpoint's generation config has several end tokens"
    for name, neutral in NEUTRAL.items():
        if (value := getattr(config, name, None)) not in neutral:
            return f"the checkpoint's generation config has {name} {value}"
    return None


def decode(model: Any, audio_BPD: Tensor, prompts_BT: Tensor, rules: Rules, *, models: int = 1) -> list[list[int]]:
    """Transcribe clips by the likeliest token, again and again.

    Args:
        model: a Whisper model or a PeftModel around one; with several models, the one that computes all of them, row
            n * B + b being clip b by model n.
        audio_BPD: the encoder's output.
        prompts_BT: the tokens before each transcript, on the same device.
        rules: what bounds it.
        models: N.

    Returns:
        R transcripts, without their prompts and ends.
    """
    decoder, head = whisper_of(model).model.decoder, whisper_of(model).proj_out
    prompt = prompts_BT.shape[1]
    room = min(prompt + rules.max_new_tokens, decoder.max_target_positions)
    rows = _Rows(models, len(audio_BPD), audio_BPD.device)
    layers = [_Layer(layer, audio_BPD, room) for layer in decoder.layers]
    every = 1 if audio_BPD.device.type == "cpu" else SYNC_STEPS
    chosen_RT = torch.full((rows.count, room - prompt), rules.end, device=audio_BPD.device)
    tokens_RT, at = prompts_BT.repeat(models, 1), 0
    for step in range(room - prompt):
        hidden_RTD = _embed(decoder, tokens_RT, at)
        for layer in layers:
            hidden_RTD = layer.forward(hidden_RTD, at)
        at += tokens_RT.shape[1]
        # The same for logits in half precision: generate() compares them in float32.
        logits_RV = head(decoder.layer_norm(hidden_RTD[:, -1:]))[:, 0].float()
        # Not `logits[:, tokens] = -inf`: for that torch copies the number to a GPU, and waits for it, at each token.
        logits_RV.index_fill_(1, rules.suppressed, -torch.inf)
        if step == 0:
            logits_RV.index_fill_(1, rules.suppressed_first, -torch.inf)
        next_R = torch.where(rows.ended_R, rules.end, logits_RV.argmax(-1))
        chosen_RT[rows.of_R, step] = next_R
        rows.ended_R |= next_R == rules.end
        tokens_RT = next_R[:, None]
        if (step + 1) % every == 0:
            keep_R = rows.shrink()
            if keep_R is not None:
                if len(keep_R) == 0:
                    break
                tokens_RT = tokens_RT[keep_R]
                for layer in layers:
                    layer.keep(keep_R)
    return [row[: row.index(rules.end)] if rules.end in row else row for row in chosen_RT.tolist()]


def _embed(decoder: Any, tokens_RT: Tensor, at: int) -> Tensor:
    positions_TD = decoder.embed_positions.weight[at : at + tokens_RT.shape[1]]
    hidden_RTD: Tensor = decoder.embed_tokens(tokens_RT) + positions_TD
    return hidden_RTD


class _Rows:
    """Which rows are at work: whole clips, since models that are computed together keep the same ones.

    Attributes:
        of_R: the rows' numbers.
        ended_R: whether each has ended.
    """

    def __init__(self, models: int, clips: int, device: torch.device) -> None:
        self._models = models
        self.of_R = torch.arange(models * clips, device=device)
        self.ended_R = torch.zeros(models * clips, dtype=torch.bool, device=device)

    @property
    def count(self) -> int:
        """R."""
        return len(self.of_R)

    def shrink(self) -> Tensor | None:
        """Let clips go that have ended with every model, if they are many enough to be worth it; returns the places of
        those that stay, or None where nothing changes."""
        at_work_B = ~self.ended_R.view(self._models, -1).all(0)
        clips, left = len(at_work_B), int(at_work_B.sum())
        if left and left > 0.75 * clips:
            return None
        keep_R = at_work_B.repeat(self._models).nonzero()[:, 0]
        self.of_R, self.ended_R = self.of_R[keep_R], self.ended_R[keep_R]
        return keep_R


class _Layer:
    """A decoder layer with the keys and values of what it has heard and said.

    Args:
        layer: transformers' layer.
        audio_BPD: the encoder's output.
        room: most tokens.
    """

    def __init__(self, layer: Any, audio_BPD: Tensor, room: int) -> None:
        self._layer, self._room = layer, room
        listening = layer.encoder_attn
        self._heard_k_RHPC = _heads(listening.k_proj(audio_BPD), listening).contiguous()
        self._heard_v_RHPC = _heads(listening.v_proj(audio_BPD), listening).contiguous()
        self._said_k_RHTC: Tensor | None = None
        self._said_v_RHTC: Tensor

    def keep(self, rows_R: Tensor) -> None:
        """Let all other rows go."""
        assert self._said_k_RHTC is not None
        self._heard_k_RHPC, self._heard_v_RHPC = self._heard_k_RHPC[rows_R], self._heard_v_RHPC[rows_R]
        self._said_k_RHTC, self._said_v_RHTC = self._said_k_RHTC[rows_R], self._said_v_RHTC[rows_R]

    def forward(self, hidden_RTD: Tensor, at: int) -> Tensor:
        """The layer's output of tokens that come after `at` others."""
        layer, attention = self._layer, self._layer.self_attn
        x_RTD = layer.self_attn_layer_norm(hidden_RTD)
        end = at + x_RTD.shape[1]
        k_RHTC, v_RHTC = _heads(attention.k_proj(x_RTD), attention), _heads(attention.v_proj(x_RTD), attention)
        if self._said_k_RHTC is None:
            shape = (*k_RHTC.shape[:2], self._room, k_RHTC.shape[3])
            self._said_k_RHTC, self._said_v_RHTC = k_RHTC.new_empty(shape), v_RHTC.new_empty(shape)
        self._said_k_RHTC[:, :, at:end], self._said_v_RHTC[:, :, at:end] = k_RHTC, v_RHTC
        said = self._said_k_RHTC[:, :, :end], self._said_v_RHTC[:, :, :end]
        hidden_RTD = hidden_RTD + _attend(attention, x_RTD, *said, is_causal=end - at > 1)
        x_RTD = layer.encoder_attn_layer_norm(hidden_RTD)
        hidden_RTD = hidden_RTD + _attend(layer.encoder_attn, x_RTD, self._heard_k_RHPC, self._heard_v_RHPC)
        x_RTD = layer.final_layer_norm(hidden_RTD)
        output_RTD: Tensor = hidden_RTD + layer.fc2(layer.activation_fn(layer.fc1(x_RTD)))
        return output_RTD


def _attend(attention: Any, x_RTD: Tensor, k_RHPC: Tensor, v_RHPC: Tensor, *, is_causal: bool = False) -> Tensor:
    # transformers' order: the query is scaled, and not the product.
    q_RHTC = _heads(attention.q_proj(x_RTD) * attention.scaling, attention)
    y_RHTC = F.scaled_dot_product_attention(q_RHTC, k_RHPC, v_RHPC, is_causal=is_causal, scale=1.0)
    output_RTD: Tensor = attention.out_proj(y_RHTC.transpose(1, 2).flatten(2))
    return output_RTD


def _heads(x_RTD: Tensor, attention: Any) -> Tensor:
    return x_RTD.unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
