"""Fine-tuning, as an outline: score the base, attach adapters, train, keep the best, prove it from its files.

A trial of a search is the middle of it: the base has been scored, and nothing is published yet.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset
from torch import Tensor
from transformers import get_scheduler

from jobs import distributed
from jobs.adapter import (
    coverage,
    load_adapter,
    lora_layers,
    require_coverage,
    snapshot,
    trainable_parameters,
)
from jobs.augment import Augmenter
from jobs.batches import Batch, Loader, Schedule, label_tokens, seed_everything
from jobs.convert import save_published
from jobs.failures import inputs_that_were_there
from jobs.fast.adapters import speed_up
from jobs.fast.base_dtype import cast_base
from jobs.fast.encoder_outputs import EncoderOutputs, Origin, SplitOutputs
from jobs.fast.kept_audio import KeptAudio
from jobs.init_data import InitClips
from jobs.inits import INITIAL, begin, initial_sha256, without_adapter
from jobs.model import Whisper, load_whisper
from jobs.packing import make_packing
from jobs.progress import transfer_events
from jobs.train.checkpoint import Progress, adapter_state, read_checkpoint, write_checkpoint
from jobs.train.heard import Clips, make_audio
from jobs.train.kept import KeptOutputs, is_used, make_outputs, origin_of, why_not
from jobs.train.pass_size import Choice, Passes, estimated, longest_label, settle, windows_of
from jobs.train.probe import probed
from jobs.train.ranks import VirtualRanks
from jobs.train.runtime import Runtime, make_runtime
from jobs.train.scores import Scores
from jobs.train.session import Session
from jobs.train.step import forward_loss
from jobs.train.step_log import StepLog
from jobs.train.store import CheckpointStore
from jobs.train.validation import loss_by, validation_loss
from jobs.transcribe import Listener
from service.artifacts import ADAPTER
from service.errors import DivergedError, JobFailedError, StoppedError
from service.spec.job import JobSpec
from service.spec.training import AUTO
from service.spec.whisper_dims import WhisperDims
from service.storage import Storage

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""transformers' names of `engine.lr_scheduler`."""


@dataclass(frozen=True)
class TrainTask:
    """What to train on, and where results go: Arrow files of prepared rows, and the run's root."""

    spec: JobSpec
    train: str
    val: str
    root: str
    revision: str | None = None
    """Commit of the base model on the hub that the run began with."""
    trial: bool = False
    """Whether it is a search's: then it ends with its last checkpoint, which a run of the same spec goes on from."""


def train(task: TrainTask, session: Session, outputs: EncoderOutputs | None = None) -> dict[str, Any]:
    """Fine-tune with all workers; each of them makes this call.

    Leaves evaluation/base.jsonl, adapter/ and evaluation/tuned.jsonl under the root; a trial checkpoints alone.

    Args:
        task: what to train on.
        session: who the other workers are.
        outputs: encoder outputs that this process's trainings on the same base and rows share.

    Returns:
        {"base": metrics, "tuned": metrics, "adapter": coverage, "training": what was done}; of a trial the last two.

    Raises:
        SpecError: the settings do not fit the model or the hardware.
        StoppedError: the job was asked to stop; a checkpoint of the last step is kept.
        DivergedError: the loss is not a finite number.
        InputLostError: a clip or the base model has gone.
        VerificationError: an adapter did not learn.
    """
    return Trainer(task, session, outputs).run()


