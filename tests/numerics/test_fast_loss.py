"""The loss without logits is transformers', and so is what flows back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine import batch_of, fill_adapters
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration

from jobs.adapter import attach, trainable_parameters
from jobs.batches import Batch, label_tokens
from jobs.fast.loss import is_plain_head, token_losses
from jobs.train.step import forward_loss
from service.spec.training import TrainingConfig

CPU = torch.device("cpu")
WIDTH, VOCABULARY = 24, 3001


@pytest.fixture(scope="module")
def batch(tiny: Path, tones: Path) -> Batch:
    """Five clips of different lengths."""
    found: Batch = batch_of(tiny, tones / "val.csv", 5)
    assert (found.labels_BT < 0).any()
    return found


def drawn(positions: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a head's weight, and labels."""
    torch.manual_seed(positions)
    labels = torch.randint(VOCABULARY, (positions,))
    return scale * torch.randn(positions, WIDTH), torch.randn(VOCABULARY, WIDTH), labels


def by_torch(hidden: Tensor, weight: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, and the gradient of their weighted sum, as transformers computes them."""
    hidden = hidden.clone().requires_grad_()
    losses = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="none")
    (losses * shares).sum().backward()
    assert hidden.grad is not None
    return losses.detach(), hidden.grad


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    losses = token_losses(hidden, weight, labels)
    (losses * shares).sum().backward()
    assert hidden.grad is not None
    return losses.detach(), hidden.grad


@pytest.mark.parametrize("positions", [0, 1, 255, 256, 257, 600])
def test_losses_and_gradients_are_those_of_cross_entropy(positions: int) -> None:
    """Each position by a factor of its own, as trials have them that train together."""
    given = drawn(positions)
    shares = torch.rand(positions)
    (losses, gradient), (expected, reference) = ours(*given, shares), by_torch(*given, shares)
    assert losses.shape == (positions,)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


def test_a_label_that_is_all_but_impossible_has_a_finite_loss() -> None:
    given = drawn(40, scale=60.0)
    (losses, gradient), (expected, reference) = ours(*given, torch.ones(40)), by_torch(*given, torch.ones(40))
    assert float(expected.max()) > 500  # e^-500 is nothing in float32
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-4)


def test_in_mixed_precision_logits_are_rounded_as_a_linear_layer_rounds_them() -> None:
    given, shares = drawn(300), torch.full((300,), 1 / 300)
    with torch.autocast("cpu", torch.bfloat16):
        (losses, gradient), (expected, reference) = ours(*given, shares), by_torch(*given, shares)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    assert losses.dtype == gradient.dtype == torch.float32
    # A gradient is a sum over the vocabulary of shares that bf16 holds to 0.4 %.
    assert float((gradient - reference).norm() / reference.norm()) < 0.005


def test_without_gradients_none_is_computed() -> None:
    hidden, weight, labels = drawn(10)
    assert not token_losses(hidden, weight, labels).requires_grad
    with torch.no_grad():
        assert not token_losses(hidden.requires_grad_(), weight, labels).requires_grad


def adapted(tiny: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    model, _ = attach(WhisperForConditionalGeneration.from_pretrained(tiny).eval(), TrainingConfig(**settings))
    fill_adapters(model, 0.02)
    return model.eval()


def step(model: Any, batch: Batch, **options: Any) -> tuple[float, dict[str, Tensor], list[torch.Size]]:
    """Loss, gradients, and the shapes of the logits that the head was asked for."""
    asked: list[torch.Size] = []
    hook = model.get_base_model().proj_out.register_forward_hook(lambda *given: asked.append(given[2].shape))
    loss = forward_loss(model, batch, CPU, **({"freeze_encoder": False} | options)) / label_tokens([batch])
    loss.backward()
    hook.remove()
    found = {name: p.grad.clone() for name, p in trainable_parameters(model) if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found, asked


@pytest.mark.setting("engine.fast_loss")
@pytest.mark.parametrize("freeze_encoder", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_step_is_that_with_logits(tiny: Path, batch: Batch, freeze_encoder: bool, use_dora: bool) -> None:
    model = adapted(tiny, use_dora=use_dora, freeze_encoder=freeze_encoder)
    loss, found, asked = step(model, batch, freeze_encoder=freeze_encoder)
    expected, reference, logits = step(model, batch, freeze_encoder=freeze_encoder, fast_loss=False)
    assert asked == []
    assert [shape[:2] for shape in logits] == [batch.labels_BT.shape]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-8)


def test_a_head_with_an_adapter_makes_logits(tiny: Path, batch: Batch) -> None:
    model = adapted(tiny, lora_target_modules=["q_proj", "proj_out"])
    assert not is_plain_head(model.get_base_model().proj_out)
    loss, found, asked = step(model, batch)
    assert len(asked) == 1
    assert loss == pytest.approx(step(model, batch, fast_loss=False)[0])
    assert any("proj_out" in name and gradient.any() for name, gradient in found.items())


def test_which_heads_are_plain() -> None:
    head = nn.Linear(4, 8, bias=False).requires_grad_(False)
    assert is_plain_head(head)
    assert not is_plain_head(nn.Linear(4, 8, bias=False))
    assert not is_plain_head(nn.Linear(4, 8).requires_grad_(False))
    assert not is_plain_head(nn.Sequential(head))
