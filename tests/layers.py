"""Adapted layers beside PEFT's: their outputs and gradients, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from engine import fill_adapters
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from jobs.adapter import trainable_parameters
from jobs.batches import Batch
from jobs.train.step import forward_loss


def linears(
    filled: float = 0.3, dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None, **options: Any
) -> Any:
    """Two linear layers, one of them without a bias, with adapters of rank 8 whose parameters have moved."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48, bias=False)).to(dtype)
    config = LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": ["0", "1"]} | options)
    model = get_peft_model(layers, config, autocast_adapter_dtype=adapter_dtype is None)
    fill_adapters(model, filled / 8)
    return model


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of all that is trained."""
    model.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in trainable_parameters(model):
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def relative(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of the other."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], bound: float) -> None:
    """Everything under the same name is as far apart as the bound says, relative to its size."""
    assert one.keys() == other.keys()
    apart = {name: relative(one[name], other[name]) for name in one}
    far = {name: value for name, value in apart.items() if not value < bound}  # NaN too
    assert not far, far


def all_of(model: Any, x: Tensor, call: Callable[[Any, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients of the parameters, and that of the input, for a loss that is no sum."""
    x = x.clone().requires_grad_()
    output = call(model, x) if call else model(x)
    loss = (output.double() * torch.linspace(-1, 1, output.shape[-1])).square().sum()
    found = gradients(model, loss)
    assert x.grad is not None
    return found | {"output": output.detach(), "input": x.grad}


def step_of(model: Any, batch: Batch, *, freeze_encoder: bool) -> dict[str, Tensor]:
    """Gradients and loss of a training step, and the gradient of the features if the encoder has any; what is dropped
    is the same in each."""
    batch.features_BMF.requires_grad_(not freeze_encoder)
    torch.manual_seed(1)
    loss = forward_loss(model.train(), batch, torch.device("cpu"), freeze_encoder=freeze_encoder)
    found = gradients(model, loss) | {"loss": loss.detach()}
    if not freeze_encoder:
        assert batch.features_BMF.grad is not None
        found["input"] = batch.features_BMF.grad
    batch.features_BMF.grad = None
    return found


def assert_alike_on_a_gpu(made: Callable[[bool], Any], batch: Batch) -> None:
    """Two ways to compute have the same gradients and loss there, in float32 and, less closely, in bfloat16.

    Args:
        made: makes the model that computes fast, or that does not, there.
        batch: what it is trained on.
    """
    device = torch.device("cuda")
    for precise, bound in ((True, 1e-4), (False, 5e-2)):
        found = []
        for fast in (False, True):
            model = made(fast).train()
            with torch.autocast("cuda", torch.bfloat16, enabled=not precise):
                loss = forward_loss(model, batch, device, freeze_encoder=False)
            found.append(gradients(model, loss) | {"loss": loss.detach()})
        assert_close(found[1], found[0], bound)


@contextmanager
def linear_layers() -> Iterator[set[tuple[bool, str, torch.dtype]]]:
    """Where and in what precision linear layers compute meanwhile, adapted or not: (in training, device, dtype)."""
    found: set[tuple[bool, str, torch.dtype]] = set()

    def look(module: Any, given: Any, output: Any) -> None:
        if type(module) in (nn.Linear, Linear):
            found.add((module.training, output.device.type, output.dtype))

    hook = register_module_forward_hook(look)
    try:
        yield found
    finally:
        hook.remove()
