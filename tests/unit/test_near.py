"""Clips in object storage are asked for once per node, are never another content, and need no room on the disk."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from disks import small_disk
from engine import tone
from objectstore import BUCKET, FAULTS, Choose, Proxy, Server, at_random, nth

from jobs.audio import open_source, read_audio
from jobs.manifest.examine import Limits, examine
from jobs.manifest.row import Reject, Row
from service.errors import ManifestError, StorageError, VerificationError
from service.spec.sections import DataConfig
from service.storage import Storage, retry, s3
from service.storage.near import ChangedError, Near, Version, fetch_near
from service.storage.objects import PART

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("client")


def quiet(_: object) -> None:
    return None


def put(prefix: str, content: bytes, name: str = "a.bin") -> str:
    root = Storage(f"s3://{BUCKET}/{prefix}")
    root.write_bytes(name, content)
    return root.path(name)


def bytes_of(near: Near) -> bytes:
    return near.content if isinstance(near.content, bytes) else near.content.read_bytes()


def test_an_object_is_got_once_and_later_only_looked_at(prefix: str, through: Callable[[Choose], Proxy]) -> None:
    uri, proxy = put(prefix, b"one"), through(quiet)
    near = fetch_near(uri)
    assert (bytes_of(near), near.version.sha256) == (b"one", hashlib.sha256(b"one").hexdigest())
    assert bytes_of(fetch_near(uri)) == b"one"
    assert [request.method for request in proxy.requests] == ["HEAD", "GET", "HEAD"]
    assert fetch_near(uri, near.version) == near
    assert len(proxy.requests) == 3, "of a version that is here, nothing is asked"


def test_on_another_node_a_version_that_was_checked_takes_one_call(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: Callable[[Choose], Proxy]
) -> None:
    uri = put(prefix, b"one")
    version = str(fetch_near(uri).version)
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "another node"))
    proxy = through(quiet)
    assert bytes_of(fetch_near(uri, Version.parse(version))) == b"one"
    assert [request.method for request in proxy.requests] == ["GET"]


def test_what_has_changed_is_never_taken_for_what_was_asked_for(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(prefix, b"one")
    before = fetch_near(uri).version
    put(prefix, b"two")
    assert bytes_of(fetch_near(uri)) == b"two"
    assert bytes_of(fetch_near(uri, before)) == b"one", "this node still has it"
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "another node"))
    with pytest.raises(ChangedError):
        fetch_near(uri, before)


def test_what_is_not_there_is_no_file_and_a_refusal_is_the_stores(
    prefix: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(prefix, b"one")
    with pytest.raises(FileNotFoundError):
        fetch_near(f"{uri}.none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"credentials are refused|access is denied"):
        fetch_near(uri)


def test_an_object_that_is_not_what_its_upload_wrote_down_is_refused(server: Server, prefix: str) -> None:
    uri = put(prefix, b"right")
    wrong = {"sha256": hashlib.sha256(b"right").hexdigest()}
    server.s3.put_object(Bucket=BUCKET, Key=f"{prefix}/a.bin", Body=b"wrong", Metadata=wrong)
    with pytest.raises(VerificationError, match=rf"{uri}: what was read is not what was written.*upload it again"):
        fetch_near(uri)


@pytest.mark.parametrize("size", [1_000, PART + 1_000])
def test_threads_and_processes_share_one_download(
    prefix: str, tmp_path: Path, through: Callable[[Choose], Proxy], size: int
) -> None:
    content = np.random.default_rng(0).bytes(size)
    uri, proxy = put(prefix, content), through(quiet)
    code = "import sys; from service.storage.near import fetch_near; print(fetch_near(sys.argv[1]).content)"
    processes = [
        subprocess.Popen([sys.executable, "-c", code, uri], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    with ThreadPoolExecutor(4) as pool:
        found = [near.content for near in pool.map(fetch_near, [uri] * 8)]
    paths = {str(path) for path in found} | {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == content
    assert len(proxy.sent("GET", "a.bin")) == -(-size // PART)


def test_a_copy_that_was_cut_off_on_this_machine_is_made_anew(prefix: str) -> None:
    near = fetch_near(put(prefix, b"one"))
    assert isinstance(near.content, Path)
    near.content.write_bytes(b"o")
    assert bytes_of(fetch_near(put(prefix, b"one"), near.version)) == b"one"


@pytest.mark.parametrize("size", [300_000, PART + 1_000])
def test_a_disk_without_room_takes_no_copy_and_the_bytes_come_all_the_same(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    content = np.random.default_rng(0).bytes(size)
    uri = put(prefix, content)
    with small_disk(tmp_path / "small", "200k"):
        monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "small"))
        assert fetch_near(uri).content == content, "the reserve is not touched"
        monkeypatch.setattr("service.storage.near.RESERVE", -(1 << 40))
        assert fetch_near(uri).content == content, "the disk is full in mid-write"
        assert sum(path.stat().st_size for path in (tmp_path / "small").rglob("*") if path.is_file()) == 0


def test_a_cache_that_cannot_be_made_is_done_without(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "file"))
    assert fetch_near(put(prefix, b"one")).content == b"one"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_call_is_got_over(
    prefix: str, through: Callable[[Choose], Proxy], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = put(prefix, b"one")
    if fault == "stall":
        monkeypatch.setattr(s3, "TIMEOUT_S", 1.0)
    first, get = nth(1, fault, "HEAD"), nth(1, fault, "GET")
    proxy = through(lambda request: first(request) or get(request))
    assert bytes_of(fetch_near(uri)) == b"one"
    assert proxy.faults() == [fault, fault]


# Clips.


def clip(prefix: str, folder: Path, seconds: float = 1.0) -> str:
    soundfile.write(folder / "a.flac", tone(seconds), 16_000)
    return put(prefix, (folder / "a.flac").read_bytes(), "a.flac")


def test_a_clip_in_a_store_sounds_as_the_file_and_as_a_part_of_it(
    prefix: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = clip(prefix, tmp_path)
    for part in ((), (0.25, 0.5)):
        np.testing.assert_array_equal(read_audio(uri, *part), read_audio(str(tmp_path / "a.flac"), *part))
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "a.flac/none"))
    np.testing.assert_array_equal(read_audio(uri), read_audio(str(tmp_path / "a.flac")))


def test_a_clip_that_has_gone_or_changed_is_named(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = clip(prefix, tmp_path)
    version = open_source(uri).version
    clip(prefix, tmp_path, seconds=2.0)
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "another node"))
    with pytest.raises(ManifestError, match=rf"{uri}: has changed since the job checked it"):
        read_audio(uri, version=version)
    Storage(f"s3://{BUCKET}/{prefix}").remove("a.flac")
    with pytest.raises(ManifestError, match=rf"{uri}: no such file"):
        read_audio(uri, version=version)


def test_the_check_of_rows_tells_a_missing_clip_from_a_store_that_is_away(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: Callable[[Choose], Proxy]
) -> None:
    uri, limits = clip(prefix, tmp_path), Limits.of(DataConfig())
    [(_, sound)] = examine(Row("a", uri, "x", "en", 2), limits)
    assert not isinstance(sound, Reject)
    assert Version.parse(sound.version).sha256 == hashlib.sha256((tmp_path / "a.flac").read_bytes()).hexdigest()
    [(_, missing)] = examine(Row("a", f"{uri}.none", "x", "en", 2), limits)
    assert (missing.kind, missing.reason) == ("missing", "no such file")  # type: ignore[union-attr]
    monkeypatch.setattr(retry, "PATIENCE_S", 0.5)
    through(at_random(1.0, seed=0, faults=("503",)))
    with pytest.raises(StorageError, match=r"object storage failed GetObject|failed HeadObject"):
        examine(Row("a", uri, "x", "en", 2), limits)
