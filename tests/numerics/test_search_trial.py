"""A trial is its configuration run alone: the same bits, however it was interrupted. And the loss is transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import job, run_engine, saved_adapter
from torch.nn import functional as F

from jobs.batches import Loader
from jobs.model import load_whisper
from jobs.prepare import prepare, split_file
from jobs.search import trial
from jobs.search.ledger import Ledger, folder_of
from jobs.search.runner import Event, InProcess, TrialRun
from jobs.search.trial import Result, TrialPlan, job_of, results
from jobs.train.pass_size import PASS_SIZE
from jobs.train.session import LocalSession
from jobs.train.validation import loss_by, validation_loss
from service.errors import DivergedError, InputLostError, JobFailedError, StoppedError
from service.spec.job import JobSpec
from service.storage import Storage
from service.trials import Evaluation

ROWS = 13
POINT = {"lora_r": 4, "use_dora": True, "lr": 2e-3}


@pytest.fixture
def search(tiny: Path, tones: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    """A search whose data are prepared; sections other than `search` by name."""

    def make(metric: str = "wer", **settings: Any) -> JobSpec:
        training = {"epochs": 2, "lora_dropout": 0.2}
        spec = job(tiny, tones, tmp_path / "root", {"evaluation": {"metric": metric}}, **training)
        content = spec.model_dump(mode="json") | {"kind": "search"}
        content["search"] = {"space": {"lora_r": [4, 8]}} | settings
        content["resources"] |= {"workers": 0}
        made = JobSpec.model_validate(content)
        splits = {"train": str(made.training.train_csv), "val": str(made.training.val_csv)}
        prepare(made, made.root, splits, made.training.base_model)
        return made

    return make


def begun(spec: JobSpec, point: dict[str, Any] = POINT) -> Ledger:
    ledger = Ledger(Storage(spec.root), spec, {"wer": 1.0, "cer": 1.0, "loss": 9.0})
    ledger.begin(0, "tpe", point, {})
    return ledger


def told(spec: JobSpec, ledger: Ledger, runner: Any = None, stopping: Any = None) -> Iterator[Result]:
    """A trial's results, each kept in the ledger as a search keeps them."""
    plan = TrialPlan(spec.to_json(), spec.root, None, ROWS)
    for result in results(plan, "t000", runner or InProcess(), stopping or (lambda: False)):
        ledger.add("t000", result.entries, **result.facts)
        yield result


def alone(spec: JobSpec, folder: Path, repeat: int = 0) -> tuple[dict[str, Any], Path]:
    """The trial's configuration as a train job of its own."""
    made = job_of(spec, POINT, ROWS, repeat)
    made = made.model_copy(update={"training": made.training.model_copy(update={"outdir": str(folder)})})
    return run_engine(made)[0], folder


