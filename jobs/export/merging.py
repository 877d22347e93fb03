"""Base and adapter merged tensor by tensor: the memory of one weight matrix, the mathematics of PEFT.

PEFT's own merge wants the whole model in memory. Here its layers stand on a model without weights; each gets its base
weight when its turn has come, merges it as PEFT does, and gives it up again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from jobs.adapter import ADAPTER_NAME
from jobs.export.weights import HEAD, Weights
from service.errors import Fault, SpecError

EMBEDDING = "model.decoder.embed_tokens.weight"
META = torch.device("meta")


class MergedTensors:
    """The tensors of base and adapter as one model.

    Args:
        base: the base's tensors.
        config: the base's configuration.
        adapter: a PEFT adapter's folder; None: the base as it is.
        dtype: of the results; each is computed in float32.

    Raises:
        SpecError: the base lacks a weight, or the adapter does not fit it.
    """

    def __init__(self, base: Weights, config: WhisperConfig, adapter: Path | None, dtype: torch.dtype) -> None:
        self._base, self._dtype = base, dtype
        with META:
            skeleton = WhisperForConditionalGeneration(config)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        self._untied_base = HEAD in base and not config.tie_word_embeddings
        needed = [name for name in self.shapes if name != HEAD or self._untied_base]
        if missing := [name for name in needed if name not in base]:
            why = f"{len(missing)} of its weights are missing: {', '.join(missing[:3])}"
            raise SpecError([Fault("training.base_model", why)])
        self._model: Any = _with_adapter(skeleton, adapter) if adapter else skeleton
        self.tied = not self._untied_base and self._stays_tied()
        self.names = [name for name in self.shapes if name != HEAD or not self.tied]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self[name]

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        """One tensor of the merged model, on the CPU."""
        return self._merged(name).to(self._dtype).contiguous()

    def _merged(self, name: str) -> Tensor:
        path, _, parameter = name.rpartition(".")
        module = self._model
        parts = path.split(".")
        for index, part in enumerate(parts):
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                inner: Any = module.modules_to_save[ADAPTER_NAME]
                for below in parts[index + 1 :]:
                    inner = getattr(inner, below)
                return getattr(inner, parameter).detach().float()
            if isinstance(module, BaseTunerLayer):
                if parameter == "weight" or module.lora_bias[ADAPTER_NAME]:
                    return self._merge(module, path, parameter)
                module = module.get_base_layer()  # the adapter leaves the bias alone
        own: Tensor = getattr(module, parameter)
        return own.detach().float() if own.device != META else self._read(name)

    def _merge(self, layer: Any, path: str, parameter: str) -> Tensor:
        base = layer.get_base_layer()
        kept = dict(base.named_parameters(recurse=False))
        for name, own in kept.items():
            value = own.detach() if own.device != META else self._read(f"{path}.{name}")
            setattr(base, name, nn.Parameter(value.float(), requires_grad=False))
        try:
            # Safe: into new tensors. The base's own are its file's, mapped, or those of this model.
            layer.merge(safe_merge=True)
            merged: Tensor = getattr(base, parameter).detach()
            return merged
        finally:
            layer.merged_adapters.clear()
            # To undo a DoRA merge PEFT keeps each row's norm; one such tensor a layer, and the heap around it, where
            # the merge's large tensors have been, never shrinks: gigabytes in the end.
            layer._caches.clear()
            for name, own in kept.items():
                setattr(base, name, own)

    def _read(self, name: str) -> Tensor:
        # A tied head has no weight of its own.
        return self._base[EMBEDDING if name == HEAD and HEAD not in self._base else name].float()

    def _stays_tied(self) -> bool:
        """Whether embedding and output head, one matrix in the base, are still one."""
        wrapped = [self._model.get_submodule(name.removesuffix(".weight")) for name in (EMBEDDING, HEAD)]
        if not any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in wrapped):
            return True
        return torch.equal(self[EMBEDDING], self[HEAD])


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _with_adapter(skeleton: Any, folder: Path) -> Any:
    """The model without weights, with the adapter's layers, and their weights, in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            # Made without a look at the base's weights, which are not there.
            model = PeftModel(skeleton, config, ADAPTER_NAME, low_cpu_mem_usage=True)
            weights = load_peft_weights(str(folder), device="cpu")
            weights = {name: tensor.float() for name, tensor in weights.items()}
            for layer in _layers(model):
                # PEFT would have the adapter follow its base to where no weights are.
                layer._move_adapter_to_device_of_base_layer = lambda *_: None
            found = set_peft_model_state_dict(model, weights, ADAPTER_NAME, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0][:200]
        raise SpecError([Fault(str(folder), f"is no adapter for this base model ({reason})")]) from error
    if found.unexpected_keys:
        why = f"holds weights that this base model has no place for: {', '.join(found.unexpected_keys[:3])}"
        raise SpecError([Fault(str(folder), why)])
    left = [n for n, p in model.named_parameters() if p.device == META and f".{ADAPTER_NAME}" in n]
    if left:
        raise SpecError([Fault(str(folder), f"lacks {len(left)} of its weights: {', '.join(left[:3])}")])
    return model.get_base_model()
