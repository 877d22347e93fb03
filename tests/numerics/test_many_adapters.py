"""Many adapters over one base: each trial's loss and gradients are those of its own PEFT model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import fill_adapters
from torch import Tensor

from jobs.adapter import attach, trainable_parameters
from jobs.batches import Batch, Loader
from jobs.fast.many import ManyAdapters, Work
from jobs.model import load_whisper
from jobs.prepare import prepare, split_file
from jobs.train.step import forward_loss
from service.activations import makes_no_keys
from service.spec.training import TrainingConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
TRIALS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 4, "lora_alpha": 8},
    "dora": {"lora_r": 8, "lora_alpha": 8, "use_dora": True},
    "few modules": {"lora_r": 2, "lora_target_modules": ["q_proj", "v_proj"]},
    "rank pattern": {"lora_r": 4, "lora_rank_pattern": {"fc1": 16}, "use_dora": True},
    "dropout": {"lora_r": 4, "lora_dropout": 0.3},
}


def settings(**more: Any) -> TrainingConfig:
    return TrainingConfig(freeze_encoder=True, **({"lora_target_modules": TARGETS, "lora_dropout": 0.0} | more))


def no_autocast() -> Any:
    return contextlib.nullcontext()


@pytest.fixture(scope="module")
def whisper(tiny: Path) -> Any:
    return load_whisper(str(tiny))


@pytest.fixture(scope="module")
def batches(whisper: Any, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Batch]:
    from datasets import Dataset
    from engine import job

    spec = job(tiny, tones, tmp_path_factory.mktemp("rows") / "run")
    prepare(spec, spec.root, {"train": str(tones / "train.csv"), "val": str(tones / "val.csv")}, str(tiny))
    rows = Dataset.from_file(f"{spec.root}/{split_file('train')}")
    loader = Loader(rows, whisper.processor.feature_extractor, whisper.prompter(), threads=1, prefetch=1)
    return lambda *numbers: loader.make(list(numbers))


def begun(many: ManyAdapters, name: str, seed: int) -> Any:
    """A trial's PEFT model with an update that is not zero."""
    torch.manual_seed(seed)
    model, _ = attach(many.twin(), settings(**TRIALS[name]))
    fill_adapters(model, 0.05, seed)
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainable_parameters(model)}


