"""docs/kubernetes.md, each command as far as it can be checked without a cluster."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from manifests import has_crds, problems

from service.cli.main import cli
from service.kubernetes import check

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "docs/kubernetes.md").read_text(encoding="utf-8")
LINES = [
    line.split("   # ")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", CHAPTER, re.DOTALL)
    for line in block.splitlines()
]
KUBECTL = [line for line in LINES if line.startswith("kubectl ")]
RENDERS = [line for line in LINES if line.startswith("whisper-jobs k8s render")]
REGISTRY = "registry.example.com/speech"

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl")


def kubectl(*words: str, given: str | None = None) -> str:
    """Run kubectl as one who has no cluster."""
    variables = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"} | {
        "KUBECONFIG": "/dev/null"
    }
    done = subprocess.run(
        ["kubectl", *words], input=given, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chapter_goes_from_a_bare_cluster_to_artifacts_and_to_a_nightly_search() -> None:
    starts = [" ".join(line.split()[:3]) for line in LINES]
    for step in ("docker/build.sh --target cuda", "kubectl create -k", "whisper-jobs k8s render", "kubectl apply -f"):
        assert step in starts
    assert len(RENDERS) == 2
    assert "--schedule" in RENDERS[1]
    assert any("pull" in line for line in LINES)


@pytest.mark.parametrize("line", RENDERS)
def test_a_rendered_job_of_the_chapter_is_valid(line: str) -> None:
    command, _, target = line.partition(" > ")
    words = shlex.split(command.replace("REGISTRY", REGISTRY))[1:]
    # There is no speech here to upload: the same spec with data that are in the store already.
    if "--upload" in words:
        words.remove("--upload")
        words += ["--train-csv", "s3://speech/data/train.csv", "--val-csv", "s3://speech/data/val.csv"]

    result = CliRunner().invoke(cli, words)

    assert result.exit_code == 0, result.stderr
    manifests = list(yaml.safe_load_all(result.stdout))
    assert check(manifests) == []
    for manifest in manifests:
        if manifest["kind"] != "RayJob" or has_crds():
            assert problems(manifest) == []
    assert f"kubectl apply -f {target}" in LINES
    if manifests[1]["kind"] == "CronJob":
        name = manifests[1]["metadata"]["name"]
        assert any(f"--from=cronjob/{name} " in one for one in LINES)
        assert f"s3://speech/runs/{name}-29851560-" in CHAPTER


@needs_kubectl
@pytest.mark.parametrize("line", [line for line in KUBECTL if "create secret" in line])
def test_a_secret_of_the_chapter_is_one_that_the_manifests_refer_to(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in re.findall(r'"\$(\w+)"', line):
        monkeypatch.setenv(name, f"value of {name}")
    words = shlex.split(os.path.expandvars(re.sub(r"\$\(.*?\)", "0123abcd", line)))[1:]

    secret = yaml.safe_load(kubectl(*words, "--dry-run=client", "-o", "yaml"))

    assert secret["metadata"]["namespace"] == "whisper-jobs"
    text = "".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml"))
    assert f"name: {secret['metadata']['name']}\n" in text
    keys = {"whisper-jobs-token": "key: auth_token", "whisper-jobs-redis": "key: password"}
    assert keys.get(secret["metadata"]["name"], "") in text
    if key := keys.get(secret["metadata"]["name"]):
        assert list(secret["data"]) == [key.removeprefix("key: ")]


@needs_kubectl
def test_the_overlays_of_the_chapter_build_with_the_readers_image(tmp_path: Path) -> None:
    (edit,) = [line for line in LINES if line.startswith("sed ")]
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    subprocess.run(["bash", "-c", edit.replace("REGISTRY", REGISTRY)], cwd=tmp_path, check=True)

    for name in ("gpu", "spot"):
        assert f"k8s/overlays/{name}" in CHAPTER
        built = kubectl("kustomize", str(tmp_path / f"k8s/overlays/{name}"))
        (cluster,) = [one for one in yaml.safe_load_all(built) if one["kind"] == "RayCluster"]
        images = set(re.findall(r"image: (\S*whisper-jobs\S*)", yaml.safe_dump(cluster)))
        assert images == {f"{REGISTRY}/whisper-jobs:0.1.0-cuda"}


@needs_kubectl
@pytest.mark.parametrize("line", KUBECTL)
def test_every_flag_and_file_of_a_kubectl_command_exists(line: str) -> None:
    words = [
        word for word in shlex.split(re.sub(r"\$\(.*?\)", "x", line.rstrip("& "))) if word not in ("-n", "whisper-jobs")
    ]
    verb = words[1] if words[1] != "create" or words[2].startswith("-") else f"create {words[2]}"
    known = kubectl(*verb.split(), *(["generic"] if verb == "create secret" else []), "--help")
    for word in words[2:]:
        flag = word.split("=")[0]
        if flag.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known), flag
        elif word.startswith("k8s/"):
            assert (ROOT / word).exists(), word


@needs_kubectl
def test_the_port_and_service_that_are_forwarded_are_the_clusters() -> None:
    (line,) = [line for line in KUBECTL if "port-forward" in line]
    cluster = yaml.safe_load((ROOT / "k8s/base/raycluster.yaml").read_text())
    # KubeRay names a head's service so.
    assert f"svc/{cluster['metadata']['name']}-head-svc 8265:8265" in line
    ports = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert {"name": "dashboard", "containerPort": 8265} in ports
