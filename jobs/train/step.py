"""The forward pass of a training step and its loss."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.batches import Batch
from jobs.fast.encoder_outputs import Encode, Heard
from jobs.model import whisper_of
from jobs.tokens import IGNORE


def forward_loss(model: Any, batch: Batch, device: torch.device, *, freeze_encoder: bool) -> Tensor:
    """Cross-entropy of one batch, summed over its label tokens (the caller divides by the global count).

    Args:
        model: a Whisper model or a PeftModel around one.
        batch: features (B, M, F) or encoder outputs, decoder inputs and labels (B, T).
        device: where the model is.
        freeze_encoder: run the encoder without gradients and without dropout.

    Returns:
        float32 scalar.
    """
    heard: dict[str, Any] = {}
    if freeze_encoder or batch.heard is not None:
        # A tuple: with a fresh output object transformers would run the encoder again.
        heard["encoder_outputs"] = (encoder_output(model, batch.features_BMF, batch.heard),)
    else:
        heard["input_features"] = batch.features_BMF.to(device, non_blocking=True)
    logits_BTV = model(**heard, decoder_input_ids=batch.inputs_BT.to(device, non_blocking=True), use_cache=False).logits
    labels_BT = batch.labels_BT.to(device, non_blocking=True)
    return cross_entropy(logits_BTV, labels_BT)


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed over the label tokens; float32 scalar."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


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
        hidden_BPD: Tensor = encoder(features_BMF).last_hidden_state
    encoder.train(was_training)
    return hidden_BPD


def encoder_of(model: Any) -> Any:
    """The encoder inside a Whisper model or a PeftModel around one."""
    return whisper_of(model).model.encoder
