"""A linear layer under the adapters of many trials: the base product once, the low-rank products stacked.

What one trial's PEFT layer computes, LoRA with g = 1 or DoRA with g = m / ||W + s B A||, its norm detached:

    y = g * (W x + s B A d(x)) + b

W x of all trials is one product. The trials' factors lie in one tensor each, padded with zeros to the largest rank;
each trial's own parameters are views of them, so that its optimizer, checkpoints and PEFT model see nothing of this.

With dropout d(x), PEFT's own DoRA is another function, W x + b + (g - 1) W d(x) + g s B A d(x); what is computed here
is that of `engine.dora_dropout: branch`.

Shapes: N trials, B clips, T positions of text, P of audio, I in, O out, R rank; M = B T or B P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.adapter import ADAPTER_NAME
from jobs.fast.dora import row_norms, row_squares


@dataclass
class Layout:
    """Who is in the present forward pass, in the order of the batch's first dimension.

    Attributes:
        members: places of the trials in the stacks.
        audio_of: of each of them, which of the distinct batches of audio is its.
        generators: of each of them, the random numbers of its dropout; None: there is none (evaluation).
        texts: of each of them, the length of its texts before they were padded to the longest.
    """

    members: list[int] = field(default_factory=list)
    audio_of: list[int] = field(default_factory=list)
    generators: list[torch.Generator] | None = None
    texts: list[int] = field(default_factory=list)


class Stack:
    """The adapters of one layer, of all trials.

    Args:
        base: the layer.
        layers: each trial's PEFT layer in its place; None: the trial has no adapter there.
    """

    def __init__(self, base: nn.Linear, layers: Sequence[Any | None]) -> None:
        device, count = base.weight.device, len(layers)
        self.base = base
        self.layers = list(layers)
        self.ranks = [0 if layer is None else layer.r[ADAPTER_NAME] for layer in layers]
        rank = max([1, *self.ranks])
        self.a_NRI = torch.zeros(count, rank, base.in_features, device=device)
        self.b_NRO = torch.zeros(count, rank, base.out_features, device=device)
        self.magnitude_NO = torch.ones(count, base.out_features, device=device)
        scales = [0.0 if layer is None else layer.scaling[ADAPTER_NAME] for layer in layers]
        self.scale_N = torch.tensor(scales, device=device)
        self.is_dora = [layer is not None and ADAPTER_NAME in layer.lora_magnitude_vector for layer in layers]
        self.dropouts = [
            0.0 if layer is None else getattr(layer.lora_dropout[ADAPTER_NAME], "p", 0.0) for layer in layers
        ]
        self._squares_O = row_squares(base.weight.detach()) if any(self.is_dora) else None
        self._norms: tuple[Any, Tensor] | None = None
        self._parameters: list[tuple[nn.Parameter, Tensor, Any]] = []
        for index, layer in enumerate(layers):
            if layer is not None:
                self._adopt(index, layer)
        for tensor in self._tensors():
            tensor.requires_grad_(True)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a_NRI, self.b_NRO, self.magnitude_NO

    def _adopt(self, index: int, layer: Any) -> None:
        """Have a trial's parameters lie in the stack. B lies transposed there: so each trial's share is dense."""
        rank = self.ranks[index]
        places = [
            (layer.lora_A[ADAPTER_NAME].weight, self.a_NRI, lambda whole: whole[index, :rank]),
            (layer.lora_B[ADAPTER_NAME].weight, self.b_NRO, lambda whole: whole[index, :rank].T),
        ]
        if self.is_dora[index]:
            vector = layer.lora_magnitude_vector[ADAPTER_NAME].weight
            places.append((vector, self.magnitude_NO, lambda whole: whole[index]))
        for parameter, whole, share in places:
            place = share(whole)
            place.copy_(parameter.data)
            parameter.data = place
            self._parameters.append((parameter, whole, share))

    def release(self) -> None:
        """Give every trial's parameters memory of their own again."""
        for parameter, _, _ in self._parameters:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        for tensor in self._tensors():
            tensor.grad = None

    def hand_out(self) -> None:
        """Give each trial's parameters their share of the gradients."""
        for parameter, whole, share in self._parameters:
            if parameter.requires_grad and whole.grad is not None:
                parameter.grad = share(whole.grad)

    def gain(self, members: list[int]) -> Tensor | None:
        """g (N, 1, O) of those trials, in float32; None: none of them is a DoRA."""
        chosen = [self.is_dora[index] for index in members]
        if not any(chosen):
            return None
        ratio_NO = _of(self.magnitude_NO, members) / _of(self._norm(), members)
        if not all(chosen):
            ratio_NO = torch.where(torch.tensor(chosen, device=ratio_NO.device)[:, None], ratio_NO, 1.0)
        return ratio_NO[:, None]

    def _norm(self) -> Tensor:
        """||W + s B A|| by rows (N, O), in float32, once for each state of the factors."""
        # Optimizers write to the trials' own parameters, whose changes the whole stack counts as well.
        state = tuple(parameter._version for parameter, _, _ in self._parameters)
        if self._norms is None or self._norms[0] != state:
            assert self._squares_O is not None
            found = row_norms(self.base.weight, self._squares_O, self.a_NRI, self.b_NRO.mT, self.scale_N)
            self._norms = (state, found)
        return self._norms[1]