def same_checkpoint(one: Path, other: Path, step: int) -> bool:
    name = f"checkpoints/checkpoint-{step}/adapter"
    left, right = saved_adapter(one / name), saved_adapter(other / name)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_trial_learns_what_its_configuration_learns_alone(search: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = search()
    ledger = begun(spec)
    found = list(told(spec, ledger))
    assert [(result.evaluation, result.status) for result in found] == [
        (0, "running"), (1, "running"), (2, "running"), (3, "running"), (4, "finished"),
    ]  # fmt: skip
    assert [each.number for each in ledger.trials[0].evaluations] == [1, 2, 3, 4]
    result, folder = alone(spec, tmp_path / "alone")
    history = result["training"]["history"]
    assert [(each.step, each.wer, each.cer) for each in ledger.trials[0].evaluations] == [
        (entry["step"], entry["wer"], entry["cer"]) for entry in history
    ]
    assert ledger.trials[0].score == min(entry["wer"] for entry in history)
    assert ledger.trials[0].trainable_parameters == result["adapter"]["trainable_parameters"]
    assert same_checkpoint(Path(spec.root) / folder_of("t000"), folder, history[-1]["step"])


def test_a_trial_tells_how_far_it_is(search: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_ADVANCE_EVERY_S", 0.0)
    spec, shares = search(), list[float]()
    begun(spec)
    plan = TrialPlan(spec.to_json(), spec.root, None, ROWS)
    (*_, last) = results(plan, "t000", InProcess(), advance=shares.append)
    steps = last.facts["step"]
    assert shares == [step / steps for step in range(1, steps + 1)]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_trial_that_is_cut_off_goes_on_to_the_same_bits(
    after: int, search: Callable[..., JobSpec], tmp_path: Path
) -> None:
    spec = search()
    ledger = begun(spec)
    stream = told(spec, ledger)
    for _ in range(1 + after):
        next(stream)
    stream.close()
    again = begun(spec)
    resumed = list(told(spec, again))
    assert [result.evaluation for result in resumed[:after]] == list(range(1, after + 1)), "told again"
    assert resumed[-1].status == "finished"
    result, folder = alone(spec, tmp_path / "alone")
    history = result["training"]["history"]
    assert [(each.step, each.wer) for each in again.trials[0].evaluations] == [
        (entry["step"], entry["wer"]) for entry in history
    ]
    assert same_checkpoint(Path(spec.root) / folder_of("t000"), folder, history[-1]["step"])


def test_evaluations_that_the_record_has_lost_come_from_the_checkpoint(search: Callable[..., JobSpec]) -> None:
    spec = search()
    list(told(spec, begun(spec)))
    whole = begun(spec).trials[0].evaluations
    (Path(spec.root) / folder_of("t000") / "trial.json").unlink()
    ledger = begun(spec)
    runner = Counting()
    assert list(told(spec, ledger, runner))[-1].status == "finished"
    assert [(each.step, each.score) for each in ledger.trials[0].evaluations] == [(e.step, e.score) for e in whole]
    assert runner.steps == 0, "nothing was trained again"


def test_a_finished_trial_is_only_told_again(search: Callable[..., JobSpec]) -> None:
    spec = search()
    ledger = begun(spec)
    first = list(told(spec, ledger))
    ledger.end("t000", "finished")
    runner = Counting()
    again = list(told(spec, begun(spec), runner))
    assert runner.runs == 0
    assert [(r.evaluation, r.score) for r in again] == [(r.evaluation, r.score) for r in first[1:]]
    assert (again[-1].status, again[-1].score) == ("finished", first[-1].score)


def test_repeats_are_runs_with_other_seeds_scored_by_their_mean(search: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = search(repeats=3)
    ledger = begun(spec)
    found = list(told(spec, ledger))
    assert [result.evaluation for result in found] == [0, 1, 2, 3, 4, 0, 5, 0, 6]
    best = []
    for repeat in range(3):
        result, _ = alone(spec, tmp_path / f"alone{repeat}", repeat)
        best.append(min(entry["wer"] for entry in result["training"]["history"]))
    row = ledger.trials[0]
    assert row.scores == best
    assert row.score == pytest.approx(sum(best) / 3)
    assert {each.seed for each in row.evaluations} == {42, 43, 44}
    assert found[4].score == best[0], "the first run alone, until the others are done"
    assert not list((Path(spec.root) / folder_of("t000")).glob("repeat*")), "their checkpoints are removed"


def test_a_repeat_that_is_cut_off_leaves_the_others_alone(search: Callable[..., JobSpec]) -> None:
    spec = search(repeats=2)
    stream = told(spec, begun(spec))
    for _ in range(5):
        next(stream)
    stream.close()
    runner = Counting()
    assert list(told(spec, begun(spec), runner))[-1].status == "finished"
    assert runner.seeds == [43]


@pytest.mark.parametrize(
    ("error", "status", "fatal"),
    [
        (DivergedError("the loss is nan"), "failed", False),
        (JobFailedError("CUDA error"), "failed", False),
        (InputLostError("a clip has gone"), "interrupted", True),
    ],
)
def test_an_error_ends_its_trial_or_all(
    error: Exception, status: str, fatal: bool, search: Callable[..., JobSpec]
) -> None:
    spec = search()
    *_, last = told(spec, begun(spec), Raising(error))
    assert (last.status, last.fatal is error) == (status, fatal)
    assert last.cause == (str(error) if status == "failed" else None)


def test_a_loss_that_is_no_number_fails_the_trial_with_its_cause(search: Callable[..., JobSpec]) -> None:
    spec = search()
    *_, last = told(spec, begun(spec, POINT | {"lr": 1.0, "use_dora": False, "lora_alpha": 2**31}))
    assert last.status == "failed"
    assert "stopped before the optimizer step" in str(last.cause)


def test_a_search_that_is_stopped_leaves_checkpoints_and_another_stop_is_passed_on(
    search: Callable[..., JobSpec],
) -> None:
    spec = search()
    steps = iter(range(9))
    *_, last = told(spec, begun(spec), stopping=lambda: next(steps, 9) > 7)
    assert last.status == "interrupted"
    assert not last.fatal
    checkpoints = Path(spec.root) / folder_of("t000") / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")], "it goes on from there"
    (only,) = told(spec, begun(spec), Raising(AssertionError()), stopping=lambda: True)
    assert only.status == "interrupted", "what has not begun does not begin"
    with pytest.raises(StoppedError):
        list(told(spec, begun(spec), Raising(StoppedError("the node is taken away"))))


class Counting(InProcess):
    """Trains as ever, and counts."""

    def __init__(self) -> None:
        self.runs = self.steps = 0
        self.seeds: list[int] = []

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Any:
        self.runs += 1
        self.seeds.append(run.spec.training.seed)
        for event in super().events(run, stopping):
            self.steps += event["event"] == "step"
            yield event


class Raising:
    """A training that ends at once."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def events(self, run: TrialRun, stopping: Callable[[], bool]) -> Any:
        yield from self._none()
        raise self.error

    def _none(self) -> Iterator[Event]:
        yield {"event": "notice", "text": "about to fail"}


# The loss.


def test_the_validation_loss_is_that_of_transformers(search: Callable[..., JobSpec]) -> None:
    from datasets import Dataset

    spec = search("loss")
    rows = Dataset.from_file(f"{spec.root}/{split_file('val')}")
    whisper = load_whisper(spec.training.base_model)
    whisper.model.train()
    loader = Loader(rows, whisper.processor.feature_extractor, whisper.prompter(), threads=1, prefetch=1)
    device = torch.device("cpu")
    with loss_by(whisper.model, spec) as loss_of:
        found = validation_loss(loss_of, rows, loader, spec, LocalSession(), device)
    assert whisper.model.training, "it is left as it was"
    whisper.model.eval()
    total = tokens = 0.0
    for row in range(len(rows)):
        batch = loader.make([row])
        with torch.no_grad():
            logits = whisper.model(input_features=batch.features_BMF, decoder_input_ids=batch.inputs_BT).logits
        labels = batch.labels_BT.flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels >= 0).sum())
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_a_search_by_loss_transcribes_nothing_and_takes_the_least(search: Callable[..., JobSpec]) -> None:
    spec = search("loss")
    ledger = begun(spec)
    list(told(spec, ledger))
    row = ledger.trials[0]
    losses = [each.loss for each in row.evaluations]
    assert all(each.wer is None for each in row.evaluations)
    assert row.score == min(loss for loss in losses if loss is not None)
    assert len(set(losses)) == 4


def test_scores_are_the_best_so_far(search: Callable[..., JobSpec]) -> None:
    spec = search("loss", evaluations=7)
    ledger = begun(spec, POINT | {"lr": 0.3})
    list(told(spec, ledger))
    entries: list[Evaluation] = ledger.trials[0].evaluations
    losses = [float(each.loss or 0) for each in entries]
    assert [each.score for each in entries] == [min(losses[: n + 1]) for n in range(len(losses))]
    assert losses != sorted(losses, reverse=True), "it gets worse now and then"


@pytest.mark.setting("per_dev_batch")
def test_a_trial_chooses_its_passes_as_its_configuration_alone_does(
    search: Callable[..., JobSpec], tmp_path: Path
) -> None:
    spec = search("loss")
    auto = spec.training.model_copy(update={"per_dev_batch": "auto", "grad_accum": 2})
    spec = spec.model_copy(update={"training": auto})
    found = list(told(spec, begun(spec)))
    assert found[-1].status == "finished"
    root = Path(spec.root) / folder_of("t000")
    assert (root / PASS_SIZE).exists()
    result, folder = alone(spec, tmp_path / "alone")
    assert (result["training"]["per_dev_batch"], result["training"]["steps"]) == (2, 14)
    assert (root / PASS_SIZE).read_bytes() == (folder / PASS_SIZE).read_bytes()
    assert same_checkpoint(root, folder, 14)
