"""Many adapters over one base: one forward and backward pass for all trials that are at work.

The encoder is frozen: its output is computed once for each distinct batch, without gradients. Every trial has a
PeftModel of its own, whose base weights are the shared ones; it is what is initialised, evaluated, saved and restored.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jobs.adapter import base_name, lora_layers
from jobs.batches import Batch
from jobs.fast.causal_mask import plain_rows
from jobs.fast.cross_attention import CrossAttention
from jobs.fast.greedy import Rules, decode
from jobs.fast.held import autocast_dtype, computes_with, is_cast, with_cast_matrix
from jobs.fast.many_adamw import Learner, ManyAdamW
from jobs.fast.stack import Layout, Rows, Stack, StackedLinear
from jobs.tokens import IGNORE
from jobs.train.step import encoder_output, labelled_losses
from jobs.transcribe import Chunk

OF_AUDIO = (".encoder_attn.k_proj", ".encoder_attn.v_proj")
"""Whose input is the encoder's output."""

Hear = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Work:
    """What a trial wants of a step.

    Attributes:
        model: the trial's PeftModel.
        passes: its forward passes.
        tokens: label tokens of all of them; the loss is the mean over these.
        generator: the random numbers of its dropout.
    """

    model: Any
    passes: Sequence[Batch]
    tokens: float
    generator: torch.Generator


