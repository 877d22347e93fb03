"""The image, built and run: what is in it, who runs in it, where it may write, and how a node in it lives and ends."""

from __future__ import annotations

import ast
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import FIGURES
from engines import BASE, LOCKED, ROOT, SCRATCH, Engine, wait_until
from pip_settings import PLANTED, PipSettings
from scan import kinds, scan

pytestmark = [pytest.mark.image, pytest.mark.slow]

HEALTHCHECK = "/opt/whisper-jobs/bin/healthcheck"
IMPORTS = (
    "accelerate, ctranslate2, datasets, espeakng_loader, faster_whisper, gcsfs, gguf, google.cloud.storage, jiwer, "
    "jobs.kinds, jobs.main, numba, optuna, pandas, peft, plotly, pyarrow.dataset, pywhispercpp.model, ray.data, "
    "ray.train.torch, ray.tune, s3fs, service.cli.main, soundfile, soxr, sympy, tensorboard.program, "
    "torch.distributed, torch.utils.tensorboard, transformers, whisper"
)
PINS = re.compile(r"^([\w.-]+)==(\S+)$", re.MULTILINE)


def same(name: str) -> str:
    """A package's name in the form that pip compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_labels_say_what_it_is_and_where_it_comes_from(engine: Engine, image: str) -> None:
    labels = engine.inspect(image)["Config"]["Labels"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert labels["title"] == "whisper-jobs"
    assert labels["version"] == version[1]
    assert labels["licenses"] == "Apache-2.0"
    assert labels["base.name"] == BASE
    assert re.fullmatch(r"[0-9a-f]{40}(-changed)?|unknown", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert labels["description"]


def test_it_runs_as_a_numbered_user_with_a_health_check_and_an_init(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert config["User"] == "1000:1000"
    check = config.get("Healthcheck") or engine.inspect(image)["Healthcheck"]  # docker's place, podman's place
    assert check["Test"] == ["CMD", HEALTHCHECK]
    assert config["Entrypoint"][0].endswith("/dumb-init")
    assert "Usage: whisper-jobs" in engine.once(image).stdout
    assert engine.once(image, "id").stdout == "uid=1000(ray) gid=1000(ray) groups=1000(ray)\n"


@pytest.mark.parametrize("user", ["1000:1000", "123456:0"])
def test_any_user_may_run_it_and_writes_to_tmp_and_cache_alone(engine: Engine, image: str, user: str) -> None:
    program = """
import getpass, os, tempfile
from pathlib import Path
assert getpass.getuser() == "ray"
written = [place for place in ("/tmp", "/cache") if tempfile.mkdtemp(dir=place)]
for place in ("/", "/home/ray", "/opt/whisper-jobs", "/etc", "/usr/local"):
    try:
        tempfile.mkdtemp(dir=place)
    except OSError:
        continue
    written.append(place)
