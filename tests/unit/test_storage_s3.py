"""Object storage over real HTTP: refusals are clear and at once, and whatever a call meets, nothing is lost or torn."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from objectstore import BUCKET, FAULTS, Choose, Keys, Proxy, Server, at_random, be, nth, wait_for

from service.errors import ExistsError, InputError, NotFoundError, StorageError, VerificationError
from service.storage import PRIVATE_PREFIX, Storage, retry, s3
from service.storage.objects import PART

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture
def root(prefix: str) -> Storage:
    return Storage(f"s3://{BUCKET}/{prefix}")


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that no compression or accident makes."""
    return b"".join(hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(-(-size // 32)))[:size]


BIG = content(3 * PART + 12_345)
FOLDER = {f"{name}.bin": content(size, size) for name, size in (("a", 10), ("b", 0), ("deep/c", 1000), ("d", PART + 9))}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_big(root: Storage, data: bytes = BIG) -> None:
    with root.new_file("big.bin") as path:
        path.write_bytes(data)


# What is the user's to mend is said at once.

REFUSALS = {
    "wrong secret": (
        "wrong",
        f"s3://{BUCKET}/x",
        r"credentials are refused \(SignatureDoesNotMatch\); check AWS_",
    ),
    "unknown key": (
        "unknown",
        f"s3://{BUCKET}/x",
        r"credentials are refused \(InvalidAccessKeyId\); check AWS_",
    ),
    "no bucket": ("writer", "s3://nonesuch/x", "no such bucket; make it, or check the URI and AWS_ENDPOINT_URL"),
    "denied write": ("reader", f"s3://{BUCKET}/x", r"access is denied \(PutObject\).*get, put and delete objects"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_root_that_cannot_be_used_is_refused_at_once_with_the_way_out(
    server: Server, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    who, uri, message = REFUSALS[case]
    unknown = Keys("AKIAUNKNOWN", "secret-that-is-not-told")
    keys = {"wrong": Keys(server.writer.id, unknown.secret), "unknown": unknown}
    be(keys.get(who) or getattr(server, who), server.endpoint, monkeypatch)
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        Storage(uri).require_access(write=True)
    assert time.monotonic() - started < 5
    assert uri in str(caught.value)
    assert unknown.secret not in str(caught.value)


def test_no_credentials_at_all_are_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match="no credentials for it; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        Storage(f"s3://{BUCKET}/x").require_access()


def test_in_mid_run_a_refusal_is_an_error_of_the_storage(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    be(server.reader, server.endpoint, monkeypatch)
    with pytest.raises(StorageError, match="access is denied") as caught:
        Storage(f"s3://{BUCKET}/x").write_text("a.txt", "x")
    assert caught.value.exit_code == 11


def test_a_reader_needs_no_right_to_write(
    server: Server, root: Storage, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root.write_text("a.txt", "x")
    be(server.reader, server.endpoint, monkeypatch)
    reader = Storage(f"s3://{BUCKET}/{prefix}")
    reader.require_access()
    assert reader.read_bytes("a.txt") == b"x"
    assert reader.fetch("a.txt").read_text() == "x"


def test_access_is_tried_without_a_trace(root: Storage, server: Server, prefix: str) -> None:
    root.require_access(write=True)
    assert server.keys(prefix) == []


# The ordinary operations.


def test_what_is_written_is_read_back_by_name(root: Storage, server: Server, prefix: str) -> None:
    root.write_text("a/b/text.txt", "ñ\n")
    root.write_json("values.json", {"a": 1})
    root.write_bytes(f"{PRIVATE_PREFIX}x/y", b"work in progress")
    assert list(root.files()) == [("a/b/text.txt", 3), ("values.json", 13)]
    assert root.read_bytes("a/b/text.txt", 0, 2) == "ñ".encode()
    assert (root.exists("a"), root.exists("a/b/text.txt"), root.exists("a/b/text"), root.exists()) == (
        True, True, False, True,
    )  # fmt: skip
    assert root.folders("a") == ["b"]
    assert root.sha256("values.json") == hashlib.sha256(root.read_bytes("values.json")).hexdigest()
    with pytest.raises(NotFoundError, match=r"none\.txt: no such file"):
        root.read_bytes("none.txt")
    root.remove("a")
    root.sweep()
    assert server.keys(prefix) == [f"{prefix}/values.json"]


def test_a_folder_is_uploaded_and_leaves_nothing_of_the_one_before(root: Storage, server: Server, prefix: str) -> None:
    for files in ({"old.bin": b"old", "a.bin": b"old"}, FOLDER):
        with root.new_folder("adapter") as folder:
            fill(folder, files)
    assert read(root.fetch("adapter")) == FOLDER
    assert server.keys(prefix) == sorted(f"{prefix}/adapter/{name}" for name in FOLDER)
    assert server.uploads(prefix) == []


def test_the_seal_of_a_folder_goes_last(server: Server, prefix: str, through: Callable[[Choose], Proxy]) -> None:
    proxy = through(lambda request: None)
    with Storage(f"s3://{BUCKET}/{prefix}").new_folder("checkpoint", last="a.bin") as folder:
        fill(folder, FOLDER)
    sent = [request.path.rsplit("/", 1)[-1].split("?")[0] for request in proxy.requests if request.method in "PUT POST"]
    assert sent[-1] == "a.bin"
    assert sent.count("a.bin") == 1


def test_progress_of_an_upload_and_of_a_download_ends_at_the_whole(prefix: str) -> None:
    told: list[tuple[int, int]] = []
    root = Storage(f"s3://{BUCKET}/{prefix}", lambda done, total: told.append((done, total)))
    put_big(root)
    assert told[-1] == (len(BIG), len(BIG))
    told.clear()
    root.fetch("big.bin")
    assert told[-1] == (len(BIG), len(BIG))


# Copies on this machine.


def test_a_copy_is_used_again_only_while_it_is_the_same_object(
    prefix: str, root: Storage, through: Callable[[Choose], Proxy]
) -> None:
    put_big(root)
    proxy = through(lambda request: None)
    near = Storage(f"s3://{BUCKET}/{prefix}")
    assert near.fetch("big.bin").read_bytes() == BIG
    downloads = len(proxy.sent("GET", "big.bin"))
    assert near.fetch("big.bin").read_bytes() == BIG
    assert len(proxy.sent("GET", "big.bin")) == downloads, "nothing is downloaded again"
    other = BIG[::-1]
    put_big(root, other)  # of the same size
    assert near.fetch("big.bin").read_bytes() == other


def test_a_copy_that_was_cut_off_on_this_machine_is_made_anew(root: Storage) -> None:
    put_big(root)
    os.truncate(root.fetch("big.bin"), 100)
    assert root.fetch("big.bin").read_bytes() == BIG


def test_processes_of_a_node_share_one_download(
    prefix: str, root: Storage, server: Server, through: Callable[[Choose], Proxy]
) -> None:
    put_big(root)
    proxy = through(lambda request: None)
    code = "import sys; from service.storage import Storage; print(Storage(sys.argv[1]).fetch('big.bin'))"
    command = [sys.executable, "-c", code, f"s3://{BUCKET}/{prefix}"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == BIG
    assert len(proxy.sent("GET", "big.bin")) == 4, "each part once"


def test_a_download_that_was_cut_off_goes_on_with_the_parts_that_are_missing(
    prefix: str, root: Storage, through: Callable[[Choose], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_big(root)
    monkeypatch.setattr(retry, "PATIENCE_S", 0.0)
    through(nth(3, "500", "GET", "big.bin"))
    with pytest.raises(StorageError, match="failed GetObject"):
        Storage(f"s3://{BUCKET}/{prefix}").fetch("big.bin")
    proxy = through(lambda request: None)
    assert Storage(f"s3://{BUCKET}/{prefix}").fetch("big.bin").read_bytes() == BIG
    assert 0 < len(proxy.sent("GET", "big.bin")) < 4


def test_an_object_that_was_changed_behind_its_hash_is_not_handed_out(
    root: Storage, server: Server, prefix: str
) -> None:
    root.write_text("a.txt", "right")
    before = server.s3.head_object(Bucket=BUCKET, Key=f"{prefix}/a.txt")["Metadata"]
    server.s3.put_object(Bucket=BUCKET, Key=f"{prefix}/a.txt", Body=b"wrong", Metadata=before)
    with pytest.raises(VerificationError, match="not what was written"):
        root.fetch("a.txt")


def test_a_corrupted_upload_is_seen_when_it_is_read_back(
    root: Storage, server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = s3.S3Objects.put, 0

    def corrupting(self: s3.S3Objects, name: str, data: bytes, digest: str, **options: object) -> str:
        nonlocal calls
        calls += 1
        etag = put(self, name, data, digest, **options)  # type: ignore[arg-type]
        if calls <= bad:
            server.s3.put_object(
                Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"x" * len(data), Metadata={"sha256": digest}
            )
        return etag

    monkeypatch.setattr(s3.S3Objects, "put", corrupting)
    bad = 1
    with root.new_folder("adapter") as folder:
        (folder / "a.bin").write_bytes(b"right")
    assert server.body(f"{prefix}/adapter/a.bin") == b"right", "it is written once more"
    calls, bad = 0, 100
    with pytest.raises(StorageError, match="what is read back is not what was written"), root.new_file("b.bin") as path:
        path.write_bytes(b"right")


# Two writers.


def test_of_many_writers_of_the_manifest_one_wins(root: Storage, server: Server, prefix: str) -> None:
    ready, ended = threading.Barrier(6), []

    def write(number: int) -> None:
        ready.wait()
        try:
            root.create_bytes("manifest.json", f"writer {number}".encode())
            ended.append(number)
        except ExistsError:
            ended.append(-1)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number in ended if number >= 0]
    assert (len(ended), len(winners)) == (6, 1)
    assert server.body(f"{prefix}/manifest.json") == f"writer {winners[0]}".encode()


def test_a_manifest_whose_answer_was_lost_is_known_as_ones_own(
    prefix: str, server: Server, through: Callable[[Choose], Proxy]
) -> None:
    through(nth(1, "lost", "PUT", "manifest.json"))
    Storage(f"s3://{BUCKET}/{prefix}").create_bytes("manifest.json", b"mine")
    assert server.body(f"{prefix}/manifest.json") == b"mine"


# Whatever a call meets.


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_in_a_large_upload_and_download_is_got_over(
    prefix: str, server: Server, through: Callable[[Choose], Proxy], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "stall":
        monkeypatch.setattr(s3, "TIMEOUT_S", 1.0)
    put, get = nth(2, fault, "PUT", "partNumber"), nth(2, fault, "GET", "big.bin")
    post = nth(2, fault, "POST", "uploadId") if fault != "cut" else nth(1, "lost", "POST", "uploadId")
    proxy = through(lambda request: put(request) or get(request) or post(request))
    root = Storage(f"s3://{BUCKET}/{prefix}")
    put_big(root)
    assert root.fetch("big.bin").read_bytes() == BIG
    assert fault in proxy.faults()
    assert hashlib.sha256(server.body(f"{prefix}/big.bin")).digest() == hashlib.sha256(BIG).digest()
    assert server.uploads(prefix) == []


def test_a_storm_of_faults_loses_nothing(prefix: str, server: Server, through: Callable[[Choose], Proxy]) -> None:
    proxy = through(at_random(0.2, seed=1))
    root = Storage(f"s3://{BUCKET}/{prefix}")
    for round_ in range(3):
        with root.new_folder("adapter", last="a.bin") as folder:
            fill(folder, FOLDER | {f"{round_}.bin": b"new"})
        assert read(root.fetch("adapter")) == FOLDER | {f"{round_}.bin": b"new"}
    root.create_bytes("manifest.json", b"done")
    root.remove("adapter/d.bin")
    assert len(proxy.faults()) > 20
    assert set(proxy.faults()) == set(FAULTS) - {"stall"}
    assert len(server.keys(prefix)) == 5
    assert server.uploads(prefix) == []


def test_a_store_that_stays_away_is_given_up_in_the_end(
    prefix: str, through: Callable[[Choose], Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PATIENCE_S", 2.0)
    proxy = through(lambda request: "503")
    with pytest.raises(StorageError, match=r"failed PutObject for 2 s \(SlowDown\); check AWS_ENDPOINT_URL") as caught:
        Storage(f"s3://{BUCKET}/{prefix}").write_text("a.txt", "x")
    assert "The same command goes on" in str(caught.value)
    assert len(proxy.requests) > 2


def test_an_address_where_nothing_listens_is_named(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("service.storage.root.START_PATIENCE_S", 0.5)
    with pytest.raises(InputError, match="check AWS_ENDPOINT_URL and the network"):
        Storage(f"s3://{BUCKET}/{prefix}").require_access()


# A writer that was killed.

_UPLOAD = """
import sys
from service.storage import Storage
Storage(sys.argv[1]).put_file(__import__("pathlib").Path(sys.argv[2]), "big.bin")
"""


def test_an_upload_whose_writer_was_killed_goes_on_with_the_missing_parts(
    prefix: str, server: Server, tmp_path: Path, through: Callable[[Choose], Proxy]
) -> None:
    (tmp_path / "big.bin").write_bytes(BIG)
    proxy = through(nth(3, "stall", "PUT", "partNumber", calls=2))
    command = [sys.executable, "-c", _UPLOAD, f"s3://{BUCKET}/{prefix}", str(tmp_path / "big.bin")]
    writer = subprocess.Popen(command, cwd=ROOT)
    wait_for(lambda: len(proxy.sent("PUT", "partNumber")) == 4)
    wait_for(lambda: sum(len(parts(server, prefix, upload)) for upload in server.uploads(prefix)) == 2)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert server.keys(prefix) == [], "nothing half-visible"

    proxy = through(lambda request: None)
    Storage(f"s3://{BUCKET}/{prefix}").put_file(tmp_path / "big.bin", "big.bin")
    assert len(proxy.sent("PUT", "partNumber")) == 2, "only the missing parts"
    assert len(proxy.sent("POST", "uploads")) == 0, "no new upload"
    assert server.body(f"{prefix}/big.bin") == BIG
    assert server.uploads(prefix) == []


def parts(server: Server, prefix: str, upload: dict[str, str]) -> list[object]:
    found = server.s3.list_parts(Bucket=BUCKET, Key=f"{prefix}/big.bin", UploadId=upload["UploadId"])
    return list(found.get("Parts", []))


def begin_upload(server: Server, key: str, data: bytes) -> None:
    """Leave the first part of an upload behind."""
    upload = server.s3.create_multipart_upload(Bucket=BUCKET, Key=key, Metadata={"sha256": "of something else"})
    server.s3.upload_part(Bucket=BUCKET, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=data[:PART])


def test_what_was_left_of_another_file_is_not_gone_on_with(root: Storage, server: Server, prefix: str) -> None:
    begin_upload(server, f"{prefix}/big.bin", BIG[::-1])
    begin_upload(server, f"{prefix}/big.bin", BIG)  # its first part is ours, its recorded hash is not
    begin_upload(server, f"{prefix}/big.bin.other", BIG)
    put_big(root)
    assert server.body(f"{prefix}/big.bin") == BIG
    assert server.s3.head_object(Bucket=BUCKET, Key=f"{prefix}/big.bin")["Metadata"]["sha256"] == root.sha256("big.bin")
    assert [upload["Key"] for upload in server.uploads(prefix)] == [f"{prefix}/big.bin.other"]


def test_removing_and_sweeping_leave_no_orphaned_parts(root: Storage, server: Server, prefix: str) -> None:
    for name in ("checkpoints/checkpoint-1/state.pt", "checkpoints/checkpoint-10/state.pt", "merged/model.bin"):
        begin_upload(server, f"{prefix}/{name}", BIG)
    root.remove("checkpoints/checkpoint-1")
    assert len(server.uploads(prefix)) == 2
    root.sweep()
    assert len(server.uploads(prefix)) == 2, "they may be gone on with"
    root.sweep(resumable=True)
    assert server.uploads(prefix) == []
