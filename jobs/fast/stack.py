"""A linear layer under the adapters of many trials: the base product once, the low-rank products stacked.

What one trial's PEFT layer computes, LoRA with g = 1 or DoRA with g = m / ||W + s B A||, its norm detached:

    y = g * (W x + s B A d(x)) + b

W x of all trials is one product. The trials' factors lie in one tensor each, padded with zeros to the largest rank;
each trial's own parameters are views of them, so that its checkpoints and PEFT model see nothing of this.

With dropout d(x), PEFT's own DoRA is another function, W x + b + (g - 1) W d(x) + g s B A d(x); what is computed here
is that of `engine.dora_dropout: branch`.

Shapes: N trials, B clips, T positions of text, P of audio, I in, O out, R rank; M = B T or B P.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.adapter import ADAPTER_NAME
from jobs.fast.dora import row_norms, row_squares

Place = Callable[[Tensor], Tensor]
"""Takes a buffer with a row for each trial (N, P); gives the share of it that lies where a tensor lies in `Rows`."""


class Layout:
    """Who is in the present forward pass, in the order of the batch's first dimension.

    Attributes:
        members: places of the trials in the stacks.
        audio_of: of each of them, which of the distinct batches of audio is its.
        generators: of each of them, the random numbers of its dropout; None: there is none (evaluation).
        texts: of each of them, the length of its texts before they were padded to the longest.
    """

    def __init__(self) -> None:
        self.members: list[int] = []
        self.audio_of: list[int] = []
        self.generators: list[torch.Generator] | None = None
        self.texts: list[int] = []
        self._places: dict[tuple[int, ...], Tensor] = {}

    def set(self, members: list[int], audio_of: list[int]) -> None:
        """Say who is in it, and who hears what."""
        self.members, self.audio_of = members, audio_of
        self._places = {}

    @property
    def sources(self) -> list[list[int]]:
        """Of each distinct batch of audio, who hears it: numbers in `members`."""
        found: list[list[int]] = [[] for _ in range(max(self.audio_of) + 1)]
        for number, source in enumerate(self.audio_of):
            found[source].append(number)
        return found

    def chosen(self, of_all: Tensor, numbers: list[int], dim: int = 0) -> Tensor:
        """The share of some places; all of them in their order, without a copy.

        Where they are on a device is known there from the first time on: each copy of a list to a GPU waits for it.
        """
        if numbers == list(range(of_all.shape[dim])):
            return of_all
        key = tuple(numbers)
        if key not in self._places:
            self._places[key] = torch.tensor(numbers, device=of_all.device)
        return of_all.index_select(dim, self._places[key])

    def of_members(self, stacked: Tensor) -> Tensor:
        """The share of those that are in it."""
        return self.chosen(stacked, self.members)


class Rows:
    """Memory of several trials: a row for each, in which all of its parameters lie.

    Args:
        count: N.
        size: P, elements of a row.
        device: where it is.

    Attributes:
        values_NP: the parameters; where a trial has none, what changes nothing.
    """

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        self.values_NP = torch.zeros(count, size, device=device)
        self._tensors: list[Tensor] = []
        self._taken = 0

    def take(self, shape: Sequence[int]) -> tuple[Tensor, Place]:
        """Room for a tensor of each trial: the tensor of all of them (N, *shape), and its place."""
        start = self._taken
        self._taken = end = start + math.prod(shape)

        def place(buffer_NP: Tensor) -> Tensor:
            return buffer_NP[:, start:end].unflatten(1, shape)

        tensor = place(self.values_NP).detach().requires_grad_(True)
        self._tensors.append(tensor)
        return tensor, place

    def begin(self) -> None:
        """Have no gradients."""
        for tensor in self._tensors:
            tensor.grad = None

    def grads(self) -> Tensor:
        """The gradients (N, P), in the places of what they belong to."""
        parts = [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in self._tensors]
        found = torch.cat([part.flatten(1) for part in parts], dim=1)
        self.begin()  # they are held once
        return found


class Stack:
    """The adapters of one layer, of all trials.

    Args:
        base: the layer.
        layers: each trial's PEFT layer in its place; None: the trial has no adapter there.
        rows: where their parameters are to lie.
    """

    def __init__(self, base: nn.Linear, layers: Sequence[Any | None], rows: Rows) -> None:
        self.base, self._rows = base, rows
        self.ranks = [0 if layer is None else layer.r[ADAPTER_NAME] for layer in layers]
        room = [rows.take(shape) for shape in self.shapes(base, layers)]
        self.a_NRI, self.b_NRO, self.magnitude_NO = (tensor for tensor, _ in room)
        with torch.no_grad():
            self.magnitude_NO.fill_(1.0)
        scales = [0.0 if layer is None else layer.scaling[ADAPTER_NAME] for layer in layers]
        self.scale_N = torch.tensor(scales, device=base.weight.device)
        self.is_dora = [layer is not None and ADAPTER_NAME in layer.lora_magnitude_vector for layer in layers]
        self._is_dora_N1 = torch.tensor(self.is_dora, device=base.weight.device)[:, None]
        self.dropouts = [
            0.0 if layer is None else getattr(layer.lora_dropout[ADAPTER_NAME], "p", 0.0) for layer in layers
        ]
        self._squares_O = row_squares(base.weight.detach()) if any(self.is_dora) else None
        self._norms: tuple[Any, Tensor] | None = None
        self.parameters: list[list[tuple[nn.Parameter, Place]]] = [
            [] if layer is None else self._adopt(index, layer, *(place for _, place in room))
            for index, layer in enumerate(layers)
        ]
        """Each trial's, with where they lie."""

    @staticmethod
    def shapes(base: nn.Linear, layers: Sequence[Any | None]) -> list[tuple[int, ...]]:
        """Of a trial's A, B and magnitude, padded to the largest rank; B transposed: so each trial's share is dense."""
        rank = max([1, *(layer.r[ADAPTER_NAME] for layer in layers if layer is not None)])
        return [(rank, base.in_features), (rank, base.out_features), (base.out_features,)]

    def _adopt(self, index: int, layer: Any, a: Place, b: Place, magnitude: Place) -> list[tuple[nn.Parameter, Place]]:
        """Have a trial's parameters lie in the stack."""
        rank = self.ranks[index]
        found: list[tuple[nn.Parameter, Place]] = [
            (layer.lora_A[ADAPTER_NAME].weight, lambda buffer: a(buffer)[index, :rank]),
            (layer.lora_B[ADAPTER_NAME].weight, lambda buffer: b(buffer)[index, :rank].T),
        ]
        if self.is_dora[index]:
            vector = layer.lora_magnitude_vector[ADAPTER_NAME].weight
            found.append((vector, lambda buffer: magnitude(buffer)[index]))
        for parameter, place in found:
            share = place(self._rows.values_NP)
            share.copy_(parameter.data)
            parameter.data = share
        return found

    def release(self) -> None:
        """Give every trial's parameters memory of their own again."""
        for parameter, _ in itertools.chain.from_iterable(self.parameters):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def hand_out(self, grads_NP: Tensor) -> None:
        """Give each trial's parameters their share of the gradients."""
        for parameter, place in itertools.chain.from_iterable(self.parameters):
            if parameter.requires_grad:
                parameter.grad = place(grads_NP)

    def forget(self) -> None:
        """Compute norms anew: the rows have changed."""
        self._norms = None

    def gain(self, layout: Layout) -> Tensor | None:
        """g (N, 1, O) of the trials that are present, in float32; None: none of them is a DoRA."""
        chosen = [self.is_dora[index] for index in layout.members]
        if not any(chosen):
            return None
        magnitude_NO, norm_NO = layout.of_members(self.magnitude_NO), layout.of_members(self._norm())
        if not all(chosen):
            # Both: where the norm is 0, a gradient of 0 times infinity would come to the others.
            chosen_N1 = layout.of_members(self._is_dora_N1)
            magnitude_NO, norm_NO = (torch.where(chosen_N1, each, 1.0) for each in (magnitude_NO, norm_NO))
        return (magnitude_NO / norm_NO)[:, None]

    def _norm(self) -> Tensor:
        """||W + s B A|| by rows (N, O), in float32, once for each state of the factors."""
        # What is written to the trials' own parameters; who writes to the rows says so (`forget`).
        state = tuple(parameter._version for parameter, _ in itertools.chain.from_iterable(self.parameters))
        if self._norms is None or self._norms[0] != state:
            assert self._squares_O is not None
            found = row_norms(self.base.weight, self._squares_O, self.a_NRI, self.b_NRO.mT, self.scale_N)
            self._norms = (state, found)
        return self._norms[1]


