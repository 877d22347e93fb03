"""Jobs whose manifests, clips and base model lie in object storage: as from files, and each clip is got once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import job, prepared, run_engine, saved_adapter
from objectstore import BUCKET, Proxy, Server, at_random, be
from running import run, write

from jobs.train.loop import train
from jobs.train.session import LocalSession
from service.errors import InputError, InputLostError, StorageError
from service.spec.job import JobSpec
from service.storage import Storage
from service.upload import plan_uploads, upload, uploads_uri

pytestmark = pytest.mark.slow


def sent(spec: JobSpec, root: str) -> JobSpec:
    """The spec with its inputs in storage, and its root there too."""
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"outdir": root})})
    uri = uploads_uri(spec)
    return upload(plan_uploads(spec, uri, Storage(uri)), Storage(uri))


@pytest.fixture
def client(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of one who may write, and a cache of its own."""
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "laptop's cache"))
    be(server.writer, server.endpoint, monkeypatch)


@pytest.mark.usefixtures("client")
def test_a_job_that_reads_all_from_storage_ends_at_the_same_adapter_and_gets_each_clip_once(
    tiny: Path, tones: Path, tmp_path: Path, server: Server
) -> None:
    settings: dict[str, Any] = {"epochs": 2, "eval_steps": 7, "lora_dropout": 0.2, "use_dora": True}
    sections = {"resources": {"workers": 0}, "augment": {"speed": [0.9, 1.1]}}
    before = job(tiny, tones, tmp_path / "run", sections, **settings)
    spec = sent(before, f"s3://{BUCKET}/far/runs/one")
    places = (spec.training.base_model, spec.training.train_csv, spec.training.val_csv)
    assert all(str(place).startswith(f"s3://{BUCKET}/far/runs/uploads/") for place in places)
    assert spec.title == before.title

    proxy = Proxy(server.port, at_random(0.05, seed=11))
    variables = server.writer.variables(proxy.endpoint) | {"WHISPER_JOBS_CACHE": str(tmp_path / "cache")}
    finished = run("--config", write(spec, tmp_path), "-o", "json", variables=variables)
    result = finished.json()
    proxy.close()
    assert len(proxy.faults()) > 5

    expected, _ = run_engine(before)
    assert result["training"]["history"] == expected["training"]["history"]
    adapter = Storage(spec.root).fetch("adapter")
    one, other = saved_adapter(adapter), saved_adapter(tmp_path / "run/adapter")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    # 18 clips, read in prepare, in two epochs, in four scorings and in the merge.
    whole = [request.path for request in proxy.sent("GET", "/uploads/audio/") if not request.fault]
    assert len(whole) == len(set(whole)) == 18

    manifest = Storage(spec.root).read_json("manifest.json")
    assert manifest["base"]["name"] == spec.training.base_model
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == places[0]
    for key in server.keys("far/runs/one/"):
        assert str(tmp_path).encode() not in server.body(key), f"{key} names a place on a node"

    again = run("--config", write(spec, tmp_path), variables=variables | {"AWS_ENDPOINT_URL": server.endpoint})
    assert "this job is complete already" in again.stderr


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_clip_that_has_gone_or_changed_since_the_check_ends_the_training_with_its_name(
    tiny: Path, tones: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    before = job(tiny, tones, tmp_path / "run")
    spec = sent(before, f"s3://{BUCKET}/{what}/runs/one")
    spec = spec.model_copy(update={"training": spec.training.model_copy(update={"outdir": str(tmp_path / "run")})})
    task = prepared(spec)
    key = server.keys(f"{what}/runs/uploads/audio/")[0]
    if what == "gone":
        server.s3.delete_object(Bucket=BUCKET, Key=key)
    else:
        server.s3.put_object(Bucket=BUCKET, Key=key, Body=b"another clip")
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "another node"))
    reason = {"gone": "no such file", "another": "has changed since the job checked it"}[what]
    with pytest.raises(InputLostError, match=rf"s3://{BUCKET}/{key}: {reason}; it was there when the job checked it"):
        train(task, LocalSession())


@pytest.mark.usefixtures("client")
def test_what_is_not_in_storage_is_one_clear_error(tiny: Path, tones: Path, tmp_path: Path, server: Server) -> None:
    spec = sent(job(tiny, tones, tmp_path / "run"), f"s3://{BUCKET}/missing/runs/one")
    for setting, value, message in (
        ("train_csv", f"s3://{BUCKET}/missing/none.csv", f"s3://{BUCKET}/missing/none.csv: no such file"),
        ("base_model", f"s3://{BUCKET}/missing/none", "training.base_model: .* holds no file; give a hub id"),
        ("base_model", spec.training.train_csv, "training.base_model: .* is a file; give the folder of a checkpoint"),
        ("train_csv", "s3://nonesuch/train.csv", "s3://nonesuch: there is no such bucket; make it"),
    ):
        other = {setting: value, "outdir": str(tmp_path / "run")}
        wrong = spec.model_copy(update={"training": spec.training.model_copy(update=other)})
        with pytest.raises((InputError, StorageError), match=message):
            prepared(wrong)
