"""Jobs submitted to a real cluster over HTTP by a client without Ray: attached, followed, stopped, gone on with."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from clusters import PLANTED, RayCluster, wait_for
from engine import environment, job, run_engine, saved_adapter
from objectstore import BUCKET, Server
from relay import Relay, write_certificate
from running import CLI, ROOT, Finished, run, start, wait_until

from service.client.address import find_cluster
from service.client.api import Api
from service.spec.job import JobSpec

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"epochs": 5000, "eval_steps": 100_000, "save_steps": 10_000}
"""A training that no test waits for the end of."""

Submit = Callable[..., Finished]


@pytest.fixture
def whisper_jobs(laptop: dict[str, str]) -> Submit:
    """The client's command line, with the laptop's environment."""

    def call(*words: Any, **variables: str) -> Finished:
        return run(*words, program=CLI, variables=laptop | variables)

    return call


@pytest.fixture
def spec_at(tiny: Path, tones: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a spec: a training of 7 steps in the job's own process, its root below tmp_path or the URI."""

    def write(name: str, uri: str | None = None, sections: dict[str, Any] | None = None, **training: Any) -> Path:
        more = {"resources": {"workers": 0}} | (sections or {})
        spec = job(tiny, tones, tmp_path / f"root-{name}", more, merge_lora=False, **training)
        content = spec.model_dump(mode="json", exclude_defaults=True) | {"name": name}
        content["training"].pop("outdir")
        content["storage"] = {"uri": uri or str(tmp_path / "runs")}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        return path

    return write


def jobs_of(head: RayCluster) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = head.ask("/api/jobs/")
    return [entry for entry in found if entry["type"] == "SUBMISSION"]


def running_step(submit: Submit, name: str) -> int:
    """The last step that a running job has told of."""
    found = submit("status", name, "-o", "json")
    assert found.code == 6, found.stderr + found.stdout
    progress = json.loads(found.stdout)["progress"]
    return int(progress["done"] or 0) if progress["what"] == "step" else 0


