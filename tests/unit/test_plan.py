"""The plan of a job: rows, steps, evaluations and checkpoints, before anything is started."""

import json
import math

import pytest

from service.plan import count_rows, make_plan, make_schedule
from service.spec.job import JobSpec
from service.spec.whisper_dims import OPENAI


def job(**training):
    """A train job on the CSVs of the folder."""
    workers = training.pop("workers", 1)
    data = {"train_csv": "train.csv", "val_csv": "val.csv"}
    return JobSpec(training=data | training, resources={"workers": workers})


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 250, 1001])
@pytest.mark.parametrize("eval_steps", [1, 3, 10, 500])
@pytest.mark.parametrize("save_steps", [1, 4, 10, 500])
def test_the_schedule_is_that_of_a_loop(rows, eval_steps, save_steps):
    spec = job(per_dev_batch=2, grad_accum=2, workers=2, epochs=3, eval_steps=eval_steps, save_steps=save_steps)

    schedule = make_schedule(spec, rows)

    steps = evaluations = checkpoints = 0
    total = 3 * math.ceil(rows / 8)
    for step in range(1, total + 1):
        steps += 1
        if step % eval_steps == 0 or step == total:
            evaluations += 1
            checkpoints += 1
        elif step % save_steps == 0:
            checkpoints += 1
    assert (schedule.effective_batch, schedule.steps_per_epoch, schedule.total_steps) == (8, math.ceil(rows / 8), steps)
    assert (schedule.evaluations, schedule.checkpoints) == (evaluations, checkpoints)


@pytest.mark.parametrize(("ratio", "warmup"), [(0, 0), (0.08, 3), (0.1, 3), (0.5, 15), (0.999, 29)])
def test_warm_up_is_rounded_up_and_leaves_a_step_at_the_full_rate(ratio, warmup):
    assert make_schedule(job(warmup_ratio=ratio, per_dev_batch=1, grad_accum=1), 10).warmup_steps == warmup


def test_rows_are_counted_as_csv_and_not_as_lines(folder):
    (folder / "odd.csv").write_text('path,text\n"a.wav","one\ntwo"\n\nb.wav,three\n')

    assert count_rows("odd.csv") == 2
    assert count_rows("s3://bucket/odd.csv") is None
    assert count_rows("gone.csv") is None
    assert count_rows(None) is None


def test_a_remote_csv_leaves_the_steps_open(folder):
    plan = make_plan(job(train_csv="s3://bucket/train.csv"))

    assert plan.rows == {"train": None, "val": 1}
    assert plan.schedule is None
    assert plan.adapter.trainable_parameters > 0
    assert "the rows of train cannot be counted here" in plan.notes


def test_a_model_that_is_not_here_leaves_parameters_and_memory_open(folder):
    plan = make_plan(job(base_model="someone/whisper-mine"))

    assert (plan.adapter, plan.memory) == (None, None)
    assert plan.schedule.total_steps == 3
    assert "parameters and memory are not known here" in plan.notes[-1]


def test_what_the_schedule_tells_is_noted(folder):
    notes = make_plan(job(per_dev_batch=4, epochs=1)).notes

    assert any("only its end is evaluated" in note for note in notes)
    assert any("one step per epoch" in note for note in notes)


def test_with_auto_a_step_holds_grad_accum_clips_of_each_worker(folder):
    auto = job(per_dev_batch="auto", grad_accum=8, workers=2, epochs=3)
    plan = make_plan(auto)

    assert make_schedule(auto, 100) == make_schedule(job(per_dev_batch=2, grad_accum=4, workers=2, epochs=3), 100)
    assert plan.memory.clips == 1
    assert plan.memory.training == make_plan(job(per_dev_batch=1)).memory.training
    (note,) = [note for note in plan.notes if "per_dev_batch" in note]
    assert note == (
        "training.per_dev_batch is auto: a forward pass holds the most clips of 1, 2, 4, 8 that fit; the memory is "
        "that of passes of one"
    )


