"""What trials in one process share: the base model, its twin under all of their adapters, and the batches."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from jobs.batches import Batch, Loader
from jobs.fast.encoder_outputs import EncoderOutputs, Origin
from jobs.fast.greedy import Rules, why_not
from jobs.fast.many import ManyAdapters, Work
from jobs.model import Whisper, load_whisper
from jobs.packing import Entry
from jobs.search.runner import Event, TrialRun, stream
from jobs.search.shared.listening import Listen, Together, Tokens, listen
from jobs.search.shared.lockstep import Lockstep
from jobs.search.shared.once import Once
from jobs.search.shared.trainer import SharedTrainer
from jobs.search.shared.validating import Validate, validate
from jobs.stopping import StopSignals
from jobs.train.heard import make_audio
from jobs.train.here import train_here
from jobs.train.kept import make_outputs
from jobs.train.pass_size import Choice, Passes, estimated
from jobs.transcribe import Chunk, Listener, Prompts
from service.plan import largest_job, trained_parameters
from service.spec.job import JobSpec
from service.spec.shared import trials_together

Learned = tuple[float, float, float]
"""What a trial hears of its step: its loss, its gradient's norm, and its learning rate."""

Wishes = dict["SharedTrainer", Work | Listen | Validate]
Answers = dict["SharedTrainer", Any]
"""Of each trial what it hears of its step, its transcripts, its loss, or an error."""

_KEPT_CHUNKS = 4
"""Of held-out clips: a trial reads one chunk ahead of the one that it has before it."""

