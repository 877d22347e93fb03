"""Which of a run's encoder outputs are kept, and where: what `engine.keep_encoder` means.

Whether the way through jobs.fast.encoder_outputs is taken depends on the spec alone; whether anything is kept on it
also on what is to come. So a run with nothing to keep, and a trial that shares what others have computed, have the same
numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from jobs.fast.encoder_outputs import EncoderOutputs, Origin, SplitOutputs
from jobs.fast.places import DeviceMemory, Disk, Memory, Place, is_in_memory, share_of_memory
from service.memory import keeps_outputs, keeps_training_outputs
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.storage import sha256_of
from service.storage.cache import cache_folder

DISK_RESERVE = 8 * 2**30
"""Bytes of the disk that stay free."""

AUTO_DISK = 16 * 10**9
"""Bytes of the disk that a worker takes without being asked to: a pod that takes more than it may is ended."""


def origin_of(
    spec: JobSpec, splits: dict[str, str], revision: str | None, device: torch.device, precision: str
) -> Origin:
    """What a run's encoder outputs depend on.

    Args:
        spec: base model and attention.
        splits: the file of prepared rows of each split, by its name.
        revision: commit of the base model.
        device: where they are computed.
        precision: `no`, `fp16` or `bf16`.
    """
    return Origin(
        base=spec.training.base_model,
        revision=revision,
        attention=spec.engine.attention,
        precision=precision,
        device=device.type,
        splits=tuple((name, sha256_of(Path(file))) for name, file in sorted(splits.items())),
    )


def make_outputs(spec: JobSpec, origin: Origin, device: torch.device) -> EncoderOutputs:
    """Somewhere to keep them, as the spec says; nothing is taken before something is kept."""
    return EncoderOutputs(origin, device, _places(spec, device))


def _places(spec: JobSpec, device: torch.device) -> list[Place]:
    where, asked = spec.engine.keep_encoder, spec.engine.keep_encoder_gb
    limit = None if asked is None else round(asked * 1e9)
    on_gpu = device.type == "cuda"
    found: list[Place] = []
    if on_gpu and where in ("auto", "device"):
        found.append(DeviceMemory(device, limit, min(spec.resources.gpus_per_worker or 1.0, 1.0)))
    if where in ("auto", "host") or (where == "device" and not on_gpu):
        most, spare = share_of_memory(asked)
        found.append(Memory("in main memory", torch.device("cpu"), most, spare, pinned=on_gpu))
    if where in ("auto", "disk"):
        folder = cache_folder()
        if where == "disk" or not is_in_memory(folder):
            found.append(Disk(folder, AUTO_DISK if where == "auto" else sys.maxsize, DISK_RESERVE, pinned=on_gpu))
    return found


def is_used(spec: JobSpec) -> bool:
    """Whether a run takes its encoder outputs from where they are kept, those of the validation set at least."""
    return keeps_outputs(spec)


def why_not(spec: JobSpec) -> str:
    """Why encoder outputs of training clips are not kept where the spec asks for it, or where packing alone keeps them
    from being; empty: there is no why."""
    packed = is_used(spec) and spec.data.packing and not spec.augment.varies_audio
    if not packed and (spec.engine.keep_encoder in ("auto", "off") or keeps_training_outputs(spec)):
        return ""
    if packed:
        why = "data.packing joins them anew in each epoch"
    else:
        why = "augment varies the clips" if is_used(spec) else "training.freeze_encoder is false"
    return f"engine.keep_encoder: no encoder outputs of training clips are kept: {why}"


class KeptOutputs:
    """The encoder's outputs in one run.

    Args:
        spec: the run's, one for which it `is_used`.
        outputs: where they are kept.
        evaluations: how often the validation set is heard, before the training too.
        shared: whether other runs use the same: then all are kept.
    """

    def __init__(self, spec: JobSpec, outputs: EncoderOutputs, evaluations: int, *, shared: bool) -> None:
        self.outputs, self._told = outputs, False
        self.val: SplitOutputs = outputs.of("val", keep=shared or evaluations > 1)
        """Of the validation set, for models whose encoder is the base's."""
        self.train: SplitOutputs | None = None
        """Of the training set; None: the encoder is to run."""
        if keeps_training_outputs(spec):
            self.train = outputs.of("train", keep=shared or spec.training.epochs > 1)

    def report(self) -> str:
        """What is kept, in words, or why nothing is; empty: it was said before, or there is nothing to say."""
        rows, troubles = self.outputs.rows(), self.outputs.troubles()
        if self._told or not (rows or troubles):
            return ""
        self._told = True
        clips = " and ".join(counted(count, f"{name} clip") for name, count in sorted(rows.items()))
        places = ", ".join(f"{each.rows:,} {each.name}" for each in self.outputs.places if each.rows)
        kept = f"encoder outputs of {clips} are kept: {places}" if rows else "no encoder output is kept"
        return "; ".join([kept, *troubles])
