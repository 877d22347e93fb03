"""Whisper models of any shape, for tests."""

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from service.spec.whisper_dims import WhisperDims

NANO = WhisperDims(64, 2, 3, 2, 4, 160, 224, 500, 40, 100, 50)


def meta_whisper(dims: WhisperDims) -> WhisperForConditionalGeneration:
    """A Whisper of that shape, without memory for its weights."""
    config = WhisperConfig(
        **{name: getattr(dims, name) for name in dims.__dataclass_fields__},
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.device("meta"):
        return WhisperForConditionalGeneration(config)
