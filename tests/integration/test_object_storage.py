"""Whole jobs with their root on object storage, through a store that fails now and then."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import job, run_engine, saved_adapter
from objectstore import BUCKET, Keys, Proxy, Request, Server, at_random, wait_for
from running import CLI, run, start, wait_until, write

from service.spec.job import JobSpec

pytestmark = pytest.mark.slow


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A store that fails one call in twenty."""
    running = Proxy(server.port, at_random(0.05, seed=7))
    yield running
    running.close()


@pytest.fixture
def variables(server: Server, proxy: Proxy, tmp_path: Path) -> dict[str, str]:
    return server.writer.variables(proxy.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path / "cache")}


def events(server: Server, root: str) -> list[dict[str, Any]]:
    """The events of a run as the store has them."""
    return [json.loads(line) for line in server.body(f"{root}/events.jsonl").decode().splitlines()]


@pytest.mark.faults
def test_a_job_on_a_failing_store_that_is_killed_goes_on_to_the_same_end(
    tiny: Path, tones: Path, tmp_path: Path, server: Server, proxy: Proxy, variables: dict[str, str]
) -> None:
    settings: dict[str, Any] = {"epochs": 5, "save_steps": 4, "eval_steps": 15, "lora_dropout": 0.2, "use_dora": True}
    uri = f"s3://{BUCKET}/runs/killed"
    report = {"engine": {"report_to": ["tensorboard"]}}
    spec = job(tiny, tones, tmp_path / "run", report, **settings)
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"outdir": uri})})
    arguments = ("--config", write(spec, tmp_path), "-o", "json")

    killed = start(*arguments, start_new_session=True, variables=variables)
    wait_until(lambda: "runs/killed/checkpoints/checkpoint-12/checkpoint.json" in server.keys("runs/killed/"), killed)
    refused = run(*arguments, variables=variables)
    assert refused.code == 2
    assert f"another run is at work here (process {killed.pid} on " in refused.error()["error"]
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not [key for key in server.keys("runs/killed/") if "manifest.json" in key or "/adapter/" in key[:20]]

    finished = run(*arguments, variables=variables)
    result = finished.json()
    assert "prepare  done before" in finished.stderr
    models = [event for event in events(server, "runs/killed") if event["event"] == "model"]
    assert models[-1]["resumed_from_step"] >= 12
    assert len(proxy.faults()) > 20

    # The engine alone, never stopped, on a local root, ends at the same adapter.
    expected, _ = run_engine(job(tiny, tones, tmp_path / "whole", **settings))
    pulled = run("pull", uri, tmp_path / "pulled", "-o", "json", program=CLI, variables=variables).json()
    assert pulled["artifacts"] == ["adapter", "hf"]
    one, other = saved_adapter(tmp_path / "pulled/adapter"), saved_adapter(tmp_path / "whole/adapter")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert result["training"]["history"] == expected["training"]["history"]

    assert run("verify", uri, program=CLI, variables=variables).code == 0
    assert run("verify", tmp_path / "pulled", program=CLI).code == 0
    listed = run("artifacts", uri, "-o", "json", program=CLI, variables=variables).json()
    assert [one["name"] for one in listed] == ["adapter", "hf"]
    assert listed[1]["wer"] == result["artifacts"]["hf"]["wer"]

    keys = server.keys("runs/killed/")
    assert not [key for key in keys if ".wj-" in key], "nothing half-done"
    assert server.uploads("runs/killed/") == []
    assert [key for key in keys if "tensorboard" in key and "tfevents" in key]
    for key in keys:
        assert server.writer.secret.encode() not in server.body(key), key

    again = run(*arguments, variables=variables)
    assert again.code == 0
    assert "this job is complete already" in again.stderr


@pytest.mark.parametrize("case", ["wrong secret", "no bucket", "denied write"])
def test_a_job_whose_store_cannot_be_used_ends_before_anything_is_done(
    tiny: Path, tones: Path, tmp_path: Path, server: Server, case: str
) -> None:
    keys = {"wrong secret": Keys(server.writer.id, "wrong"), "denied write": server.reader}.get(case, server.writer)
    bucket = "nonesuch" if case == "no bucket" else BUCKET
    words = ["--base-model", tiny, "--train-csv", tones / "train.csv", "--val-csv", tones / "val.csv"]
    words += ["--set", f"storage.uri=s3://{bucket}/refused", "-o", "json"]
    finished = run(*words, variables=keys.variables(server.endpoint))
    assert finished.code == 2
    message = finished.error()["error"]
    assert {"wrong secret": "SignatureDoesNotMatch", "no bucket": "no such bucket", "denied write": "PutObject"}[
        case
    ] in (message)
    assert f"s3://{bucket}/refused/" in message
    assert finished.seconds < 60
    assert server.keys("refused") == []


@pytest.mark.faults
def test_a_job_waits_out_a_store_that_is_away_for_a_while(
    tiny: Path, tones: Path, tmp_path: Path, server: Server
) -> None:
    away = [False]

    def choose(request: Request) -> str | None:
        if "checkpoint-4/state.pt" in request.path and len(proxy.faults()) < 6:
            away[0] = True  # for as many calls as a store makes in some seconds
        return "503" if away[0] and len(proxy.faults()) < 6 else None

    proxy = Proxy(server.port, choose)
    variables = server.writer.variables(proxy.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path / "cache")}
    spec = job(tiny, tones, tmp_path, {"resources": {"workers": 0}}, save_steps=4, merge_lora=False)
    root = f"s3://{BUCKET}/runs/away"
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"outdir": root})})
    process = start("--config", write(spec, tmp_path), "-o", "json", variables=variables)
    wait_for(lambda: len(proxy.faults()) == 6 or process.poll() is not None, 200)
    stdout, stderr = process.communicate(timeout=200)
    proxy.close()
    assert process.returncode == 0, stderr
    assert len(proxy.faults()) == 6
    assert json.loads(stdout)["training"]["steps"] == 7


@pytest.mark.faults
def test_a_search_on_a_failing_store_ends_as_on_a_folder(
    tiny: Path, tones: Path, tmp_path: Path, server: Server, proxy: Proxy, variables: dict[str, str]
) -> None:
    uri = f"s3://{BUCKET}/runs/search"
    sections = {"resources": {"workers": 0}, "evaluation": {"metric": "loss", "max_new_tokens": 6, "bootstrap": 10}}
    content = job(tiny, tones, tmp_path / "run", sections, epochs=4).model_dump(mode="json") | {"kind": "search"}
    content["search"] = {"space": {"lora_r": [4, 8]}, "sampler": "grid", "scheduler": "none", "evaluations": 2}
    found = {}
    for root, environment in ((uri, variables), (str(tmp_path / "run"), {})):
        content["training"]["outdir"] = root
        arguments = ("--config", write(JobSpec.model_validate(content), tmp_path), "-o", "json")
        found[root] = run(*arguments, variables=environment).json()
        assert run("verify", root, program=CLI, variables=environment).code == 0
    one, other = found.values()
    assert [trial["score"] for trial in one["search"]["trials"]] == [t["score"] for t in other["search"]["trials"]]
    assert (one["search"]["winner"], one["tuned"]) == (other["search"]["winner"], other["tuned"])
    assert len(proxy.faults()) > 20
    keys = server.keys("runs/search/")
    assert not [key for key in keys if "checkpoint" in key or ".wj-" in key], "nothing is left that no one needs"
    assert run("report", uri, "--out", tmp_path / "r.html", program=CLI, variables=variables).code == 0
