"""`per_dev_batch: auto`: the training of the number that it chooses, to the bit, whatever it went through before."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine import Run, events, job, prepared, run_engine, saved_adapter, watched
from gloo import settle_in_processes, train_in_processes
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from jobs.prepare import split_file
from jobs.train.loop import Trainer, TrainTask, train
from jobs.train.pass_size import PASS_SIZE, PROBE, Choice, as_chosen, largest_that_runs
from jobs.train.probe import as_in_training, forget_gradients, one_pass
from jobs.train.session import LocalSession
from service.errors import JobFailedError
from service.spec.job import JobSpec
from service.storage import Storage

PER_CLIP = 16 * 51865 * 8
"""Bytes of a clip's logits and their logarithms, in float32, of 16 tokens: most of what a tiny model keeps."""

CPU = {"resources": {"gpus_per_worker": 0}}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets what the system says is free of main memory, in clips of a pass."""
    Found = namedtuple("Found", "available")

    def set_to(clips: float) -> None:
        # Half of it is a pass's; gradients and moments take some, and layers some of each clip.
        found = Found(round(2 * (clips + 0.5) * 1.3 * PER_CLIP))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: found)

    yield set_to


def spec_of(
    tiny: Path, tones: Path, root: Path, sections: dict[str, dict[str, Any]] | None = None, **settings: Any
) -> JobSpec:
    settings = {"per_dev_batch": "auto", "grad_accum": 4, "epochs": 2, "eval_steps": 3, "save_steps": 2} | settings
    return job(tiny, tones, root, CPU | (sections or {}), **settings)


def notices(session: LocalSession) -> list[str]:
    found = [event["text"] for event in events(session, "notice")]
    return [text for text in found if text.startswith("training.per_dev_batch")]


def assert_same(one: Path, other: Path) -> None:
    checkpoints = sorted(path.name for path in (one / "checkpoints").glob("checkpoint-*"))
    assert checkpoints == sorted(path.name for path in (other / "checkpoints").glob("checkpoint-*"))
    for name in ("adapter", *(f"checkpoints/{each}/adapter" for each in checkpoints)):
        left, right = saved_adapter(one / name), saved_adapter(other / name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


@pytest.mark.setting("per_dev_batch", "grad_accum")
@pytest.mark.parametrize(("clips", "chosen"), [(100, 4), (2, 2), (0, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_training_is_that_of_the_number_chosen_to_the_bit(
    tiny: Path, tones: Path, tmp_path: Path, memory: Any, clips: int, chosen: int, dropout: float
) -> None:
    memory(clips)
    with watched(WhisperDecoder) as calls:
        auto = Run(spec_of(tiny, tones, tmp_path / "auto", lora_dropout=dropout))
    cut = {"per_dev_batch": chosen, "grad_accum": 4 // chosen}
    number = Run(spec_of(tiny, tones, tmp_path / "number", lora_dropout=dropout, **cut))

    assert max(len(call.given["input_ids"]) for call in calls if call.training) == chosen
    assert auto.steps("loss") == number.steps("loss")
    assert_same(auto.root, number.root)
    training = auto.result["training"]
    assert {name: training[name] for name in cut} == cut
    assert training["effective_batch"] == 4
    assert len(auto.steps()) == 8
    passes = {4: "1 pass of 4 clips", 2: "2 passes of 2 clips", 1: "4 passes of 1 clip"}[chosen]
    assert notices(auto.session) == [
        f"training.per_dev_batch: auto chose {chosen} ({passes} in each step of 4), by an estimate of the memory"
    ]
    assert notices(number.session) == []


def test_a_run_that_goes_on_keeps_its_choice_whatever_memory_there_is(
    tiny: Path, tones: Path, tmp_path: Path, memory: Any
) -> None:
    memory(2)
    whole = Run(spec_of(tiny, tones, tmp_path / "whole", lora_dropout=0.3))
    for name, clips in (("less", 0), ("more", 100)):
        memory(clips)
        root = tmp_path / name
        shutil.copytree(whole.root, root)
        for path in (root / "checkpoints").glob("checkpoint-*"):
            if int(path.name.split("-")[1]) > 3:
                shutil.rmtree(path)
        files = [str(root / split_file(split)) for split in ("train", "val")]
        session = LocalSession()
        result = train(TrainTask(spec_of(tiny, tones, root, lora_dropout=0.3), *files, root=str(root)), session)
        assert events(session, "model")[0]["resumed_from_step"] == 3
        assert notices(session) == [
            "training.per_dev_batch: auto stays at 2 (2 passes of 2 clips in each step of 4), chosen when the run began"
        ]
        assert (result["training"]["per_dev_batch"], result["training"]["grad_accum"]) == (2, 2)
        assert_same_end(whole.root, root)


def test_a_job_with_the_choice_written_out_is_the_number_chosen(
    tiny: Path, tones: Path, tmp_path: Path, memory: Any
) -> None:
    memory(2)
    run = Run(spec_of(tiny, tones, tmp_path / "run", epochs=1))
    found = as_chosen(run.spec, Storage(str(run.root))).training
    assert (found.per_dev_batch, found.grad_accum) == (2, 2)
    assert found.model_copy(update={"per_dev_batch": "auto", "grad_accum": 4}) == run.spec.training
    number = spec_of(tiny, tones, tmp_path / "other", per_dev_batch=4, grad_accum=1)
    assert as_chosen(number, Storage(str(run.root))) == number
    assert as_chosen(run.spec, Storage(str(tmp_path / "other"))) == run.spec, "nothing is chosen there"


def assert_same_end(one: Path, other: Path) -> None:
    left, right = saved_adapter(one / "adapter"), saved_adapter(other / "adapter")
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("content", ["{", '{"per_dev_batch": 3, "grad_accum": 1, "by": "x"}', "[1]", '{"clips": 2}'])
def test_a_choice_that_is_none_of_this_runs_ends_it(tiny: Path, tones: Path, tmp_path: Path, content: str) -> None:
    spec = spec_of(tiny, tones, tmp_path / "run")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run" / PASS_SIZE).write_text(content)
    with pytest.raises(JobFailedError, match=r"pass_size\.json: is not how .* --overwrite begins anew"):
        run_engine(spec)


class Probing(Trainer):
    """Chooses as on a GPU, by passes on the CPU; those of more than two windows have no room."""

    tried: list[int]

    def _choose_passes(self, sharers: int) -> Choice:
        passes, self.tried = self._passes(), []

        def run(size: int) -> None:
            self.tried.append(size)
            one_pass(passes, passes.windows(size), self.model, self.parameters, self.runtime, frames=200)
            assert all(parameter.grad is not None for parameter in self.parameters)
            if passes.windows(size) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        with as_in_training(self.model):
            size = largest_that_runs(self.settings.pass_sizes, run, 4, lambda: forget_gradients(self.parameters))
        return passes.choice(size, PROBE)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True}, {"freeze_encoder": True}, {"modules_to_save": ["embed_tokens"]}, {"bf16": True}],
    ids=str,
)
def test_passes_before_the_training_change_nothing_of_it(
    tiny: Path, tones: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from accelerate.state import AcceleratorState

    settings = {"lora_dropout": 0.3, "epochs": 1} | settings
    AcceleratorState._reset_state(reset_partial_state=True)
    session = LocalSession()
    trainer = Probing(prepared(spec_of(tiny, tones, tmp_path / "probed", **settings)), session)
    trainer.run()
    assert trainer.tried == [4, 2]
    assert notices(session) == [
        "training.per_dev_batch: auto chose 2 (2 passes of 2 clips in each step of 4), by a probe of the GPU's memory"
    ]
    number = Run(spec_of(tiny, tones, tmp_path / "number", per_dev_batch=2, grad_accum=2, **settings))
    assert [event["loss"] for event in events(session, "step")] == number.steps("loss")
    assert_same_end(tmp_path / "probed", number.root)


@pytest.mark.setting("data.packing")
@pytest.mark.parametrize("init", [True, "eva"])
def test_packed_windows_are_those_of_the_number_chosen(
    tiny: Path, tones: Path, tmp_path: Path, memory: Any, init: bool | str
) -> None:
    """Which rows share a window hangs on the size of a pass; clips that `eva` looks at do not."""
    packed = {"data": {"packing": True, "packing_gap_s": 0.1}}
    settings: dict[str, Any] = {"lora_init": init, "epochs": 1, "lora_dropout": 0.3}
    memory(100)
    auto = Run(spec_of(tiny, tones, tmp_path / "auto", packed, grad_accum=6, **settings))
    number = Run(spec_of(tiny, tones, tmp_path / "number", packed, per_dev_batch=6, grad_accum=1, **settings))
    assert auto.result["training"]["per_dev_batch"] == 6
    assert auto.steps("loss") == number.steps("loss")
    assert_same(auto.root, number.root)


@pytest.mark.slow
def test_workers_agree_and_fewer_of_them_go_on_with_the_same_passes(tiny: Path, tones: Path, tmp_path: Path) -> None:
    workers = {"resources": {"workers": 2, "min_workers": 1, "gpus_per_worker": 0}}
    auto = spec_of(tiny, tones, tmp_path / "auto", workers, lora_dropout=0.3)
    number = spec_of(tiny, tones, tmp_path / "number", workers, lora_dropout=0.3, per_dev_batch=4, grad_accum=1)
    reports = train_in_processes([prepared(auto), prepared(number)], 2)
    assert [report.get("traceback") for report in reports] == [None, None]
    assert reports[0]["result"]["training"]["per_dev_batch"] == 4
    texts = [event["text"] for event in reports[0]["events"] if event["event"] == "notice"]
    assert any("auto chose 4 (1 pass of 4 clips in each worker's step of 4)" in text for text in texts)
    assert_same(tmp_path / "auto", tmp_path / "number")

    root = tmp_path / "shrunk"
    shutil.copytree(auto.root, root)
    for path in (root / "checkpoints").glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 2:
            shutil.rmtree(path)
    files = [str(root / split_file(split)) for split in ("train", "val")]
    session = LocalSession()
    train(TrainTask(spec_of(tiny, tones, root, workers, lora_dropout=0.3), *files, root=str(root)), session)
    assert "auto stays at 4" in notices(session)[0]
    whole, shrunk = saved_adapter(tmp_path / "auto/adapter"), saved_adapter(root / "adapter")
    assert max(float((whole[name] - shrunk[name]).abs().max()) for name in whole) < 1e-4


@pytest.mark.slow
def test_of_the_workers_choices_the_least_is_all_of_theirs(tiny: Path, tones: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny, tones, tmp_path, grad_accum=8)
    found = settle_in_processes(spec, tmp_path, [8, 2])
    assert found == [(Choice(2, 4, "a test", 800), False)] * 2
    assert settle_in_processes(spec, tmp_path, [1, 1]) == [(Choice(2, 4, "a test", 800), True)] * 2


GPU = {"resources": {"gpus_per_worker": 1}}


@pytest.fixture
def small_gpu() -> Iterator[int]:
    """Lets this process have 250 MB of the GPU beside what it has; gives the bytes that it may have in all."""
    torch.cuda.empty_cache()
    most, total = torch.cuda.memory_reserved() + 250_000_000, torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(most / total)
    yield most
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
@pytest.mark.setting("per_dev_batch")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"freeze_encoder": True}], ids=str)
def test_on_a_gpu_all_of_a_step_fits_and_the_training_is_that_of_the_number(
    tiny: Path, tones: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {"lora_dropout": 0.3, "epochs": 1} | settings
    auto = Run(spec_of(tiny, tones, tmp_path / "auto", GPU, **settings))
    number = Run(spec_of(tiny, tones, tmp_path / "number", GPU, per_dev_batch=4, grad_accum=1, **settings))
    assert notices(auto.session) == [
        "training.per_dev_batch: auto chose 4 (1 pass of 4 clips in each step of 4), by a probe of the GPU's memory"
    ]
    assert auto.steps("loss") == pytest.approx(number.steps("loss"), rel=1e-3), "dropout draws the same numbers"
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


@pytest.mark.gpu
@pytest.mark.setting("per_dev_batch")
def test_on_a_small_gpu_passes_are_smaller_and_the_training_has_room(
    tiny: Path, tones: Path, tmp_path: Path, small_gpu: int
) -> None:
    run = Run(spec_of(tiny, tones, tmp_path / "run", GPU, grad_accum=1024, epochs=1, bf16=True))
    size = run.result["training"]["per_dev_batch"]
    assert 1 <= size < 1024
    assert run.result["training"]["grad_accum"] == 1024 // size
    assert f"auto chose {size} " in notices(run.session)[0]
    assert len(run.steps()) == 1
    assert torch.cuda.get_per_process_memory_fraction() == pytest.approx(
        small_gpu / torch.cuda.mem_get_info()[1], rel=1e-6
    )


@pytest.mark.gpu
def test_on_a_gpu_the_probe_leaves_gradients_numbers_and_peak_as_they_were(
    tiny: Path, tones: Path, tmp_path: Path
) -> None:
    class Watched(Trainer):
        def _choose_passes(self, sharers: int) -> Choice:
            before, trained = torch.cuda.get_rng_state(), self.model.training
            self.found = super()._choose_passes(sharers)
            assert torch.equal(torch.cuda.get_rng_state(), before)
            assert self.model.training == trained
            assert all(parameter.grad is None for parameter in self.parameters)
            assert torch.cuda.max_memory_allocated() < self.found.peak_bytes
            return self.found

    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    sections = GPU | {"engine": {"report_to": []}}
    spec = spec_of(tiny, tones, tmp_path, sections, grad_accum=64, epochs=1, freeze_encoder=True, lora_dropout=0.3)
    trainer = Watched(prepared(spec), LocalSession())
    trainer.run()
    assert trainer.found.per_dev_batch == 64
