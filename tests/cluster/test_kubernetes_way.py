"""What rendered manifests run, on a real cluster: the command that KubeRay makes of a RayJob, and a CronJob's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import RayCluster
from engine import environment, job
from objectstore import BUCKET, Server
from running import CLI, run

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

Manifest = dict[str, Any]


@dataclass
class Place:
    """A cluster whose nodes reach a store, and somebody with a laptop who has rendered a job for it."""

    cluster: RayCluster
    store: dict[str, str]
    folder: Path

    def render(self, *words: str) -> tuple[Manifest, Manifest]:
        """The manifests of the job, whose data go to the store."""
        done = run("k8s", "render", self.folder / "spec.json", *words, program=CLI, variables=self.store)
        assert done.code == 0, done.stderr
        config, made = yaml.safe_load_all(done.stdout)
        return config, made

    def mounted(self, config: Manifest) -> Path:
        """The folder that a pod would see as /etc/whisper-jobs."""
        folder = self.folder / config["metadata"]["name"]
        folder.mkdir(exist_ok=True)
        for name, content in config["data"].items():
            (folder / name).write_text(content)
        return folder

    def client(self) -> dict[str, str]:
        """What KubeRay and the secrets put into a client's environment."""
        return self.store | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.cluster.token}

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line as the submitter's container does."""
        variables = environment() | self.client() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        return subprocess.run(
            ["bash", "-c", line], env=variables, cwd=self.folder, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def place(server: Server, tiny: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("kubernetes")
    store = server.writer.variables(server.endpoint) | {"WHISPER_JOBS_CACHE": str(folder / "cache")}
    spec = job(tiny, tones, folder / "unused", {"resources": {"workers": 1, "gpus_per_worker": 0}}, merge_lora=False)
    content = spec.model_dump(mode="json", exclude_defaults=True) | {"name": "nightly.tones"}
    content["training"].pop("outdir")
    content["storage"] = {"uri": f"s3://{BUCKET}/kubernetes"}
    (folder / "spec.json").write_text(json.dumps(content))
    with RayCluster.start(workers=[2], environment=store) as cluster:
        yield Place(cluster, store, folder)


def test_a_rayjob_is_run_by_the_command_that_kuberay_makes_of_it(place: Place) -> None:
    config, rayjob = place.render("--image", "x:1", "--upload")
    spec = rayjob["spec"]
    entrypoint = spec["entrypoint"].replace("/etc/whisper-jobs", str(place.mounted(config)))
    at = f"--address {place.cluster.dashboard}"

    def quoted(content: Any) -> str:
        return json.dumps(json.dumps(content))  # as Go's strconv.Quote does for such text

    url = f"{place.cluster.dashboard}/api/gcs_healthz"
    healthy = f"import urllib.request as r; assert b'success' in r.urlopen('{url}').read()"
    # As KubeRay 1.7 builds it (BuildJobSubmitCommand, mode K8sJobMode): the dashboard is waited for without a token.
    done = place.shell(
        f'until python -c "{healthy}" >/dev/null 2>&1 ; do echo waiting ; sleep 2 ; done ; '
        f"if ! ray job status {at} rayjob-x1 >/dev/null 2>&1 ; then ray job submit {at} --no-wait "
        f"--runtime-env-json {quoted(yaml.safe_load(spec['runtimeEnvYAML']))} "
        f"--metadata-json {quoted(spec['metadata'])} --submission-id rayjob-x1 -- {entrypoint} ; fi ; "
        f"ray job logs {at} --follow rayjob-x1"
    )

    assert done.returncode == 0, done.stderr + done.stdout
    client = place.client() | {"RAY_API_SERVER_ADDRESS": place.cluster.dashboard}
    known = run("status", spec["metadata"]["job_id"], "-o", "json", program=CLI, variables=client).json()
    assert (known["status"], known["root"]) == ("succeeded", spec["metadata"]["root"])
    assert run("verify", known["root"], program=CLI, variables=place.store).code == 0


def test_each_night_has_a_job_of_its_own_and_a_pod_that_is_begun_again_attaches_to_it(place: Place) -> None:
    config, cron = place.render("--image", "x:1", "--upload", "--schedule", "0 2 * * *")
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    folder, name = place.mounted(config), cron["metadata"]["name"]

    def night(minute: int) -> subprocess.CompletedProcess[str]:
        line = [word.replace("$(JOB_NAME)", f"{name}-{minute}") for word in container["command"]]
        line = [word.replace("/etc/whisper-jobs", str(folder)) for word in line]
        line = [word.replace("http://whisper-jobs-head-svc:8265", place.cluster.dashboard) for word in line]
        return place.shell(" ".join(line))

    first, again, next_one = night(29851560), night(29851560), night(29853000)

    for done in (first, again, next_one):
        assert done.returncode == 0, done.stderr
    assert "submitted to" in first.stderr
    assert "has been done, with this very spec" in again.stderr
    assert "submitted to" in next_one.stderr
    client = place.client() | {"RAY_API_SERVER_ADDRESS": place.cluster.dashboard}
    listed = run("list", "-o", "json", program=CLI, variables=client).json()
    roots = {one["root"] for one in listed if (one["name"] or "").startswith(f"{name}-")}
    assert len(roots) == 2
    for root in roots:
        assert run("verify", root, program=CLI, variables=place.store).code == 0
