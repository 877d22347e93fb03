"""The commands that answer questions: validate, explain, schema, verify, and what they share."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from service.cli.main import COMMANDS, cli
from service.spec.settings import settings

DATA = ["--train-csv", "train.csv", "--val-csv", "val.csv"]
ROOT = Path(__file__).parents[2]


def invoke(*words):
    """Run a command line in this process."""
    return CliRunner().invoke(cli, list(words))


def run_python(code, **more):
    """Run Python code in a fresh interpreter, from the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more.pop("env", {})}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, **more)


def write(folder, content, name="spec.yaml"):
    """Write a spec and return its name."""
    (folder / name).write_text(yaml.safe_dump(content))
    return name


@pytest.fixture
def spec(folder):
    """A valid flat spec."""
    return write(folder, {"train_csv": "train.csv", "val_csv": "val.csv", "lora_r": 4})


# validate


def test_a_valid_spec_is_said_to_be_one(spec, folder):
    result = invoke("validate", spec)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("spec.yaml: a valid train job\n")
    assert f"{folder}/runs/whisper-medium.en-lora-" in result.stdout


def test_the_answer_as_json_stands_on_stdout_and_warnings_on_stderr(spec, folder):
    result = invoke("validate", spec, "--lora-target-modules", "o_proj", "-o", "json")

    content = json.loads(result.stdout)
    assert content["valid"] is True
    assert content["warnings"] == ["--lora-target-modules: `o_proj` is taken to mean `out_proj`, as Whisper calls it"]
    assert result.stderr == f"warning: {content['warnings'][0]}\n"


FORMS = {
    "argument": ["SPEC"],
    "option": ["--config", "SPEC"],
    "flags after": ["SPEC", "--lora-r", "8"],
    "flags before": ["--lora-r", "8", "SPEC"],
    "list before": ["--lora-target-modules", "q_proj", "k_proj", "SPEC"],
    "list after": ["SPEC", "--lora-target-modules", "q_proj", "k_proj"],
    "list of one before": ["--modules-to-save", "embed_tokens", "SPEC"],
    "list before a switch": ["--lora-target-modules", "q_proj", "k_proj", "--use-dora", "SPEC"],
    "list before a double dash": ["--lora-target-modules", "q_proj", "--", "SPEC"],
    "list and option": ["--lora-target-modules", "q_proj", "k_proj", "--config", "SPEC"],
    "two lists": ["--modules-to-save", "embed_tokens", "--lora-target-modules", "q_proj", "SPEC"],
    "no file": DATA,
}


@pytest.mark.parametrize("words", FORMS.values(), ids=FORMS)
def test_spec_and_flags_may_stand_in_any_order(spec, words):
    result = invoke("run", "--dry-run", "-o", "json", *[spec if word == "SPEC" else word for word in words])

    assert result.exit_code == 0, result.output
    training = json.loads(result.stdout)["spec"]["training"]
    given = [word for word in words if word.endswith("_proj")]
    assert training["lora_target_modules"] == (given or settings()["training.lora_target_modules"].default)
    assert training["lora_r"] == (8 if "8" in words else 16 if words == DATA else 4)


def test_a_flag_that_takes_no_value_says_so(spec):
    result = invoke("validate", spec, "--no-use-dora", "true")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: --no-use-dora takes no value; write --use-dora or --no-use-dora")


USAGE = {
    "unknown flag": (["validate", "spec.yaml", "--lora-rnk", "4"], "No such option"),
    "underscores": (["validate", "spec.yaml", "--lora_r", "4"], "--lora-r"),
    "unknown command": (["qqqq"], "No such command 'qqqq'. (whisper-jobs --help"),
    "misspelt command": (["validat"], "No such command 'validat'. Did you mean 'validate'? (whisper-jobs --help"),
    "watched in two ways": (["submit", "spec.yaml", "--detach", "--wait"], "--wait and --detach exclude each other"),
    "list without words": (["validate", "spec.yaml", "--lora-target-modules"], "needs at least one word"),
    "spec twice": (["validate", "spec.yaml", "--config", "spec.yaml"], "SPEC is given twice"),
    "bad form": (["validate", "spec.yaml", "-o", "xml"], "'xml' is not one of"),
    "missing argument": (["verify"], "Missing argument 'ROOT'"),
    "missing option": (["manifest", "build", "audio"], "Missing option '--out'"),
    "no kind": (["manifest", "build", "a", "--out", "m", "--kind", "nme"], "'nme' is not one of 'auto', 'names'"),
    "no seed": (["manifest", "build", "a", "--out", "m", "--seed", "abc"], "'abc' is not a valid integer"),
    "no ratio": (["manifest", "build", "a", "--out", "m", "--val-ratio", "2"], "not in the range 0<x<1"),
    "no overlap": (["manifest", "build", "a", "--out", "m", "--allow-overlap", "foo"], "'foo' is not one of"),
    "no processes": (["manifest", "check", "a.csv", "--processes", "abc"], "'abc' is not a valid integer"),
    "no process": (["manifest", "check", "a.csv", "--processes", "0"], "0 is not in the range x>=1"),
    "no limit": (["manifest", "check", "a.csv", "--silence-dbfs", "low"], "'low' is not a valid float"),
}