class Trainer:
    """One run of the engine in one worker."""

    def __init__(self, task: TrainTask, session: Session, outputs: EncoderOutputs | None = None) -> None:
        self.task, self.spec, self.session = task, task.spec, session
        self.storage = Storage(task.root, transfer_events(session.emit))
        self.settings, self.revision = task.spec.training, task.revision
        self.runtime: Runtime = make_runtime(task.spec, self.storage, session)
        self.train_set, self.val_set = Dataset.from_file(task.train), Dataset.from_file(task.val)
        self.ranks: Any = VirtualRanks(task.spec.resources.workers, session.rank, session.workers)
        self.schedule = Schedule(
            rows=len(self.train_set),
            per_dev_batch=self.settings.pass_sizes[0],  # with `auto` until it is chosen: a step has as many clips
            grad_accum=self.settings.grad_accum,
            workers=self.ranks.total,
            seed=self.settings.seed,
        )
        self.steps = self.schedule.steps_per_epoch * self.settings.epochs
        self.checkpoints = CheckpointStore(self.storage, task.spec.engine.keep_checkpoints, self._notice)
        self.kept_step = 0
        self.progress = Progress()
        self.log = StepLog(session, self.runtime, self.steps, self.settings.logging_steps)
        self.best: dict[str, Tensor] | None = None
        self.kept: KeptOutputs | None = None
        self._given, self.shares_outputs = outputs, outputs is not None

    def run(self) -> dict[str, Any]:
        """The whole run; see `train`."""
        self.whisper = self._load_base()
        self.whisper.model.to(self.runtime.device)
        self.kept, self.clips = self._keep_outputs(), self._clips()
        self.scores = self._scores()
        base = None if self.task.trial else self.scores.base(self.whisper, self._val_outputs)
        self._prepare_training()
        self._evaluate_if_due()  # a run may have been stopped between a step and its evaluation
        for batches in self._batches():
            self._step(batches)
        self.runtime.finish()
        report = self._take_best()
        found = {}
        if not self.task.trial:
            self._publish()
            found = {"base": base, "tuned": self._score_saved()}
        return found | {
            "adapter": report,
            "training": {
                "steps": self.steps,
                "effective_batch": self.schedule.effective_batch,
                "per_dev_batch": self.schedule.per_dev_batch,
                "grad_accum": self.schedule.grad_accum,
                "best_step": self.progress.best_step,
                "history": self.progress.history,
                "clips_per_s": self.log.clips_per_s,
                "precision": self.runtime.precision,
                "device": self.runtime.device_name,
            },
        }

    def _load_base(self) -> Whisper:
        with inputs_that_were_there():
            return load_whisper(self.settings.base_model, self.revision, attention=self.spec.engine.attention)

    def _keep_outputs(self) -> KeptOutputs | None:
        if why := why_not(self.spec):
            self._notice(why)
        if not is_used(self.spec):
            return None
        splits = {"train": self.task.train, "val": self.task.val}
        origin = origin_of(self.spec, splits, self.revision, self.runtime.device, self.runtime.precision)
        outputs = self._outputs(origin)
        if outputs.origin != origin:
            raise ValueError(f"encoder outputs of {outputs.origin} were handed to a training that needs {origin}")
        evaluations = self._evaluations() + (not self.task.trial)
        return KeptOutputs(self.spec, outputs, evaluations, shared=self.shares_outputs)

    def _evaluations(self) -> int:
        """How often the validation set is heard in the training."""
        return -(-self.steps // self.settings.eval_steps)

    def _clips(self) -> Clips:
        heard = {self.task.train: self.settings.epochs, self.task.val: self._evaluations() + 2 * (not self.task.trial)}
        again = {split for split, times in heard.items() if times > 1 or self.shares_outputs}
        return Clips(self.spec, self._audio(), self.whisper.processor.feature_extractor, self.runtime.device, again)

    def _scores(self) -> Scores:
        features = functools.partial(self.clips.features, self.task.val)
        return Scores(self.spec, self.session, self.storage, self.runtime, self.val_set, features)

    @property
    def _val_outputs(self) -> SplitOutputs | None:
        """Encoder outputs of the validation set, where the encoder is the base's."""
        return self.kept.val if self.kept else None

    def _audio(self) -> KeptAudio:
        return make_audio(self.spec)

    def _outputs(self, origin: Origin) -> EncoderOutputs:
        return self._given or make_outputs(self.spec, origin, self.runtime.device)

    # The way in: adapters, optimizer, checkpoint.

    def _prepare_training(self) -> None:
        seed_everything(self.settings.seed)  # nothing before is drawn by chance
        self.schedule = replace(self.schedule, packing=make_packing(self.spec, self.train_set, self.whisper))
        total = sum(parameter.numel() for parameter in self.whisper.model.parameters())
        augmenter = Augmenter(self.spec.augment, self.settings.seed)
        self.loader = self._loader(self.train_set, augmenter, self.kept.train if self.kept else None)
        self.model = begin(self.whisper.model, self.settings, self.storage, self.session.rank, self._init_clips)
        if self.spec.engine.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.dora = speed_up(self.model, self.spec.engine)
        self.before = snapshot(self.model)
        self._cast_base()
        self.parameters = [parameter for _, parameter in trainable_parameters(self.model)]
        self._cut_steps()
        optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.lr, weight_decay=self.spec.engine.weight_decay, foreach=True
        )
        warmup = self.settings.warmup_steps(self.steps)
        self.scheduler = get_scheduler(SCHEDULES[self.spec.engine.lr_scheduler], optimizer, warmup, self.steps)
        self.first_learning_step = 2 if warmup else 1  # a warm-up begins at a learning rate of 0
        self.optimizer = self.runtime.prepare_optimizer(optimizer)
        self.ranks.seed(self.settings.seed)
        self._resume()
        trainable = sum(parameter.numel() for parameter in self.parameters)
        self.session.emit(
            {
                "event": "model",
                "trainable_parameters": trainable,
                "parameters": total,
                "modules": len(lora_layers(self.model)),
                "steps": self.steps,
                "resumed_from_step": self.progress.step,
                "history": self.progress.history,
                "precision": self.runtime.precision,
                "device": self.runtime.device_name,
            }
        )

    def _cut_steps(self) -> None:
        """With `training.per_dev_batch: auto`, make each step in the largest passes that fit."""
        if self.settings.per_dev_batch != AUTO:
            return
        choice, kept = settle(self.storage, self.spec, self.session.rank, self._choose_passes)
        self.schedule = replace(self.schedule, per_dev_batch=choice.per_dev_batch, grad_accum=choice.grad_accum)
        if self.kept is not None:
            self.kept.outputs.leave(choice.peak_bytes)
        self._notice(choice.text(kept=kept, workers=self.ranks.total))

    def _choose_passes(self, sharers: int) -> Choice:
        """This worker's choice, of the number of workers that share its node's main memory."""
        passes, device = self._passes(), self.runtime.device
        if device.type != "cuda":
            return estimated(passes, device, sharers)
        kept_bytes = self.kept.outputs.device_bytes if self.kept else 0
        frames = int(self.whisper.processor.feature_extractor.nb_max_frames)
        return probed(passes, self.model, self.parameters, self.runtime, frames=frames, kept_bytes=kept_bytes)

    def _passes(self) -> Passes:
        packing = self.schedule.packing
        return Passes(
            spec=self.spec,
            dims=WhisperDims.from_config(self.whisper.model.config.to_dict()),
            trainable=sum(parameter.numel() for parameter in self.parameters),
            half=self.runtime.precision != "no",
            tokens=longest_label(self.train_set["tokens"], self.whisper.prompter().max_tokens, packing),
            windows=windows_of(packing, self.settings.epochs),
            rows={"train": len(self.train_set), "val": len(self.val_set)},
        )

    def _cast_base(self) -> None:
        cast_base(self.model, self.spec, self.runtime.precision)

    def _loader(self, rows: Dataset, augmenter: Augmenter | None = None, outputs: SplitOutputs | None = None) -> Loader:
        return Loader(
            rows,
            self.clips.features(self.task.train if rows is self.train_set else self.task.val, outputs),
            self.whisper.prompter(),
            threads=self.spec.data.threads,
            prefetch=self.spec.data.prefetch,
            augmenter=augmenter,
            timestamps=self.spec.data.timestamps,
            outputs=outputs,
            gap_s=self.spec.data.packing_gap_s,
        )

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; one worker looks, as above."""
        found = self.checkpoints.newest() if self.session.rank == 0 else None
        step, initial = distributed.gather([found])[0], initial_sha256(self.storage)
        if step is not None:
            folder = self.checkpoints.folder(step)
            self.progress, self.best, states = read_checkpoint(folder, self.model, self._parts())
            self.ranks.restore(states)
            self.kept_step = step
            if self.progress.initial != initial:
                where = self.storage.path(INITIAL)
                raise JobFailedError(f"{where}: is not what the checkpoints began from; --overwrite begins anew")
        self.progress.initial = initial

    def _init_clips(self) -> InitClips:
        # By themselves: which of them share a window hangs on the passes, which may not be chosen yet.
        rows = replace(self.schedule, packing=None).order(0)[: self.spec.engine.init_clips].tolist()
        return InitClips(rows, self._loader(self.train_set).make, self.runtime.device, self.settings.freeze_encoder)

    def _parts(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.runtime.scaler}

    # The loop's body.

    def _batches(self) -> Iterator[tuple[list[Batch], ...]]:
        """Per step, the forward passes of each of this worker's virtual ranks."""
        self.model.train()
        self.log.restart()
        first = self.progress.step
        with inputs_that_were_there():
            yield from zip(
                *(self.loader.steps(self.schedule, rank, first, self.steps) for rank in self.ranks.mine), strict=True
            )

    def _step(self, batches: tuple[list[Batch], ...]) -> None:
        counted = sum(map(label_tokens, batches))
        tokens, stops = distributed.sum_numbers([counted, self.session.stopping()], self.runtime.device)
        if stops:
            self._stop()
        loss, norm, rate = self._learn(batches, tokens)
        self.progress.step += 1
        self.log.tell(self.progress.step, self.schedule, loss=loss, norm=norm, rate=rate)
        self._tell_kept()
        if not self._evaluate_if_due() and self.progress.step % self.settings.save_steps == 0:
            self._save()

    def _tell_kept(self) -> None:
        if self.kept is not None:
            self.kept.outputs.settle()
        if self.progress.step % self.schedule.steps_per_epoch == 0:
            for kept in (self.kept, self.clips):
                if kept is not None and (text := kept.report()):
                    self._notice(text)

    def _stop(self) -> NoReturn:
        """Leave the training with a checkpoint of what was done."""
        if self.progress.step > self.kept_step:
            self._save()
        step = self.kept_step
        where = f"at step {step} of {self.steps}; its checkpoint is kept" if step else "before the first step"
        raise StoppedError(f"stopped {where}. The same command goes on from there")

    def _learn(self, batches: tuple[list[Batch], ...], tokens: float) -> tuple[float, float, float]:
        """Forward, backward, and the optimizer's step; returns the loss, the gradient's norm and the learning rate."""
        loss = self.finite(self._gradients(batches, tokens))
        return loss, *self._update()

    def _update(self) -> tuple[float, float]:
        """One step of the optimizer by the gradients that are there; returns their norm and the learning rate."""
        norm = self.runtime.clip(self.parameters, self.optimizer, self.spec.engine.max_grad_norm)
        if self.runtime.scaler is None:
            self.finite(norm, "the gradient's norm")
        rate = self.rate
        self.optimizer.step()
        if not self.runtime.skipped(self.optimizer):
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.dora.refresh()
        return norm, rate

    def _gradients(self, batches: tuple[list[Batch], ...], tokens: float) -> float:
        """Forward and backward; the loss is the mean over the label tokens of all workers and passes.

        Args:
            batches: the forward passes of this worker's virtual ranks.
            tokens: label tokens of all workers.
        """
        device, frozen, fast = self.runtime.device, self.settings.freeze_encoder, self.spec.engine.fast_loss
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once a step: reading waits for the GPU
        for rank, passes in zip(self.ranks.mine, batches, strict=True):
            with self.ranks.at_work(rank):
                for batch in passes:
                    with self.runtime.autocast():
                        part = forward_loss(self.model, batch, device, freeze_encoder=frozen, fast_loss=fast)
                    part = part / tokens
                    total += part.detach()
                    self.runtime.backward(part)
        (loss,) = distributed.sum_numbers([float(total)], device)
        distributed.sum_gradients(self.parameters)
        return loss

    @property
    def rate(self) -> float:
        """The learning rate of the step that comes."""
        return float(self.scheduler.get_last_lr()[0])

    def finite(self, value: float, what: str = "the loss") -> float:
        """A loss or a norm that is a number.

        Raises:
            DivergedError: it is none.
        """
        if not math.isfinite(value):
            raise DivergedError(
                f"training: {what} is {value} at step {self.progress.step + 1}; stopped before the optimizer step. "
                "Lower training.lr, or use bf16 in place of fp16; checkpoints stay as they are"
            )
        return value

    def _evaluate_if_due(self) -> bool:
        """Evaluate every eval_steps steps and at the end; each evaluation leaves a checkpoint."""
        step = self.progress.step
        due = step > 0 and (step % self.settings.eval_steps == 0 or step == self.steps)
        if not due or self.progress.evaluated == step:
            return False
        try:
            found = self._measure()
        except StoppedError:
            self._stop()
        score = found[self.spec.evaluation.metric]
        better = self.progress.best is None or score < self.progress.best
        if better and step >= self.first_learning_step:
            self.progress.best, self.progress.best_step, self.best = score, step, adapter_state(self.model)
        self.progress.history.append({"step": step} | found)
        self.progress.evaluated = step
        self.session.emit({"event": "evaluation", "step": step} | found)
        self.runtime.log({f"eval/{name}": value for name, value in found.items()}, step)
        self._save()
        self.log.restart()
        return True

    def _measure(self) -> dict[str, float]:
        """The validation set's WER and CER, or its loss, as `evaluation.metric` says."""
        if self.spec.evaluation.metric == "wer":
            return self.scores.rates(self.whisper, self.model, self._val_outputs, self._listener())
        with self.runtime.autocast(), inputs_that_were_there(), self._loss_of() as loss_of:
            loader = self._loader(self.val_set, outputs=self._val_outputs)
            device = self.runtime.device
            return {"loss": validation_loss(loss_of, self.val_set, loader, self.spec, self.session, device)}

    def _loss_of(self) -> AbstractContextManager[Callable[[Batch], float]]:
        """What gives the loss of held-out clips, summed over their label tokens."""
        return loss_by(self.model, self.spec)

    def _save(self) -> None:
        """Keep a checkpoint of the last step; rank 0 writes it."""
        states = self.ranks.gather()

        def write(folder: Path) -> None:
            write_checkpoint(folder, self.model, self.best, self.progress, self._parts(), states)

        if self.session.rank == 0:
            self.checkpoints.save(self.progress.step, write)
            self.runtime.keep_curves()
        distributed.barrier()
        self.kept_step = self.progress.step
        self.session.emit({"event": "checkpoint", "step": self.progress.step})

    # The way out: the best adapter, on disk, proven.

    def _take_best(self) -> dict[str, Any]:
        """Put the best adapter in place, and show that every module in it has moved."""
        from peft import set_peft_model_state_dict

        assert self.best is not None, "the last step is always evaluated"
        set_peft_model_state_dict(self.model, self.best)
        report = coverage(self.model, self.before)
        require_coverage(report)
        report["without_adapter"] = without_adapter(self.model, self.settings)
        report["trainable_parameters"] = sum(parameter.numel() for parameter in self.parameters)
        return report

    def _publish(self) -> None:
        """Write the best adapter in the form that fits the untouched base."""
        assert self.best is not None
        if self.session.rank == 0:
            with self.storage.new_folder(ADAPTER) as folder:
                save_published(folder, self.model, self.best, self.before)
        distributed.barrier()

    def _score_saved(self) -> dict[str, Any]:
        """Score what was published: the adapter's files on a base read anew, not what is in memory."""
        del self.model, self.dora, self.optimizer, self.scheduler, self.parameters, self.whisper.model, self.loader
        self.kept = None  # a proof computes everything anew
        gc.collect()
        self.whisper = self._load_base()
        model = load_adapter(self.whisper.model, self.storage.fetch(ADAPTER)).to(self.runtime.device)
        speed_up(model, self.spec.engine)
        return self.scores.tuned(self.whisper, model)

    def _notice(self, text: str) -> None:
        self.session.emit({"event": "notice", "text": text})

    def _listener(self) -> Listener | None:
        """What transcribes; None: as `evaluation` says."""
        return None