@pytest.fixture
def long_job(whisper_jobs: Submit, spec_at: Callable[..., Path], request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a job that trains until it is stopped."""
    name = re.sub(r"[^a-z]+", "-", request.node.name)[5:35].strip("-")
    submitted = whisper_jobs("submit", spec_at(name, **LONG), "--detach")
    assert submitted.code == 0, submitted.stderr
    yield name
    whisper_jobs("stop", name, "--grace", "5")


def test_a_job_is_followed_to_its_end_pulled_and_attached_to(
    head: RayCluster,
    server: Server,
    whisper_jobs: Submit,
    spec_at: Callable[..., Path],
    laptop: dict[str, str],
    tmp_path: Path,
) -> None:
    spec = spec_at("followed", f"s3://{BUCKET}/service")
    seen_on_command_lines: set[str] = set()
    process = start("submit", spec, program=CLI, variables=laptop)
    while process.poll() is None:
        seen_on_command_lines |= secrets_on_command_lines(head, server)
        time.sleep(0.2)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    lines = stderr.splitlines()
    assert lines[0] == f"checking on {head.dashboard}: versions, resources, storage, files"
    assert re.fullmatch(rf"followed-\w{{8}}  submitted to {head.dashboard}", lines[1])
    job_id = lines[1].split()[0]
    text = "\n".join(lines)
    for said in ("  prepare  checking every row", "base WER ", "step 7/7  loss ", "tuned WER ", "whisper-jobs verify"):
        assert text.count(said) == 1, said
    uri = f"s3://{BUCKET}/service/{job_id}"
    assert re.search(rf"^{job_id}  succeeded$", stdout, re.MULTILINE)
    assert f"pull       whisper-jobs pull {uri} DIR" in stdout

    pulled = whisper_jobs("pull", uri, tmp_path / "here")
    assert pulled.code == 0, pulled.stderr
    assert whisper_jobs("verify", tmp_path / "here").code == 0

    before = len(jobs_of(head))
    again = whisper_jobs("submit", spec, "--wait", "-o", "json")
    outcome = again.json()
    assert (outcome["submission_id"], outcome["attached"], outcome["status"]) == (job_id, True, "succeeded")
    assert outcome["metrics"]["tuned"]["utterances"] == 5
    other = whisper_jobs("submit", spec, "--lora-r", "3", "--detach", "-o", "json")
    assert other.code == 2
    assert f'name: "followed" is the name of {job_id}, succeeded, with another spec' in other.error()["error"]
    assert "(it differs in training.lora_r)" in other.error()["error"]
    elsewhere = whisper_jobs("submit", spec, "--set", f"storage.uri=s3://{BUCKET}/elsewhere", "--detach", "-o", "json")
    assert elsewhere.code == 2
    assert f"its results go to {uri}" in elsewhere.error()["error"], "no place is shown where nothing lies"
    assert len(jobs_of(head)) == before, "nothing was submitted"
    assert not [entry for entry in jobs_of(head) if entry["submission_id"].startswith("wj-errand-")]

    assert seen_on_command_lines == set()
    found = places_of_secrets(head, server, [tmp_path / "here", tmp_path / "followed.json"], stdout + stderr)
    assert found == []


def secrets(head: RayCluster, server: Server) -> dict[str, str]:
    return {"the cluster's token": head.token, "the store's key": server.writer.secret, "a planted one": PLANTED}


def secrets_on_command_lines(head: RayCluster, server: Server) -> set[str]:
    """Which secrets can be read in the process list."""
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return {name for name, value in secrets(head, server).items() if any(value in line for line in lines)}


def places_of_secrets(head: RayCluster, server: Server, folders: list[Path], said: str) -> list[str]:
    """Where a secret can be read: what was printed, the API's answers, Ray's logs, objects and files."""
    contents = {"printed": said.encode(), "the API": json.dumps(head.ask("/api/jobs/")).encode()}
    places = [*folders, head.folder]
    for path in (file for place in places for file in (place.rglob("*") if place.is_dir() else [place])):
        if path.is_file() and not path.is_symlink():
            contents[str(path)] = path.read_bytes()
    contents |= {key: server.body(key) for key in server.keys("")}
    assert len([name for name in contents if name.startswith(str(head.folder))]) > 20
    return [
        f"{name} in {place}"
        for place, content in contents.items()
        for name, value in secrets(head, server).items()
        if value.encode() in content
    ]


@pytest.mark.faults
def test_a_submission_whose_answer_is_lost_is_one_submission(
    head: RayCluster, whisper_jobs: Submit, spec_at: Callable[..., Path]
) -> None:
    relay = Relay(head.dashboard_port, lose="POST /api/jobs/ ")
    before = {entry["submission_id"] for entry in jobs_of(head)}
    submitted = whisper_jobs("submit", spec_at("answer-lost"), "--detach", "-o", "json", "--address", relay.url)
    relay.close()
    outcome = submitted.json()
    assert outcome["attached"] is False
    assert {entry["submission_id"] for entry in jobs_of(head)} - before == {outcome["submission_id"]}
    assert whisper_jobs("logs", "-f", "answer-lost").code == 0


@pytest.mark.faults
def test_of_two_clients_that_submit_one_spec_at_once_one_submits_and_both_see_its_end(
    whisper_jobs: Submit, spec_at: Callable[..., Path], laptop: dict[str, str]
) -> None:
    spec = spec_at("twice")
    words = ("submit", spec, "--wait", "-o", "json")
    processes = [start(*words, program=CLI, variables=laptop) for _ in range(2)]
    outcomes = [json.loads(process.communicate(timeout=200)[0]) for process in processes]
    assert [outcome["exit_code"] for outcome in outcomes] == [0, 0]
    assert outcomes[0]["submission_id"] == outcomes[1]["submission_id"]
    assert sorted(outcome["attached"] for outcome in outcomes) == [False, True]


@pytest.mark.cluster
def test_of_two_specs_that_take_one_name_at_once_one_gives_way(
    head: RayCluster, whisper_jobs: Submit, spec_at: Callable[..., Path], laptop: dict[str, str]
) -> None:
    spec = spec_at("contended", **LONG)
    words = [("submit", spec, "--lora-r", rank, "--detach", "-o", "json") for rank in ("2", "3")]
    processes = [start(*one, program=CLI, variables=laptop) for one in words]
    said = [process.communicate(timeout=200) for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    (won,) = [json.loads(stdout)["submission_id"] for stdout, _ in said if stdout]
    (refused,) = [stderr for stdout, stderr in said if not stdout]
    assert f"is the name of {won}" in refused
    at_work = [entry["submission_id"] for entry in jobs_of(head) if entry["metadata"].get("name") == "contended"]
    wait_for(
        lambda: (
            [
                e["submission_id"]
                for e in jobs_of(head)
                if e["submission_id"] in at_work and e["status"] in ("PENDING", "RUNNING")
            ]
            == [won]
        ),
        "the other one goes on",
    )
    assert whisper_jobs("stop", "contended").code == 0


@pytest.mark.faults
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on_to_the_same_bits(
    head: RayCluster, whisper_jobs: Submit, spec_at: Callable[..., Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"epochs": 60, "eval_steps": 400, "save_steps": 1000, "lora_dropout": 0.2}
    spec = spec_at("stopped", **settings)
    assert whisper_jobs("submit", spec, "--detach").code == 0
    runs = tmp_path / "runs"  # the log tells of a step now and then, too seldom for so short a training
    wait_for(lambda: any('"event": "model"' in path.read_text() for path in runs.glob("*/events.jsonl")), "no training")
    stopped = whisper_jobs("stop", "stopped")
    assert stopped.code == 0, stopped.stderr
    found = re.search(r"stopped at step (\d+) of 420; its checkpoint is kept", stopped.stdout)
    assert found, stopped.stdout + stopped.stderr
    status = whisper_jobs("status", "stopped", "-o", "json")
    assert (status.code, json.loads(status.stdout)["status"]) == (4, "stopped")

    resumed = whisper_jobs("resume", "stopped", "--wait", "-o", "json").json()
    assert resumed["submission_id"].endswith("-2")
    models = [event for event in events(Path(resumed["root"])) if event["event"] == "model"]
    assert [event["resumed_from_step"] for event in models] == [0, int(found[1])]
    whole = JobSpec.model_validate(json.loads(spec.read_text()))
    whole = whole.model_copy(update={"training": whole.training.model_copy(update={"outdir": str(tmp_path / "whole")})})
    run_engine(whole)
    one, other = saved_adapter(Path(resumed["root"]) / "adapter"), saved_adapter(tmp_path / "whole/adapter")
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    assert whisper_jobs("logs", "stopped").stdout.count("going on from step") == 1


def events(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def driver_of(job_id: str) -> psutil.Process:
    """The process of a submitted job's program."""
    for process in psutil.process_iter():
        try:
            variables, words = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        if job_id in variables.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "") and "jobs.main" in words and "python" in words[0]:
            return process
    raise AssertionError(f"no process of {job_id}")


