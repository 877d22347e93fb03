"""GPU-hours: the work per clip against figures that were counted elsewhere, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.errors import InputError
from service.estimate import PEAK_TFLOPS, UTILISATION, Estimate, estimate, read_prices, training_flop
from service.plan import Plan, make_schedule
from service.spec.job import JobSpec
from service.spec.targets import adapted_modules
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import OPENAI
from service.spec.whisper_modules import modules

COUNTED = {
    ("large-v3-turbo", False): 5.02, ("large-v3-turbo", True): 2.36, ("large-v3", False): 5.78,
    ("large-v3", True): 2.84, ("small", False): 0.896, ("small", True): 0.433,
}  # fmt: skip
"""TFLOP of a 30 s window with 64 label tokens, forward and backward, LoRA in encoder and decoder or in the decoder."""


@pytest.mark.parametrize(("model", "frozen"), COUNTED)
def test_the_work_of_a_clip_is_what_was_counted_within_an_eighth(model: str, frozen: bool) -> None:
    dims = OPENAI[f"openai/whisper-{model}"]
    adapted = adapted_modules(TrainingConfig(freeze_encoder=frozen), modules(dims))
    assert training_flop(dims, adapted, frozen_encoder=frozen) / 1e12 == pytest.approx(
        COUNTED[model, frozen], rel=0.125
    )


def of(rows: int = 10_000, gpu: str | None = None, prices: Path | None = None, **resources: Any) -> Estimate | None:
    content = {"training": {"base_model": "openai/whisper-large-v3-turbo"}, "resources": resources}
    spec = JobSpec.model_validate(content)
    plan = Plan("train", "job", "root", {"train": rows, "val": 0}, make_schedule(spec, rows))
    return estimate(spec, plan, OPENAI[spec.training.base_model], gpu, read_prices(prices) if prices else None)


def test_hours_are_work_over_speed_and_shared_by_the_gpus() -> None:
    one = of()
    assert one is not None
    seconds = 3 * 10_000 * one.tflop_per_clip / (PEAK_TFLOPS["H100"] * UTILISATION)
    assert one.gpu_hours == pytest.approx(seconds / 3600)
    four = of(workers=2, gpus_per_worker=2)
    assert four is not None
    assert four.gpu_hours == pytest.approx(one.gpu_hours)
    assert four.hours == pytest.approx(one.hours / 4)
    assert of(gpus_per_worker=0) is None
    assert one.cost is None


def write(folder: Path, content: Any) -> Path:
    path = folder / "prices.json"
    path.write_text(json.dumps(content))
    return path


def test_a_price_table_gives_the_cost_and_the_gpu(tmp_path: Path) -> None:
    table = write(tmp_path, {"currency": "EUR", "gpu_hour": {"L4": 0.7}})
    found = of(prices=table)
    assert found is not None
    assert (found.gpu, found.currency) == ("L4", "EUR")
    assert found.cost == pytest.approx(found.gpu_hours * 0.7)
    own = of(prices=write(tmp_path, {"gpu_hour": {"X9": 1.0}, "tflops": {"X9": 989}}), gpu="X9")
    plain = of()
    assert own is not None
    assert plain is not None
    assert own.cost == own.gpu_hours == plain.gpu_hours


@pytest.mark.parametrize(
    ("content", "gpu", "fault"),
    [
        ({"gpu_hour": {}}, None, "gpu_hour"),
        ({"gpu_hour": {"H100": "much"}}, None, "gpu_hour.H100"),
        ({"gpu_hours": {"H100": 1}}, None, "gpu_hours"),
        ({"gpu_hour": {"H100": -1}}, None, "gpu_hour.H100"),
        ({"gpu_hour": {"X": 1}, "tflops": {"X": 0}}, "X", "tflops.X"),
        ({"gpu_hour": {"H100": 1}}, "H10", "did you mean H100?"),
        ({"gpu_hour": {"H100": 1}}, "A10G", "has no price of A10G; it has H100"),
    ],
)
def test_a_table_or_a_gpu_that_says_nothing_is_refused(
    tmp_path: Path, content: Any, gpu: str | None, fault: str
) -> None:
    with pytest.raises(InputError) as caught:
        of(gpu=gpu, prices=write(tmp_path, content))
    assert fault in str(caught.value)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--prices: .* is no file"):
        read_prices(tmp_path / "none.yaml")
