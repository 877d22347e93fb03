"""How many clips a forward pass holds where `training.per_dev_batch` is `auto`.

The largest divisor of a step's clips whose pass fits in every worker's memory. On a GPU passes of the longest audio and
labels are run before the training (jobs/train/probe.py); on a CPU, and for trials that train together, they are
estimated (service/memory.py). The choice is kept below the run's root: numbers of another one differ by rounding, and a
run that goes on, perhaps beside other jobs on its GPU, is to have the same ones to the bit.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from jobs import distributed
from jobs.batches import WIDTH_STEP
from jobs.fast.places import available_memory
from jobs.packing import Packing
from service.artifacts import CHECKPOINTS
from service.errors import JobFailedError, NotFoundError
from service.memory import Training, host_memory, training_memory
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.targets import adapted_modules
from service.spec.training import AUTO
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import modules
from service.storage import Storage

PASS_SIZE = f"{CHECKPOINTS}/pass_size.json"

MARGIN = 0.1
"""Share of a GPU's memory that stays free: for features that are made ahead, fragments, and what libraries take."""

HOST_SHARE = 0.5
"""Share of the free main memory that passes may take; clips that are kept may take the other half."""

PROBE = "a probe of the GPU's memory"
ESTIMATE = "an estimate of the memory"


@dataclass(frozen=True)
class Choice:
    """How a worker's clips of a step are cut into forward passes.

    Attributes:
        per_dev_batch: clips of a pass.
        grad_accum: passes of a step.
        by: how it was chosen, in words.
        peak_bytes: of the GPU's memory, that a training may come to need; 0: not known.
    """

    per_dev_batch: int
    grad_accum: int
    by: str
    peak_bytes: int = 0

    def text(self, *, kept: bool, workers: int) -> str:
        """One line for the user.

        Args:
            kept: whether it was made by an earlier start of the run.
            workers: of the training.
        """
        passes = counted(self.grad_accum, "pass", "passes")
        clips = counted(self.per_dev_batch, "clip")
        step = "worker's step" if workers > 1 else "step"
        said = f"({passes} of {clips} in each {step} of {self.per_dev_batch * self.grad_accum})"
        if kept:
            return f"training.per_dev_batch: auto stays at {self.per_dev_batch} {said}, chosen when the run began"
        return f"training.per_dev_batch: auto chose {self.per_dev_batch} {said}, by {self.by}"