def alone(model: Any, passes: list[Batch], tokens: float, seed: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as PEFT and transformers compute them, with the global generator begun anew."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    total = 0.0
    for batch in passes:
        loss = forward_loss(model, batch, torch.device("cpu"), freeze_encoder=True) / tokens
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def together(
    many: ManyAdapters,
    models: list[Any],
    passes: list[list[Batch]],
    seed: int,
    autocast: Callable[[], Any] = no_autocast,
) -> list[tuple[float, dict]]:
    works = []
    for model, own in zip(models, passes, strict=True):
        many.add(model)
        tokens = float(sum(int((batch.labels_BT >= 0).sum()) for batch in own))
        works.append(Work(model, own, tokens, torch.Generator().manual_seed(seed)))
    losses = many.gradients(works, autocast)
    found = [(loss, gradients(model)) for loss, model in zip(losses, models, strict=True)]
    many.release()
    return found


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    largest = max(float(each.abs().max()) for each in expected[1].values())
    assert largest > 1e-3, "gradients that are nothing would prove nothing"
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-5 * max(1.0, largest), name


PASSES: dict[str, list[list[tuple[int, ...]]]] = {
    "same batches": [[(0, 5), (2, 9)]] * 5,
    "own batches": [[(index, index + 4), (index + 6,)] for index in range(5)],
    "two batches": [[(0, 5)], [(2, 9)], [(0, 5)], [(2, 9)], [(0, 5)]],
}


@pytest.mark.parametrize("heads", [2, 16], ids=["short texts", "long texts"])
@pytest.mark.parametrize("kind", PASSES)
def test_gradients_are_those_of_each_trial_alone(whisper: Any, batches: Any, kind: str, heads: int) -> None:
    base = copy.deepcopy(whisper.model)
    for layer in base.model.decoder.layers:
        attention = layer.encoder_attn
        assert attention.num_heads == 2
        attention.num_heads, attention.head_dim = heads, base.config.d_model // heads
        attention.scaling = attention.head_dim**-0.5
    many = ManyAdapters(base)
    models = [begun(many, name, seed) for seed, name in enumerate(TRIALS)]
    made = {rows: batches(*rows) for rows in {rows for own in PASSES[kind] for rows in own}}
    passes = [[made[rows] for rows in own] for own in PASSES[kind]]
    tokens = [float(sum(int((batch.labels_BT >= 0).sum()) for batch in own)) for own in passes]
    lengths = [batch.inputs_BT.shape[1] for batch in made.values()]
    assert {makes_no_keys(length, base.config.d_model // heads, half=False) for length in lengths} == {heads == 2}

    expected = [alone(model, own, count, 7) for model, own, count in zip(models, passes, tokens, strict=True)]
    found = together(many, models, passes, 7)

    for name, one, other in zip(TRIALS, found, expected, strict=True):
        assert one[1], name
        assert_same(one, other)


def test_in_bfloat16_they_are_those_of_each_trial_alone_to_its_precision(whisper: Any, batches: Any) -> None:
    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    many = ManyAdapters(whisper.model)
    names = [name for name in TRIALS if name != "dropout"]  # whose numbers differ by precision
    models = [begun(many, name, seed) for seed, name in enumerate(names)]
    batch = batches(0, 5)
    tokens = float((batch.labels_BT >= 0).sum())
    exact = [alone(model, [batch], tokens, 7) for model in models]
    with autocast():
        each_alone = [alone(model, [batch], tokens, 7) for model in models]
    found = together(many, models, [[batch]] * len(models), 7, autocast)

    def off(one: dict[str, Tensor], true: dict[str, Tensor]) -> float:
        distance = torch.cat([(one[name] - true[name]).flatten() for name in true]).norm()
        return float(distance / torch.cat([each.flatten() for each in true.values()]).norm())

    for name, mine, other, true in zip(names, found, each_alone, exact, strict=True):
        assert mine[0] == pytest.approx(true[0], rel=1e-2), name
        assert 0 < off(mine[1], true[1]) < 1.5 * off(other[1], true[1]) + 1e-3, name


def test_the_encoder_runs_once_for_a_batch_that_all_trials_share(whisper: Any, batches: Any) -> None:
    many = ManyAdapters(whisper.model)
    models = [begun(many, "lora", seed) for seed in range(3)]
    heard = []
    many.hear = (lambda inner: lambda batch: (heard.append(batch), inner(batch))[1])(many.hear)  # type: ignore[method-assign]
    one, other = batches(0, 1), batches(2, 3)

    together(many, models, [[one], [one], [other]], 0)

    assert [id(batch) for batch in heard] == [id(one), id(other)]


def test_trials_come_and_go_and_optimizers_write_through(whisper: Any, batches: Any) -> None:
    """Steps of three trials, of which one leaves and one comes in between, are those of each alone."""
    many = ManyAdapters(whisper.model)
    order = [["dora", "lora"], ["dora", "lora", "rank pattern"], ["dora", "rank pattern"], ["rank pattern"]]
    models = {name: begun(many, name, 3) for name in ("dora", "lora", "rank pattern")}
    twins = {name: begun(many, name, 3) for name in models}
    # Not Adam, which makes as much of a gradient of 1e-9 as of one of 1.
    optimizers = {
        id(model): torch.optim.SGD([each for _, each in trainable_parameters(model)], lr=0.05, momentum=0.9)
        for model in [*models.values(), *twins.values()]
    }
    present: list[str] = []
    for step, names in enumerate(order):
        for name in [name for name in present if name not in names]:
            many.remove(models[name])
        for name in [name for name in names if name not in present]:
            many.add(models[name])
        present = names
        batch = batches(step, step + 3)
        tokens = float((batch.labels_BT >= 0).sum())
        works = [Work(models[name], [batch], tokens, torch.Generator()) for name in names]
        many.gradients(works, no_autocast)
        for name in names:
            alone(twins[name], [batch], tokens, 0)
            optimizers[id(models[name])].step()
            optimizers[id(twins[name])].step()
    many.release()
    for name, model in models.items():
        for (path, one), (_, other) in zip(trainable_parameters(model), trainable_parameters(twins[name]), strict=True):
            assert float((one - other).detach().abs().max()) < 2e-5, (name, path)