class StackedLinear(nn.Module):
    """Takes the place of a linear layer in the model that all trials share.

    Args:
        base: the layer.
        layout: who is in a forward pass; its owner fills it in.
        of_audio: whether its input is the encoder's output, of which each distinct batch comes once.
    """

    def __init__(self, base: nn.Linear, layout: Layout, *, of_audio: bool) -> None:
        super().__init__()
        self.base, self.layout, self.of_audio = base, layout, of_audio
        self.stack: Stack | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(N * B, T, I) gives (N * B, T, O); of audio (U * B, P, I), of U distinct batches, gives (N * B, P, O)."""
        members, base, stack = self.layout.members, self.base, self.stack
        count = len(members)
        sources = max(self.layout.audio_of) + 1 if self.of_audio else count
        positions, clips = x.shape[1], x.shape[0] // sources
        y_UMO = F.linear(x, base.weight).reshape(sources, -1, base.out_features)
        if stack is None or not any(stack.ranks[index] for index in members):
            y_NMO = self._of_each(y_UMO if base.bias is None else y_UMO + base.bias.to(y_UMO.dtype))
            return y_NMO.reshape(count * clips, positions, base.out_features)
        low_NMR = self._low(x.reshape(sources, -1, base.in_features), clips, positions)
        # Scale and gain are taken to B, which is small; what is as large as the output is written twice, and no more.
        b_NRO = _of(stack.b_NRO, members) * _of(stack.scale_N, members)[:, None, None]
        gain = stack.gain(members)
        if gain is None:
            y_NMO = self._of_each(y_UMO if base.bias is None else y_UMO + base.bias.to(y_UMO.dtype))
        else:
            b_NRO = b_NRO * gain
            y_NMO = self._of_each(y_UMO)
            y_NMO = (y_NMO * gain if base.bias is None else torch.addcmul(base.bias, y_NMO, gain)).to(y_UMO.dtype)
        # Added in place where it is a tensor of its own.
        add = torch.baddbmm if gain is None else torch.Tensor.baddbmm_
        y_NMO = add(y_NMO, low_NMR.to(y_NMO.dtype), b_NRO.to(y_NMO.dtype))
        return y_NMO.reshape(count * clips, positions, base.out_features)

    def _low(self, x_UMI: Tensor, clips: int, positions: int) -> Tensor:
        """A d(x) of every trial: (N, M, R)."""
        assert self.stack is not None
        members = self.layout.members
        a_NRI = _of(self.stack.a_NRI, members)
        rates = [self.stack.dropouts[index] for index in members]
        if self.layout.generators is not None and any(rates):
            x_NMI = self._of_each(x_UMI)
            return torch.bmm(x_NMI * self._masks(rates, clips, positions, x_NMI), a_NRI.transpose(1, 2))
        if self.of_audio and len(x_UMI) == 1:
            # One product for all: the audio is the same.
            count, rank, _ = a_NRI.shape
            return F.linear(x_UMI[0], a_NRI.flatten(0, 1)).unflatten(1, (count, rank)).transpose(0, 1)
        return torch.bmm(self._of_each(x_UMI), a_NRI.transpose(1, 2))

    def _of_each(self, distinct: Tensor) -> Tensor:
        """Of distinct audio (U, ...) each trial's (N, ...); of text, which is each trial's own, what is given."""
        if not self.of_audio:
            return distinct
        if len(distinct) == 1:
            return distinct.expand(len(self.layout.members), -1, -1)
        return distinct[self.layout.audio_of]

    def _masks(self, rates: list[float], clips: int, positions: int, like: Tensor) -> Tensor:
        """What dropout multiplies each trial's input with (N, M, I): the numbers that the trial alone would draw, also
        where its texts were padded."""
        assert self.layout.generators is not None
        masks = torch.ones_like(like).unflatten(1, (clips, positions))
        for mask, rate, generator, text in zip(masks, rates, self.layout.generators, self.layout.texts, strict=True):
            if rate:
                length = positions if self.of_audio else text
                keep = torch.empty(clips, length, like.shape[-1], device=like.device, dtype=like.dtype)
                mask[:, :length] = keep.bernoulli_(1 - rate, generator=generator).div_(1 - rate)
        return masks.flatten(1, 2)


def _of(stacked: Tensor, members: list[int]) -> Tensor:
    """The share of some trials; all of them in their order, without a copy."""
    return stacked if members == list(range(len(stacked))) else stacked[members]