@dataclass(frozen=True)
class Passes:
    """What decides how much memory a run's forward passes take.

    Attributes:
        spec: the train job.
        dims: of its base model.
        trainable: its parameters.
        half: whether it trains in mixed precision.
        tokens: of the longest label.
        windows: how many windows a pass of so many clips holds at most.
        rows: the splits' clips.
        trials: that train together; 0: it trains alone.
    """

    spec: JobSpec
    dims: WhisperDims
    trainable: int
    half: bool
    tokens: int
    windows: Callable[[int], int]
    rows: dict[str, int | None]
    trials: int = 0

    def memory(self, size: int) -> Training:
        """The estimate for passes of so many clips."""
        return training_memory(
            self.spec,
            self.dims,
            adapted_modules(self.spec.training, modules(self.dims)),
            self.trainable,
            clips=self.windows(size),
            tokens=self.tokens,
            half=self.half,
            trials=self.trials,
            rows=self.rows,
        )

    def choice(self, size: int, by: str, peak_bytes: int = 0) -> Choice:
        """Passes of so many clips."""
        return Choice(size, self.spec.training.clips_per_step // size, by, peak_bytes)


def longest_label(tokens: Sequence[int], most: int, packing: Packing | None) -> int:
    """Tokens of the longest label that a training pads to.

    Args:
        tokens: of each row, its prompt counted.
        most: the decoder's positions.
        packing: joins rows up to these; None: each is alone.
    """
    if packing is not None or not len(tokens):
        return most
    return min(-(-max(tokens) // WIDTH_STEP) * WIDTH_STEP, most)


def windows_of(packing: Packing | None, epochs: int) -> Callable[[int], int]:
    """How many windows a pass of so many clips holds at most, in a training of so many epochs."""
    if packing is None:
        return lambda size: size
    return lambda size: packing.most_windows(size, epochs)


def settle(storage: Storage, spec: JobSpec, rank: int, choose: Callable[[int], Choice]) -> tuple[Choice, bool]:
    """The run's choice: the one that it keeps or, at its first start, the least of all workers'; all make this call.

    Args:
        storage: the run's root.
        spec: the train job.
        rank: this worker's.
        choose: makes this worker's, of the number of workers that share its node's main memory.

    Returns:
        the choice, and whether it was kept.

    Raises:
        JobFailedError: what is kept is none of this run's.
    """
    # One worker looks: on a network file system another may not see the file yet.
    found = distributed.gather([_read(storage, spec) if rank == 0 else None])[0]
    if found is not None:
        return found, True
    hosts = Counter(distributed.gather([socket.gethostname()]))
    all_found = distributed.gather([choose(hosts[socket.gethostname()])])
    least = min(all_found, key=lambda each: each.per_dev_batch)
    least = replace(least, peak_bytes=max(each.peak_bytes for each in all_found))
    if rank == 0:
        storage.write_text(PASS_SIZE, json.dumps(asdict(least), indent=2) + "\n")
    distributed.barrier()
    return least, False


def as_chosen(spec: JobSpec, storage: Storage) -> JobSpec:
    """A train job with the passes that its run has chosen written out: run anew, it has the same numbers.

    Args:
        spec: with `per_dev_batch: auto` or a number, with which it stays as it is.
        storage: the run's root.
    """
    if spec.training.per_dev_batch != AUTO or (found := _read(storage, spec)) is None:
        return spec
    cut = {"per_dev_batch": found.per_dev_batch, "grad_accum": found.grad_accum}
    return spec.model_copy(update={"training": spec.training.model_copy(update=cut)})


def _read(storage: Storage, spec: JobSpec) -> Choice | None:
    try:
        found = Choice(**json.loads(storage.read_bytes(PASS_SIZE)))
        if found.per_dev_batch * found.grad_accum == spec.training.clips_per_step:
            return found
    except NotFoundError:
        return None
    except (ValueError, TypeError):
        pass
    where = storage.path(PASS_SIZE)
    raise JobFailedError(f"{where}: is not how this run's steps were cut into passes; --overwrite begins anew")


def largest(sizes: Sequence[int], fits: Callable[[int], bool], guess: int | None = None) -> int:
    """The largest of some sizes that fits; the smallest where none does, for training to fail in its own words.

    Args:
        sizes: in order.
        fits: whether one does; those below one that does do too. Asked once at most for each.
        guess: the one to begin with: from there it goes up as long as they fit, or down until one does. None: the
            smallest.
    """
    at = max(index for index, size in enumerate(sizes) if index == 0 or size <= (guess or 0))
    if fits(sizes[at]):
        while at + 1 < len(sizes) and fits(sizes[at + 1]):
            at += 1
        return sizes[at]
    while at and not fits(sizes[at - 1]):
        at -= 1
    return sizes[max(0, at - 1)]


def largest_that_runs(
    sizes: Sequence[int], run: Callable[[int], None], guess: int | None = None, tidy: Callable[[], None] = lambda: None
) -> int:
    """The largest size of a pass that runs without running out of memory, as `largest`.

    Args:
        sizes: in order.
        run: makes a pass; one that has no room raises torch.OutOfMemoryError.
        guess: see `largest`.
        tidy: is called after each pass.
    """

    def runs(size: int) -> bool:
        with contextlib.suppress(torch.OutOfMemoryError):
            run(size)
            return True
        return False  # here what the pass held is free again, as its error is forgotten

    def fits(size: int) -> bool:
        found = runs(size)
        tidy()
        return found

    return largest(sizes, fits, guess)


def estimated(passes: Passes, device: torch.device, sharers: int = 1) -> Choice:
    """The choice by service/memory.py.

    Args:
        passes: the run's.
        device: where it trains.
        sharers: workers that share the node's main memory.
    """
    if device.type == "cuda":
        room = room_on_gpu(passes.spec, device)
        size = largest(passes.spec.training.pass_sizes, lambda size: passes.memory(size).total <= room)
        needed = passes.memory(size)
        return passes.choice(size, ESTIMATE, needed.total - needed.kept)
    room = room_on_host(passes, sharers)
    # Base and weights are there already; gradients and AdamW's two moments are not.
    return passes.choice(
        largest(passes.spec.training.pass_sizes, lambda size: _still_needed(passes.memory(size)) <= room), ESTIMATE
    )


def _still_needed(memory: Training) -> int:
    return memory.activations + memory.loss + memory.adapter * 3 // 4


def room_on_host(passes: Passes, sharers: int) -> int:
    """Bytes of main memory that a worker's passes may take."""
    kept = host_memory(passes.spec, passes.dims, half=passes.half, rows=passes.rows)
    return round(HOST_SHARE * available_memory() / sharers) - kept.total


def room_on_gpu(spec: JobSpec, device: torch.device) -> int:
    """Bytes of a GPU's memory that this process may have in all: what is free and what it has, a margin left out; of a
    GPU that it shares its own part at most."""
    free, total = torch.cuda.mem_get_info(device)
    asked = spec.resources.gpus_per_worker
    share = min(asked or 1.0, 1.0, torch.cuda.get_per_process_memory_fraction(_index(device)))
    return max(0, round(min(free + torch.cuda.memory_reserved(device), share * total) - MARGIN * share * total))


@contextlib.contextmanager
def limited(device: torch.device, most: int) -> Iterator[None]:
    """Let this process have no more of a GPU's memory than so many bytes."""
    before = torch.cuda.get_per_process_memory_fraction(_index(device))
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.set_per_process_memory_fraction(min(before, max(0, most) / total), _index(device))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, _index(device))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
