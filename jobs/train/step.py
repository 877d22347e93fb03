"""The forward pass of a training step and its loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.batches import Batch
from jobs.fast.causal_mask import plain_rows
from jobs.fast.encoder_outputs import Encode, Heard
from jobs.fast.loss import is_plain_head, token_losses
from jobs.halves import in_halves
from jobs.model import whisper_of
from jobs.tokens import IGNORE


def forward_loss(
    model: Any, batch: Batch, device: torch.device, *, freeze_encoder: bool, fast_loss: bool = True
) -> Tensor:
    """Cross-entropy of one batch, summed over its label tokens (the caller divides by the global count).

    Args:
        model: a Whisper model or a PeftModel around one.
        batch: features (B, M, F) or encoder outputs, decoder inputs and labels (B, T).
        device: where the model is.
        freeze_encoder: run the encoder without gradients and without dropout.
        fast_loss: compute no logits where there is no label, and keep none; False: as transformers does.

    Returns:
        float32 scalar.
    """
    heard: dict[str, Any] = {}
    if freeze_encoder or batch.heard is not None:
        # A tuple: with a fresh output object transformers would run the encoder again.
        heard["encoder_outputs"] = (encoder_output(model, batch.features_BMF, batch.heard),)
    else:
        heard["input_features"] = batch.features_BMF.to(device, non_blocking=True)
    inputs_BT = batch.inputs_BT.to(device, non_blocking=True)
    whisper = whisper_of(model)
    if fast_loss and is_plain_head(whisper.proj_out):
        with plain_rows():
            hidden_BTD = whisper.model(**heard, decoder_input_ids=inputs_BT, use_cache=False).last_hidden_state
        return labelled_losses(hidden_BTD, whisper.proj_out.weight, batch.labels_BT).sum()
    with plain_rows():
        logits_BTV = model(**heard, decoder_input_ids=inputs_BT, use_cache=False).logits
    labels_BT = batch.labels_BT.to(device, non_blocking=True)
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def labelled_losses(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy of each label token, row by row (M,), in float32.

    Args:
        hidden_BTD: the decoder's output.
        weight_VD: of the head.
        labels_BT: where it is at hand without waiting for a GPU: on the CPU.
    """
    labels = labels_BT.flatten()
    places = (labels != IGNORE).nonzero()[:, 0]
    device = hidden_BTD.device
    hidden_MD = hidden_BTD.flatten(0, 1).index_select(0, places.to(device, non_blocking=True))
    return token_losses(hidden_MD, weight_VD, labels[places].to(device, non_blocking=True))


def encoder_output(model: Any, features_BMF: Tensor, heard: Heard | None) -> Tensor:
    """The encoder's output (B, P, D) of B clips: what is kept of it, and the rest computed without gradients.

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        features_BMF: of all clips or, with `heard`, of those that are missing in it.
        heard: what is kept.
    """
    encode = encode_by(model)
    if heard is not None:
        return heard.complete(features_BMF, encode)
    return encode(features_BMF.to(next(model.parameters()).device, non_blocking=True))


def encode_by(model: Any) -> Encode:
    """The encoder of a model as in inference: a checkpoint's config may ask for dropout in training."""
    return functools.partial(_encode, encoder_of(model))


def _encode(encoder: Any, features_BMF: Tensor) -> Tensor:
    was_training = encoder.training
    encoder.eval()
    with torch.no_grad():
        parts: list[Tensor] = in_halves(
            lambda part: encoder(features_BMF[part]).last_hidden_state, slice(0, len(features_BMF))
        )
    encoder.train(was_training)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def encoder_of(model: Any) -> Any:
    """The encoder inside a Whisper model or a PeftModel around one."""
    return whisper_of(model).model.encoder