_KEPT_BATCHES, _KEPT_BYTES = 64, 2**29
"""Batches that are kept for trials that come to them a little later, and what they may take with their features."""


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
        self._step: Lockstep[Work | Listen | Validate, Any] = Lockstep(self._in_one_thread)
        # torch keeps a team of threads for each thread that computes; sixteen of them would fight over a CPU.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="step")
        self._batches: Once[Batch] = Once(_KEPT_BATCHES, _KEPT_BYTES, lambda batch: batch.features_BMF.nbytes)
        self._chunks: Once[Chunk] = Once(_KEPT_CHUNKS)
        self._held_out: Once[Batch] = Once(_KEPT_CHUNKS)
        self._outputs: dict[Origin, EncoderOutputs] = {}
        self._spec = spec
        self._choices: dict[int, Choice] = {}
        self._room: int | None = None  # trials in a pass, where not all of them had room; till others are there
        self.audio = make_audio(spec)
        """Decoded clips, for whichever trial."""
        self.alone = threading.RLock()
        """Held by who draws from the process's random numbers, or makes what the process has one of."""
        self.scoring = threading.RLock()
        """Held by who transcribes by itself."""

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
        """A trial's loader, whose batches are made once for all trials; those of the training set for all of one seed,
        by which clips are varied."""
        make, made = loader.make, self._batches if trains else self._held_out

        def once(entries: Sequence[Entry], epoch: int | None = None) -> Batch:
            return made.get((seed if trains else None, epoch, tuple(entries)), lambda: make(entries, epoch))

        loader.make = once  # type: ignore[method-assign]
        return loader

    def choice(self, passes: Passes) -> Choice:
        """How `per_dev_batch: auto` cuts the steps of a trial: for all with as many clips in a step the same, so that
        they share batches. Estimated for as many trials as there may be, each like the largest of the search."""
        with self.alone:
            clips = passes.spec.training.clips_per_step
            if clips not in self._choices:
                self._choices[clips] = estimated(of_search(passes, self._spec), self._many.device)
            return self._choices[clips]

    def needed(self, passes: Passes) -> int:
        """Bytes that the training of as many trials as there may be comes to, each like the largest of the search."""
        memory = of_search(passes, self._spec).memory(passes.spec.training.pass_sizes[0])
        return memory.total - memory.kept

    def listener(self, trainer: SharedTrainer) -> Listener | None:
        """What transcribes for a trial; None: generate(), for each trial by itself."""
        settings, whisper = trainer.spec.evaluation, self._whisper
        if not settings.fast_decoding or why_not(whisper.model, settings.num_beams) is not None:
            return None
        prompts = Prompts(whisper.model, whisper.processor, multilingual=whisper.multilingual)
        rules = Rules.of(whisper.model, settings.max_new_tokens)

        def ask(wish: Listen) -> Tokens:
            found: Tokens = self._step.ask(trainer, wish)
            return found

        return Together(ask, trainer.model, prompts, rules, self._chunks)

    def join(self, trainer: SharedTrainer) -> None:
        """Have the others wait for a trial from now on."""
        self._step.join(trainer)

    def add(self, trainer: SharedTrainer) -> None:
        """Take its adapters in."""

        def add() -> None:
            self._many.add(trainer.model, trainer.adamw)
            self._room = None

        self._step.between(add)

    def sync(self, trainer: SharedTrainer) -> None:
        """Let a trial's optimizer know what it has come to."""
        self._step.between(lambda: self._many.sync(trainer.model))

    def leave(self, trainer: SharedTrainer) -> None:
        """Let a trial go, if it is there."""

        def remove() -> None:
            self._many.remove(getattr(trainer, "model", None))
            self._room = None
            if not len(self._many):  # what was read for them need not wait for the next ones
                for read in (self._batches, self._chunks, self._held_out):
                    read.clear()

        self._step.leave(trainer, remove)

    def learn(self, trainer: SharedTrainer, work: Work) -> Learned:
        """The trial's share of the common step; returns its loss, its gradient's norm and its learning rate."""
        found: Learned = self._step.ask(trainer, work)
        return found

    def loss(self, trainer: SharedTrainer, batch: Batch) -> float:
        """The trial's loss on held-out clips, summed over the label tokens."""
        found: float = self._step.ask(trainer, Validate(trainer.model, batch))
        return found

    def _in_one_thread(self, wishes: Wishes) -> Answers:
        return self._thread.submit(self._answer, wishes).result()

    def _answer(self, wishes: Wishes) -> Answers:
        wishes = dict(sorted(wishes.items(), key=lambda each: self._many.index(each[0].model)))
        works = {trainer: wish for trainer, wish in wishes.items() if isinstance(wish, Work)}
        listens = {trainer: wish for trainer, wish in wishes.items() if isinstance(wish, Listen)}
        validates = {trainer: wish for trainer, wish in wishes.items() if isinstance(wish, Validate)}
        learned = self._learn(works) if works else {}
        return learned | self._judge(listens, listen) | self._judge(validates, validate)

    def _learn(self, wishes: dict[SharedTrainer, Work]) -> Answers:
        """All of it at once or, where memory is short, in parts: from then on, as long as the same trials are there."""
        trainers = list(wishes)
        size = min(len(trainers), self._room or len(trainers))
        if size < len(trainers):
            parts = [trainers[start : start + size] for start in range(0, len(trainers), size)]
            answers = [self._learn({trainer: wishes[trainer] for trainer in part}) for part in parts]
            return {trainer: answer for found in answers for trainer, answer in found.items()}
        drawn = [wish.generator.get_state() for wish in wishes.values()]
        try:
            losses = self._many.gradients(list(wishes.values()), trainers[0].runtime.autocast)
        except torch.OutOfMemoryError as error:
            failed = _held_by_nobody(error)
        else:
            return self._update(dict(zip(trainers, losses, strict=True)))
        gc.collect()
        torch.cuda.empty_cache()
        if len(trainers) == 1:
            return {trainers[0]: failed}
        for wish, state in zip(wishes.values(), drawn, strict=True):
            wish.generator.set_state(state)  # dropout is that of a step which had room at once
        self._room = (len(trainers) + 1) // 2
        return self._learn(wishes)

    def _update(self, losses: dict[SharedTrainer, float]) -> Answers:
        """Have the optimizers of some trials make their step. A loss or a gradient that is no number is that trial's
        own affair; what else goes wrong is theirs, and not of those that are judged meanwhile."""
        found: Answers = {trainer: _tried(trainer.finite, loss) for trainer, loss in losses.items()}
        steady = [trainer for trainer, loss in found.items() if not isinstance(loss, BaseException)]
        if not steady:
            return found
        try:
            norms = self._many.update([trainer.model for trainer in steady], self._spec.engine.max_grad_norm)
        except Exception as error:  # noqa: BLE001  # raised in the trials' own threads
            return found | dict.fromkeys(steady, _held_by_nobody(error))
        for trainer, norm in zip(steady, norms, strict=True):
            made = _tried(trainer.updated, norm)
            found[trainer] = made if isinstance(made, BaseException) else (losses[trainer], *made)
        return found

    def _judge(self, wishes: dict[SharedTrainer, Any], judge: Callable[[ManyAdapters, Sequence[Any]], Any]) -> Answers:
        """What some trials say, or their losses, of the clips that each of them wants to be judged by."""
        trainers = list(wishes)
        if not trainers:
            return {}
        try:
            with trainers[0].runtime.autocast():
                return dict(zip(trainers, judge(self._many, list(wishes.values())), strict=True))
        except Exception as error:  # noqa: BLE001  # raised in the trials' own threads; others go on with their steps
            return dict.fromkeys(trainers, _held_by_nobody(error))


def of_search(passes: Passes, search: JobSpec) -> Passes:
    """A trial's forward passes as those of all trials of its search: each like the one with most parameters."""
    if search.kind != "search":
        return replace(passes, trials=1)
    largest = largest_job(search, None, passes.dims)
    cut = {"per_dev_batch": passes.spec.training.per_dev_batch, "grad_accum": passes.spec.training.grad_accum}
    spec = largest.model_copy(update={"training": largest.training.model_copy(update=cut)})
    trainable = trained_parameters(spec, passes.dims)
    return replace(passes, spec=spec, trainable=trainable, trials=trials_together(search))


def _held_by_nobody(error: BaseException) -> BaseException:
    """The error of an attempt for which there was no memory, without the frames that hold what it had come to."""
    return error.with_traceback(None) if isinstance(error, torch.OutOfMemoryError) else error


def _tried(function: Callable[[float], Any], value: float) -> Any:
    """What a function of one trial's gives, or the error that it raises."""
    try:
        return function(value)
    except Exception as error:  # noqa: BLE001  # raised in the trial's own thread
        return error
