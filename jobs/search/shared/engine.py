"""What trials in one process share: the base model, its twin under all of their adapters, and the batches."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch

from jobs.batches import Batch, Loader
from jobs.fast.encoder_outputs import EncoderOutputs, Origin
from jobs.fast.many import ManyAdapters, Work
from jobs.model import Whisper, load_whisper
from jobs.packing import Entry
from jobs.search.runner import Event, TrialRun, stream
from jobs.search.shared.lockstep import Lockstep
from jobs.search.shared.trainer import SharedTrainer
from jobs.stopping import StopSignals
from jobs.train.heard import make_audio
from jobs.train.here import train_here
from jobs.train.kept import make_outputs
from jobs.train.pass_size import Choice, Passes, estimated
from service.plan import largest_job, trained_parameters
from service.spec.job import JobSpec
from service.spec.shared import trials_together

_KEPT_BATCHES = 64
"""Batches that are kept for trials that come to them a little later."""


class SharedEngine:
    """A runner of trials that train together.

    Args:
        spec: the search.
        revision: commit of the base model.
    """

    def __init__(self, spec: JobSpec, revision: str | None) -> None:
        from jobs.device import has_gpu

        self._whisper = load_whisper(spec.training.base_model, revision, attention=spec.engine.attention)
        self._whisper.model.to("cuda" if has_gpu(spec) else "cpu")
        self._many = ManyAdapters(self._whisper.model)
        self._step: Lockstep[tuple[Work, Any], float] = Lockstep(self._compute)
        self._batches = Batches()
        self._outputs: dict[Origin, EncoderOutputs] = {}
        self._spec = spec
        self._choices: dict[int, Choice] = {}
        self.audio = make_audio(spec)
        """Decoded clips, for whichever trial."""
        self.alone = threading.RLock()
        """Held by who draws from the process's random numbers, or makes what the process has one of."""
        self.scoring = threading.RLock()
        """Held by who transcribes."""

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Generator[Event]:
        """See TrialRunner."""
        return stream(functools.partial(self._train, run), stopping)

    def _train(self, run: TrialRun, say: Callable[[Event], None], signals: StopSignals) -> dict[str, Any]:
        def trainer(task: Any, session: Any) -> SharedTrainer:
            return SharedTrainer(task, session, self)

        return train_here(run.spec, run.root, run.data, run.revision, say, signals, trial=True, trainer=trainer)

    # What a trial's trainer asks for.

    def whisper(self) -> Whisper:
        """The base for one trial: modules of its own, around the shared weights."""
        shared = self._whisper
        return Whisper(shared.name, self._many.twin(), shared.processor, shared.stored_dtype)

    def outputs(self, spec: JobSpec, origin: Origin) -> EncoderOutputs:
        """What the encoder made of clips, for whichever trial."""
        with self.alone:
            if origin not in self._outputs:
                self._outputs[origin] = make_outputs(spec, origin, self._many.device)
            return self._outputs[origin]

    def loader(self, loader: Loader, seed: int, *, trains: bool) -> Loader:
        """A trial's loader; batches of the training set are made once for all trials of one seed."""
        if trains:
            loader.make = self._batches.shared(loader.make, seed)  # type: ignore[method-assign]
        return loader

    def choice(self, passes: Passes) -> Choice:
        """How `per_dev_batch: auto` cuts the steps of a trial: for all with as many clips in a step the same, so that
        they share batches. Estimated for as many trials as there may be, each like the largest of the search."""
        with self.alone:
            clips = passes.spec.training.clips_per_step
            if clips not in self._choices:
                self._choices[clips] = estimated(of_search(passes, self._spec), self._many.device)
            return self._choices[clips]

    def join(self, trainer: SharedTrainer) -> None:
        """Have the others wait for a trial from now on."""
        self._step.join(trainer)

    def add(self, trainer: SharedTrainer) -> None:
        """Take its adapters in."""
        self._step.between(lambda: self._many.add(trainer.model))

    def leave(self, trainer: SharedTrainer) -> None:
        """Let a trial go, if it is there."""
        self._step.leave(trainer, lambda: self._many.remove(getattr(trainer, "model", None)))

    def gradients(self, trainer: SharedTrainer, work: Work) -> float:
        """The trial's share of the common step; returns its loss."""
        return self._step.ask(trainer, (work, trainer.runtime.autocast))

    def _compute(self, wishes: dict[Any, tuple[Work, Any]]) -> dict[Any, float | BaseException]:
        """All of it at once or, where memory is short, in halves."""
        members = list(wishes)
        works = [wishes[member][0] for member in members]
        autocast = wishes[members[0]][1]
        try:
            return dict(zip(members, self._many.gradients(works, autocast), strict=True))
        except torch.OutOfMemoryError as error:
            if len(members) == 1:
                return {members[0]: error}
        torch.cuda.empty_cache()
        half = len(members) // 2
        found: dict[Any, float | BaseException] = {}
        for part in (members[:half], members[half:]):
            found |= self._compute({member: wishes[member] for member in part})
        return found


def of_search(passes: Passes, search: JobSpec) -> Passes:
    """A trial's forward passes as those of all trials of its search: each like the one with most parameters."""
    if search.kind != "search":
        return replace(passes, trials=1)
    largest = largest_job(search, None, passes.dims)
    cut = {"per_dev_batch": passes.spec.training.per_dev_batch, "grad_accum": passes.spec.training.grad_accum}
    spec = largest.model_copy(update={"training": largest.training.model_copy(update=cut)})
    trainable = trained_parameters(spec, passes.dims)
    return replace(passes, spec=spec, trainable=trainable, trials=trials_together(search))


class Batches:
    """Batches of the training set, each made once for all trials that come to it at about the same time."""

    def __init__(self) -> None:
        self._made: OrderedDict[Any, Future[Batch]] = OrderedDict()
        self._lock = threading.Lock()

    def shared(self, make: Callable[..., Batch], seed: int) -> Callable[..., Batch]:
        """A `Loader.make` that makes no batch twice; the seed is that by which clips are varied."""

        def once(entries: Sequence[Entry], epoch: int | None = None) -> Batch:
            key, future = (seed, epoch, tuple(entries)), Future[Batch]()
            with self._lock:
                found = self._made.setdefault(key, future)
                while len(self._made) > _KEPT_BATCHES:
                    self._made.popitem(last=False)
            if found is future:
                try:
                    future.set_result(make(entries, epoch))
                except BaseException as error:  # noqa: BLE001  # of whoever waits for it
                    with self._lock:
                        self._made.pop(key, None)
                    future.set_exception(error)
            return found.result()

        return once
