"""The .pt file that openai-whisper's `whisper.load_model(path)` opens."""

from __future__ import annotations

from pathlib import Path

import torch

from jobs.export.checkpoint import Checkpoint


def write_openai(checkpoint: Checkpoint, folder: Path, precision: str = "") -> Path:
    """Write `model.pt`, weights in the checkpoint's own precision; returns its path.

    Raises:
        UnsupportedError: openai-whisper has no place for this model.
    """
    checkpoint.require_shape("openai")
    config = checkpoint.config
    dims = {
        "n_mels": config.num_mel_bins,
        "n_vocab": config.vocab_size,
        "n_audio_ctx": config.max_source_positions,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": config.encoder_layers,
        "n_text_ctx": config.max_target_positions,
        "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": config.decoder_layers,
    }
    path = folder / "model.pt"
    # The tensors stay backed by the checkpoint's files while torch copies them out one by one.
    torch.save({"dims": dims, "model_state_dict": dict(checkpoint.openai_tensors())}, path)
    return path
