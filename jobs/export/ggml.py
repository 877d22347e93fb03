"""ggml for whisper.cpp, by the layout that its loader reads (whisper_model_load in whisper.cpp).

In order: magic; eleven int32 hyperparameters; mel filters; the tokens of text; tensors, each with its number of
dimensions, length of its name, type, dimensions from the last to the first, name and data.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import Tensor

from jobs.export.checkpoint import Checkpoint

MAGIC = 0x67676D6C
QUANTISATION_VERSION = 2
VERSION_FACTOR = 1000
"""ftype of a quantised file: version * factor + the kind of its matrices (GGML_QNT_VERSION_FACTOR)."""

KINDS = {"f16": (1, GGMLQuantizationType.F16), "q8_0": (7, GGMLQuantizationType.Q8_0)} | {
    "q5_0": (8, GGMLQuantizationType.Q5_0)
}
"""By precision: ggml's ftype, and the type of each matrix."""

FLOAT32 = (
    "encoder.conv1.bias",
    "encoder.conv2.bias",
    "encoder.positional_embedding",
    "decoder.positional_embedding",
)
"""Of two dimensions, but kept in float32 beside everything of one dimension."""

ROWS = 1024
"""How many rows of a matrix are converted at a time."""


def write_ggml(checkpoint: Checkpoint, folder: Path, precision: str) -> Path:
    """Write `ggml-model-<precision>.bin`; returns its path.

    Raises:
        UnsupportedError: whisper.cpp has no place for this model.
    """
    checkpoint.require_shape(f"ggml-{precision}")
    config = checkpoint.config
    ftype, kind = KINDS[precision]
    if kind != GGMLQuantizationType.F16:
        ftype += QUANTISATION_VERSION * VERSION_FACTOR
    path = folder / f"ggml-model-{precision}.bin"
    with open(path, "wb") as out:
        hyperparameters = (
            config.vocab_size,
            config.max_source_positions,
            config.d_model,
            config.encoder_attention_heads,
            config.encoder_layers,
            # The decoder's positions; a generation config's max_length is another thing, and too short.
            config.max_target_positions,
            config.d_model,
            config.decoder_attention_heads,
            config.decoder_layers,
            config.num_mel_bins,
            ftype,
        )
        out.write(struct.pack("<12i", MAGIC, *hyperparameters))
        filters_MF = checkpoint.mel_filters
        out.write(struct.pack("<2i", *filters_MF.shape))
        out.write(filters_MF.tobytes())
        words = checkpoint.words()
        out.write(struct.pack("<i", len(words)))
        for word in words:
            out.write(struct.pack("<i", len(word)) + word)
        for name, tensor in checkpoint.openai_tensors():
            _write_tensor(out, name, tensor, kind)
    return path


def _write_tensor(out: BinaryIO, name: str, tensor: Tensor, kind: GGMLQuantizationType) -> None:
    if name in FLOAT32[:2]:
        tensor = tensor.reshape(-1, 1)
    if tensor.ndim == 1 or name in FLOAT32:
        stored = GGMLQuantizationType.F32
    elif tensor.ndim == 2:
        stored = kind
    else:  # the convolutions
        stored = GGMLQuantizationType.F16
    encoded = name.encode()
    out.write(struct.pack("<3i", tensor.ndim, len(encoded), stored))
    out.write(struct.pack(f"<{tensor.ndim}i", *reversed(tensor.shape)))
    out.write(encoded)
    # A block of numbers that is quantised lies within a row.
    for rows in tensor.split(ROWS):
        out.write(np.ascontiguousarray(quantize(rows.float().numpy(), stored)).data)
