"""What the image is made of, looked at without an engine: the Dockerfile, the scripts, compose.yaml."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = sorted([*DOCKER.glob("*.sh"), *Path(__file__).parent.glob("*.sh")])
COMPOSE = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
OURS = [name for name in SERVICES if name != "store"]


def tool(name: str) -> str:
    """A program of the environment of the tests."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f'there is no {name}: pip install ".[image]"')
    return found


def run(*line: str | Path, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program; its output is text."""
    return subprocess.run(
        [str(word) for word in line], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    ended = run(tool("hadolint"), DOCKER / "Dockerfile")
    assert (ended.returncode, ended.stdout) == (0, "")


def test_hadolint_finds_a_fault_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    assert run(tool("hadolint"), tmp_path / "Dockerfile").returncode == 1


def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    ended = run(tool("shellcheck"), *SCRIPTS)
    assert (ended.returncode, ended.stdout) == (0, "")


def test_what_the_ignore_file_lets_through_exists_and_nothing_else_goes_to_the_builder() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines[0] == "*"
    let_through = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_through)
    copied = {
        word.split("/")[0]
        for line in (DOCKER / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    }
    assert copied == let_through


def test_the_base_is_a_patch_level_and_not_only_a_series() -> None:
    (base,) = re.findall(r"^ARG BASE=(.+)$", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(r":3\.11\.\d+-slim-bookworm$", base)


def test_the_packages_are_those_of_the_extras_and_name_no_package_twice() -> None:
    listed = run(sys.executable, DOCKER / "requirements.py", "jobs", "exports", "s3", "gcs", "demo").stdout.splitlines()
    names = [re.match(r"[\w.-]+", line)[0] for line in listed]  # type: ignore[index]
    assert len(names) == len(set(names))
    assert {"click", "ray", "torch", "s3fs", "gcsfs", "ctranslate2", "espeakng-loader"} <= set(names)
    assert not {"whisper-jobs", "pytest", "moto"} & set(names)


def test_the_pins_of_the_image_contradict_none_of_the_project() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        return dict(line.split("==") for line in lines)

    own = pins(DOCKER / "constraints.txt")
    assert own
    assert not set(own) & set(pins(ROOT / "constraints.txt"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "tpu"], "--target is cpu or cuda, not 'tpu'"),
        (["--engine", "kaniko"], "--engine is docker, buildah or podman, not 'kaniko'"),
        (["--colour"], "there is no option '--colour'; see --help"),
        (["cpu"], "there is no option 'cpu'; see --help"),
        (["--tag"], "--tag wants a value; see --help"),
        (["--tag="], "--tag is empty; see --help"),
        (["--pip-conf", "/none/pip.conf"], "--pip-conf /none/pip.conf: there is no such file, or it cannot be read"),
        (["--ca=/none/ca.pem"], "--ca /none/ca.pem: there is no such file, or it cannot be read"),
        (["--wheels", "/none"], "--wheels /none: there is no such folder"),
    ],
)
def test_an_option_that_cannot_be_is_one_line_and_exit_code_2(options: list[str], said: str) -> None:
    ended = run(DOCKER / "build.sh", *options)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"build.sh: {said}\n")


def test_a_pip_conf_whose_authority_is_not_given_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\ncert = /etc/company.pem\n")
    ended = run(DOCKER / "build.sh", f"--pip-conf={tmp_path}/pip.conf")
    assert ended.returncode == 2
    assert ended.stderr.endswith("whose file is not there in the build: give it with --ca too\n")


def test_without_an_engine_build_says_what_to_install(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "cat", "grep", "sed"):
        (tmp_path / name).symlink_to(tool(name))
    ended = run(DOCKER / "build.sh", PATH=str(tmp_path))
    assert ended.returncode == 2
    assert ended.stderr.startswith("build.sh: none of docker, buildah and podman is there and works; install one")


def test_help_names_every_option() -> None:
    ended = run(DOCKER / "build.sh", "--help")
    assert ended.returncode == 0
    options = set(re.findall(r"(--[a-z-]+)[ |)=]", (DOCKER / "build.sh").read_text().split("while [ $# -gt 0 ]")[1]))
    taken = {
        "--target",
        "--tag",
        "--base",
        "--torch-index",
        "--wheels",
        "--pip-conf",
        "--ca",
        "--engine",
        "--isolation",
    }
    assert taken | {"--pull", "--no-cache", "--help"} <= options
    assert all(name in ended.stdout for name in taken | {"--pull", "--no-cache", "--help"})


def test_env_writes_a_token_and_keys_once_and_for_nobody_else(tmp_path: Path) -> None:
    shutil.copy(DOCKER / "env.sh", tmp_path)
    assert run(tmp_path / "env.sh").returncode == 0
    first = (tmp_path / ".env").read_text()
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    values = dict(line.split("=") for line in first.splitlines() if not line.startswith("#"))
    assert re.fullmatch("[0-9a-f]{64}", values["RAY_AUTH_TOKEN"])
    assert values["RAY_AUTH_TOKEN"] != values["AWS_SECRET_ACCESS_KEY"]
    assert run(tmp_path / "env.sh").returncode == 0
    assert (tmp_path / ".env").read_text() == first


@pytest.mark.parametrize("name", OURS)
def test_a_container_of_compose_has_no_rights_and_writes_only_where_it_is_meant_to(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service, "the image's own"
    assert not service.get("privileged")
    assert not service.get("cap_add")
    assert service["deploy"]["resources"]["limits"]["memory"]
    in_memory = [place.partition(":")[0] for place in service["tmpfs"]]
    # One of its own: two nodes with one /tmp would take each other's sockets.
    assert (in_memory, [place.rpartition(":")[2] for place in service["volumes"]]) == (["/tmp"], ["/cache"])


def test_compose_opens_ports_to_this_machine_alone_and_holds_no_secret() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    for name in ("RAY_AUTH_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        values = [service["environment"][name] for service in SERVICES.values() if name in service["environment"]]
        assert values
        assert all(value.startswith(f"${{{name}:?") for value in values)


def test_nodes_of_compose_have_longer_to_stop_than_they_drain() -> None:
    (drain,) = re.findall(r"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=(\d+)", (DOCKER / "Dockerfile").read_text())
    for name in ("head", "worker"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= int(drain) + 20
        assert SERVICES[name]["healthcheck"]["test"][-1] == name


def test_the_store_is_pinned_to_its_bytes() -> None:
    assert re.search(r":[\d.]+@sha256:[0-9a-f]{64}$", SERVICES["store"]["image"])


@pytest.mark.parametrize("missing", ["RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_a_missing_token_or_key_is_named_with_the_way_out(missing: str, tmp_path: Path) -> None:
    values = {"RAY_AUTH_TOKEN": "t", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    shutil.copy(DOCKER / "compose.yaml", tmp_path)
    line = (tool("podman-compose"), "-f", "compose.yaml", "config")
    assert run(*line, folder=tmp_path, **values).returncode == 0
    ended = run(*line, folder=tmp_path, **{**values, missing: ""})
    assert ended.returncode != 0
    assert re.search(rf"{missing}.*is missing; docker/env.sh writes docker/.env with one", ended.stderr)
