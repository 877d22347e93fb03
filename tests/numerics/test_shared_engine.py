"""Trials that train together: each ends as it ends alone, whoever comes, goes, fails or is stopped beside it."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import job, keeping, run_engine, saved_adapter
from together import run_together

from jobs.prepare import prepare
from jobs.search.runner import TrialRun
from jobs.search.shared.engine import SharedEngine, of_search
from jobs.search.shared.lockstep import Lockstep
from jobs.train.pass_size import Choice, Passes
from service.errors import DivergedError, JobFailedError, StoppedError
from service.spec.job import JobSpec
from service.spec.search import SearchConfig
from service.storage import Storage

POINTS: list[dict[str, Any]] = [
    {"lora_r": 4, "lora_dropout": 0.0},
    {"lora_r": 8, "lora_alpha": 8, "use_dora": True, "lora_dropout": 0.0, "lr": 2e-3},
    {"lora_r": 2, "lora_dropout": 0.3, "lora_target_modules": ["q_proj", "v_proj"]},
    {"lora_r": 4, "lora_dropout": 0.0, "epochs": 1, "seed": 7},
]
STEPS = 7


@pytest.fixture
def spec_of(tiny: Path, tones: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    def make(name: str, **training: Any) -> JobSpec:
        settings: dict[str, Any] = {"freeze_encoder": True, "epochs": 2, "eval_steps": 4, "save_steps": 3}
        sections = {"resources": {"workers": 0}, "evaluation": {"metric": "loss"}}
        return keeping(job(tiny, tones, tmp_path / name, sections, **settings | training), 100)

    return make


@pytest.fixture
def data(spec_of: Callable[..., JobSpec]) -> Storage:
    """The root with the rows that all trials train on."""
    spec = spec_of("data")
    prepare(
        spec,
        spec.root,
        {"train": str(spec.training.train_csv), "val": str(spec.training.val_csv)},
        str(spec.training.base_model),
    )
    return Storage(spec.root)


def checkpoint(root: str | Path, step: int) -> dict[str, torch.Tensor]:
    return saved_adapter(Path(root) / f"checkpoints/checkpoint-{step}/adapter")


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], bound: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert float((one[name] - other[name]).abs().max()) < bound, name


def test_each_trial_ends_as_it_ends_alone(spec_of: Callable[..., JobSpec], data: Storage) -> None:
    specs = [spec_of(f"trial-{index}", **point) for index, point in enumerate(POINTS)]
    engine = SharedEngine(specs[0], None)
    scored: list[int] = []
    inner = engine._many.losses
    engine._many.losses = lambda models, *rest: (scored.append(len(models)), inner(models, *rest))[1]  # type: ignore[method-assign]
    said = run_together(engine, specs, data)

    assert scored.count(len(POINTS)) == 5, "the five clips at step 4, by all trials together"
    for index, point in enumerate(POINTS):
        result = said[index][-1]["result"]
        alone, _ = run_engine(spec_of(f"alone-{index}", **point))
        steps = alone["training"]["steps"]
        assert result["training"]["steps"] == steps == STEPS * (point.get("epochs") or 2)
        for found, expected in zip(result["training"]["history"], alone["training"]["history"], strict=True):
            assert found["step"] == expected["step"]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert result["adapter"] == alone["adapter"]
        assert_close(checkpoint(specs[index].root, steps), checkpoint(spec_of(f"alone-{index}").root, steps))


def test_without_room_for_all_they_train_in_parts_to_the_same_end(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    points = POINTS[:3]
    specs = [spec_of(f"trial-{index}", **point) for index, point in enumerate(points)]
    engine, sizes = SharedEngine(specs[0], None), []
    inner = engine._many.gradients

    def gradients(works: Any, autocast: Any) -> list[float]:
        sizes.append(len(works))
        losses = inner(works, autocast)  # dropout has been drawn when there is no more room
        if len(works) > 2:
            raise torch.OutOfMemoryError
        return losses

    engine._many.gradients = gradients  # type: ignore[method-assign]
    said = run_together(engine, specs, data)

    assert sizes[:5] == [3, 2, 1, 2, 1], "it is tried once"
    assert sizes.count(3) <= len(points), "and again where others are there"
    for index, point in enumerate(points):
        alone, _ = run_engine(spec_of(f"alone-{index}", **point))
        found = said[index][-1]["result"]["training"]["history"]
        assert [each["loss"] for each in found] == pytest.approx(
            [each["loss"] for each in alone["training"]["history"]], rel=1e-4
        )


def test_what_ran_out_of_memory_holds_none(spec_of: Callable[..., JobSpec], data: Storage) -> None:
    spec = spec_of("trial")
    engine, held = SharedEngine(spec, None), []

    def gradients(*_: Any) -> list[float]:
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine._many.gradients = gradients  # type: ignore[method-assign]
    gc.disable()
    try:
        ((*_, error),) = run_together(engine, [spec], data)
        assert isinstance(error, torch.OutOfMemoryError)
        assert held[0]() is None
    finally:
        gc.enable()
    assert len(engine._batches) == 0, "nor is what was read for trials that have gone"


def test_a_trial_that_comes_leaves_the_random_numbers_of_another_that_begins_alone(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    """Adapters are drawn from the process's generator by who holds `alone`."""
    spec = spec_of("comes", epochs=1)
    engine = SharedEngine(spec, None)
    came, go_on, loaded = threading.Event(), threading.Event(), threading.Event()
    join, whisper = engine.join, engine.whisper
    engine.join = lambda trainer: (join(trainer), came.set(), go_on.wait(60))  # type: ignore[method-assign]
    engine.whisper = lambda: (whisper(), loaded.set())[0]  # type: ignore[method-assign]
    trial = threading.Thread(target=run_together, args=(engine, [spec], data))
    trial.start()
    assert came.wait(60)
    with engine.alone:
        before = torch.get_rng_state()
        go_on.set()
        assert loaded.wait(60)
        time.sleep(0.5)
        assert torch.equal(torch.get_rng_state(), before)
    trial.join(60)
    assert not trial.is_alive()


