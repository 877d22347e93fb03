"""What a spec reads here goes to storage once, by its content, and the spec then reads it there."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from objectstore import BUCKET, Choose, Proxy, Request, Server, at_random, nth, wait_for

from jobs.manifest.rows import read_rows
from jobs.sources import resolve_model
from service.errors import InputError, ManifestError, StorageError
from service.spec.job import JobSpec
from service.storage import Storage
from service.storage.objects import PART
from service.upload import UploadPlan, plan_uploads, upload, uploads_uri

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("client")


def quiet(_: Request) -> None:
    return None


def clip(name: str, size: int = 40) -> bytes:
    """Bytes that stand for a clip: nothing here listens."""
    return b"".join(hashlib.sha256(f"{name} {n}".encode()).digest() for n in range(-(-size // 32)))[:size]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_csv(path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("path", "text")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def data(folder: Path, names: tuple[str, ...] = ("a", "b", "c")) -> Path:
    """A folder with clips, train.csv and val.csv; they share a clip under two names."""
    (folder / "clips").mkdir(parents=True)
    for name in names:
        (folder / f"clips/{name}.wav").write_bytes(clip(name))
    (folder / "clips/twin of a.WAV").write_bytes(clip("a"))
    write_csv(folder / "train.csv", [(f"clips/{name}.wav", f"text of {name}") for name in names])
    write_csv(folder / "val.csv", [("clips/twin of a.WAV", "held out")])
    return folder


def job(folder: Path, uri: str, **sections: Any) -> JobSpec:
    csvs = {"train_csv": str(folder / "train.csv"), "val_csv": str(folder / "val.csv")}
    training = {"base_model": "openai/whisper-tiny"} | csvs | sections.pop("training", {})
    return JobSpec.model_validate({"training": training, "storage": {"uri": uri}} | sections)


def plan_of(spec: JobSpec) -> UploadPlan:
    uri = uploads_uri(spec)
    return plan_uploads(spec, uri, Storage(uri))


def send(spec: JobSpec) -> JobSpec:
    plan = plan_of(spec)
    return upload(plan, Storage(plan.uri))


@pytest.fixture(params=["s3", "local"])
def uri(request: pytest.FixtureRequest, prefix: str, tmp_path: Path) -> str:
    """A root on object storage, or on a file system that the cluster shares."""
    return f"s3://{BUCKET}/{prefix}" if request.param == "s3" else str(tmp_path / "shared")


@pytest.fixture
def bucket(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}"


# What goes, and where.


@pytest.mark.parametrize(
    ("outdir", "storage", "expected"),
    [
        (None, "s3://speech/runs/", "s3://speech/runs/uploads"),
        ("s3://speech/runs/one/", "/runs", "s3://speech/runs/uploads"),
        ("/shared/runs/one", "s3://speech/runs", "s3://speech/runs/uploads"),
        ("/shared/runs/one", "/home/runs", "/shared/runs/uploads"),
        (None, "file:///shared", "/shared/uploads"),
    ],
)
def test_uploads_go_beside_the_runs(outdir: str | None, storage: str, expected: str) -> None:
    spec = JobSpec.model_validate({"training": {"outdir": outdir}, "storage": {"uri": storage}})
    assert uploads_uri(spec) == expected


def test_the_spec_reads_there_what_it_read_here(uri: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    columns = ("speaker", "path", "text", "start_s")
    rows = [
        ("sue", "clips/a.wav", "one,\ntwo", "0.5"),
        (),
        ("", "s3://elsewhere/b.wav", "ñ", ""),
        ("x", "clips/b.wav", ""),
    ]
    write_csv(folder / "train.csv", rows, columns)
    spec = send(job(folder, uri))
    assert spec.training.train_csv
    assert spec.training.train_csv.startswith(f"{uri}/uploads/csv/")
    found = list(read_rows(spec.training.train_csv, "en"))
    before = list(read_rows(str(folder / "train.csv"), "en"))
    for one, other in zip(found, before, strict=True):
        assert (one.text, one.start_s, one.line, one.extras) == (other.text, other.start_s, other.line, other.extras)
    assert found[1].path == "s3://elsewhere/b.wav"
    for row, name in ((found[0], "a"), (found[2], "b")):
        assert row.path.endswith(
            f"audio/{hashlib.sha256(clip(name)).hexdigest()[:2]}/{hashlib.sha256(clip(name)).hexdigest()}.wav"
        )
        place, _, file = row.path.rpartition("/")
        assert Storage(place).read_bytes(file) == clip(name)


def test_each_content_goes_once_and_the_same_command_sends_nothing(
    bucket: str, tmp_path: Path, server: Server, prefix: str, through: Callable[[Choose], Proxy]
) -> None:
    spec = job(data(tmp_path / "data"), bucket, guard={"csv": str(tmp_path / "data/val.csv")})
    plan = plan_of(spec)
    assert (plan.files, plan.new_files) == (5, 5), "three clips and two CSVs, whatever names they have"
    by_setting = {item.setting: (item.files, item.present_files) for item in plan.items}
    assert by_setting == {"training.train_csv": (4, 0), "training.val_csv": (2, 0), "guard.csv": (2, 0)}
    proxy = through(quiet)
    first = send(spec)
    assert len(proxy.sent("PUT")) == 5
    assert len(server.keys(f"{prefix}/uploads/")) == 5
    proxy = through(quiet)
    assert send(spec) == first
    assert proxy.sent("PUT") == []
    again = plan_of(spec)
    assert (again.new_files, again.new_bytes) == (0, 0)
    assert all((item.present_files, item.present_bytes) == (item.files, item.size_bytes) for item in again.items)
    assert json.loads(json.dumps(again.as_dict()))["settings"][0]["setting"] == "training.train_csv"


def test_added_clips_alone_are_sent(bucket: str, tmp_path: Path, through: Callable[[Choose], Proxy]) -> None:
    folder = data(tmp_path / "data")
    before = send(job(folder, bucket))
    (folder / "clips/d.wav").write_bytes(clip("d"))
    with open(folder / "train.csv", "a") as file:
        file.write("clips/d.wav,more\n")
    proxy = through(quiet)
    after = send(job(folder, bucket))
    assert len(proxy.sent("PUT", "/audio/")) == len(proxy.sent("PUT", "/csv/")) == 1
    assert after.sha256 != before.sha256
    assert after.training.val_csv == before.training.val_csv


def test_the_hash_of_the_spec_is_that_of_its_content_wherever_it_lay(uri: str, tmp_path: Path) -> None:
    one, other = data(tmp_path / "one"), data(tmp_path / "other")
    (other / "clips").rename(other / "moved")
    rows = [("moved/a.wav", "text of a"), (str(other / "moved/b.wav"), "text of b"), ("./moved/c.wav", "text of c")]
    write_csv(other / "train.csv", rows)
    write_csv(other / "val.csv", [("moved/twin of a.WAV", "held out")])
    assert job(one, uri).sha256 != job(other, uri).sha256
    assert send(job(one, uri)).sha256 == send(job(other, uri)).sha256
    (other / "moved/b.wav").write_bytes(clip("another"))
    assert send(job(one, uri)).sha256 != send(job(other, uri)).sha256


def test_a_bucket_may_be_mirrored(bucket: str, prefix: str, server: Server, tmp_path: Path) -> None:
    spec = send(job(data(tmp_path / "data"), bucket))
    for key in server.keys(f"{prefix}/uploads/"):
        server.s3.put_object(Bucket=BUCKET, Key=key.replace(prefix, f"{prefix}-mirror"), Body=server.body(key))
    mirrored = str(spec.training.train_csv).replace(prefix, f"{prefix}-mirror")
    for row in read_rows(mirrored, "en"):
        assert f"{prefix}-mirror/uploads/audio/" in row.path
        assert server.body(row.path.removeprefix(f"s3://{BUCKET}/"))


def test_uris_and_hub_ids_stay_as_they_are_and_nothing_is_sent(bucket: str, prefix: str, server: Server) -> None:
    csvs = {"train_csv": "s3://elsewhere/train.csv", "val_csv": "s3://elsewhere/val.csv"}
    spec = JobSpec.model_validate({"training": csvs, "storage": {"uri": bucket}})
    assert send(spec) == spec
    assert server.keys(prefix) == []


def test_progress_of_hashing_and_of_sending_ends_at_the_whole(uri: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    (folder / "clips/c.wav").write_bytes(clip("c", PART + 100))
    hashed: list[tuple[int, int]] = []
    sent: list[tuple[int, int]] = []
    place = Storage(f"{uri}/uploads")
    plan = plan_uploads(job(folder, uri), place.uri, place, lambda *counts: hashed.append(counts))
    assert hashed[-1] == (PART + 100 + 3 * 40, PART + 100 + 3 * 40)
    upload(plan, place, lambda *counts: sent.append(counts))
    assert sent[-1] == (plan.new_bytes, plan.new_bytes)
    assert plan.new_bytes > PART + 100 + 2 * 40


# Faults: all at once, and nothing is sent.


def test_all_faults_are_told_at_once_with_csv_and_line(
    bucket: str, tmp_path: Path, prefix: str, server: Server
) -> None:
    folder = data(tmp_path / "data")
    rows = [("clips/a.wav", "x"), ("clips/none.wav", "x"), ("clips", "x"), ("", "x"), ("clips/none.wav", "y")]
    rows.append(("http://x/a.wav", "x"))
    write_csv(folder / "train.csv", rows)
    (folder / "val.csv").write_bytes(b"path,text\nclips/a.wav,ok\nclips/b.wav,\xff\n")
    (folder / "base").mkdir()
    spec = job(folder, bucket, guard={"csv": str(folder / "none.csv")}, training={"base_model": str(folder / "base")})
    with pytest.raises(ManifestError) as caught:
        plan_of(spec)
    text = str(caught.value)
    assert f'{folder}/train.csv, line 3: "clips/none.wav" no such file' in text
    assert f'{folder}/train.csv, line 4: "clips" is a folder' in text
    assert f"{folder}/train.csv, line 5: path is empty" in text
    assert f"{folder}/train.csv, line 6:" in text
    assert f'{folder}/train.csv, line 7: "http://x/a.wav" is a URI of a kind that is not known; give a path' in text
    assert f"{folder}/val.csv, line 3: is not UTF-8 text" in text
    assert f"{folder}/none.csv: does not exist" in text
    assert "training.base_model" in text
    assert "holds no config.json" in text
    assert "--set data.bad_rows=reject; nothing was sent" in text
    assert "line 2" not in text
    assert server.keys(prefix) == []


def test_of_many_faults_a_hundred_are_told(bucket: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    write_csv(folder / "train.csv", [(f"{n}.wav", "x") for n in range(1_500)])
    with pytest.raises(ManifestError, match="and 1,400 more rows") as caught:
        plan_of(job(folder, bucket))
    assert len(caught.value.faults) == 102


def test_rows_that_the_job_may_leave_out_are_left_to_it(bucket: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    write_csv(folder / "train.csv", [("clips/a.wav", "x"), ("clips/none.wav", "gone"), ("clips", "folder")])
    spec = send(job(folder, bucket, data={"bad_rows": "reject"}))
    rows = list(read_rows(str(spec.training.train_csv), "en"))
    assert [row.name for row in rows[1:]] == ["clips/none.wav", "clips"]
    assert [row.path for row in rows[1:]] == [f"{bucket}/uploads/csv/{name}" for name in ("clips/none.wav", "clips")]


def test_a_clip_that_cannot_be_read_is_told_from_a_missing_one(bucket: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    (folder / "clips/b.wav").unlink()
    (folder / "clips/b.wav").symlink_to("b.wav")
    with pytest.raises(InputError, match=r'line 3: "clips/b\.wav" cannot be read \(too many levels'):
        plan_of(job(folder, bucket))


def test_held_out_clips_that_are_the_training_set_under_other_names_are_refused(bucket: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data", ("a",))
    write_csv(folder / "val.csv", [("clips/twin of a.WAV", "text of a")])
    with pytest.raises(InputError, match=r"training\.val_csv: .*holds the same clips and texts as .*/train\.csv"):
        plan_of(job(folder, bucket))


@pytest.mark.parametrize("size", [40, PART + 100])
def test_a_file_that_changes_between_hashing_and_sending_is_an_error_and_no_object(
    uri: str, tmp_path: Path, size: int
) -> None:
    folder = data(tmp_path / "data")
    (folder / "clips/b.wav").write_bytes(clip("b", size))
    plan = plan_of(job(folder, uri))
    (folder / "clips/b.wav").write_bytes(clip("changed", size))
    with pytest.raises(InputError, match=r"clips/b\.wav: has changed while it was sent"):
        upload(plan, Storage(plan.uri))
    there = [name for name, _ in Storage(plan.uri).files()]
    assert not [name for name in there if sha256(clip("b", size)) in name]
    assert not [name for name in there if name.startswith("csv/")]
    assert all(len(Storage(plan.uri).read_bytes(name)) == 40 for name in there)


def test_a_large_file_that_changes_while_its_parts_are_sent_is_no_object(
    bucket: str, tmp_path: Path, prefix: str, server: Server, through: Callable[[Choose], Proxy]
) -> None:
    folder = data(tmp_path / "data", ("a",))
    (folder / "clips/a.wav").write_bytes(clip("big", 2 * PART))

    def touch(request: Request) -> None:
        if "partNumber=2" in request.path:
            (folder / "clips/a.wav").write_bytes(clip("other", 2 * PART))

    plan = plan_of(job(folder, bucket))
    through(touch)
    with pytest.raises(InputError, match="has changed while it was sent"):
        upload(plan, Storage(plan.uri))

    assert not [key for key in server.keys(prefix) if sha256(clip("big", 2 * PART)) in key]


def test_a_clip_or_a_csv_that_goes_in_between_is_named(bucket: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    plan = plan_of(job(folder, bucket))
    (folder / "clips/b.wav").unlink()
    with pytest.raises(InputError, match=r"clips/b\.wav: could be read before, and now cannot"):
        upload(plan, Storage(plan.uri))
    plan = plan_of(job(data(tmp_path / "more"), bucket))
    write_csv(tmp_path / "more/train.csv", [("clips/a.wav", "another text")])
    with pytest.raises(InputError, match=r"more/train\.csv: has changed while it was sent"):
        upload(plan, Storage(plan.uri))


def test_refused_credentials_and_a_root_that_takes_nothing_are_said_at_once(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = job(data(tmp_path / "data"), bucket)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAUNKNOWN")
    with pytest.raises(StorageError, match=r"uploads: (the credentials are refused|access is denied)"):
        plan_of(spec)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        send(job(tmp_path / "data", str(tmp_path / "file")))


# A bad line, and a kill.


def test_through_a_store_that_fails_one_call_in_twenty_all_arrives(
    bucket: str, tmp_path: Path, prefix: str, server: Server, through: Callable[[Choose], Proxy]
) -> None:
    names = tuple(f"clip {number}" for number in range(40))
    spec = job(data(tmp_path / "data", names), bucket)
    proxy = through(at_random(0.05, seed=3))
    sent = send(spec)
    assert len(proxy.faults()) >= 3
    rows = list(read_rows(str(sent.training.train_csv), "en"))
    assert [server.body(row.path.removeprefix(f"s3://{BUCKET}/")) for row in rows] == [clip(name) for name in names]
    assert plan_of(spec).new_files == 0


_UPLOAD = """
import sys
from pathlib import Path
from service.spec.job import JobSpec
from service.storage import Storage
from service.upload import plan_uploads, upload, uploads_uri
heavy = {"torch", "ray", "numpy", "transformers", "jobs"} & set(sys.modules)
assert not heavy, heavy
spec = JobSpec.model_validate_json(Path(sys.argv[1]).read_text())
uri = uploads_uri(spec)
print(upload(plan_uploads(spec, uri, Storage(uri)), Storage(uri)).to_json())
"""


def test_an_upload_that_was_killed_in_a_large_file_goes_on_with_the_missing_parts(
    bucket: str, tmp_path: Path, prefix: str, server: Server, through: Callable[[Choose], Proxy]
) -> None:
    folder = data(tmp_path / "data")
    big = clip("big", 3 * PART + 77)
    (folder / "clips/c.wav").write_bytes(big)
    spec = job(folder, bucket)
    (tmp_path / "spec.json").write_text(spec.to_json())
    proxy = through(nth(3, "stall", "PUT", "partNumber", calls=2))
    command = [sys.executable, "-c", _UPLOAD, str(tmp_path / "spec.json")]
    killed = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: len(proxy.sent("PUT", "partNumber")) == 4 and parts(server, prefix) == 2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not [key for key in server.keys(f"{prefix}/uploads/") if key.endswith(".csv")]

    proxy = through(quiet)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(proxy.sent("PUT", "partNumber")) == 2, "only the missing parts"
    sent = JobSpec.model_validate_json(done.stdout)
    rows = list(read_rows(str(sent.training.train_csv), "en"))
    assert server.body(rows[2].path.removeprefix(f"s3://{BUCKET}/")) == big
    assert server.uploads(prefix) == []


def parts(server: Server, prefix: str) -> int:
    return sum(
        len(server.s3.list_parts(Bucket=BUCKET, Key=one["Key"], UploadId=one["UploadId"]).get("Parts", []))
        for one in server.uploads(prefix)
    )


def test_two_clients_that_send_the_same_at_once_do_not_harm_each_other(
    bucket: str, tmp_path: Path, prefix: str, server: Server
) -> None:
    folder = data(tmp_path / "data")
    (folder / "clips/c.wav").write_bytes(clip("big", 3 * PART))
    (tmp_path / "spec.json").write_text(job(folder, bucket).to_json())
    command = [sys.executable, "-c", _UPLOAD, str(tmp_path / "spec.json")]
    clients = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        printed = {client.communicate(timeout=60)[0] for client in clients}
    finally:
        for client in clients:
            client.kill()
    assert [client.returncode for client in clients] == [0, 0, 0]
    assert len(printed) == 1
    assert plan_of(job(folder, bucket)).new_files == 0


# Models and datasets.


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"):
        (folder / name).write_text(name)
    for name in ("optimizer.pt", "pytorch_model.bin", "training_args.bin", "runs/events"):  # no job reads these
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


READ = {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "README.md"}


def names_in(uri: str) -> set[str]:
    return {name for name, _ in Storage(uri).files()}


def test_a_checkpoint_goes_without_what_no_job_reads_and_keeps_its_name(uri: str, tmp_path: Path) -> None:
    folder = data(tmp_path / "data")
    base = checkpoint(tmp_path / "models/my-whisper")
    before = job(folder, uri, training={"base_model": str(base)})
    spec = send(before)
    assert spec.training.base_model.startswith(f"{uri}/uploads/models/")
    assert names_in(spec.training.base_model) == READ
    assert spec.title == before.title == "my-whisper-lora"
    (base / "model.safetensors").write_text("other")
    assert send(before).training.base_model != spec.training.base_model


def test_a_checkpoint_in_shards_goes_with_all_of_them_or_is_refused(bucket: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model-1.safetensors").write_text("one")
    spec = job(data(tmp_path / "data"), bucket, training={"base_model": str(base)})
    with pytest.raises(InputError, match=r"training\.base_model: .*lacks model-2\.safetensors \(no such file\)"):
        plan_of(spec)
    (base / "model-2.safetensors").write_text("two")
    shards = {"model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"}
    assert names_in(send(spec).training.base_model) == READ - {"model.safetensors"} | shards


def adapter(folder: Path, base: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_text("adapter")
    (folder / "optimizer.pt").write_text("state")
    return folder


def run(folder: Path, base: str, val: str) -> Path:
    adapter(folder / "adapter", base)
    (folder / "spec.json").write_text("{}")
    (folder / "data").mkdir()
    (folder / "data/val.arrow").write_text("rows")
    manifest = {"base": {"name": base, "revision": None, "weights_sha256": {}}, "data": {"val": {"source": val}}}
    about = {"job_id": "x", "kind": "train", "spec_sha256": "0", "created": "now", "versions": {}, "files": []}
    (folder / "manifest.json").write_text(json.dumps(about | manifest | {"wer": {}, "promoted": True, "refused": {}}))
    return folder


def scoring(model: Path, folder: Path, bucket: str) -> JobSpec:
    evaluation = {"model": str(model), "csv": str(folder / "val.csv")}
    return JobSpec.model_validate({"kind": "evaluate", "evaluation": evaluation, "storage": {"uri": bucket}})


def exporting(source: Path, bucket: str, **settings: Any) -> JobSpec:
    csv_path = settings.pop("csv", None)
    content = {"kind": "export", "export": {"source": str(source)} | settings, "evaluation": {"csv": csv_path}}
    return JobSpec.model_validate(content | {"storage": {"uri": bucket}})


def test_an_adapter_or_a_run_on_a_hub_model_goes_as_it_is_needed(bucket: str, tmp_path: Path) -> None:
    folder, files = data(tmp_path / "data"), {"adapter_config.json", "adapter_model.safetensors"}
    one = send(scoring(adapter(tmp_path / "one", "openai/whisper-tiny"), folder, bucket)).evaluation.model
    assert one
    assert names_in(one) == files
    assert resolve_model(one) == {"base": "openai/whisper-tiny", "revision": None, "adapter": f"{one}", "run": None}
    made = run(tmp_path / "run", "openai/whisper-tiny", "/here/val.csv")
    other = send(scoring(made, folder, bucket)).evaluation.model
    assert other
    assert names_in(other) == {"spec.json", "manifest.json", *(f"adapter/{name}" for name in files)}
    assert resolve_model(other)["adapter"] == f"{other}/adapter"


def test_an_export_takes_its_adapters_local_base_along_and_an_evaluation_says_what_to_score(
    bucket: str, tmp_path: Path
) -> None:
    folder, base = data(tmp_path / "data"), checkpoint(tmp_path / "base")
    made = run(tmp_path / "run", str(base), "/here/val.csv")
    spec = send(exporting(made, bucket, csv=str(folder / "val.csv")))
    assert spec.export.base
    assert names_in(spec.export.base) == READ
    assert resolve_model(str(spec.export.source), "export.source", spec.export.base)["base"] == spec.export.base
    with pytest.raises(
        InputError, match=r"evaluation\.model: .* an adapter on .*/base, a folder of this machine; merge"
    ):
        plan_of(scoring(made, folder, bucket))
    elsewhere = run(tmp_path / "elsewhere", "/on/the/cluster/base", "/here/val.csv")
    assert send(scoring(elsewhere, folder, bucket)).evaluation.model, "the base may be where the job runs"
    assert send(exporting(elsewhere, bucket, csv=str(folder / "val.csv"))).export.base is None
    checkpoint(made / "merged")
    with pytest.raises(InputError, match=r"score its merged model, .*/run/merged"):
        plan_of(scoring(made, folder, bucket))
    assert names_in(str(send(scoring(made / "merged", folder, bucket)).evaluation.model)) == READ


def test_a_run_lends_its_held_out_rows_only_where_their_clips_can_be_heard(bucket: str, tmp_path: Path) -> None:
    near = run(tmp_path / "near", "openai/whisper-tiny", "/here/val.csv")
    with pytest.raises(InputError, match=r"evaluation\.csv: is missing, and the run's own held-out clips are files"):
        plan_of(exporting(near, bucket))
    far = run(tmp_path / "far", "openai/whisper-tiny", "s3://elsewhere/val.csv")
    assert "data/val.arrow" in names_in(str(send(exporting(far, bucket)).export.source))


def test_a_folder_that_is_no_model_is_refused(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.model: .* is not a checkpoint \(config\.json\), a PEFT adapter"):
        plan_of(scoring(data(tmp_path / "data"), tmp_path / "data", bucket))


def test_a_dataset_goes_whole(bucket: str, tmp_path: Path) -> None:
    for name in ("dataset_dict.json", "train/data-00000.arrow", "train/state.json", ".cache/lock"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text(name)
    content = {"data": {"dataset": str(tmp_path / "set")}, "training": {"base_model": "openai/whisper-tiny"}}
    spec = send(JobSpec.model_validate(content | {"storage": {"uri": bucket}}))
    assert spec.data.dataset
    assert names_in(spec.data.dataset) == {"dataset_dict.json", "train/data-00000.arrow", "train/state.json"}