@dataclass(frozen=True)
class Parts:
    """What a layer makes of audio, taken apart: g * (W x + (s B) A d(x)) + b.

    Attributes:
        base_UBPO: W x of each distinct batch.
        low_BNRP: A d(x) of every trial; None: none of them has an adapter here.
        scaled_b_NRO: s B; None likewise.
        gain_N1O: g; None: none of them is a DoRA.
    """

    base_UBPO: Tensor
    low_BNRP: Tensor | None
    scaled_b_NRO: Tensor | None
    gain_N1O: Tensor | None


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
        y, gain_N1O = self.before_gain(x)
        return y if gain_N1O is None else with_gain(y, gain_N1O, self.base.bias)

    def before_gain(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """W x + s B A d(x), and the gain (N, 1, O) that it is to be multiplied with before b is added; where that is
        None, W x + s B A d(x) + b."""
        base, stack, sources, positions = self.base, self._adapted(), self._sources, x.shape[1]
        gain_N1O = None if stack is None else stack.gain(self.layout)
        y_UMO = F.linear(x, base.weight, base.bias if gain_N1O is None else None)
        y_NMO = self._of_each(y_UMO.reshape(sources, -1, base.out_features))
        if stack is not None:
            low_NMR = self._low(x.reshape(sources, -1, base.in_features), len(x) // sources, positions)
            # Added in place where it is a tensor of its own.
            add = torch.baddbmm if self.of_audio else torch.Tensor.baddbmm_
            y_NMO = add(y_NMO, low_NMR.to(y_NMO.dtype), self._scaled_b(stack).to(y_NMO.dtype))
        return y_NMO.reshape(-1, positions, base.out_features), gain_N1O

    def parts(self, x: Tensor) -> Parts:
        """Of audio (U * B, P, I), without what each trial's sum of them would take."""
        assert self.of_audio
        stack, sources = self._adapted(), self._sources
        base_UBPO = F.linear(x, self.base.weight).unflatten(0, (sources, -1))
        if stack is None:
            return Parts(base_UBPO, None, None, None)
        count, clips, positions = len(self.layout.members), len(x) // sources, x.shape[1]
        if sources == 1 and not self._drops(stack):
            a_NRI = self.layout.of_members(stack.a_NRI)
            low_BNRP = torch.matmul(a_NRI.flatten(0, 1), x.mT).unflatten(1, (count, -1))
        else:
            low_NMR = self._low(x.reshape(sources, clips * positions, -1), clips, positions)
            low_BNRP = low_NMR.view(count, clips, positions, -1).permute(1, 0, 3, 2)
        return Parts(base_UBPO, low_BNRP, self._scaled_b(stack), stack.gain(self.layout))

    def _adapted(self) -> Stack | None:
        """The adapters, if one of the trials that are present has one here."""
        stack = self.stack
        return stack if stack is not None and any(stack.ranks[index] for index in self.layout.members) else None

    @property
    def _sources(self) -> int:
        """How many distinct batches the input holds: of audio U, of text each trial's own."""
        return max(self.layout.audio_of) + 1 if self.of_audio else len(self.layout.members)

    def _scaled_b(self, stack: Stack) -> Tensor:
        return self.layout.of_members(stack.b_NRO) * self.layout.of_members(stack.scale_N)[:, None, None]

    def _drops(self, stack: Stack) -> bool:
        return self.layout.generators is not None and any(stack.dropouts[index] for index in self.layout.members)

    def _low(self, x_UMI: Tensor, clips: int, positions: int) -> Tensor:
        """A d(x) of every trial: (N, M, R)."""
        assert self.stack is not None
        members = self.layout.members
        a_NRI = self.layout.of_members(self.stack.a_NRI)
        if self._drops(self.stack):
            rates = [self.stack.dropouts[index] for index in members]
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
        return self.layout.chosen(distinct, self.layout.audio_of)

    def _masks(self, rates: list[float], clips: int, positions: int, like: Tensor) -> Tensor:
        """What dropout multiplies each trial's input with (N, M, I), of the trial's own generator, whatever the others
        are and however its texts were padded. On a CPU they are the numbers that the trial alone would draw; on a GPU
        torch's dropout is a kernel of its own, whose numbers are others."""
        assert self.layout.generators is not None
        masks = torch.ones_like(like).unflatten(1, (clips, positions))
        for mask, rate, generator, text in zip(masks, rates, self.layout.generators, self.layout.texts, strict=True):
            if rate:
                length = positions if self.of_audio else text
                keep = torch.empty(clips, length, like.shape[-1], device=like.device, dtype=like.dtype)
                mask[:, :length] = keep.bernoulli_(1 - rate, generator=generator).div_(1 - rate)
        return masks.flatten(1, 2)


def with_gain(y: Tensor, gain_N1O: Tensor, bias_O: Tensor | None) -> Tensor:
    """g * y + b of rows (N * B, T, O), trial by trial."""
    y_NMO = y.reshape(len(gain_N1O), -1, y.shape[-1])
    found = y_NMO * gain_N1O if bias_O is None else torch.addcmul(bias_O, y_NMO, gain_N1O)
    return found.to(y.dtype).reshape(y.shape)