def test_auto_with_one_clip_in_a_step_has_nothing_to_choose(folder):
    notes = make_plan(job(per_dev_batch="auto", grad_accum=1)).notes

    assert any("is 1: there is nothing to choose; raise grad_accum, or give a number" in note for note in notes)
    assert not any("per_dev_batch" in note for note in make_plan(job(per_dev_batch=1, grad_accum=1)).notes)


def test_trials_that_train_together_are_counted_over_one_base(folder):
    training = {"train_csv": "train.csv", "val_csv": "val.csv", "freeze_encoder": True}

    def memory(**search):
        return make_plan(JobSpec(kind="search", training=training, search=search)).memory

    together, fewer, separate = memory(), memory(concurrent=2), memory(engine="separate")
    assert (together.trials, fewer.trials, separate.trials) == (8, 2, 0)
    assert together.training.adapter == 8 * separate.training.adapter
    assert together.training.activations > 7 * separate.training.activations
    assert together.training.base == fewer.training.base > separate.training.base, "in float32"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_initialisation_that_changes_the_base_doubles_what_is_published(folder, init, use_dora):
    plain, plan = (make_plan(job(lora_init=each, use_dora=use_dora)) for each in (True, init))

    assert plan.adapter.trainable_parameters == plain.adapter.trainable_parameters == plain.adapter.published_parameters
    magnitudes = plain.adapter.trainable_parameters - make_plan(job()).adapter.trainable_parameters if use_dora else 0
    assert plan.adapter.published_parameters == 2 * (plan.adapter.trainable_parameters - magnitudes) + magnitudes
    assert any(f"({plan.adapter.published_parameters:,} parameters) and fits the untouched" in n for n in plan.notes)


def test_eva_leaves_the_ranks_open_and_mica_trains_a_alone(folder):
    plain, eva, mica = (make_plan(job(lora_init=init)) for init in (True, "eva", "mica"))

    assert any("up to 32 in one" in note for note in eva.notes)
    assert mica.adapter.trainable_parameters < plain.adapter.trainable_parameters
    assert mica.adapter.published_parameters == plain.adapter.published_parameters


def test_the_plan_is_json(folder):
    content = json.loads(json.dumps(make_plan(job(use_dora=True, modules_to_save=["embed_tokens"])).as_dict()))

    assert content["adapter"]["share"] == pytest.approx(
        content["adapter"]["trainable_parameters"] / content["adapter"]["base_parameters"]
    )
    assert content["adapter"]["saved"] == {"model.decoder.embed_tokens": 51864 * 1024}
    assert content["memory"]["estimate"] is True
    assert content["memory"]["peak_bytes"] >= content["memory"]["training_bytes"]["total"]


def test_an_evaluation_has_rows_and_no_steps(folder):
    plan = make_plan(JobSpec(kind="evaluate", evaluation={"model": "openai/whisper-tiny", "csv": "val.csv"}))

    assert plan.rows == {"csv": 1}
    assert (plan.schedule, plan.adapter) == (None, None)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({}, {"freeze_encoder": True}),
        ({"per_dev_batch": 4}, {"per_dev_batch": 2}),
        ({"use_dora": True}, {"use_dora": False}),
        ({"lora_r": 64}, {"lora_r": 8}),
        ({"bf16": False}, {"bf16": True}),
        ({"lora_dropout": 0.1}, {"lora_dropout": 0}),
    ],
)
def test_memory_moves_the_right_way(folder, more, less):
    assert make_plan(job(**more)).memory.training.total > make_plan(job(**less)).memory.training.total


def test_gradient_checkpointing_saves_most_activations(folder):
    spec = job()
    saving = spec.model_copy(update={"engine": spec.engine.model_copy(update={"gradient_checkpointing": True})})

    plain, saved = (make_plan(one).memory.training.activations for one in (spec, saving))

    assert saved < plain / 4


@pytest.mark.parametrize("name", OPENAI)
def test_every_openai_checkpoint_has_a_plan(folder, name):
    plan = make_plan(job(base_model=name))

    assert 0 < plan.adapter.share < 0.1
    assert plan.memory.peak > 4 * plan.adapter.base_parameters
