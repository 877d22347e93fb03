"""The loss on the validation set: what a training is judged by where no transcript is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from jobs import distributed
from jobs.batches import Batch, Loader, label_tokens
from jobs.train.session import Session
from jobs.train.step import forward_loss
from jobs.transcribe import read_ahead, shard
from service.errors import StoppedError
from service.spec.job import JobSpec


def validation_loss(
    loss_of: Callable[[Batch], float],
    dataset: Any,
    loader: Loader,
    spec: JobSpec,
    session: Session,
    device: torch.device,
) -> float:
    """Mean cross-entropy per label token, of all workers together; clips as they are, no dropout.

    Args:
        loss_of: the loss of a batch, summed over its label tokens, such as `loss_by` gives.
        dataset: the validation set.
        loader: makes batches of it.
        spec: its batch size and threads.
        session: who the other workers are; each of them makes this call.
        device: where they exchange numbers.

    Raises:
        StoppedError: a worker was told to stop.
    """
    rows, size = shard(dataset, session.rank, session.workers), spec.evaluation.batch_size
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    total, tokens, stopped = 0.0, 0, session.stopping()
    with ThreadPoolExecutor(spec.data.threads, thread_name_prefix="audio") as pool:
        for done, (_, batch) in enumerate(read_ahead(pool, loader.make, [] if stopped else chunks), 1):
            total += loss_of(batch)
            tokens += label_tokens([batch])
            seen = min(done * size * session.workers, len(dataset))
            session.emit({"event": "transcribed", "what": "validation", "done": seen, "total": len(dataset)})
            if stopped := session.stopping():
                break
    # Workers hear of a stop at different times, and must all leave by the same way.
    total, count, stops = distributed.sum_numbers([total, tokens, stopped], device)
    if stops:
        raise StoppedError("stopped while the validation set was scored")
    return total / count


@contextlib.contextmanager
def loss_by(model: Any, spec: JobSpec) -> Iterator[Callable[[Batch], float]]:
    """The loss of a model on a batch, summed over its label tokens; meanwhile its dropouts rest.

    Args:
        model: a Whisper model or a PeftModel around one, on its device.
        spec: whether the encoder is frozen, and how the loss is computed.
    """
    device, frozen, fast = next(model.parameters()).device, spec.training.freeze_encoder, spec.engine.fast_loss

    @torch.no_grad()
    def loss_of(batch: Batch) -> float:
        return float(forward_loss(model, batch, device, freeze_encoder=frozen, fast_loss=fast))

    was_training = model.training
    model.eval()
    try:
        yield loss_of
    finally:
        model.train(was_training)
