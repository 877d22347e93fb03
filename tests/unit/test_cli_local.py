"""A job as a child process: what it is given, and how signals and exit codes come through."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli.main import cli
from service.errors import InfeasibleError
from service.local import NEEDED, require_jobs_extra, wait_for

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("code", [0, 2, 10])
def test_the_childs_exit_code_is_ours(code):
    assert wait_for([sys.executable, "-c", f"raise SystemExit({code})"], dict(os.environ)) == code


def test_a_child_that_a_signal_has_ended_counts_as_shells_count():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"

    assert wait_for([sys.executable, "-c", code], dict(os.environ)) == 128 + signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_once_and_the_child_is_waited_for(number):
    child = textwrap.dedent("""
        import os, signal, sys, time
        count = 0
        def take(number, frame):
            global count
            count += 1
            os.write(1, b"took\\n")  # print may be interrupted by a signal while it prints
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, take)
        print("ready", flush=True)
        while not count:
            signal.pause()
        time.sleep(0.3)  # a second delivery would come within this time
        sys.exit(40 + count)
    """)
    parent = textwrap.dedent(f"""
        import os, sys
        from service.local import wait_for
        sys.exit(wait_for([sys.executable, "-c", {child!r}], dict(os.environ)))
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"

    process.send_signal(number)

    assert process.wait(timeout=20) == 41
    assert process.stdout.read() == "took\n"


def test_a_machine_without_the_extra_says_how_to_install_it(folder, monkeypatch):
    monkeypatch.setattr("service.local.NEEDED", (*NEEDED, "no_such_package"))

    with pytest.raises(InfeasibleError, match=r'no_such_package.*pip install "\.\[jobs\]" in the checkout'):
        require_jobs_extra()
    result = CliRunner().invoke(cli, ["run", "--train-csv", "train.csv", "--val-csv", "val.csv"])

    assert result.exit_code == 9
    assert result.stderr.startswith("error: this machine has no no_such_package")


CHILD = """
import json, os, sys
config = sys.argv[sys.argv.index("--config") + 1]
print(json.dumps({"words": sys.argv[1:], "spec": json.load(open(config)), "address": os.environ["RAY_ADDRESS"]}))
sys.exit(3)
"""


def test_a_run_gives_the_resolved_spec_to_the_clusters_program_on_a_local_ray(folder):
    """The program's place is taken by one that prints what it was given: what is tested is the client's side."""
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "main.py").write_text(CHILD)
    words = [
        "run",
        "--train-csv",
        "train.csv",
        "--val-csv",
        "val.csv",
        "--lora-target-modules",
        "o_proj",
        "--overwrite",
    ]
    words += ["--dora-ephemeral-offload", "-o", "json", "--debug"]
    code = f"import sys; sys.argv = ['whisper-jobs', *{words}]; from service.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "RAY_ADDRESS": "https://elsewhere"}

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert result.returncode == 3, result.stderr
    given = json.loads(result.stdout)
    assert given["address"] == "local"
    assert given["spec"]["training"]["lora_target_modules"] == ["out_proj"]
    assert given["spec"]["training"]["train_csv"] == str(folder / "train.csv")
    assert given["words"][2:] == ["--no-warnings", "--overwrite", "-o", "json", "--debug"]
    assert not Path(given["words"][1]).exists()
    assert [line.split(": ")[1] for line in result.stderr.splitlines()] == [
        "--lora-target-modules",
        "--dora-ephemeral-offload",
    ]


def test_manifest_build_passes_its_options_on(folder):
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "main.py").write_text("import sys; print(sys.argv[1:])")
    words = ["manifest", "build", "audio", "--out", "m", "--pattern", "-x", "--val-ratio", "0.2", "-o", "json"]
    code = f"import sys; sys.argv = ['whisper-jobs', *{words}]; from service.cli.main import main; main()"

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
    )

    expected = ["manifest", "build", "audio", "--out", "m", "--pattern=-x", "--val-ratio=0.2", "-o", "json"]
    assert result.stdout == f"{expected}\n", result.stderr


def test_a_manifest_command_that_was_killed_has_no_checkpoint_to_go_on_from(folder):
    (folder / "jobs").mkdir()
    (folder / "jobs" / "__init__.py").touch()
    (folder / "jobs" / "main.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    code = (
        "import sys; sys.argv = ['whisper-jobs', 'manifest', 'stats', 'a.csv']; import service.cli.main as m; m.main()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert result.returncode == 137
    ended = "error: the command's process was ended by SIGKILL, which the system sends where memory runs out\n"
    assert result.stderr == ended