@pytest.mark.parametrize(("words", "says"), USAGE.values(), ids=USAGE)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_wrong_command_line_is_one_line_and_exit_code_two(spec, words, says, form):
    result = invoke(*words, *(["-o", "json"] if form == "json" and "-o" not in words else []))

    assert (result.exit_code, result.stdout) == (2, "")
    if form == "json" and "-o" not in words:
        content = json.loads(result.stderr)
        assert (content["exit_code"], content["faults"]) == (2, [])
        assert says in content["error"]
    else:
        assert result.stderr.startswith("error: ")
        assert says in result.stderr


WEB = {
    "verify": ["verify", "http://x/run"],
    "artifacts": ["artifacts", "http://x/run"],
    "pull": ["pull", "http://x/run", "there"],
    "report": ["report", "http://x/run"],
    "compare": ["compare", "http://x/run", "http://x/run"],
    "trials": ["trials", "http://x/run"],
    "manifest check": ["manifest", "check", "http://x/a.csv"],
    "manifest build": ["manifest", "build", "http://x/a.csv", "--out", "there"],
    "submit": ["submit", "--train-csv", "http://x/a.csv", "--val-csv", "val.csv", "--dry-run"],
}


@pytest.mark.parametrize("words", WEB.values(), ids=WEB)
def test_an_address_of_the_web_is_no_place(folder, words):
    result = subprocess.run(
        [sys.executable, "-c", "from service.cli.main import main; main()", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )

    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "http://x/" in result.stderr
    assert "is a URI of a kind that is not known; give " in result.stderr
    assert result.stderr.endswith(", s3:// or gs://\n")


def test_what_takes_no_uri_says_so(folder):
    pulled, validated = invoke("pull", "run", "s3://bucket/there"), invoke("validate", "https://x/spec.yaml")

    assert pulled.stderr == 'error: DIR: "s3://bucket/there" is a URI; give a folder on this machine\n'
    assert "is a URI; a spec is read from this machine" in validated.stderr


@pytest.mark.parametrize(
    ("words", "named"), [([], "validate, explain"), (["manifest"], "build, check"), (["k8s"], "render")]
)
def test_a_group_alone_asks_for_a_command_in_one_line(words, named):
    result = invoke(*words)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {' '.join(['whisper-jobs', *words])} needs a command: ")
    assert named in result.stderr
    assert len(result.stderr.splitlines()) == 1


# explain and schema


@pytest.mark.parametrize("words", [["schema"], ["explain"], ["--help"], ["manifest", "stats", "train.csv"]])
def test_an_output_that_takes_nothing_is_a_matter_of_storage(folder, words):
    with open("/dev/full", "w") as full:
        code = f"import sys; sys.argv = ['whisper-jobs', *{words}]; from service.cli.main import main; main()"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )

    assert result.returncode == 11
    assert re.fullmatch(r"error: results cannot be written \(.*No space left on device\); make room.*\n", result.stderr)
    assert "checkpoint" not in result.stderr


def test_every_setting_is_explained_with_its_default_and_flag():
    for path, setting in settings().items():
        text = invoke("explain", path).stdout
        assert text.startswith(path)
        assert setting.type_text in text
        assert json.dumps(setting.default, ensure_ascii=False) in text
        assert (setting.flag or f"--set {path}") in text


@pytest.mark.parametrize("name", ["lora_r", "--lora-r", "training.lora_r", "lora-r"])
def test_a_setting_is_found_by_any_of_its_names(name):
    assert invoke("explain", name).stdout == invoke("explain", "training.lora_r").stdout


