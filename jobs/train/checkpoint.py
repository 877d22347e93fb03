"""A checkpoint: all that a run needs to go on as if it had never stopped.

adapter/    the adapter as it is, in PEFT's format
best/       the best adapter so far, with best.json
state.pt    optimizer, schedule, loss scale, step, history, and every virtual rank's random states
"""

from __future__ import annotations

import copy
import io
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs.adapter import ADAPTER_NAME

ADAPTER, BEST, STATE = "adapter", "best", "state.pt"
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Progress:
    """How far a run has come."""

    initial: str = ""
    """SHA-256 of the adapter's initial state."""
    step: int = 0
    evaluated: int = 0
    """The last step whose evaluation is done: a run may be stopped between a step and its evaluation."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One entry per evaluation: its step, and wer and cer, or loss."""
    best_step: int | None = None
    best: float | None = None
    """The least value of `evaluation.metric`."""


def adapter_state(model: Any) -> dict[str, Tensor]:
    """A copy of the adapter's weights in CPU memory, under the names of PEFT's files."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def save_adapter(folder: Path, model: Any, state: dict[str, Tensor]) -> None:
    """Write an adapter of this model as PEFT does."""
    write_adapter(folder, copy.deepcopy(model.peft_config[ADAPTER_NAME]), state)


def write_adapter(folder: Path, config: Any, state: dict[str, Tensor]) -> None:
    """Write adapter_config.json, changed to say that it is for inference, and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators in this process."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # This worker's device alone: others that it can see are other workers', and may be elsewhere on a resumed run.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Inverse of `random_states`."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_checkpoint(
    folder: Path,
    model: Any,
    best: dict[str, Tensor] | None,
    progress: Progress,
    parts: dict[str, Any],
    random_states_by_rank: list[dict[str, Any]],
) -> None:
    """Fill a folder with a checkpoint; `parts` are optimizer, scheduler and the like, by name."""
    save_adapter(folder / ADAPTER, model, adapter_state(model))
    if best is not None:
        save_adapter(folder / BEST, model, best)
        (folder / BEST / "best.json").write_text(json.dumps({"step": progress.best_step, "score": progress.best}))
    state = {
        "progress": asdict(progress),
        "parts": {name: part.state_dict() for name, part in parts.items() if part is not None},
        "random": random_states_by_rank,
    }
    content = io.BytesIO()  # torch reports a disk that is full as a fault of its own
    torch.save(state, content)
    (folder / STATE).write_bytes(content.getbuffer())


def read_checkpoint(
    folder: Path, model: Any, parts: dict[str, Any]
) -> tuple[Progress, dict[str, Tensor] | None, list[dict[str, Any]]]:
    """Put a checkpoint's content back where it came from.

    Returns:
        how far the run had come, the best adapter so far, and the random states of each virtual rank.
    """
    set_peft_model_state_dict(model, load_file(folder / ADAPTER / WEIGHTS))
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state["parts"][name])
    best = folder / BEST / WEIGHTS
    return Progress(**state["progress"]), load_file(best) if best.exists() else None, state["random"]
