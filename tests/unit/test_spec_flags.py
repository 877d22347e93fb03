"""Flags made from the settings: in argparse for the cluster's program, in Click for the client."""

import argparse

import pytest

from service.errors import SpecError
from service.spec.flags import Override, add_to, flags, overrides_from
from service.spec.load import load_spec
from service.spec.settings import settings


def overrides(*words):
    """What the cluster's program makes of a command line."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_to(parser)
    return overrides_from(parser.parse_args(words))


def test_every_setting_of_training_has_a_flag_and_a_help_text():
    expected = {f"--{s.name.replace('_', '-')}" for s in settings().values() if s.section == "training"}

    assert {flag.option for flag in flags()} == expected | {"--name"}
    assert all(len(flag.help) > 10 for flag in flags())


CASES = {
    ("--lora-r", "16"): ("training.lora_r", 16, "--lora-r"),
    ("--lora-r=16",): ("training.lora_r", 16, "--lora-r"),
    ("--lora-r", "x"): ("training.lora_r", "x", "--lora-r"),
    ("--lr", "5e-5"): ("training.lr", 5e-5, "--lr"),
    ("--use-dora",): ("training.use_dora", True, "--use-dora"),
    ("--no-use-dora",): ("training.use_dora", False, "--no-use-dora"),
    ("--no-bf16",): ("training.bf16", False, "--no-bf16"),
    ("--lora-target-modules", "q_proj", "k_proj"): (
        "training.lora_target_modules",
        ["q_proj", "k_proj"],
        "--lora-target-modules",
    ),
    ("--lora-target-modules", ".*fc1"): ("training.lora_target_modules", ".*fc1", "--lora-target-modules"),
    ("--lora-init", "false"): ("training.lora_init", False, "--lora-init"),
    ("--lora-init", "orthogonal"): ("training.lora_init", "orthogonal", "--lora-init"),
    ("--outdir", "2024"): ("training.outdir", "2024", "--outdir"),
    ("--name", "true"): ("name", "true", "--name"),
    ("--lora-rank-pattern", '{"fc1": 4}'): ("training.lora_rank_pattern", {"fc1": 4}, "--lora-rank-pattern"),
    ("--set", "engine.threads=4"): ("engine.threads", 4, "--set engine.threads"),
    ("--set", "engine.threads=null"): ("engine.threads", None, "--set engine.threads"),
    ("--set", "data.bad_rows=reject"): ("data.bad_rows", "reject", "--set data.bad_rows"),
    ("--set", 'engine.report_to=["wandb"]'): ("engine.report_to", ["wandb"], "--set engine.report_to"),
    ("--set", "lora_r=8"): ("training.lora_r", 8, "--set lora_r"),
    ("--set", "weight_decay=0"): ("engine.weight_decay", 0, "--set weight_decay"),
    ("--set", "outdir=2024"): ("training.outdir", "2024", "--set outdir"),
    ("--set", "training.outdir=a=b"): ("training.outdir", "a=b", "--set training.outdir"),
    ("--set", "storage.uri=7"): ("storage.uri", "7", "--set storage.uri"),
}


@pytest.mark.parametrize(("words", "expected"), CASES.items(), ids=[" ".join(words) for words in CASES])
def test_a_flag_is_one_override(words, expected):
    assert overrides(*words) == [Override(*expected)]


def test_lists_of_other_sections_are_taken_as_yaml_has_them(folder):
    data = ["--train-csv", "train.csv", "--val-csv", "val.csv"]
    words = [
        "--set",
        "export.formats=[hf, ggml]",
        "--set",
        "augment.speed=[0.9, 1.1]",
        "--set",
        "data.text={case: lower}",
    ]

    spec = load_spec(None, overrides(*data, *words)).spec

    assert (spec.export.formats, spec.augment.speed, spec.data.text.case) == (["hf", "ggml-f16"], [0.9, 1.1], "lower")


def test_a_list_of_numbers_is_called_one():
    texts = {path: setting.type_text for path, setting in settings().items() if setting.is_list}

    assert {path for path, text in texts.items() if text == "list of numbers"} == {
        "augment.speed",
        "augment.noise_snr_db",
        "augment.gain_db",
    }


def test_without_flags_there_is_nothing_to_override():
    assert overrides("--config", "spec.yaml") == []


def test_flags_alone_make_a_job(folder):
    words = ["--train-csv", "train.csv", "--val-csv", "val.csv", "--use-dora", "--lora-target-modules", "fc1", "o_proj"]

    loaded = load_spec(None, overrides(*words, "--set", "resources.workers=2"))

    assert loaded.spec.training.lora_target_modules == ["fc1", "out_proj"]
    assert (loaded.spec.training.use_dora, loaded.spec.resources.workers) == (True, 2)
    assert loaded.rewritten == ["--lora-target-modules: `o_proj` is taken to mean `out_proj`, as Whisper calls it"]


def test_a_list_may_be_given_in_pieces():
    found = overrides("--modules-to-save", "a", "--modules-to-save", "b", "--set", "engine.threads=1", "--set", "x=2")

    assert [(override.path, override.value) for override in found] == [
        ("training.modules_to_save", ["a", "b"]),
        ("engine.threads", 1),
        ("x", 2),
    ]


def test_the_same_flag_may_stand_twice_with_one_value(folder):
    data = ["--train-csv", "train.csv", "--val-csv", "val.csv"]

    spec = load_spec(
        None,
        overrides(
            *data, *data, "--set", "engine.threads=3", "--set", "lora_r=3", "--lora-r", "3", "--use-dora", "--use-dora"
        ),
    ).spec

    assert (spec.training.lora_r, spec.training.use_dora) == (3, True)


def test_two_values_of_one_flag_are_an_error(folder):
    data = ["--train-csv", "train.csv", "--val-csv", "val.csv"]
    twice = ["--lora-r", "8", "--lora-r", "9", "--bf16", "--no-bf16", "--set", "engine.threads=1"]

    with pytest.raises(SpecError) as caught:
        load_spec(None, overrides(*data, *twice, "--set", "engine.threads=3"))

    assert {fault.where for fault in caught.value.faults} == {"--lora-r", "--no-bf16", "--set engine.threads"}