@pytest.mark.gpu
@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-3), (True, 5e-2)], ids=["float32", "bfloat16"])
def test_on_a_gpu_they_end_as_they_end_alone_on_the_cpu(
    tiny: Path, tones: Path, tmp_path: Path, data: Storage, bf16: bool, bound: float
) -> None:
    def spec_on(gpus: int, name: str, **training: Any) -> JobSpec:
        settings: dict[str, Any] = {"freeze_encoder": True, "epochs": 2, "eval_steps": 4, "bf16": bf16 and gpus == 1}
        sections = {"resources": {"workers": 0, "gpus_per_worker": gpus}}
        return job(tiny, tones, tmp_path / name, sections, **settings | training)

    points = [point for point in POINTS if not point["lora_dropout"]]  # another device draws other numbers
    specs = [spec_on(1, f"trial-{index}", **point) for index, point in enumerate(points)]
    engine = SharedEngine(specs[0], None)
    said = run_together(engine, specs, data)

    for index, point in enumerate(points):
        result = said[index][-1]["result"]
        alone, session = run_engine(spec_on(0, f"alone-{index}", **point))
        assert result["training"]["device"] == torch.cuda.get_device_name()
        assert result["training"]["precision"] == ("bf16" if bf16 else "no")
        assert result["training"]["steps"] == alone["training"]["steps"]
        losses = [
            [event["loss"] for event in events if event["event"] == "step"] for events in (said[index], session.events)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=bound)


