"""Device, precision and trackers of one worker, on accelerate."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from jobs.device import has_gpu, precision_of, set_threads
from jobs.train.session import Session
from service.artifacts import TENSORBOARD
from service.errors import Fault, SpecError
from service.spec.job import JobSpec
from service.storage import Storage


class Runtime:
    """What a worker computes with."""

    def __init__(self, accelerator: Accelerator, spec: JobSpec, curves: Curves) -> None:
        self._accelerator, self._curves = accelerator, curves
        self.device: torch.device = accelerator.device
        self.precision: str = accelerator.mixed_precision
        self.scaler = accelerator.scaler
        if self.scaler is not None:
            # It sets itself up with the first loss; a worker may have no clip in its first step.
            self.scaler.scale(torch.zeros(1, device=self.device))

    @property
    def device_name(self) -> str:
        """The GPU's name, or how many CPU threads torch uses."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu ({torch.get_num_threads()} threads)"

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for a forward pass."""
        return self._accelerator.autocast()

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> Any:
        """The optimizer behind the loss scaler, where there is one."""
        return self._accelerator.prepare_optimizer(optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        """Add gradients, scaled in fp16."""
        self._accelerator.backward(loss)

    def clip(self, parameters: Sequence[nn.Parameter], optimizer: Any, max_norm: float) -> float:
        """Scale gradients down to a norm; returns the norm that they had."""
        if self.scaler is not None:
            self._accelerator.unscale_gradients(optimizer)
        return float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))

    def skipped(self, optimizer: Any) -> bool:
        """Whether the loss scaler left out the last step (fp16 overflow): the schedule must not move on either."""
        return bool(optimizer.step_was_skipped)

    def log(self, values: dict[str, float], step: int) -> None:
        """Pass values to the trackers of `engine.report_to`."""
        self._accelerator.log(values, step=step)

    def finish(self) -> None:
        """Close the trackers. (accelerate's end_training would end the process group too, and we still need it.)"""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._curves.keep()

    def keep_curves(self) -> None:
        """Have a remote root hold what TensorBoard's tracker has written so far."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.flush()
        self._curves.keep()


def make_runtime(spec: JobSpec, storage: Storage, session: Session) -> Runtime:
    """Set up accelerate for this worker.

    Raises:
        SpecError: precision that the hardware lacks, or a tracker that is not installed.
    """
    set_threads(spec)
    wanted = [name.lower() for name in spec.engine.report_to if name.lower() != "none"]
    curves = Curves(storage)
    # Ray has set up the process group; accelerate takes it as it is.
    accelerator = Accelerator(
        cpu=not has_gpu(spec),
        mixed_precision=precision_of(spec),
        log_with=_trackers(wanted),
        project_dir=str(curves.folder),
    )
    if wanted:
        found = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
        if missing := [name for name in wanted if name not in found]:
            raise SpecError([Fault("engine.report_to", f"is not installed here: pip install {missing[0]}", missing[0])])
        accelerator.init_trackers(spec.title, config=_flat(spec.training.model_dump()))
    if spec.training.use_dora and spec.training.ephemeral_gpu_offload and not has_gpu(spec):
        text = "ephemeral_gpu_offload has no effect: this worker has no GPU"
        session.emit({"event": "notice", "level": "warning", "text": text})
    return Runtime(accelerator, spec, curves)


def _trackers(names: list[str]) -> list[str] | None:
    from accelerate.utils import LoggerType

    known = [str(kind.value) for kind in LoggerType if kind.value != "all"]
    if unknown := [name for name in names if name not in known]:
        raise SpecError([Fault("engine.report_to", f"is no tracker; give any of {', '.join(known)}", unknown[0])])
    return names or None


class Curves:
    """The folder that trackers write to: in a local root itself; of a remote one aside, and copied.

    Args:
        storage: the run's root.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._copied: dict[str, int] = {}
        if storage.is_local:
            self.folder = storage.local(TENSORBOARD)
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="whisper-jobs-")
            self.folder = Path(self._scratch.name)

    def keep(self) -> None:
        """Copy the files that have grown. They begin anew with each start, under new names."""
        if self._storage.is_local:
            return
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and path.stat().st_size != self._copied.get(name):
                content = path.read_bytes()  # it may grow while it is on its way
                self._storage.write_bytes(f"{TENSORBOARD}/{name}", content)
                self._copied[name] = len(content)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    # Trackers take plain values only.
    return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in values.items()}