@pytest.mark.cluster
def test_a_job_that_does_not_stop_is_killed_after_its_grace_and_a_killed_one_goes_on(
    head: RayCluster, whisper_jobs: Submit, long_job: str
) -> None:
    wait_for(lambda: running_step(whisper_jobs, long_job) > 3, "it does not train")
    driver = driver_of(json.loads(whisper_jobs("status", long_job, "-o", "json").stdout)["submission_id"])
    driver.suspend()  # it hears no signal but SIGKILL
    stopped = whisper_jobs("stop", long_job, "--grace", "1")
    assert stopped.code == 0, stopped.stderr
    assert "no end after 1 s; killing its program" in stopped.stderr
    assert not driver.is_running()
    again = whisper_jobs("resume", long_job, "--detach", "-o", "json").json()
    assert again["again"] is True
    wait_for(lambda: running_step(whisper_jobs, long_job) > 3, "it does not go on")
    driver_of(again["submission_id"]).kill()
    wait_for(lambda: whisper_jobs("status", long_job).code == 3, "the cluster does not see that it has gone")
    third = whisper_jobs("submit", *_same(again), "--detach", "-o", "json")
    assert third.code == 0, third.stderr
    assert third.json()["submission_id"].endswith("-3")


def _same(submitted: dict[str, Any]) -> list[str]:
    """The spec of a run, as it wrote it down."""
    return [str(Path(submitted["root"]) / "spec.json")]