def test_in_bfloat16_they_learn_what_they_learn_alone_in_float32(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    points = [point for point in POINTS if not point["lora_dropout"]]
    alone = [run_engine(spec_of(f"alone-{index}", **point))[1].events for index, point in enumerate(points)]
    specs = [spec_of(f"trial-{index}", bf16=True, **point) for index, point in enumerate(points)]
    said = run_together(SharedEngine(specs[0], None), specs, data)

    for trial, other in zip(said, alone, strict=True):
        assert trial[-1]["result"]["training"]["precision"] == "bf16"
        losses = [[event["loss"] for event in events if event["event"] == "step"] for events in (trial[:-1], other)]
        assert losses[0] == pytest.approx(losses[1], rel=5e-2)


def test_a_trial_whose_loss_is_no_number_leaves_the_others_alone(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    specs = [spec_of("wild", lora_init=False, lora_alpha=10**18, lora_dropout=0.0), spec_of("tame", lora_dropout=0.0)]
    wild, tame = run_together(SharedEngine(specs[0], None), specs, data)

    assert isinstance(wild[-1], DivergedError)
    alone, _ = run_engine(spec_of("alone", lora_dropout=0.0))
    assert tame[-1]["result"]["training"]["history"][-1]["loss"] == pytest.approx(
        alone["training"]["history"][-1]["loss"], rel=1e-4
    )


def test_a_trial_whose_gradient_is_no_number_leaves_the_others_alone(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    specs = [spec_of("wild", lora_dropout=0.0), spec_of("tame", lora_dropout=0.0)]
    engine = SharedEngine(specs[0], None)
    inner = engine._many.gradients

    def gradients(works: Any, autocast: Any) -> list[float]:
        losses = inner(works, autocast)
        wild = next((each for each in engine._step._members if each.spec.root == specs[0].root), None)
        if wild is not None and wild.progress.step == 3:
            engine._many._grads_NP[engine._many.index(wild.model), 0] = torch.nan
        return losses

    engine._many.gradients = gradients  # type: ignore[method-assign]
    wild, tame = run_together(engine, specs, data)

    assert isinstance(wild[-1], DivergedError)
    assert "the gradient's norm is nan at step 4; stopped before the optimizer step" in str(wild[-1])
    alone, _ = run_engine(spec_of("alone", lora_dropout=0.0))
    assert tame[-1]["result"]["training"]["history"][-1]["loss"] == pytest.approx(
        alone["training"]["history"][-1]["loss"], rel=1e-4
    )


def test_a_step_that_cannot_be_made_ends_its_trials_and_the_engine_takes_others(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    specs = [spec_of(f"trial-{index}", lora_dropout=0.0) for index in range(2)]
    engine = SharedEngine(specs[0], None)
    inner = engine._many.update

    def refuse(*_: Any) -> list[float]:
        raise JobFailedError("no memory for the step")

    engine._many.update = refuse  # type: ignore[method-assign]
    assert [str(events[-1]) for events in run_together(engine, specs, data)] == ["no memory for the step"] * 2
    engine._many.update = inner  # type: ignore[method-assign]
    (other,) = run_together(engine, [spec_of("other", lora_dropout=0.0)], data)
    assert other[-1]["result"]["training"]["steps"] == 2 * STEPS


def test_who_leaves_with_an_error_does_not_keep_the_others_waiting() -> None:
    lockstep: Lockstep[int, int] = Lockstep(lambda wishes: {member: 2 * wish for member, wish in wishes.items()})
    answers: list[int] = []
    for member in ("one", "other"):
        lockstep.join(member)
    waiting = threading.Thread(target=lambda: answers.append(lockstep.ask("one", 21)))
    waiting.start()

    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        lockstep.leave("other", fail)
    waiting.join(60)
    assert answers == [42]


@pytest.mark.parametrize("together", [False, True])
def test_a_trial_that_is_stopped_goes_on_from_its_checkpoint_also_alone(
    spec_of: Callable[..., JobSpec], data: Storage, together: bool
) -> None:
    """With dropout: the random numbers are in the checkpoint, in the form in which a trial alone reads them."""
    settings = {"lora_dropout": 0.3, "lora_r": 4}
    specs = [spec_of("stopped", **settings), spec_of("other", lora_dropout=0.0)]
    seen = threading.Event()
    engine = SharedEngine(specs[0], None)
    events = engine.events(TrialRun(specs[0], Storage(specs[0].root), data, None), seen.is_set)
    for event in events:
        if event["event"] == "step" and event["step"] == 5:
            break
    seen.set()
    with pytest.raises(StoppedError):
        for _ in events:
            pass
    kept = max(int(path.name.split("-")[1]) for path in (Path(specs[0].root) / "checkpoints").glob("checkpoint-*"))
    assert 5 <= kept < 2 * STEPS

    if together:
        for said in run_together(SharedEngine(specs[0], None), specs, data):
            assert said[-1]["result"]["training"]["steps"] == 2 * STEPS
    else:
        run_engine(specs[0])

    run_engine(spec_of("alone", **settings))
    assert_close(checkpoint(specs[0].root, 2 * STEPS), checkpoint(spec_of("alone").root, 2 * STEPS))


def test_what_trials_share_is_read_and_made_once(spec_of: Callable[..., JobSpec], data: Storage) -> None:
    specs = [spec_of(f"trial-{index}", lora_dropout=0.0, lr=1e-3 * (index + 1)) for index in range(3)]
    engine = SharedEngine(specs[0], None)
    weights = {parameter.data_ptr() for parameter in engine._whisper.model.parameters()}
    twins = [engine.whisper().model for _ in range(3)]
    assert all({parameter.data_ptr() for parameter in twin.parameters()} == weights for twin in twins)
    heard = []
    inner = engine._many.hear
    engine._many.hear = lambda batch: (heard.append(tuple(batch.rows)), inner(batch))[1]  # type: ignore[method-assign]

    run_together(engine, specs, data)

    assert len(heard) <= 2 * STEPS + 4, "once a step, but for steps before all had come"


def test_accelerates_objects_of_a_process_are_made_by_one_trial_at_a_time(
    spec_of: Callable[..., JobSpec], data: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that made them at once met one half made: GradientState without plugin_kwargs."""
    from jobs.train import loop

    inner, inside, most = loop.make_runtime, 0, 0

    def make_runtime(*words: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.2)  # time enough for the others to come
        try:
            return inner(*words)
        finally:
            inside -= 1

    monkeypatch.setattr(loop, "make_runtime", make_runtime)
    specs = [spec_of(f"trial-{index}", lora_dropout=0.0, epochs=1) for index in range(3)]
    said = run_together(SharedEngine(specs[0], None), specs, data)

    assert most == 1
    assert all("result" in events[-1] for events in said)


@pytest.mark.setting("per_dev_batch")
def test_trials_that_train_together_share_one_choice_of_passes_for_all_of_them(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    settings = {"per_dev_batch": "auto", "grad_accum": 4, "lora_dropout": 0.0, "epochs": 1}
    specs = [spec_of(f"trial-{index}", lora_r=rank, **settings) for index, rank in enumerate((4, 8))]
    space = SearchConfig.model_validate({"space": {"lora_r": [4, 64]}, "concurrent": 2})
    search = specs[0].model_copy(update={"kind": "search", "search": space})
    heard: list[Passes] = []

    class Watched(SharedEngine):
        def choice(self, passes: Passes) -> Choice:
            heard.append(of_search(passes, search))
            return super().choice(passes)

    said = run_together(Watched(search, None), specs, data)

    assert [(each.trials, each.spec.training.lora_r) for each in heard] == [(2, 64)] * 2, "as large as any may be"
    assert heard[0].memory(4).total > replace(heard[0], trials=0).memory(4).total
    alone, _ = run_engine(spec_of("alone", lora_r=4, **settings | {"per_dev_batch": 4, "grad_accum": 1}))
    for events in said:
        training = events[-1]["result"]["training"]
        assert (training["per_dev_batch"], training["grad_accum"]) == (4, 1)
        assert any("auto chose 4 " in each.get("text", "") and "by an estimate" in each["text"] for each in events)
    assert said[0][-1]["result"]["training"]["history"][-1]["loss"] == pytest.approx(
        alone["training"]["history"][-1]["loss"], rel=1e-4
    )