print(written)
"""
    ended = engine.once(image, "python", "-c", program, options=(f"--user={user}",))
    assert ended.stdout == "['/tmp', '/cache']\n"


@pytest.mark.parametrize("line", ["whisper-jobs --version", "python -m jobs.main --help", "ray --version"])
@pytest.mark.parametrize("shell", ["-c", "-lc"])
def test_programs_are_found_in_any_folder_and_by_login_shells(
    engine: Engine, image: str, shell: str, line: str
) -> None:
    engine.once(image, "bash", shell, line, options=("--workdir=/",))


def test_everything_that_a_job_may_import_is_there_without_a_network_or_a_cache(engine: Engine, image: str) -> None:
    options = ("--rm", "--network=none", *LOCKED, "--tmpfs=/tmp")
    engine.run("run", *options, image, "python", "-c", f"import {IMPORTS}", timeout_s=300)


def test_every_package_is_pinned(engine: Engine, image: str) -> None:
    program = "import importlib.metadata as m; print([(d.name, d.version) for d in m.distributions()])"
    installed = dict(ast.literal_eval(engine.once(image, "python", "-c", program).stdout))
    pinned = {}
    for file in (ROOT / "constraints.txt", ROOT / "docker/constraints.txt"):
        pinned |= {same(name): version for name, version in PINS.findall(file.read_text())}
    assert "ray" in installed
    unpinned = {
        name: version
        for name, version in installed.items()
        if name != "whisper-jobs" and pinned.get(same(name)) != version.partition("+")[0]
    }
    assert not unpinned
    assert installed["torch"].endswith("+cpu")
    assert not {"pip", "setuptools", "triton", "pytest", "moto"} & set(installed)


def test_the_configs_of_the_image_are_valid_there(engine: Engine, image: str) -> None:
    found = engine.once(image, "ls", "/opt/whisper-jobs/configs").stdout.split()
    assert set(found) == {path.name for path in (ROOT / "configs").iterdir()}
    spec = "/opt/whisper-jobs/configs/train_lora.yaml"
    ended = engine.once(image, "whisper-jobs", "validate", spec, check=False)
    assert "data/train.csv" in ended.stdout + ended.stderr, "only its data are missing"


def test_the_image_makes_the_speech_and_the_model_of_the_demo_by_itself(engine: Engine, image: str) -> None:
    lines = (
        "cd /tmp && python -m jobs.demo.nano nano && python -m jobs.demo.make_speech speech --clips 12"
        " && whisper-jobs manifest build speech --out data --val-ratio 0.25 && wc -l data/train.csv"
    )
    ended = engine.once(image, "bash", "-ec", lines, options=("--network=none",), timeout_s=300)
    assert re.search(r"^\d+ data/train.csv$", ended.stdout, re.MULTILINE)


def test_no_file_gives_rights_and_only_tmp_is_open_to_all(engine: Engine, image: str) -> None:
    find = "find / -xdev -type f -perm /6000; find / -xdev ! -type l ! -path '/proc/*' ! -path '/dev/*' -perm -0002"
    found = engine.run("run", "--rm", "--user=0", image, "bash", "-c", find).stdout.split()
    assert set(found) <= {"/tmp", "/var/tmp"}


def test_no_layer_has_a_secret_a_cache_a_build_tool_or_a_file_open_to_all(engine: Engine, image: str) -> None:
    found, layers = scan(engine, image, (PLANTED,))
    assert not kinds(found)
    assert sum(layer.files for layer in layers) > 20_000
    FIGURES["scanned"] = f"{sum(layer.files for layer in layers):,} files in {len(layers)} layers"


def test_a_secret_that_was_copied_and_deleted_is_found(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(f"# {PLANTED}\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {BASE}\nCOPY pip.conf /etc/pip.conf\nRUN rm /etc/pip.conf && echo x >/open && chmod 666 /open\n"
    )
    tag = f"localhost/whisper-jobs-leaky:{secrets.token_hex(4)}"
    line = ["build", f"--tag={tag}", str(tmp_path)]
    if engine.own_storage:
        engine.command(["buildah", "build", "--layers", "--isolation=chroot", "--pull=false", *line[1:]])
    else:
        engine.run(*line)
    try:
        found, _ = scan(engine, tag, (PLANTED,))
    finally:
        engine.run("rmi", tag)
    assert kinds(found) == {"secret": ["etc/pip.conf"], "secret file": ["etc/pip.conf"], "world-writable": ["open"]}


def test_a_base_that_does_not_exist_ends_the_build_with_its_name(engine: Engine, pip: PipSettings) -> None:
    base = "localhost/whisper-jobs-none:1"
    ended = engine.build("localhost/whisper-jobs-none:2", pip, f"--base={base}", check=False, timeout_s=120)
    assert ended.returncode != 0
    assert base in ended.stderr
    assert engine.run("image", "inspect", "localhost/whisper-jobs-none:2", check=False).returncode != 0


def test_without_a_token_no_head_starts(engine: Engine, image: str) -> None:
    ended = engine.once(image, "ray", "start", "--head", "--block", check=False)
    assert ended.returncode == 1
    assert "Token authentication is enabled but no authentication token was found" in ended.stderr


def test_zombies_are_reaped(engine: Engine, image: str) -> None:
    program = """