def test_examples_of_settings_are_valid(folder):
    for path, setting in settings().items():
        flag = [f"--{setting.name.replace('_', '-')}"] if setting.flag else ["--set"]
        value = setting.example if isinstance(setting.example, str) else json.dumps(setting.example)
        switch = setting.is_switch and setting.flag
        words = flag if switch else [*flag, value if setting.flag else f"{path}={value}"]
        (folder / "data").mkdir(exist_ok=True)
        for name in ("train", "val", "test", "guard"):
            (folder / "data" / f"{name}.csv").write_text("path,text\na.wav,hi\n")
        words += [word for pair in (DATA[:2], DATA[2:]) if pair[0] not in words for word in pair]

        words += ["--set", "kind=search"] if setting.section == "search" else []  # in other jobs it is refused

        result = invoke("validate", *words)

        allowed = (0, 2) if path in ("kind", "data.dataset") else (0,)  # these two want others left out
        assert result.exit_code in allowed, (words, result.output)


SENTENCES = {
    "engine.fast_dora": " with g = m / n.",
    "augment.mask_time_min_masks": "Fewest masks over time in a clip, with `mask_time_prob` above 0.",
    "engine.keep_encoder_gb": "and of main memory, in GB.",
    "training.per_dev_batch": "or `auto`.",
    "training.epochs": "Passes over the training set.",
    "search.engine": "How trials are trained.",
}


@pytest.mark.parametrize(("path", "end"), SENTENCES.items(), ids=SENTENCES)
def test_a_settings_first_sentence_is_whole_and_stands_alone(path, end):
    assert settings()[path].summary.endswith(end)
    assert len(settings()[path].summary) >= len(end)


def test_no_first_sentence_speaks_of_another_settings_text():
    for path, setting in settings().items():
        assert not re.search(
            r"that they may|so many of them|of those masks|in the same form", setting.summary.split(":")[0]
        ), path


def test_without_a_name_all_settings_are_listed():
    text = invoke("explain").stdout

    assert all(setting.name in text for setting in settings().values())
    assert len(json.loads(invoke("explain", "-o", "json").stdout)) == len(settings())
    assert [entry["setting"] for entry in json.loads(invoke("explain", "data", "-o", "json").stdout)] == [
        path for path in settings() if path.startswith("data.")
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "lora",
            "those that begin so are training.lora_r, training.lora_alpha, training.lora_dropout, training.lora_t",
        ),
        ("lora_rnk", "did you mean training.lora_r?"),
        ("enginee", "did you mean engine?"),
        ("zzz", "lists all"),
    ],
)
def test_an_unknown_setting_is_answered_by_the_nearest(name, says):
    result = invoke("explain", name)

    assert result.exit_code == 2
    assert says in result.stderr


def test_the_schema_is_json():
    assert json.loads(invoke("schema").stdout)["title"] == "whisper-jobs job spec"


# run --dry-run


def test_a_dry_run_prints_the_resolved_spec_and_the_plan(spec):
    result = invoke("run", spec, "--dry-run", "--use-dora")

    resolved = yaml.safe_load(result.stdout.split("\n\n")[0])
    assert resolved["training"]["use_dora"] is True
    for words in ("effective batch", "8 clips", "cross-attention", "memory (estimate)", "trainable parameters"):
        assert words in result.stdout
    assert result.stderr == ""


def test_a_dry_run_evaluation_is_a_job_too(folder):
    result = invoke("evaluate", "openai/whisper-tiny", "val.csv", "--dry-run", "-o", "json")

    content = json.loads(result.stdout)
    assert content["spec"]["kind"] == "evaluate"
    assert content["spec"]["evaluation"]["csv"] == str(folder / "val.csv")
    assert content["plan"]["rows"] == {"csv": 1}


@pytest.mark.parametrize("words", [["evaluate", "m", "val.csv"], ["export", "m"]])
def test_a_command_that_trains_nothing_has_no_flags_of_training(folder, words):
    shown = invoke(words[0], "--help").stdout
    refused = invoke(*words, "--lora-r", "8")

    assert all(f"  {flag} " in shown for flag in ("--name", "--outdir", "--language", "--fp16", "--bf16", "--set"))
    assert not [flag for flag in ("--lora-r", "--epochs", "--train-csv", "--base-model") if f"  {flag} " in shown]
    assert (refused.exit_code, "No such option '--lora-r'" in refused.stderr) == (2, True)


def test_the_doctors_help_shows_the_flags_that_it_looks_at_and_takes_all(folder):
    shown = invoke("doctor", "--help").stdout
    result = invoke("doctor", *DATA, "--lora-r", "0")

    assert all(f"  {flag} " in shown for flag in ("--base-model", "--train-csv", "--val-csv", "--outdir"))
    assert "--lora-r" not in shown
    assert result.stderr == "error: --lora-r: 0 is too small; give 1 or more\n"


def test_a_dry_run_loads_no_torch_and_opens_no_network(spec):
    code = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from service.cli.main import cli
sys.argv = ["whisper-jobs", "run", "spec.yaml", "--dry-run"]
try:
    cli()