class ManyAdapters:
    """A base model under the adapters of several trials.

    Args:
        model: the base, on its device; it is left as it is.
    """

    def __init__(self, model: Any) -> None:
        self._base = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self._layout = Layout()
        self._model = self.twin()
        self._places: dict[str, StackedLinear] = {}
        self._trials: list[Any] = []
        self._optimizers: list[torch.optim.AdamW | None] = []
        self._rows: Rows | None = None
        self._adamw: ManyAdamW | None = None
        self._grads_NP: Tensor | None = None
        for name, module in list(self._model.model.decoder.named_modules()):
            whole = f"model.decoder.{name}"
            if isinstance(module, nn.Linear):
                place = StackedLinear(module, self._layout, of_audio=whole.endswith(OF_AUDIO))
                parent, _, last = whole.rpartition(".")
                setattr(self._model.get_submodule(parent), last, place)
                self._places[whole] = place
        if model.config._attn_implementation == "sdpa":
            for layer in self._model.model.decoder.layers:
                layer.encoder_attn = CrossAttention(layer.encoder_attn)

    def twin(self) -> Any:
        """Another model over the very weights of the base: a tree of modules, and no memory to speak of."""
        shared: dict[int, Any] = {id(each): each.data for each in self._base.buffers()}
        for each in self._base.parameters():
            shared[id(each)] = nn.Parameter(each.data, requires_grad=False)
        return copy.deepcopy(self._base, shared)

    def add(self, model: Any, optimizer: torch.optim.AdamW | None = None) -> None:
        """Take a trial in: its parameters lie with the others' from the next step on.

        Args:
            model: its PeftModel, around a `twin`.
            optimizer: by which it learns, in `update`; None: each parameter is handed its gradient. All trials have
                one, or none.
        """
        if self._trials and (optimizer is None) != (self._optimizers[0] is None):
            raise ValueError("trials with and without an optimizer cannot train together")
        self._unstack()
        self._trials.append(model)
        self._optimizers.append(optimizer)

    def remove(self, model: Any) -> None:
        """Let a trial go, with its parameters as they are."""
        if (index := self.index(model)) >= 0:
            self._unstack()
            del self._trials[index], self._optimizers[index]

    def __len__(self) -> int:
        """How many trials are there."""
        return len(self._trials)

    def release(self) -> None:
        """Let all trials go."""
        self._unstack()
        self._trials, self._optimizers = [], []

    def sync(self, model: Any) -> None:
        """Let a trial's optimizer know its moments, if it is there, for a checkpoint: they lie in main memory."""
        if (index := self.index(model)) >= 0 and self._adamw is not None:
            self._adamw.give(index, torch.device("cpu"))

    def _stack(self) -> Rows:
        """Lay the trials' parameters together: once for all that have come and gone since the last step."""
        if self._rows is not None:
            return self._rows
        layers = [{base_name(name): layer for name, layer in lora_layers(trial)} for trial in self._trials]
        adapted = {name: [each.get(name) for each in layers] for name in self._places}
        adapted = {name: mine for name, mine in adapted.items() if any(layer is not None for layer in mine)}
        shapes = [shape for name, mine in adapted.items() for shape in Stack.shapes(self._places[name].base, mine)]
        self._rows = Rows(len(layers), sum(map(math.prod, shapes)), self.device)
        for name, mine in adapted.items():
            self._places[name].stack = Stack(self._places[name].base, mine, self._rows)
        optimizers = [each for each in self._optimizers if each is not None]
        if optimizers:
            places = [[each for stack in self._stacks for each in stack.parameters[row]] for row in range(len(layers))]
            learners = [Learner(*each) for each in zip(optimizers, places, strict=True)]
            self._adamw = ManyAdamW(self._rows.values_NP, learners)
        return self._rows

    def _unstack(self) -> None:
        """Give all trials' parameters memory of their own, and their optimizers their moments."""
        if self._adamw is not None:
            for row in range(len(self._trials)):
                self._adamw.give(row)
        for place in self._places.values():
            if place.stack is not None:
                place.stack.release()
                place.stack = None
        self._rows = self._adamw = self._grads_NP = None

    @property
    def _stacks(self) -> list[Stack]:
        return [place.stack for place in self._places.values() if place.stack is not None]

    def gradients(self, works: Sequence[Work], autocast: Callable[[], Any]) -> list[float]:
        """Forward and backward of several trials: the gradients that `update` takes, or that every parameter is handed
        where trials were added without optimizers.

        Args:
            works: what each of them wants; each trial is in at most once. In the order of their `index` nothing of
                the stacks is copied.
            autocast: gives the context of a forward pass.

        Returns:
            each trial's loss, its mean per label token.
        """
        rows = self._stack()
        rows.begin()  # an attempt for which there was no memory may have left some
        # Read once, at the end: reading waits for the GPU.
        losses = torch.zeros(len(works), dtype=torch.float64, device=self.device)
        for turn in range(max(len(work.passes) for work in works)):
            for group in _alike(
                [(index, work.passes[turn]) for index, work in enumerate(works) if turn < len(work.passes)]
            ):
                found = self._pass([(works[index], batch) for index, batch in group], autocast)
                for (index, _), loss in zip(group, found, strict=True):
                    losses[index] += loss
        grads_NP = rows.grads()
        if self._adamw is None:
            for stack in self._stacks:
                stack.hand_out(grads_NP)
        else:
            self._grads_NP = grads_NP
        return [float(loss) for loss in losses.tolist()]

    def update(self, models: Sequence[Any], max_norm: float) -> list[float]:
        """One step of several trials' optimizers by the gradients that are there.

        Args:
            models: their PeftModels; all that are there were added with optimizers.
            max_norm: to which each trial's gradient is clipped.

        Returns:
            the norms of their gradients; a trial whose norm is not finite makes no step.
        """
        assert self._adamw is not None
        assert self._grads_NP is not None, "`gradients` comes first"
        grads_NP, self._grads_NP = self._grads_NP, None
        norms = self._adamw.step(grads_NP, [self.index(model) for model in models], max_norm)
        for stack in self._stacks:
            stack.forget()
        return norms

    @contextlib.contextmanager
    def held_for_decoding(self) -> Iterator[None]:
        """Hold the decoder's matrices as autocast multiplies them, for several calls of `decode` under it."""
        dtype, head = autocast_dtype(self._base), self._model.proj_out
        # Before: the stacks keep the bases as they are, since norms are made of them.
        self._stack()
        with contextlib.ExitStack() as held:
            if dtype is not None:
                for place in self._places.values():
                    if is_cast(place.base, dtype):
                        held.callback(setattr, place, "base", place.base)
                        place.base = with_cast_matrix(place.base, dtype)
                if is_cast(head, dtype):
                    held.enter_context(computes_with(head, head.weight, head.bias, dtype))
            yield

    @torch.no_grad()
    def decode(
        self, models: Sequence[Any], audio_BPD: Tensor, prompts_BT: Tensor, rules: Rules
    ) -> list[list[list[int]]]:
        """Transcribe clips by several trials, in a pass for each token.

        Args:
            models: their PeftModels.
            audio_BPD: what the encoder made of the clips.
            prompts_BT: the tokens before each transcript.
            rules: what bounds it.

        Returns:
            of each trial, B transcripts.
        """
        self._of_the_same(models)
        found = decode(self._model, audio_BPD, prompts_BT, rules, models=len(models))
        return [found[start : start + len(audio_BPD)] for start in range(0, len(found), len(audio_BPD))]

    @torch.no_grad()
    def losses(
        self, models: Sequence[Any], audio_BPD: Tensor, inputs_BT: Tensor, labels_BT: Tensor
    ) -> list[list[float]]:
        """The loss of clips by several trials, without dropout.

        Args:
            models: their PeftModels.
            audio_BPD: what the encoder made of the clips.
            inputs_BT: decoder inputs.
            labels_BT: labels, on the CPU.

        Returns:
            of each trial, the loss of each clip, summed over its label tokens.
        """
        self._of_the_same(models)
        count = len(models)
        hidden = self._decoded(inputs_BT.repeat(count, 1), audio_BPD)
        tokens = labelled_losses(hidden, self._model.proj_out.weight, labels_BT.repeat(count, 1))
        counts = (labels_BT != IGNORE).sum(1).tolist()
        found_NB = torch.stack([part.double().sum() for part in tokens.split(counts * count)]).view(count, -1)
        return [[float(loss) for loss in losses] for losses in found_NB.tolist()]

    def _of_the_same(self, models: Sequence[Any]) -> None:
        """Lay out a forward pass of several trials over the same audio, without dropout."""
        self._stack()
        self._layout.set([self.index(model) for model in models], [0] * len(models))

    def _decoded(self, inputs: Tensor, audio: Tensor) -> Tensor:
        """The decoder's output (N * B, T, D) in the present layout."""
        with plain_rows():
            found: Tensor = self._model.model.decoder(
                input_ids=inputs.to(self.device), encoder_hidden_states=audio, use_cache=False
            ).last_hidden_state
        return found

    def _pass(self, group: list[tuple[Work, Batch]], autocast: Callable[[], Any]) -> list[Tensor]:
        """Forward and backward of one batch of each of some trials; all batches hold as many windows."""
        with autocast():
            with self._at_work(group) as audio:
                inputs_NBT, labels_NBT = _padded([batch for _, batch in group])
                hidden = self._decoded(inputs_NBT.flatten(0, 1), audio)
            tokens = labelled_losses(hidden, self._model.proj_out.weight, labels_NBT)
            # They lie trial by trial. (The sum of each is no gather of floats on a GPU, whose order is left to chance.)
            counts = (labels_NBT != IGNORE).flatten(1).sum(1).tolist()
            losses = [part.sum() / work.tokens for part, (work, _) in zip(tokens.split(counts), group, strict=True)]
        torch.stack(losses).sum().backward()
        return [loss.detach() for loss in losses]

    @contextlib.contextmanager
    def _at_work(self, group: list[tuple[Work, Batch]]) -> Iterator[Tensor]:
        """Lay out a forward pass; gives the encoder's output of each distinct batch (U * B, P, D)."""
        distinct: dict[int, int] = {}
        for _, batch in group:
            distinct.setdefault(id(batch), len(distinct))
        first = {id(batch): batch for _, batch in group}
        layout = self._layout
        layout.set([self.index(work.model) for work, _ in group], [distinct[id(batch)] for _, batch in group])
        layout.generators = [work.generator for work, _ in group]
        layout.texts = [batch.inputs_BT.shape[1] for _, batch in group]
        try:
            yield torch.cat([self.hear(first[key]) for key in distinct])
        finally:
            layout.generators = None

    def index(self, model: Any) -> int:
        """A trial's place in the stacks; -1: it is not there."""
        return next((index for index, each in enumerate(self._trials) if each is model), -1)

    @property
    def decoder_layers(self) -> int:
        """How many there are."""
        return len(self._base.model.decoder.layers)

    def hear(self, batch: Batch | Chunk) -> Tensor:
        """The encoder's output of a batch, or of clips that are to be transcribed (B, P, D)."""
        return encoder_output(self._base, batch.features_BMF, batch.heard)


def _alike(batches: list[tuple[int, Batch]]) -> list[list[tuple[int, Batch]]]:
    """Batches by their number of windows: the last one of an epoch may hold fewer, and so may packed ones."""
    groups: dict[int, list[tuple[int, Batch]]] = {}
    for index, batch in batches:
        groups.setdefault(len(batch.inputs_BT), []).append((index, batch))
    return list(groups.values())


def _padded(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Decoder inputs and labels of all trials (N, B, T), padded to the longest: what follows a text changes nothing of
    what comes before it."""
    longest = max(batch.inputs_BT.shape[1] for batch in batches)

    def pad(tokens_BT: Tensor, fill: int) -> Tensor:
        return F.pad(tokens_BT, (0, longest - tokens_BT.shape[1]), value=fill)

    inputs = torch.stack([pad(batch.inputs_BT, int(batch.inputs_BT[0, 0])) for batch in batches])
    return inputs, torch.stack([pad(batch.labels_BT, IGNORE) for batch in batches])
