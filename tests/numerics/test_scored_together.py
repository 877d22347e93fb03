"""Trials that train together are scored together: each says what it says alone, and has the loss that it has alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from engine import fill_adapters, job, keeping, run_engine
from together import run_together
from waits import MatrixCasts

from jobs.adapter import attach
from jobs.batches import Features, Loader
from jobs.fast.greedy import Rules, decode
from jobs.fast.log_mel import LogMel
from jobs.fast.many import ManyAdapters
from jobs.model import load_whisper
from jobs.prepare import prepare, split_file
from jobs.search.shared import listening, validating
from jobs.search.shared.engine import SharedEngine
from jobs.search.shared.listening import Listen, listen
from jobs.search.shared.once import Once
from jobs.search.shared.room import clip_by_clip
from jobs.search.shared.validating import Validate, validate
from jobs.train.step import encoder_output
from jobs.train.validation import loss_by
from jobs.transcribe import Chunk, Prompts
from service.errors import StoppedError
from service.spec.job import JobSpec
from service.spec.training import TrainingConfig
from service.storage import Storage

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TRIALS: list[dict[str, Any]] = [
    {"lora_r": 4, "lora_alpha": 8},
    {"lora_r": 8, "use_dora": True, "lora_dropout": 0.3},
    {"lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]},
]
POINTS: list[dict[str, Any]] = [
    {"lora_r": 4, "lr": 2e-2},
    {"lora_r": 8, "use_dora": True, "lr": 1e-2},
    {"lora_r": 4, "lr": 1e-3, "epochs": 1},
]


@pytest.fixture(scope="module")
def whisper(tiny: Path) -> Any:
    return load_whisper(str(tiny))


@pytest.fixture(scope="module")
def rows(tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    spec = job(tiny, tones, tmp_path_factory.mktemp("rows") / "run")
    prepare(spec, spec.root, {"train": str(tones / "train.csv"), "val": str(tones / "val.csv")}, str(tiny))
    return Dataset.from_file(f"{spec.root}/{split_file('train')}")


@pytest.fixture
def chunk(whisper: Any, rows: Dataset) -> Chunk:
    records = [rows[number] for number in range(7)]
    features = Features(LogMel(whisper.processor.feature_extractor, torch.device("cpu"))).of(records, list(range(7)))
    return Chunk(features, None, [record["language"] for record in records])


def trials(many: ManyAdapters) -> list[Any]:
    """PEFT models, each with an update that changes what is said."""
    found = []
    for seed, point in enumerate(TRIALS):
        torch.manual_seed(seed)
        settings = TrainingConfig(freeze_encoder=True, **({"lora_target_modules": TARGETS} | point))
        model, _ = attach(many.twin(), settings)
        fill_adapters(model, 0.2, seed)
        found.append(model.eval())
    return found


@pytest.mark.parametrize("at_once", [7, 3, 1])
def test_each_trial_says_what_it_says_alone(
    whisper: Any, chunk: Chunk, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ManyAdapters(whisper.model)
    models = trials(many)
    prompts = Prompts(whisper.model, whisper.processor, multilingual=True)(chunk.languages)
    rules = Rules.of(whisper.model, 20)
    with torch.no_grad():
        alone = [decode(model, encoder_output(model, chunk.features_BMF, None), prompts, rules) for model in models]
    assert len({str(texts) for texts in alone}) == len(models), "adapters that change nothing would prove nothing"

    for model in models:
        many.add(model)
    monkeypatch.setattr(listening, "clips_at_once", lambda *_: at_once)
    order = [2, 0, 1]
    found = listen(many, [Listen(models[place], chunk, prompts, rules) for place in order])

    assert found == [alone[place] for place in order]


def test_under_autocast_the_bases_matrices_are_cast_once_for_all_trials(whisper: Any, chunk: Chunk) -> None:
    many, logits = ManyAdapters(whisper.model), []
    models = trials(many)
    prompts = Prompts(whisper.model, whisper.processor, multilingual=True)(chunk.languages)
    rules = Rules.of(whisper.model, 9)
    for model in models:
        many.add(model)
    many._model.proj_out.register_forward_hook(lambda module, given, output: logits.append(output))
    before = {name: (place, place.base) for name, place in many._places.items()}
    wide = 2 * len(many._places) // 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        audio_BPD = many.hear(chunk)
        with MatrixCasts() as each_time:
            expected = many.decode(models, audio_BPD, prompts, rules)
        # Added again: norms are to be made anew, of what is in float32.
        for model in models:
            many.remove(model)
        for model in models:
            many.add(model)
        with many.held_for_decoding(), MatrixCasts() as once:
            found = many.decode(models, audio_BPD, prompts, rules)
    assert found == expected
    assert len(logits) == 18 and all(torch.equal(logits[step], logits[step + 9]) for step in range(9))
    assert each_time.count - once.count >= 9 * (1 + wide)
    assert all(place.base is base for place, base in before.values())
    assert all(stack.base.weight.dtype == torch.float32 for stack in many._stacks)
    assert "forward" not in vars(many._model.proj_out)
    with many.held_for_decoding():
        assert all(place.base is base for place, base in before.values()), "there is no autocast"


def test_what_trials_say_together_is_decoded_with_matrices_that_are_held(
    whisper: Any, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ManyAdapters(whisper.model)
    models = trials(many)
    prompts, dtypes = Prompts(whisper.model, whisper.processor, multilingual=True)(chunk.languages), set()
    for model in models:
        many.add(model)
    inner = many.decode

    def decoded(*given: Any) -> Any:
        dtypes.update(place.base.weight.dtype for place in many._places.values())
        return inner(*given)

    monkeypatch.setattr(many, "decode", decoded)
    with torch.autocast("cpu", torch.bfloat16):
        listen(many, [Listen(model, chunk, prompts, Rules.of(whisper.model, 5)) for model in models])
    assert dtypes == {torch.bfloat16}
    assert {place.base.weight.dtype for place in many._places.values()} == {torch.float32}


@pytest.mark.parametrize("at_once", [5, 2, 1])
def test_each_trial_has_the_loss_that_it_has_alone(
    whisper: Any, rows: Dataset, spec_of: Callable[..., JobSpec], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = ManyAdapters(whisper.model)
    models = trials(many)
    loader = Loader(rows, whisper.processor.feature_extractor, whisper.prompter(), threads=1, prefetch=1)
    batch, other = loader.make([0, 1, 2, 3, 4]), loader.make([5, 6])
    asked = [(2, batch), (0, other), (1, batch)]
    alone = []
    for place, of in asked:
        with loss_by(models[place], spec_of("alone")) as loss_of:
            alone.append(loss_of(of))
    for model in models:
        many.add(model)
    monkeypatch.setattr(validating, "clips_at_once", lambda *_: at_once)

    assert validate(many, [Validate(models[place], of) for place, of in asked]) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("fits", [6, 3, 1])
def test_where_memory_is_short_clips_and_then_trials_are_taken_by_halves(fits: int) -> None:
    done: list[int] = []

    def compute(models: list[str], clips: slice) -> list[list[str]]:
        size = len(models) * (clips.stop - clips.start)
        if size > fits:
            raise torch.OutOfMemoryError
        done.append(size)
        return [[f"{model}{clip}" for clip in range(clips.start, clips.stop)] for model in models]

    found = clip_by_clip(["a", "b", "c"], slice(0, 5), 4, compute)

    assert found == [[f"{model}{clip}" for clip in range(5)] for model in "abc"]
    assert sum(done) == 15, "each once"
    assert max(done) == fits


def test_training_goes_on_behind_it(whisper: Any, chunk: Chunk, rows: Dataset) -> None:
    """What a layer keeps of its adapters from scoring has to serve autograd."""
    import contextlib

    from jobs.fast.many import Work

    many = ManyAdapters(whisper.model)
    models = trials(many)
    prompts = Prompts(whisper.model, whisper.processor, multilingual=True)(chunk.languages)
    for model in models:
        many.add(model)
    batch = Loader(rows, whisper.processor.feature_extractor, whisper.prompter(), threads=1, prefetch=1).make([0, 1])
    works = [Work(model, [batch], 9.0, torch.Generator().manual_seed(1)) for model in models]
    before = many.gradients(works, contextlib.nullcontext)
    with torch.inference_mode():
        listen(many, [Listen(model, chunk, prompts, Rules.of(whisper.model, 5)) for model in models])
    again = [Work(model, [batch], 9.0, torch.Generator().manual_seed(1)) for model in models]

    assert many.gradients(again, contextlib.nullcontext) == before


@pytest.fixture
def spec_of(tiny: Path, tones: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    def make(name: str, **training: Any) -> JobSpec:
        settings: dict[str, Any] = {"freeze_encoder": True, "epochs": 2, "eval_steps": 4, "lora_dropout": 0.0}
        sections = {"resources": {"workers": 0}, "evaluation": {"metric": "wer", "batch_size": 4, "max_new_tokens": 12}}
        return keeping(job(tiny, tones, tmp_path / name, sections, **settings | training), 100)

    return make


@pytest.fixture
def data(spec_of: Callable[..., JobSpec]) -> Storage:
    spec = spec_of("data")
    splits = {"train": str(spec.training.train_csv), "val": str(spec.training.val_csv)}
    prepare(spec, spec.root, splits, str(spec.training.base_model))
    return Storage(spec.root)


def test_trials_are_scored_in_one_pass_and_as_each_alone(spec_of: Callable[..., JobSpec], data: Storage) -> None:
    specs = [spec_of(f"trial-{index}", **point) for index, point in enumerate(POINTS)]
    engine = SharedEngine(specs[0], None)
    passes: list[int] = []
    inner = engine._many.decode
    engine._many.decode = lambda models, *rest: (passes.append(len(models)), inner(models, *rest))[1]  # type: ignore[method-assign]

    said = run_together(engine, specs, data)

    assert passes.count(3) >= 4, passes  # the evaluation of step 4, clip by clip; then they have unlike schedules
    rates = []
    for index, point in enumerate(POINTS):
        history = said[index][-1]["result"]["training"]["history"]
        alone, _ = run_engine(spec_of(f"alone-{index}", **point))
        assert history == alone["training"]["history"]
        rates.append(history[-1]["cer"])
    assert len(set(rates)) > 1, "rates that are all the same would prove nothing"


@pytest.mark.jobs
def test_a_trial_that_is_stopped_while_all_are_scored_leaves_the_others_alone(
    spec_of: Callable[..., JobSpec], data: Storage
) -> None:
    specs = [spec_of(f"trial-{index}", **point) for index, point in enumerate(POINTS[:2])]
    engine, scored = SharedEngine(specs[0], None), threading.Event()
    inner = engine._many.decode

    def decoded(*given: Any) -> Any:
        scored.set()
        return inner(*given)

    engine._many.decode = decoded  # type: ignore[method-assign]
    stopped, other = run_together(engine, specs, data, lambda index: index == 0 and scored.is_set())

    assert isinstance(stopped[-1], StoppedError)
    alone, _ = run_engine(spec_of("alone", **POINTS[1]))
    assert other[-1]["result"]["training"]["history"] == alone["training"]["history"]


def test_what_one_makes_serves_all_who_come_to_it() -> None:
    once, made, barrier = Once[int](2), [], threading.Barrier(4)

    def make() -> int:
        made.append(1)
        return len(made)

    def go() -> None:
        barrier.wait()
        assert once.get("a", make) == 1

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert [once.get(key, make) for key in ("b", "c", "a")] == [2, 3, 4], "a was let go"
    with pytest.raises(ZeroDivisionError):
        once.get("d", lambda: 1 // 0)
    assert once.get("d", make) == 5, "a failure is not kept"