@pytest.mark.cluster
def test_a_follow_survives_cut_connections_and_a_head_that_is_away_for_a_while(
    head: RayCluster, laptop: dict[str, str], spec_at: Callable[..., Path], whisper_jobs: Submit
) -> None:
    relay = Relay(head.dashboard_port)
    spec = spec_at("cut-off", epochs=60, eval_steps=400, save_steps=1000, logging_steps=10)
    process = start("submit", spec, "--address", relay.url, program=CLI, variables=laptop)
    root = wait_for(lambda: root_of(head, "cut-off"), "it was not submitted")
    wait_until(lambda: steps_told(root) > 20, process)
    relay.mode = "refuse"
    relay.cut()
    seen = relay.connections
    wait_for(lambda: relay.connections > seen + 25, "it does not try again")  # for longer than a call is patient
    relay.mode = "pass"
    stdout, stderr = process.communicate(timeout=200)
    relay.close()
    assert process.returncode == 0, stderr
    assert stderr.count("note: ") == 2
    assert "the cluster answers again" in stderr
    log = whisper_jobs("logs", "cut-off").stdout.splitlines()
    shown = [line for line in stderr.splitlines() if not line.startswith(("note: ", "checking on ", "cut-off-"))]
    assert shown == [line for line in log if not line.startswith("cut-off-")]
    assert re.search(r"^cut-off-\w{8}  succeeded$", stdout, re.MULTILINE)


def root_of(head: RayCluster, name: str) -> Path | None:
    roots = [entry["metadata"]["root"] for entry in jobs_of(head) if entry["metadata"].get("name") == name]
    return Path(roots[0]) if roots else None


def steps_told(root: Path) -> int:
    path = root / "events.jsonl"
    return sum('"event": "step"' in line for line in path.read_text().splitlines()) if path.exists() else 0


