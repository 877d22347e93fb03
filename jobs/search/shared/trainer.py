"""The training engine of one trial among others: with a schedule, an optimizer and checkpoints of its own, and steps
that all trials make together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from jobs.batches import Batch, Loader
from jobs.fast.many import Work
from jobs.train.checkpoint import random_states
from jobs.train.loop import Trainer, TrainTask
from jobs.train.session import Session
from jobs.transcribe import Listener

if TYPE_CHECKING:
    from jobs.augment import Augmenter
    from jobs.fast.encoder_outputs import EncoderOutputs, Origin, SplitOutputs
    from jobs.fast.kept_audio import KeptAudio
    from jobs.model import Whisper
    from jobs.search.shared.engine import SharedEngine
    from jobs.train.pass_size import Choice


class SharedTrainer(Trainer):
    """A trial.

    Args:
        task: its train job.
        session: takes its events.
        engine: what it shares with the others.
    """

    def __init__(self, task: TrainTask, session: Session, engine: SharedEngine) -> None:
        with engine.alone:  # accelerate's first objects in a process are made half before others can see them
            super().__init__(task, session)
        self.engine = engine
        self.streams = Streams(self.runtime.device)
        self.ranks = self.streams
        self.shares_outputs = True

    def run(self) -> dict[str, Any]:
        """See Trainer."""
        self.engine.join(self)
        try:
            return super().run()
        finally:
            self.engine.leave(self)

    def _load_base(self) -> Whisper:
        return self.engine.whisper()

    def _outputs(self, origin: Origin) -> EncoderOutputs:
        return self.engine.outputs(self.spec, origin)

    def _audio(self) -> KeptAudio:
        return self.engine.audio

    def _loader(self, rows: Any, augmenter: Augmenter | None = None, outputs: SplitOutputs | None = None) -> Loader:
        loader = super()._loader(rows, augmenter, outputs)
        return self.engine.loader(loader, self.settings.seed, trains=rows is self.train_set)

    def _prepare_training(self) -> None:
        # Adapters are drawn from the process's generators, as a trial alone draws them.
        with self.engine.alone:
            super()._prepare_training()
        if self.kept is not None:  # others may come: what one has shown is not what all of them need
            self.kept.outputs.leave(self.engine.needed(self._passes()))
        self.engine.add(self)

    def _cast_base(self) -> None:
        """The base's weights are all trials', and those to come begin from them."""

    def _choose_passes(self, sharers: int) -> Choice:
        return self.engine.choice(self._passes())

    def _learn(self, batches: tuple[list[Batch], ...], tokens: float) -> tuple[float, float, float]:
        (passes,) = batches
        return self.engine.learn(self, Work(self.model, passes, tokens, self.streams.generator))

    def updated(self, norm: float) -> tuple[float, float]:
        """Go on after a step of the optimizer, which all trials make together; returns what `_update` returns.

        Args:
            norm: of the gradient; where it was not finite, no step was made.

        Raises:
            DivergedError: it was not.
        """
        rate = self.rate
        self.finite(norm, "the gradient's norm")
        self.adamw._opt_called = True  # by which the schedule knows that there was a step
        self.scheduler.step()
        self.dora.refresh()
        return norm, rate

    @property
    def adamw(self) -> Any:
        """What says how it learns."""
        return self.optimizer.optimizer

    def _parts(self) -> dict[str, Any]:
        self.engine.sync(self)
        return super()._parts()

    def _loss_of(self) -> AbstractContextManager[Callable[[Batch], float]]:
        return contextlib.nullcontext(functools.partial(self.engine.loss, self))

    def _measure(self) -> dict[str, float]:
        if self.spec.evaluation.metric == "loss" or self._listener() is not None:
            return super()._measure()
        with self.engine.scoring:  # one after the other: each has the processor to itself
            return super()._measure()

    def _listener(self) -> Listener | None:
        return self.engine.listener(self)

    def _take_best(self) -> dict[str, Any]:
        self.engine.leave(self)
        return super()._take_best()


class Streams:
    """The random numbers of one trial in a process of many, in place of the process's own, kept in the same form. On a
    CPU its dropout draws from them what the trial alone would draw; on a GPU torch's dropout is a kernel of its own,
    whose numbers are others.

    Args:
        device: where dropout draws.
    """

    total, mine = 1, (0,)

    def __init__(self, device: torch.device) -> None:
        self.generator = torch.Generator(device)

    def seed(self, seed: int) -> None:
        """Begin."""
        self.generator.manual_seed(seed)

    @contextlib.contextmanager
    def at_work(self, rank: int) -> Iterator[None]:
        """See VirtualRanks."""
        yield

    def gather(self) -> list[dict[str, Any]]:
        """What a checkpoint holds."""
        return [random_states() | {self._kind: self.generator.get_state()}]

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Inverse of `gather`."""
        if states[0][self._kind] is not None:
            self.generator.set_state(states[0][self._kind])

    @property
    def _kind(self) -> str:
        return "cuda" if self.generator.device.type == "cuda" else "torch"
