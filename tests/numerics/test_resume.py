"""A run that was stopped ends where one ends that never stopped, to the last bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import events, job, run_engine, saved_adapter
from gloo import train_in_processes
from safetensors.torch import save_file

from jobs.prepare import split_file
from jobs.train.checkpoint import random_states, restore_random_states
from jobs.train.loop import TrainTask, train
from jobs.train.session import FolderSession
from service.errors import JobFailedError
from service.spec.job import JobSpec

CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_init": "orthogonal"},
    "DoRA": {"use_dora": True, "grad_accum": 2},
    "embeddings in full": {"modules_to_save": ["embed_tokens"], "freeze_encoder": True},
}


def spec_of(tiny: Path, tones: Path, root: Path, **settings: Any) -> JobSpec:
    sections = {"engine": {"weight_decay": 0.1}} | settings.pop("sections", {})
    return job(tiny, tones, root, sections, epochs=2, lora_dropout=0.3, save_steps=2, eval_steps=5, **settings)


def stop_after(spec: JobSpec, step: int, root: Path) -> TrainTask:
    """The run as it was when it had kept that step's checkpoint; 0: before the first one."""
    shutil.copytree(spec.root, root)
    for path in (root / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    shutil.rmtree(root / "adapter")
    (root / "evaluation/tuned.jsonl").unlink()
    training = spec.training.model_copy(update={"outdir": str(root)})
    files = [str(root / split_file(name)) for name in ("train", "val")]
    return TrainTask(spec.model_copy(update={"training": training}), *files, root=str(root))


def assert_same_run(one: Path, other: Path) -> None:
    """Adapter, transcripts and the state of the last checkpoint are equal to the last bit."""
    kept = [path.name for path in (other / "checkpoints").glob("checkpoint-*")]
    for name in ("adapter", *(f"checkpoints/{each}/adapter" for each in kept)):
        first, second = saved_adapter(one / name), saved_adapter(other / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    for name in ("base", "tuned"):
        assert (one / f"evaluation/{name}.jsonl").read_bytes() == (other / f"evaluation/{name}.jsonl").read_bytes()
    last = max(kept, key=lambda name: int(name.split("-")[1]))
    states = [torch.load(root / "checkpoints" / last / "state.pt") for root in (one, other)]
    assert repr(states[0]["parts"]["scheduler"]) == repr(states[1]["parts"]["scheduler"])
    assert states[0]["progress"] == states[1]["progress"]
    for key, kept in states[0]["parts"]["optimizer"]["state"].items():
        for name, tensor in kept.items():
            assert torch.equal(tensor, states[1]["parts"]["optimizer"]["state"][key][name])
    for first, second in zip(*(state["random"] for state in states), strict=True):
        assert torch.equal(first["torch"], second["torch"])
        assert first["python"] == second["python"]


@pytest.fixture(scope="module", params=CASES)
def whole(
    request: pytest.FixtureRequest, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[JobSpec, dict[str, Any], FolderSession]:
    """A run that was not stopped: spec, result, session."""
    spec = spec_of(tiny, tones, tmp_path_factory.mktemp("whole") / "run", **CASES[request.param])
    return (spec, *run_engine(spec))


@pytest.mark.parametrize("step", [0, 2, 5, -1], ids=["start", "save", "evaluation", "end"])
def test_a_stopped_run_ends_where_the_other_ended(
    whole: tuple[JobSpec, dict[str, Any], FolderSession], tmp_path: Path, step: int
) -> None:
    spec, result, session = whole
    step = result["training"]["steps"] if step == -1 else step
    task = stop_after(spec, step, tmp_path / "run")
    again = FolderSession(tmp_path / "run/checkpoints", keep=100)
    resumed = train(task, again)
    (model,) = events(again, "model")
    assert model["resumed_from_step"] == step
    expected = [event["loss"] for event in events(session, "step") if event["step"] > step]
    assert [event["loss"] for event in events(again, "step")] == expected
    assert_same_run(Path(spec.root), tmp_path / "run")
    for part in ("base", "tuned", "adapter"):
        assert resumed[part] == result[part]
    for name in ("best_step", "history", "steps"):
        assert resumed["training"][name] == result["training"][name]


@pytest.mark.slow
def test_two_workers_go_on_to_the_same_end(tiny: Path, tones: Path, tmp_path: Path) -> None:
    two = {"resources": {"workers": 2}}
    spec = spec_of(tiny, tones, tmp_path / "whole", sections=two, use_dora=True)
    from engine import prepared

    (whole,) = train_in_processes([prepared(spec)], 2)
    assert "error" not in whole, whole.get("traceback")
    (resumed,) = train_in_processes([stop_after(spec, 4, tmp_path / "stopped")], 2)
    assert "error" not in resumed, resumed.get("traceback")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert resumed["random"] == whole["random"]


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_its_checkpoints(
    tiny: Path, tones: Path, tmp_path: Path
) -> None:
    spec = spec_of(tiny, tones, tmp_path / "whole")
    run_engine(spec)
    task = stop_after(spec, 4, tmp_path / "run")
    weights = tmp_path / "run/checkpoints/checkpoint-4/adapter/adapter_model.safetensors"
    state = saved_adapter(weights.parent)
    name = next(name for name in state if "decoder.layers.1.fc2.lora_B" in name)
    save_file(state | {name: torch.full_like(state[name], torch.inf)}, weights)

    def kept() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()}

    before, session = kept(), FolderSession(tmp_path / "run/checkpoints")
    with pytest.raises(JobFailedError, match=r"the loss is nan at step 5; stopped before the optimizer step"):
        train(task, session)
    assert kept() == before
    assert events(session, "step") == []
    assert not (tmp_path / "run/adapter").exists()


def test_a_checkpoint_that_was_never_finished_is_passed_over(tiny: Path, tones: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny, tones, tmp_path / "whole")
    run_engine(spec)
    task = stop_after(spec, 4, tmp_path / "run")
    torn = tmp_path / "run/checkpoints/.new/adapter"
    torn.mkdir(parents=True)
    (torn / "adapter_model.safetensors").write_bytes(b"half")
    train(task, FolderSession(tmp_path / "run/checkpoints", keep=100))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_every_generator_goes_on_where_it_was() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), float(torch.rand(()))]

    draw()
    states = random_states()
    expected = draw()
    draw()
    restore_random_states(states)
    assert draw() == expected
    assert "cuda" in states
