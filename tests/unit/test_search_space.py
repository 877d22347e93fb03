"""The space of a search: how points are drawn, and that no point of it can be an invalid job."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest

from service.errors import SpecError
from service.spec.flags import Override
from service.spec.job import JobSpec
from service.spec.load import load_spec
from service.spec.shared import is_shared
from service.spec.space import (
    FIXED,
    defaults,
    grid,
    job_at,
    planned_trials,
    random_point,
    space_of,
    value_words,
    walk,
    words_of,
)
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import OPENAI

CSVS = {"training.train_csv": "s3://bucket/train.csv", "training.val_csv": "s3://bucket/val.csv"}


def search(space: Any = None, **settings: Any) -> JobSpec:
    """A checked search; names with dots are settings of other sections."""
    values: dict[str, Any] = {"kind": "search", **CSVS, "training.base_model": "openai/whisper-tiny"}
    values["search.space"] = space
    values |= {name if "." in name else f"search.{name}": value for name, value in settings.items()}
    return load_spec(None, [Override(path, value, path) for path, value in values.items()]).spec


def faults(space: Any = None, **settings: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        search(space, **settings)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("model", [name for name in OPENAI if "tiny" in name or "large-v3" in name])
def test_only_the_number_of_trials_is_enough(model: str) -> None:
    spec = search(trials=16, **{"training.base_model": model})
    names = {"lora_r", "lora_alpha", "use_dora", "lora_dropout", "lr"}
    assert set(space_of(spec)) == names
    points = [random_point(spec, number) for number in range(1, 200)]
    assert all(set(point) == names for point in points)
    assert {point["lora_alpha"] / point["lora_r"] for point in points} == {1, 2, 4}
    assert {point["use_dora"] for point in points} == {True, False}
    assert all(2e-5 <= point["lr"] <= 2e-3 for point in points)
    below = sum(point["lr"] < 2e-4 for point in points)
    assert 60 < below < 140, "half of them below the middle of the logarithms"


def test_a_draw_is_a_function_of_seed_and_number() -> None:
    one, same, other = (search(trials=8, seed=seed) for seed in (1, 1, 2))
    assert [random_point(one, n) for n in range(9)] == [random_point(same, n) for n in range(9)]
    assert random_point(one, 1) != random_point(other, 1)
    assert random_point(one, 1) != random_point(one, 2)


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        ([8, 16], {8, 16}),
        ({"choice": [8]}, {8}),
        ({"randint": [2, 11], "step": 4}, {2, 6, 10}),
        ({"randint": [2, 4]}, {2, 3, 4}),
        ({"times": "lora_alpha", "by": [0.5, 1]}, {16, 32}),
    ],
)
def test_what_is_drawn_is_what_the_dimension_says(dimension: Any, expected: set[int]) -> None:
    spec = search({"lora_r": dimension})
    assert {random_point(spec, number)["lora_r"] for number in range(200)} == expected
    assert {point["lora_r"] for point in walk(spec)} == expected


def test_ranges_keep_to_their_ends() -> None:
    spec = search({"lora_dropout": {"uniform": [0.1, 0.2]}, "lr": {"loguniform": [1e-5, 1e-3]}})
    points = [random_point(spec, number) for number in range(500)]
    for name, low, high in (("lora_dropout", 0.1, 0.2), ("lr", 1e-5, 1e-3)):
        values = [point[name] for point in points]
        assert low <= min(values) < low * 1.1 < high * 0.9 < max(values) <= high
    middle = math.sqrt(1e-5 * 1e-3)
    assert 150 < sum(point["lr"] < middle for point in points) < 350


def test_a_setting_depends_on_another_wherever_it_stands_and_a_chain_does() -> None:
    space = {
        "per_dev_batch": {"times": "lora_alpha", "by": [2]},
        "lora_alpha": {"times": "lora_r", "by": [1, 2]},
        "lora_r": [4, 8],
    }
    for point in walk(search(space)):
        assert point["lora_alpha"] in (point["lora_r"], 2 * point["lora_r"])
        assert point["per_dev_batch"] == 2 * point["lora_alpha"]
    assert len(list(walk(search(space)))) == 4


def test_a_condition_leaves_the_setting_to_training_where_it_does_not_hold() -> None:
    space = {
        "lora_dropout": {"choice": [0.3, 0.4], "when": {"use_dora": False, "lora_r": [4, 8]}},
        "use_dora": [True, False],
        "lora_r": [4, 8, 16],
    }
    spec = search(space)
    points = list(walk(spec))
    assert len(points) == 3 + 2 * 2 + 1
    for point in points:
        drawn = not point["use_dora"] and point["lora_r"] < 16
        assert ("lora_dropout" in point) == drawn
        assert job_at(spec, point).training.lora_dropout == (point["lora_dropout"] if drawn else 0.05)


def test_a_condition_on_what_is_not_searched_looks_at_training() -> None:
    space = {"lora_dropout": {"choice": [0.3], "when": {"freeze_encoder": True}}, "lora_r": [4]}
    spec = search(space, **{"training.freeze_encoder": True})
    assert [set(point) for point in walk(spec)] == [{"lora_r", "lora_dropout"}]
    (fault,) = faults(space)
    assert "draws lora_dropout only when freeze_encoder is true, which it never is" in fault


def test_numbers_in_quotes_are_numbers_and_a_value_counts_once() -> None:
    space = {"lora_r": ["8", 16, "16"], "lora_alpha": {"times": "lora_r", "by": [2]}, "lr": ["1e-4", 1e-4, 5e-4]}
    spec = search(space, sampler="grid")
    assert spec.search.space is not None
    assert (spec.search.space["lora_r"].choice, spec.search.space["lr"].choice) == ([8, 16], [1e-4, 5e-4])
    assert {point["lora_alpha"] for point in walk(spec)} == {16, 32}
    assert planned_trials(spec) == 5


def test_a_fault_under_a_condition_is_found_in_a_large_space() -> None:
    ranks = {"choice": [*range(8, 44, 2), 7], "when": {"use_dora": True}}
    inits = {"lora_init": [True, False, "gaussian", "orthogonal"], "use_dora": [False, True]}
    space = {"lora_r": ranks, **inits, "epochs": {"randint": [1, 9]}, "lr": {"loguniform": [1e-5, 1e-3]}}
    (fault,) = faults(space)
    assert "training.lora_r is odd" in fault
    assert "use_dora true" in fault


def test_lists_and_texts_are_values_too() -> None:
    spec = search({"lora_target_modules": [["q_proj"], ["q_proj", "o_proj"]], "lora_init": [True, "gaussian"]})
    jobs = [job_at(spec, point).training for point in walk(spec)]
    assert [job.lora_target_modules for job in jobs[::2]] == [["q_proj"], ["q_proj", "out_proj"]]
    assert {job.lora_init for job in jobs} == {True, "gaussian"}


def test_a_point_is_a_train_job_that_can_be_run_alone() -> None:
    spec = search({"lora_r": [4]}, evaluations=4, **{"training.eval_steps": 7, "storage.uri": "s3://bucket/mine"})
    job = job_at(spec, {"lora_r": 4}, steps=10, seed=9)
    assert (job.kind, job.search, job.storage) == ("train", type(spec.search)(), spec.storage)
    assert (job.training.eval_steps, job.training.save_steps, job.training.seed) == (3, 3, 9)
    assert JobSpec.model_validate_json(job.to_json()) == job
    assert job_at(spec, {"lora_r": 4}).training.eval_steps == 7


def test_the_grid_is_all_points_but_the_defaults() -> None:
    space = {"lora_r": [8, 16], "use_dora": [True, False]}
    spec = search(space, sampler="grid")
    assert grid(spec) == [
        {"lora_r": 8, "use_dora": True}, {"lora_r": 8, "use_dora": False}, {"lora_r": 16, "use_dora": True},
    ]  # fmt: skip
    assert planned_trials(spec) == 4
    assert planned_trials(search(space)) == 16
    assert planned_trials(search(space, trials=3)) == 3
    assert defaults(spec) == {"lora_r": 16, "use_dora": False}


# Faults: nothing of them is submitted.


@pytest.mark.parametrize("name", FIXED)
def test_what_cannot_be_searched_is_said_with_the_reason(name: str) -> None:
    (fault,) = faults({name: [1, 2]})
    assert fault == f"search.space: holds {name}, which cannot be searched: {FIXED[name]}"


def test_every_other_setting_of_training_can_be_searched() -> None:
    examples = {
        "epochs": [1, 2], "lr": {"loguniform": [1e-5, 1e-3]}, "warmup_ratio": {"uniform": [0, 0.3]},
        "per_dev_batch": [2, 4, "auto"], "grad_accum": {"randint": [1, 4]}, "freeze_encoder": [True, False],
        "lora_r": {"randint": [4, 64]}, "lora_alpha": {"times": "lora_r", "by": [1, 2]},
        "lora_dropout": {"uniform": [0, 0.2]}, "lora_target_modules": [["q_proj", "fc1"], ["v_proj", "fc1"]],
        "modules_to_save": [None, ["embed_tokens"]], "use_dora": [True, False], "lora_init": [True, "gaussian"],
        "lora_rank_pattern": [None, {"decoder.layers.0.fc1": 2}], "lora_alpha_pattern": [None, {"fc1": 3}],
    }  # fmt: skip
    assert set(examples) == set(TrainingConfig.model_fields) - set(FIXED)
    spec = search(examples)
    for number in range(50):
        assert random_point(spec, number).keys() == examples.keys()


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"lora_rr": [8]}, "holds lora_rr, which is no setting of training; did you mean lora_r?"),
        ({"lora_r": [0, 8]}, "0 holds a value of lora_r that is too small; give 1 or more"),
        ({"lr": {"loguniform": [0.1, 10]}}, "10.0 holds a value of lr that is too large; give 1 or less"),
        ({"lora_r": {"uniform": [2, 8]}}, "draws lora_r by uniform, and it takes whole numbers; give randint"),
        ({"use_dora": {"uniform": [0, 1]}}, "draws use_dora by uniform, and it is true or false; give a choice"),
        ({"lora_alpha": {"times": "rank", "by": [1]}}, "lets lora_alpha depend on rank, which is no setting"),
        ({"lora_alpha": {"times": "use_dora", "by": [1]}}, "multiplies use_dora for lora_alpha, and that is no number"),
        ({"lora_r": {"times": "lora_alpha", "by": [0.3]}}, "training.lora_r is not a whole number"),
        ({"lora_r": {"choice": [4], "when": {"dora": True}}}, "depend on dora, which is no setting of training"),
        (
            {"lora_r": {"choice": [4], "when": {"lora_alpha": 5}}, "lora_alpha": [8, 16]},
            "draws lora_r only when lora_alpha is 5, which it never is",
        ),
        (
            {"lora_r": {"times": "lora_alpha", "by": [1]}, "lora_alpha": {"times": "lora_r", "by": [1]}},
            "depend on each other in a circle: lora_r, lora_alpha",
        ),
    ],
)
def test_a_space_that_cannot_be_is_refused(space: Any, said: str) -> None:
    (fault,) = faults(space)
    assert fault.startswith("search.space: ")
    assert said in fault


@pytest.mark.parametrize(
    ("dimension", "said"),
    [
        (3, "is neither a list of values nor an object such as"),
        ({}, "says none of them; give one of choice, uniform, loguniform, randint, or times with by"),
        ({"choice": [1], "randint": [1, 2]}, "says choice and randint"),
        ({"times": "lora_alpha"}, "has `times` and `by` only together"),
        ({"by": [1], "choice": [3]}, "has `times` and `by` only together"),
        ({"randint": [8, 4]}, "has a randint whose first number is not below its second"),
        ({"loguniform": [0, 4]}, "has a loguniform that does not begin above 0"),
        ({"choice": [4], "step": 2}, "has a `step`, which belongs to `randint`"),
        ({"randint": [1, 10**9]}, "has a randint of over 10,000 values; give a larger step"),
        ({"range": [1, 2]}, "is not known there"),
        ({"choice": []}, "has no values; give one or more"),
    ],
)
def test_a_dimension_that_says_nothing_clear_is_refused(dimension: Any, said: str) -> None:
    assert any(said in fault and "search.space[lora_r]" in fault for fault in faults({"lora_r": dimension}))


def test_all_faults_of_a_space_are_told_at_once() -> None:
    found = faults({"lora_rr": [8], "seed": [1], "lr": [2], "lora_alpha": {"times": "x", "by": [1]}})
    assert len(found) == 4


@pytest.mark.parametrize("step", [1, 3])
def test_orthogonal_wants_even_ranks_at_every_point(step: int) -> None:
    space = {"lora_r": {"randint": [4, 40], "step": step}, "lora_init": [True, "orthogonal"]}
    (fault,) = faults(space)
    assert "training.lora_r is odd, and lora_init orthogonal wants even ranks" in fault
    assert "lora_init orthogonal" in fault.split("It is ")[1]
    search({"lora_r": {"randint": [4, 40], "step": 2}, "lora_init": [True, "orthogonal"]})


def test_a_fault_of_two_settings_together_is_found_in_a_space_of_millions_of_points() -> None:
    many = {
        "epochs": {"randint": [1, 9]}, "per_dev_batch": {"randint": [1, 8]}, "grad_accum": {"randint": [1, 8]},
        "lora_alpha": {"randint": [1, 64]}, "lora_dropout": [0.0, 0.1, 0.2, 0.3], "lr": {"loguniform": [1e-5, 1e-3]},
    }  # fmt: skip
    pair = {"use_dora": [False, True], "lora_init": [True, "gaussian", "mica"]}
    (fault,) = faults(many | pair)
    assert "training.lora_init excludes use_dora" in fault
    search(many | {"use_dora": [False, True], "lora_init": [True, "gaussian"]})
    conditional = {"use_dora": {"choice": [False, True], "when": {"lora_init": [True, "gaussian"]}}}
    search(many | pair | conditional)


def test_a_malformed_dimension_hides_no_other_fault() -> None:
    space = {
        "lora_r": 8,
        "lora_alpha": {"times": "lora_r", "by": [1]},
        "use_dora": {"choice": [True], "when": {"lora_alpha": 8}},
        "lra": [1e-4],
        "epochs": [0],
        "lr": {"loguniform": [1, 2, 3]},
    }
    for form in (space, json.dumps(space)):
        told = faults(form, trials=0, **{"training.fp16": True, "training.bf16": True})
        assert len(told) == 6, told
        assert told[0].startswith("search.trials: 0 is too small")
        assert told[1].startswith("search.space[lora_r]: 8 is neither a list of values nor an object")
        assert told[2] == "search.space[lr][loguniform]: [1, 2, 3] has 3 values; give 2"
        assert told[3].startswith("training.fp16: and bf16 exclude each other")
        assert "holds lra, which is no setting of training; did you mean lr?" in told[4]
        assert "holds a value of epochs that is too small; give 1 or more" in told[5]


def test_what_is_wrong_with_the_spec_itself_is_told_once() -> None:
    found = faults({"lora_r": [4, 8, 16]}, **{"training.lora_target_modules": ["q_prj"]})
    assert len(found) == 1
    assert "training.lora_target_modules" in found[0]


def test_ranks_that_an_initialisation_cannot_have_are_found() -> None:
    (fault,) = faults(
        {"lora_r": [8, 512]}, **{"training.base_model": "openai/whisper-tiny", "training.lora_init": "olora"}
    )
    assert "training.lora_r is too high for lora_init olora" in fault


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": "grid"}, "needs values that can be listed, and lr is a range"),
        ({"sampler": "grid", "trials": 3, "space": {"lora_r": [4, 8, 32]}}, "is less than the grid's 4 points"),
        ({"trials": 3, "top_k": 4}, "is more than the 3 trials"),
        ({"top_k": 17}, "is more than the 16 trials"),
        (
            {"sampler": "grid", "space": {name: {"randint": [1, 99]} for name in ("lora_r", "lora_alpha", "epochs")}},
            "is of over 10,000 points",
        ),
        ({"grace": 5}, "is more than search.evaluations (4)"),
        ({"trials": 0}, "is too small"),
        ({"sampler": "bayes"}, "is not one of"),
        ({"scheduler": "hyperband"}, "is not one of"),
        ({"hours": 0}, "is too small"),
        ({"kind": "train", "trials": 3}, "is train, and `search` is given"),
    ],
)
def test_settings_of_a_search_that_do_not_fit_are_refused(settings: dict[str, Any], said: str) -> None:
    values = {"kind": "search", **CSVS}
    values |= {name if name == "kind" else f"search.{name}": value for name, value in settings.items()}
    with pytest.raises(SpecError) as caught:
        load_spec(None, [Override(path, value, path) for path, value in values.items()])
    assert said in str(caught.value)


def test_words_for_people() -> None:
    point = {"lora_r": 16, "use_dora": True, "lr": 0.000123456, "lora_target_modules": ["q_proj", "fc1"]}
    assert words_of(point) == "lora_r 16, use_dora true, lr 0.000123, lora_target_modules q_proj fc1"
    assert words_of({}) == "no setting"
    assert value_words(None) == "None"


def test_the_hash_leaves_out_how_many_trials_run_at_once() -> None:
    one = search(trials=8)
    assert one.sha256 == search(trials=8, concurrent=3, max_failures=9).sha256
    assert len({one.sha256, search(trials=9).sha256, search(trials=8, seed=1).sha256}) == 3
    pairs = itertools.combinations([search({"lora_r": [8, 4]}), search({"lora_r": [4, 8]})], 2)
    assert all(a.sha256 != b.sha256 for a, b in pairs)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"training.freeze_encoder": False}, "training.freeze_encoder is false"),
        ({"space": {"freeze_encoder": [True, False]}}, "training.freeze_encoder is false"),
        ({"space": {"lora_init": [True, "pissa"]}}, "training.lora_init pissa changes the base model"),
        ({"training.modules_to_save": ["embed_tokens"]}, "training.modules_to_save trains parts of the base"),
        ({"resources.workers": 2}, "resources.workers is 2"),
        ({"training.fp16": True}, "training.fp16 scales each trial's loss"),
        (
            {"training.use_dora": True, "training.lora_dropout": 0.1, "engine.dora_dropout": "peft"},
            "dora_dropout is peft",
        ),
        ({"engine.fast_loss": False}, "engine.fast_loss is false"),
        ({"engine.gradient_checkpointing": True}, "engine.gradient_checkpointing recomputes"),
    ],
    ids=str,
)
def test_what_keeps_trials_from_training_together_is_told(settings: dict[str, Any], says: str) -> None:
    asked = {"training.freeze_encoder": True, "space": {"lora_r": [4, 8]}} | settings
    space = asked.pop("space")
    assert is_shared(search(space, engine="auto", **asked)) is False
    (fault,) = faults(space, engine="shared", **asked)
    assert "search.engine" in fault
    assert says in fault
    assert "take separate, or auto" in fault