import subprocess, time
from pathlib import Path
subprocess.run(["bash", "-c", "sleep 0.2 & sleep 0.2 & exit"], check=True)
time.sleep(1)
states = [path.read_text().rpartition(")")[2].split()[0] for path in Path("/proc").glob("[0-9]*/stat")]
assert len(states) == 2, states
assert "Z" not in states, states
"""
    engine.once(image, "python", "-c", program)


def test_a_container_without_ray_is_well_but_is_no_node(engine: Engine, image: str) -> None:
    assert engine.once(image, HEALTHCHECK).stdout == "no Ray runs here\n"
    for role in ("head", "worker"):
        ended = engine.once(image, HEALTHCHECK, role, check=False)
        assert ended.returncode == 1
        assert "Connection refused" in ended.stderr
    assert engine.once(image, HEALTHCHECK, "nodes", check=False).stderr.endswith("usage: healthcheck [head | worker]\n")


@contextmanager
def head(engine: Engine, image: str) -> Iterator[str]:
    """A container with a head alone, until it is well."""
    name = f"wj-test-{secrets.token_hex(4)}"
    token = f"--env=RAY_AUTH_TOKEN={secrets.token_hex(32)}"
    command = ("ray", "start", "--head", "--num-cpus=1", "--block")
    engine.run("run", "--detach", f"--name={name}", *LOCKED, *SCRATCH, "--shm-size=512m", token, image, *command)
    try:
        for _ in wait_until("the head is not well"):
            if well(engine, name):
                break
        yield name
    finally:
        engine.run("rm", "--force", "--volumes", name)


def well(engine: Engine, name: str, *role: str) -> bool:
    """What the health check in a container says."""
    return engine.run("exec", name, HEALTHCHECK, *role, check=False).returncode == 0


SIGNAL = """
import os, signal, sys
from pathlib import Path
number, wanted = getattr(signal, sys.argv[1]), sys.argv[2]
for path in Path("/proc").glob("[0-9]*/cmdline"):
    words = path.read_text(errors="replace").split("\\0")
    if any(os.path.basename(word) == wanted for word in words[:2]) and int(path.parent.name) > 1:
        os.kill(int(path.parent.name), number)
        print(path.parent.name)
"""


def send(engine: Engine, name: str, signal: str, program: str) -> None:
    """Send a signal to a program in a container."""
    ended = engine.run("exec", name, "python", "-c", SIGNAL, signal, program)
    assert ended.stdout.split(), f"{program} does not run"


def test_the_health_check_sees_that_a_raylet_or_a_gcs_has_died(engine: Engine, image: str) -> None:
    with head(engine, image) as name:
        assert engine.run("exec", name, HEALTHCHECK).stdout == "head: well\n"
        assert well(engine, name, "head")
        assert well(engine, name, "worker")
        # `ray start --block` would end the container at once.
        send(engine, name, "SIGSTOP", "ray")
        send(engine, name, "SIGKILL", "raylet")
        for _ in wait_until("a node without a raylet counts as well", 30):
            if not well(engine, name):
                break
        assert not well(engine, name, "worker")
        send(engine, name, "SIGCONT", "ray")
        assert engine.run("wait", name).stdout.strip() == "1", "the container ends with its raylet"


def test_a_head_without_its_gcs_is_not_well_and_ends(engine: Engine, image: str) -> None:
    with head(engine, image) as name:
        send(engine, name, "SIGSTOP", "ray")
        send(engine, name, "SIGKILL", "gcs_server")
        for _ in wait_until("a head without a GCS counts as well", 60):
            if not well(engine, name, "head"):
                break
        send(engine, name, "SIGCONT", "ray")
        assert engine.run("wait", name).stdout.strip() == "1"