def hear_interrupts() -> None:
    """Have a process take Ctrl-C also where the tests run in the background of a shell, which lets it be ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_log_is_followed_while_it_is_written_with_and_without_a_stream(
    head: RayCluster, laptop: dict[str, str], whisper_jobs: Submit, long_job: str
) -> None:
    job_id = json.loads(whisper_jobs("status", long_job, "-o", "json").stdout)["submission_id"]
    api = Api(find_cluster(head.dashboard, laptop))
    with api, api.tail(job_id) as stream:
        said = ""
        while "base WER" not in said:
            said += str(stream.recv(timeout=100))
    relay = Relay(head.dashboard_port, drop="/logs/tail")
    process = start(
        "logs", "-f", long_job, "--address", relay.url, program=CLI, variables=laptop, preexec_fn=hear_interrupts
    )
    assert process.stdout is not None
    while "base WER" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    relay.close()


def test_ctrl_c_leaves_a_job_that_goes_on_also_over_tls(
    head: RayCluster, laptop: dict[str, str], whisper_jobs: Submit, long_job: str, tmp_path: Path
) -> None:
    certificate = write_certificate(tmp_path)
    relay = Relay(head.dashboard_port, certificate)
    trusting = laptop | {"SSL_CERT_FILE": str(certificate)}
    assert run("list", "--address", relay.url, program=CLI, variables=laptop).code == 8, "not trusted without a word"
    process = start(
        "logs", "-f", long_job, "--address", relay.url, program=CLI, variables=trusting, preexec_fn=hear_interrupts
    )
    assert process.stdout is not None
    assert process.stdout.readline(), process.communicate()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    job_id = json.loads(whisper_jobs("status", long_job, "-o", "json").stdout)["submission_id"]
    relay.close()
    here = f"{job_id} --address {relay.url}"
    assert f"{job_id} goes on without you; come back with: whisper-jobs logs -f {here}" in stderr
    assert f"or end it with: whisper-jobs stop {here}" in stderr
    assert whisper_jobs("status", long_job).code == 6


@pytest.mark.cluster
def test_rays_own_tools_work_on_our_jobs_and_ours_on_theirs(
    head: RayCluster,
    laptop: dict[str, str],
    whisper_jobs: Submit,
    long_job: str,
    spec_at: Callable[..., Path],
    tmp_path: Path,
) -> None:
    def ray(*words: Any) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("ray")), "job", *map(str, words)]
        address = {"RAY_ADDRESS": head.dashboard}
        return subprocess.run(
            command, env=environment() | laptop | address, text=True, capture_output=True, timeout=200
        )

    ours = json.loads(whisper_jobs("status", long_job, "-o", "json").stdout)["submission_id"]
    wait_for(lambda: running_step(whisper_jobs, long_job) > 0, "it does not train")
    assert "RUNNING" in ray("status", ours).stdout
    assert "base WER" in ray("logs", ours).stdout
    assert ours in ray("list").stdout
    assert ray("stop", ours).returncode == 0
    assert "its checkpoint is kept" in whisper_jobs("logs", ours).stdout, "ray job stop leaves a checkpoint too"
    assert whisper_jobs("status", ours).code == 4

    code = tmp_path / "code"
    code.mkdir()
    for package in ("jobs", "service"):
        (code / package).symlink_to(ROOT / package)
    spec = spec_at("plain")
    plain = ray(
        "submit",
        "--submission-id",
        "plain-one",
        "--working-dir",
        code,
        "--",
        "python",
        "-m",
        "jobs.main",
        "--config",
        spec,
    )
    assert plain.returncode == 0, plain.stderr
    status = whisper_jobs("status", "plain-one", "-o", "json").json()
    assert (status["status"], status["progress"]["stage"]) == ("succeeded", "train")
    assert status["progress"]["root"].startswith(str(tmp_path / "runs/plain-"))
    assert "step 7/7" in whisper_jobs("logs", "-f", "plain-one").stdout
    assert "plain-one" in whisper_jobs("list").stdout
    assert whisper_jobs("resume", "plain-one").code == 2, "its spec is not known"
    assert whisper_jobs("resume", status["progress"]["root"], "--wait").code == 0, "its root has it"


def test_all_that_the_cluster_cannot_hold_is_told_at_once_and_nothing_is_submitted(
    head: RayCluster, server: Server, whisper_jobs: Submit, spec_at: Callable[..., Path], tmp_path: Path
) -> None:
    before = {entry["submission_id"] for entry in jobs_of(head)}
    spec = spec_at("impossible")
    words = ("submit", spec, "--set", "resources.workers=7", "--set", "storage.uri=s3://nonesuch/runs", "-o", "json")
    refused = whisper_jobs(*words, "--train-csv", tmp_path / "laptop.csv", "--base-model", tmp_path / "laptops-model")
    assert refused.code == 2
    faults = {fault["where"]: fault["message"] for fault in refused.error()["faults"]}
    assert "7 workers ask for 7 CPUs (there are 3)" in faults["resources"]
    assert "there is no such bucket" in next(
        text for where, text in faults.items() if where.startswith("s3://nonesuch")
    )
    assert "--upload" in faults["training.train_csv"]
    assert "on the cluster; put it where all nodes see it" in faults["training.train_csv"]
    assert "training.base_model" in faults
    alone = whisper_jobs("submit", spec, "--set", "resources.workers=7", "-o", "json")
    assert alone.code == 9
    assert "the cluster has no more; lower resources.workers" in alone.error()["error"]
    sick = whisper_jobs("doctor", spec, "--set", "resources.workers=7", "-o", "json")
    assert sick.code == 9
    assert [finding["what"] for finding in json.loads(sick.stdout) if finding["code"]] == ["resources"]
    assert {entry["submission_id"] for entry in jobs_of(head)} == before


@pytest.mark.jobs
def test_a_job_brings_its_files_along_each_content_once_and_only_to_a_cluster_that_fits(
    head: RayCluster, server: Server, whisper_jobs: Submit, spec_at: Callable[..., Path], tones: Path, tmp_path: Path
) -> None:
    home = tmp_path / "only-here"
    shutil.copytree(tones, home)
    for name in ("train.csv", "val.csv"):
        assert "/" not in (home / name).read_text(), "clips lie beside their CSV"
    place = f"s3://{BUCKET}/brought"
    spec = spec_at("brought", place, train_csv=str(home / "train.csv"), val_csv=str(home / "val.csv"))
    planned = whisper_jobs("submit", spec, "--upload", "--dry-run", "-o", "json").json()["uploads"]
    assert planned["new_files"] == planned["files"] > 20
    too_large = whisper_jobs("submit", spec, "--upload", "--set", "resources.workers=7", "-o", "json")
    assert too_large.code == 9
    assert server.keys("brought/uploads/") == [], "what cannot run is not uploaded"

    submitted = whisper_jobs("submit", spec, "--upload", "--wait", "-o", "json")
    outcome = submitted.json()
    assert f"uploading to {place}/uploads: {planned['files']} of {planned['files']} files" in submitted.stderr
    assert outcome["status"] == "succeeded"
    assert len(server.keys("brought/uploads/")) == planned["files"]
    written = json.loads(server.body(f"brought/{outcome['job_id']}/spec.json"))["training"]
    for setting in ("train_csv", "val_csv", "base_model"):
        assert written[setting].startswith(f"{place}/uploads/")

    shared = whisper_jobs(
        "submit", spec, "--upload", "--set", f"storage.uri={tmp_path / 'mount'}", "--reuse-name", "--wait"
    )
    assert shared.code == 0, shared.stderr
    assert len(list((tmp_path / "mount/uploads").rglob("*.csv"))) == 2, (
        "a folder that laptop and cluster share will do too"
    )

    again = whisper_jobs("submit", spec, "--upload", "--wait", "-o", "json").json()
    assert (again["submission_id"], again["attached"]) == (outcome["submission_id"], True)
    other = whisper_jobs("submit", spec, "--upload", "--dry-run", "--lora-r", "3", "-o", "json").json()["uploads"]
    assert other["new_files"] == 0


def test_what_the_job_itself_refuses_is_the_clients_outcome(
    whisper_jobs: Submit, spec_at: Callable[..., Path], tmp_path: Path
) -> None:
    csv = tmp_path / "broken.csv"
    csv.write_text("path,text\nnone-of-these.wav,hello\n")
    failed = whisper_jobs("submit", spec_at("broken", train_csv=str(csv)))
    assert failed.code == 2
    assert f"{csv}, line 2: " in failed.stderr
    assert "no such file" in failed.stderr
    assert "exit code 2" in whisper_jobs("status", "broken").stdout


def test_the_doctor_finds_nothing_where_all_is_well(whisper_jobs: Submit, spec_at: Callable[..., Path]) -> None:
    well = whisper_jobs("doctor", spec_at("well", f"s3://{BUCKET}/well"))
    assert well.code == 0, well.stdout
    assert [line.split()[:2] for line in well.stdout.splitlines()] == [
        ["ok", what] for what in ("client", "cluster", "token", "packages", "nodes", "job", "storage")
    ]


@pytest.mark.parametrize(
    ("words", "variables", "code", "text"),
    [
        (["list"], {"RAY_AUTH_TOKEN": "another"}, 7, "refuses the token of RAY_AUTH_TOKEN"),
        (["list"], {"RAY_AUTH_MODE": "disabled"}, 7, "wants a token, and none was found here"),
        (["list", "--address", "http://127.0.0.1:1"], {}, 8, "no cluster answers there"),
        (["status", "nonesuch"], {}, 5, "knows of no job nonesuch"),
        (["logs", "nonesuch"], {}, 5, "knows of no job nonesuch"),
        (["stop", "nonesuch"], {}, 5, "knows of no job nonesuch"),
        (["resume", "nonesuch"], {}, 5, "knows of no job nonesuch"),
        (["stop", "x", "--grace", "-1"], {}, 2, "--grace"),
        (["list", "--address", "ray://head:10001"], {}, 2, "give the dashboard's"),
    ],
)
def test_each_way_in_which_a_command_fails_has_its_code(
    whisper_jobs: Submit, words: list[str], variables: dict[str, str], code: int, text: str
) -> None:
    failed = whisper_jobs(*words, "-o", "json", **variables)
    assert failed.code == code, failed.stderr
    assert text in failed.error()["error"]


def test_a_token_that_is_changed_in_mid_follow_ends_it_with_its_own_code(
    head: RayCluster, laptop: dict[str, str], whisper_jobs: Submit, long_job: str
) -> None:
    relay = Relay(head.dashboard_port)
    process = start("logs", "-f", long_job, "--address", relay.url, program=CLI, variables=laptop)
    wait_for(lambda: relay.connections >= 2, "it does not follow")
    relay.mode = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    relay.cut()
    _, stderr = process.communicate(timeout=60)
    relay.close()
    assert process.returncode == 7
    assert "it is another cluster's, or was changed" in stderr


def test_a_shell_completes_commands_and_jobs(laptop: dict[str, str], long_job: str) -> None:
    def complete(*words: str) -> list[str]:
        asked = {"_WHISPER_JOBS_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("whisper-jobs", *words))}
        asked["COMP_CWORD"] = str(len(words))
        found = run(program=CLI, variables=laptop | asked)
        return [line.split(",")[1] for line in found.stdout.splitlines()]

    assert "submit" in complete("su")
    assert [name.rsplit("-", 1)[0] for name in complete("logs", long_job[:6])] == [long_job]
    script = run("completion", "bash", program=CLI).stdout
    assert "_WHISPER_JOBS_COMPLETE=bash_complete" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_dry_run_says_what_it_would_take_and_talks_to_nobody(spec_at: Callable[..., Path], tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("{currency: EUR, gpu_hour: {H100: 3}}")
    words = ("submit", spec_at("planned", sections={"resources": {"workers": 2, "gpus_per_worker": 1}}))
    nowhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}
    planned = run(*words, "--dry-run", "--prices", prices, "-o", "json", program=CLI, variables=nowhere).json()
    assert planned["plan"]["schedule"]["total_steps"] == 4
    assert planned["workers"]["workers"] == 2
    assert planned["estimate"]["gpu_hours"] > 0
    assert planned["estimate"]["cost"] == pytest.approx(3 * planned["estimate"]["gpu_hours"])
    text = run(*words, "--dry-run", program=CLI, variables=nowhere)
    assert text.code == 0
    assert re.search(r"workers +2, 1 GPU each", text.stdout)
    assert re.search(r"GPU-hours +under 0\.1; under 0\.1 h by the clock", text.stdout)
    assert not (tmp_path / "runs").exists()
