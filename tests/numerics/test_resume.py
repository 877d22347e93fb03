"""A run that was stopped ends where one ends that never stopped, to the last bit."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
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
from jobs.train.session import LocalSession
from jobs.train.store import seal
from service.errors import DivergedError, JobFailedError, StoppedError
from service.spec.job import JobSpec

CASES: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_init": "orthogonal"},
    "DoRA": {"use_dora": True, "grad_accum": 2},
    "embeddings in full": {"modules_to_save": ["embed_tokens"], "freeze_encoder": True},
    "packed": {"per_dev_batch": 4, "sections": {"data": {"packing": True, "packing_gap_s": 0.1}}},
}


def spec_of(tiny: Path, tones: Path, root: Path, **settings: Any) -> JobSpec:
    sections = {"engine": {"weight_decay": 0.1, "keep_checkpoints": 100}} | settings.pop("sections", {})
    settings = {"epochs": 2, "lora_dropout": 0.3, "save_steps": 2, "eval_steps": 5} | settings
    return job(tiny, tones, root, sections, **settings)


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
) -> tuple[JobSpec, dict[str, Any], LocalSession]:
    """A run that was not stopped: spec, result, session."""
    spec = spec_of(tiny, tones, tmp_path_factory.mktemp("whole") / "run", **CASES[request.param])
    return (spec, *run_engine(spec))


@pytest.mark.parametrize("step", [0, 2, 5, -1], ids=["start", "save", "evaluation", "end"])
def test_a_stopped_run_ends_where_the_other_ended(
    whole: tuple[JobSpec, dict[str, Any], LocalSession], tmp_path: Path, step: int
) -> None:
    spec, result, session = whole
    step = result["training"]["steps"] if step == -1 else step
    task = stop_after(spec, step, tmp_path / "run")
    again = LocalSession()
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
    seal(weights.parents[1])

    def kept() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()}

    before, session = kept(), LocalSession()
    with pytest.raises(DivergedError, match=r"the loss is nan at step 5; stopped before the optimizer step"):
        train(task, session)
    assert kept() == before
    assert events(session, "step") == []
    assert not (tmp_path / "run/adapter").exists()


def tear_half_a_file(checkpoint: Path) -> None:
    weights = checkpoint / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def tear_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(bytes(content))


def tear_the_seal(checkpoint: Path) -> None:
    (checkpoint / "checkpoint.json").write_text('{"step": 6, "fi')


def tear_a_file_away(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "best")


def tear_all_but_a_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


TORN = (tear_half_a_file, tear_a_bit, tear_the_seal, tear_a_file_away, tear_all_but_a_folder)


@pytest.fixture(scope="module")
def plain(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """The spec of a run that was not stopped."""
    spec = spec_of(tiny, tones, tmp_path_factory.mktemp("plain") / "run")
    run_engine(spec)
    return spec


@pytest.mark.parametrize("tear", TORN)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_taken(
    plain: JobSpec, tmp_path: Path, tear: Callable[[Path], None]
) -> None:
    task = stop_after(plain, 6, tmp_path / "run")
    tear(tmp_path / "run/checkpoints/checkpoint-6")
    session = LocalSession()
    train(task, session)
    (model,) = events(session, "model")
    assert model["resumed_from_step"] == 5
    (notice,) = events(session, "notice")
    assert notice["text"].startswith("checkpoint 6 is passed over: ")
    assert_same_run(Path(plain.root), tmp_path / "run")


def test_where_all_checkpoints_are_torn_the_training_begins_anew(plain: JobSpec, tmp_path: Path) -> None:
    task = stop_after(plain, 5, tmp_path / "run")
    for checkpoint in (tmp_path / "run/checkpoints").glob("checkpoint-*"):
        tear_a_bit(checkpoint)
    session = LocalSession()
    train(task, session)
    (model,) = events(session, "model")
    assert model["resumed_from_step"] == 0
    assert len(events(session, "notice")) == 3
    assert_same_run(Path(plain.root), tmp_path / "run")


def test_an_initial_state_that_was_damaged_is_made_again_or_the_run_ends(plain: JobSpec, tmp_path: Path) -> None:
    initial = "checkpoints/initial/adapter_model.safetensors"
    task = stop_after(plain, 5, tmp_path / "again")
    (tmp_path / "again" / initial).write_bytes(b"torn")
    train(task, LocalSession())
    assert_same_run(Path(plain.root), tmp_path / "again")

    task = stop_after(plain, 5, tmp_path / "other")
    state = saved_adapter((tmp_path / "other" / initial).parent)
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "other" / initial)
    seal((tmp_path / "other" / initial).parent)
    with pytest.raises(JobFailedError, match="initial: is not what the checkpoints began from; --overwrite begins"):
        train(task, LocalSession())


class Stops:
    """A user who asks for a stop after so many questions whether to."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_stopped_anywhere_keeps_its_last_step_and_ends_where_the_other_ended(
    plain: JobSpec, tmp_path: Path
) -> None:
    """Each start is stopped some questions later than the one before: in scoring, between steps, in evaluations."""
    task = stop_after(plain, 0, tmp_path / "run")
    (tmp_path / "run/evaluation/base.jsonl").unlink()
    said, patience = [], 0
    while True:
        patience += 3
        try:
            train(task, LocalSession(stopping=Stops(patience)))
            break
        except StoppedError as stopped:
            said.append(str(stopped))
            steps = [int(path.name.split("-")[1]) for path in (tmp_path / "run/checkpoints").glob("checkpoint-*")]
            if found := re.search(r"at step (\d+) of 14; its checkpoint is kept", said[-1]):
                assert max(steps) == int(found.group(1))
    assert "stopped while a model was scored" in said[0]
    assert "stopped before the first step" in "".join(said)
    assert len({text for text in said if "its checkpoint is kept" in text}) > 2
    assert_same_run(Path(plain.root), tmp_path / "run")


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