except SystemExit as end:
    assert not end.code, end.code
loaded = {"torch", "transformers", "ray", "peft", "numpy", "huggingface_hub", "fsspec", "jobs"} & set(sys.modules)
assert not loaded, loaded
"""
    result = run_python(code)

    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["manifest", "build", "--help"], ["explain", "-h"]])
def test_help_is_there(words):
    result = invoke(*words)

    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: whisper-jobs")


def test_help_lists_every_command_and_every_flag():
    listed = invoke("--help").stdout
    flags = invoke("run", "--help").stdout

    assert all(f"  {name} " in listed for name in COMMANDS)
    assert all(setting.flag in flags for setting in settings().values() if setting.flag)


# verify


def test_verify_of_nothing_and_of_an_unfinished_run(folder):
    (folder / "run").mkdir()
    (folder / "run" / "spec.json").write_text("{}")

    gone, unfinished = invoke("verify", "gone"), invoke("verify", "run")

    assert (gone.exit_code, unfinished.exit_code) == (5, 6)
    assert gone.stderr.startswith("error: gone: no such folder")
    assert "the run is not complete" in unfinished.stderr


def test_verify_finds_what_has_changed(folder):
    from service.artifacts import RunManifest, file_records
    from service.storage import Storage

    root = Storage(str(folder / "run"))
    root.write_text("adapter/a.bin", "weights")
    root.write_text("metrics.json", "{}")
    manifest = RunManifest(
        job_id="x",
        kind="train",
        spec_sha256="0",
        created="2026-01-01T00:00:00Z",
        versions={},
        base=None,
        data={},
        wer={},
        promoted=None,
        files=file_records(root),
    )
    root.write_json("manifest.json", manifest.model_dump(mode="json"))
    fine = invoke("verify", "run", "-o", "json")
    root.write_text("adapter/a.bin", "WEIGHTS")
    changed = invoke("verify", "run")

    assert (fine.exit_code, json.loads(fine.stdout)["problems"]) == (0, [])
    assert changed.exit_code == 10
    assert changed.stdout.startswith("adapter/a.bin: content differs")


# errors of all kinds


@pytest.mark.parametrize("debug", [False, True])
def test_a_fault_of_ours_is_one_line_and_a_traceback_only_with_debug(spec, debug):
    code = f"""
import service.spec.load as load
from service.cli import options, main
def broken(*args, **options): raise ZeroDivisionError("oh\\nno")
options.load_spec = broken
import sys
sys.argv = ["whisper-jobs", "validate", "spec.yaml"] + ["--debug"] * {debug}
main.main()
"""
    result = run_python(code)

    assert result.returncode == 1
    assert ("Traceback" in result.stderr) is debug
    if not debug:
        assert result.stderr == (
            "error: ZeroDivisionError: oh no; this is a fault of whisper-jobs: "
            "run again with --debug for the traceback\n"
        )


def test_an_interruption_is_exit_code_130(spec):
    code = """
from service.cli import options, main
def interrupted(*args, **options): raise KeyboardInterrupt
options.load_spec = interrupted
import sys
sys.argv = ["whisper-jobs", "validate", "spec.yaml"]
main.main()
"""
    result = run_python(code)

    assert (result.returncode, result.stderr.strip()) == (130, "error: interrupted")


def test_a_closed_pipe_is_no_fault(spec):
    code = "import sys; sys.argv = ['whisper-jobs', 'explain']; from service.cli.main import main; main()"
    command = f'{sys.executable} -c "{code}" | head -1'
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )

    assert (result.stdout, result.stderr) == ("top level:\n", "")


def test_a_bad_spec_ends_a_real_process_as_it_should(folder):
    write(folder, {"lora_r": 0, "train_csv": "train.csv", "val_csv": "val.csv"})
    code = "import sys; sys.argv = ['whisper-jobs', 'run', 'spec.yaml']; from service.cli.main import main; main()"

    result = run_python(code)

    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: spec.yaml:1: lora_r: 0 is too small; give 1 or more\n"


def cpu_seconds(code: str) -> float:
    """The least CPU time of three runs: what else runs on the machine counts little."""
    run_python(code)  # byte code is written
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_python(code).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds)


def test_the_command_starts_about_as_fast_as_its_libraries(spec):
    """Measured 1.6; torch alone would make it 10."""
    ours = "import sys; sys.argv = ['whisper-jobs', 'validate', 'spec.yaml']; from service.cli.main import main; main()"
    libraries = "import click, rich.console, yaml; from pydantic import BaseModel; type('A', (BaseModel,), {})"

    assert cpu_seconds(ours) < 2.5 * cpu_seconds(libraries)
