"""Adapters folded into weights for as long as a model is scored: then an adapted layer costs what a plain one does.

PEFT's merge_adapter() adds s B A to the base's own weights and takes it off again, which leaves rounding in them. Here
the base is not touched: each adapted layer computes with a weight of its own meanwhile, which is made in float32,

    W' = g * (W + s B A),  g = 1 or, with DoRA, m / ||W + s B A||

and takes as much memory as the adapted weights of the base or, in mixed precision, half of that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jobs.adapter import ADAPTER_NAME, lora_layers
from jobs.fast.dora import row_norms, row_squares
from jobs.fast.held import autocast_dtype, computes_with, is_cast
from jobs.fast.plain import is_dora, is_in_use, is_plain
from jobs.model import whisper_of


@contextlib.contextmanager
def folded(model: Any) -> Iterator[None]:
    """Have the adapted linear layers of a model compute with folded weights; for inference alone.

    Layers of other kinds, adapters that are merged or disabled, and biases that are trained stay PEFT's. Under
    autocast the folded weights, all other matrices of the decoder and the output head are held in its precision.

    Args:
        model: a Whisper model or a PeftModel around one. Without adapters and autocast nothing changes.
    """
    dtype = autocast_dtype(model)
    done: set[nn.Module] = set()
    with contextlib.ExitStack() as layers:
        for _, layer in lora_layers(model):
            if is_plain(layer) and is_in_use(layer):
                layers.enter_context(computes_with(layer, folded_weight(layer), layer.get_base_layer().bias, dtype))
                done.update(layer.modules())
        for layer in _of_each_token(model):
            if layer not in done and is_cast(layer, dtype):
                layers.enter_context(computes_with(layer, layer.weight, layer.bias, dtype))
        yield


def _of_each_token(model: Any) -> Iterator[Any]:
    """The modules that compute anew for each token."""
    whisper = whisper_of(model)
    yield from whisper.model.decoder.modules()
    yield from whisper.proj_out.modules()


@torch.no_grad()
def folded_weight(layer: Any) -> Tensor:
    """W' (O, I) of an adapted linear layer, in the dtype of W."""
    weight_OI = layer.get_base_layer().weight
    a_RI, b_OR = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    scale = layer.scaling[ADAPTER_NAME]
    with torch.autocast(weight_OI.device.type, enabled=False):
        whole_OI = torch.addmm(weight_OI.float(), b_OR.float(), a_RI.float(), alpha=scale)
        if is_dora(layer):
            # Not the norms of what was just computed: those of training, rounding and all.
            norm_O = row_norms(weight_OI, row_squares(weight_OI), a_RI, b_OR, scale)
            whole_OI *= (layer.lora_magnitude_vector[ADAPTER_NAME].weight / norm_O)[:, None]
        return whole_OI.to(weight_OI.dtype)
