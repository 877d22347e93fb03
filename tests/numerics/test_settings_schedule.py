"""What the settings of the schedule do: order of the rows, steps, learning rate, batches, the optimizer's input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import Run, events, job, read_lines, watched
from torch import Tensor
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from jobs.adapter import attach, trainable_parameters
from jobs.batches import Schedule, seed_everything
from jobs.model import load_whisper
from service.spec.job import JobSpec

ROWS = 13
BETA1, EPSILON = 0.9, 1e-8
"""AdamW's, as torch has them."""


def text_ids(ids_BT: Tensor, end: int) -> list[tuple[int, ...]]:
    """The decoder's input of each row after its prompt of four tokens, without what pads it."""
    return [tuple(token for token in row[4:] if token != end) for row in ids_BT.tolist()]


def trained_rows(spec: JobSpec) -> tuple[Run, list[tuple[int, ...]]]:
    """A run, and the texts that its decoder read in training, in their order."""
    with watched(WhisperDecoder) as calls:
        run = Run(spec)
    end = int(load_whisper(spec.training.base_model).processor.tokenizer.eos_token_id)  # it pads, too
    return run, [row for call in calls if call.training for row in text_ids(call.given["input_ids"], end)]


class TestOrder:
    """seed and epochs: each epoch has every row once, in an order of its own that the seed decides."""

    @pytest.fixture(scope="class")
    def orders(self, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        """Rows in the order of their training, per run."""
        folder = tmp_path_factory.mktemp("order")
        seeds = {"one": 1, "one again": 1, "two": 2}
        return {
            name: trained_rows(job(tiny, tones, folder / name, seed=seed, epochs=2, per_dev_batch=4, lora_dropout=0.3))
            for name, seed in seeds.items()
        }

    @pytest.mark.setting("epochs", "train_csv")
    def test_an_epoch_is_a_pass_over_the_training_set(self, orders: dict[str, Any], tones: Path, tiny: Path) -> None:
        run, order = orders["one"]
        prompter = load_whisper(str(tiny)).prompter()
        lines = (tones / "train.csv").read_text().splitlines()[1:]
        texts = {tuple(prompter.encode(line.split(",")[1], line.split(",")[2]).inputs[4:]) for line in lines}
        assert len(texts) == ROWS
        assert len(order) == 2 * ROWS
        assert set(order[:ROWS]) == set(order[ROWS:]) == texts
        assert len(run.steps()) == run.result["training"]["steps"] == 2 * math.ceil(ROWS / 4)

    @pytest.mark.setting("seed")
    def test_the_seed_decides_the_order_anew_in_each_epoch(self, orders: dict[str, Any]) -> None:
        one, again, two = (orders[name][1] for name in ("one", "one again", "two"))
        assert one == again
        assert len({tuple(one[:ROWS]), tuple(one[ROWS:]), tuple(two[:ROWS]), tuple(two[ROWS:])}) == 4
        by_schedule = Schedule(ROWS, 4, 1, 1, seed=1)
        number = dict(zip(one[:ROWS], by_schedule.order(0).tolist(), strict=True))
        assert [number[row] for row in one[ROWS:]] == by_schedule.order(1).tolist()

    @pytest.mark.setting("seed")
    def test_the_seed_decides_every_bit_of_a_run(self, orders: dict[str, Any]) -> None:
        one, again, two = (orders[name][0] for name in ("one", "one again", "two"))
        for value in ("loss", "grad_norm"):
            assert one.steps(value) == again.steps(value) != two.steps(value)
        last = one.result["training"]["steps"]
        for folder in (None, last):
            first, same, other = (run.adapter(folder) for run in (one, again, two))
            assert all(torch.equal(first[name], same[name]) for name in first)
            assert not any(torch.equal(first[name], other[name]) for name in first)
        optimizers = [run.state(last)["parts"]["optimizer"]["state"] for run in (one, again)]
        assert repr(optimizers[0]) == repr(optimizers[1])
        assert one.result["tuned"] == again.result["tuned"]


def rate_of(step: int, steps: int, warmup_ratio: float, peak: float) -> float:
    """The learning rate of optimizer step 0, 1, ...: up in a line to the peak, down in a line to 0."""
    warmup = min(math.ceil(warmup_ratio * steps), steps - 1)
    return peak * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


WARMUPS = {0.0: 0, 0.08: 1, 0.5: 4, 0.99: 6}
"""Steps of the warm-up, of seven."""


class TestLearningRate:
    """lr and warmup_ratio."""

    @pytest.fixture(scope="class", params=WARMUPS)
    def run(
        self, request: pytest.FixtureRequest, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Run:
        """Seven steps, a checkpoint after each."""
        root = tmp_path_factory.mktemp("rates") / "run"
        return Run(job(tiny, tones, root, warmup_ratio=request.param, lr=0.002, save_steps=1, lora_dropout=0.0))

    @pytest.mark.setting("lr", "warmup_ratio")
    def test_every_steps_rate_is_that_of_the_formula(self, run: Run) -> None:
        ratio = run.spec.training.warmup_ratio
        expected = [rate_of(step, 7, ratio, 0.002) for step in range(7)]
        assert run.steps("lr") == pytest.approx(expected)
        assert expected.index(0.002) == WARMUPS[ratio]

    @pytest.mark.setting("lr", "warmup_ratio")
    def test_the_optimizer_steps_at_that_rate(self, run: Run) -> None:
        ratio = run.spec.training.warmup_ratio
        for step in range(1, 7):  # AdamW's rate after a step is that of the next
            (group,) = run.state(step)["parts"]["optimizer"]["param_groups"]
            assert group["lr"] == pytest.approx(rate_of(step, 7, ratio, 0.002))
        # AdamW's first update is the rate itself where the gradient is not all but 0; B begins at 0.
        first = max(float(tensor.abs().max()) for name, tensor in run.adapter(1).items() if "lora_B" in name)
        assert first == pytest.approx(rate_of(0, 7, ratio, 0.002), rel=1e-3)


@pytest.mark.setting("engine.lr_scheduler")
@pytest.mark.parametrize("scheduler", ["cosine", "constant"])
def test_after_the_warmup_the_rate_goes_as_the_scheduler_says(
    tiny: Path, tones: Path, tmp_path: Path, scheduler: str
) -> None:
    settings = {"warmup_ratio": 0.25, "lr": 0.002, "lora_dropout": 0.0, "save_steps": 1}
    run = Run(job(tiny, tones, tmp_path / "run", {"engine": {"lr_scheduler": scheduler}}, **settings))
    warmup, steps = 2, 7
    past = [(step - warmup) / (steps - warmup) for step in range(warmup, steps)]
    after = [0.5 * (1 + math.cos(math.pi * share)) if scheduler == "cosine" else 1.0 for share in past]
    expected = [0.002 * factor for factor in (0.0, 0.5, *after)]
    assert run.steps("lr") == pytest.approx(expected)
    for step in range(1, steps):  # AdamW's rate after a step is that of the next
        (group,) = run.state(step)["parts"]["optimizer"]["param_groups"]
        assert group["lr"] == pytest.approx(expected[step])


CUTS = {"4 x 1": (4, 1), "2 x 2": (2, 2), "1 x 4": (1, 4)}
"""per_dev_batch and grad_accum."""


@pytest.fixture(scope="module", params=[False, True], ids=["LoRA", "DoRA"])
def cuts(
    request: pytest.FixtureRequest, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The same steps of four clips in one, two and four forward passes: run, and sizes of the passes."""
    folder, found = tmp_path_factory.mktemp("cuts"), {}
    for name, (per_dev_batch, grad_accum) in CUTS.items():
        settings = {"per_dev_batch": per_dev_batch, "grad_accum": grad_accum, "use_dora": request.param}
        with watched(WhisperDecoder) as calls:
            run = Run(job(tiny, tones, folder / name, lora_dropout=0.0, save_steps=1, **settings))
        found[name] = run, [len(call.given["input_ids"]) for call in calls if call.training]
    return found


@pytest.mark.setting("per_dev_batch")
def test_a_forward_pass_holds_per_dev_batch_clips(cuts: dict[str, Any]) -> None:
    assert {name: sizes for name, (_, sizes) in cuts.items()} == {
        "4 x 1": [4, 4, 4, 1],
        "2 x 2": [2, 2, 2, 2, 2, 2, 1],
        "1 x 4": [1] * 13,
    }


@pytest.mark.setting("per_dev_batch", "grad_accum")
def test_a_step_is_of_both_multiplied(cuts: dict[str, Any]) -> None:
    for run, _ in cuts.values():
        assert run.result["training"]["effective_batch"] == 4
        assert len(run.steps()) == run.result["training"]["steps"] == 4


def first_gradients(run: Run) -> list[Tensor]:
    """The gradients of the first step, as AdamW has averaged them."""
    state = run.state(1)["parts"]["optimizer"]["state"]
    return [state[index]["exp_avg"] / (1 - BETA1) for index in sorted(state)]


@pytest.mark.setting("per_dev_batch", "grad_accum")
@pytest.mark.parametrize("name", ["2 x 2", "1 x 4"])
def test_gradients_and_adapter_are_those_of_one_pass_over_the_same_clips(cuts: dict[str, Any], name: str) -> None:
    whole, cut = cuts["4 x 1"][0], cuts[name][0]
    pairs = list(zip(first_gradients(cut), first_gradients(whole), strict=True))
    assert sum(bool(other.any()) for _, other in pairs) >= 32, "of each module's B"
    for one, other in pairs:
        assert float((one - other).abs().max()) <= 1e-5 * max(1e-3, float(other.abs().max()))
    assert cut.steps("loss") == pytest.approx(whole.steps("loss"), rel=1e-5)
    assert cut.steps("grad_norm") == pytest.approx(whole.steps("grad_norm"), rel=1e-4)
    one, other = cut.adapter(4), whole.adapter(4)
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-5


class TestOneStep:
    """What the optimizer makes of the first gradients, by the formulas of clipping and AdamW."""

    RATE = 0.01

    @pytest.fixture(scope="class")
    def runs(self, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
        """One step over all rows, with different settings of the engine."""
        folder = tmp_path_factory.mktemp("one-step")
        engines = {"plain": {"max_grad_norm": 1e9}, "clipped": {"max_grad_norm": 1e-6}}
        engines["decayed"] = {"max_grad_norm": 1e9, "weight_decay": 0.5}
        settings = {"per_dev_batch": ROWS, "warmup_ratio": 0.0, "lr": self.RATE, "lora_dropout": 0.0}
        return {
            name: Run(job(tiny, tones, folder / name, {"engine": engine}, **settings))
            for name, engine in engines.items()
        }

    @pytest.mark.setting("engine.max_grad_norm")
    def test_gradients_are_scaled_down_to_the_norm(self, runs: dict[str, Run]) -> None:
        plain, clipped = first_gradients(runs["plain"]), first_gradients(runs["clipped"])
        norm = float(torch.cat([gradient.flatten() for gradient in plain]).norm())
        assert runs["plain"].steps("grad_norm") == runs["clipped"].steps("grad_norm") == pytest.approx([norm])
        assert norm > 0.1
        assert float(torch.cat([gradient.flatten() for gradient in clipped]).norm()) == pytest.approx(1e-6, rel=1e-4)
        for one, other in zip(clipped, plain, strict=True):
            torch.testing.assert_close(one, other * (1e-6 / norm), rtol=1e-3, atol=1e-14)
        # So small that AdamW's epsilon counts, which else undoes any factor.
        b = {name: tensor for name, tensor in runs["clipped"].adapter().items() if "lora_B" in name}
        expected = [-self.RATE * g / (g.abs() + EPSILON) for g in clipped if g.any()]
        for tensor, wanted in zip(b.values(), sorted_like(b, runs["clipped"], expected), strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-7)

    @pytest.mark.setting("engine.weight_decay")
    def test_weights_decay_by_rate_times_decay(self, runs: dict[str, Run]) -> None:
        plain, decayed = runs["plain"].adapter(), runs["decayed"].adapter()
        for name, tensor in plain.items():
            # A has no gradient where B is 0, so its first step is the decay alone; B begins at 0, which nothing decays.
            factor = 1 - self.RATE * 0.5 if "lora_A" in name else 1.0
            torch.testing.assert_close(decayed[name], tensor * factor, rtol=1e-6, atol=1e-9)

    @pytest.mark.setting("seed")
    def test_adapters_begin_as_the_seed_says(self, runs: dict[str, Run], tiny: Path) -> None:
        seed_everything(runs["plain"].spec.training.seed)
        model, _ = attach(load_whisper(str(tiny)).model, runs["plain"].spec.training)
        begun = {name.replace(".default", ""): tensor.detach() for name, tensor in trainable_parameters(model)}
        for name, tensor in runs["plain"].adapter().items():
            if "lora_A" in name:
                assert torch.equal(tensor, begun[name])


def sorted_like(wanted: dict[str, Tensor], run: Run, gradients: list[Tensor]) -> list[Tensor]:
    """Updates of the optimizer, which are in the order of the model, in the order of a saved adapter's B."""
    model, _ = attach(load_whisper(run.spec.training.base_model).model, run.spec.training)
    names = [name.replace(".default", "") for name, _ in trainable_parameters(model) if "lora_B" in name]
    found = dict(zip(names, gradients, strict=True))
    return [found[name] for name in wanted]


class TestIntervals:
    """logging_steps, save_steps and eval_steps: what is in events.jsonl and on disk, to the step."""

    CASES: tuple[tuple[int, int, int, dict[str, list[int]]], ...] = (
        (1, 1, 3, {"logged": [1, 2, 3, 4, 5, 6, 7], "saved": [1, 2, 3, 4, 5, 6, 7], "scored": [3, 6, 7]}),
        (3, 4, 100, {"logged": [3, 6, 7], "saved": [4, 7], "scored": [7]}),
    )

    @pytest.mark.setting("logging_steps", "save_steps", "eval_steps")
    @pytest.mark.parametrize(("logging", "saving", "scoring", "expected"), CASES)
    def test_things_happen_at_every_nth_step_and_at_the_end(
        self,
        tiny: Path,
        tones: Path,
        tmp_path: Path,
        logging: int,
        saving: int,
        scoring: int,
        expected: dict[str, list[int]],
    ) -> None:
        intervals = {"logging_steps": logging, "save_steps": saving, "eval_steps": scoring}
        run = Run(job(tiny, tones, tmp_path / "run", **intervals))
        checkpoints = sorted(
            int(path.name.rsplit("-", 1)[1]) for path in (run.root / "checkpoints").glob("checkpoint-*")
        )
        assert {
            "logged": [event["step"] for event in run.steps() if event["logged"]],
            "saved": checkpoints,
            "scored": [event["step"] for event in events(run.session, "evaluation") if "step" in event],
        } == expected
        assert [entry["step"] for entry in run.result["training"]["history"]] == expected["scored"]
        assert len(read_lines(run.root / "evaluation/tuned.jsonl")) == 5
