"""Files are written whole or not at all, and what is in the making is never seen."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InputError, NotFoundError
from service.storage import PRIVATE_PREFIX, Storage


@pytest.fixture(params=["local", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty root of each kind."""
    if request.param == "memory":
        return Storage(f"memory://{tmp_path}/root")
    return Storage(f"file://{tmp_path}/root" if request.param == "file" else f"{tmp_path}/root")


def test_what_is_written_is_read_back(root: Storage) -> None:
    root.write_text("a/b/text.txt", "ñ\n")
    root.write_bytes("bytes.bin", b"\0\xff")
    root.write_json("values.json", {"b": [1.5, None], "a": "ñ"})
    assert root.read_bytes("a/b/text.txt") == "ñ\n".encode()
    assert root.read_bytes("bytes.bin") == b"\0\xff"
    assert root.read_json("values.json") == {"b": [1.5, None], "a": "ñ"}
    assert root.read_bytes("values.json").decode() == '{\n  "b": [\n    1.5,\n    null\n  ],\n  "a": "ñ"\n}\n'
    assert list(root.files()) == [("a/b/text.txt", 3), ("bytes.bin", 2), ("values.json", 48)]


def test_writing_again_replaces(root: Storage) -> None:
    root.write_text("a.txt", "long long long")
    root.write_text("a.txt", "short")
    assert root.read_bytes("a.txt") == b"short"
    assert len(list(root.files())) == 1


def test_existence_is_of_files_folders_and_the_root(root: Storage) -> None:
    assert not root.exists()
    assert not root.exists("a")
    root.write_text("a/b.txt", "x")
    assert root.exists()
    assert root.exists("a")
    assert root.exists("a/b.txt")
    assert not root.exists("a/b")


def test_a_missing_file_is_named(root: Storage) -> None:
    with pytest.raises(NotFoundError, match=r"root/a\.txt: no such file"):
        root.read_bytes("a.txt")
    root.write_text("a", "x")
    with pytest.raises(NotFoundError):
        root.read_bytes("a/b.txt")


def test_removing_takes_a_file_or_a_folder_with_all_in_it_and_nothing_else(root: Storage) -> None:
    for name in ("a/one.txt", "a/deep/two.txt", "ab.txt", "b.txt"):
        root.write_text(name, "x")
    root.remove("a")
    root.remove("b.txt")
    root.remove("was never there")
    assert [name for name, _ in root.files()] == ["ab.txt"]


def test_a_folder_is_replaced_as_a_whole(root: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "new.txt").write_text("new")
    (source / "deep/two.txt").write_text("two")
    root.put_folder(source, "out/adapter")
    assert dict(root.files()) == {"out/adapter/new.txt": 3, "out/adapter/deep/two.txt": 3}
    assert source.is_dir(), "the source stays"


def test_hashes_are_sha_256(root: Storage) -> None:
    content = bytes(range(256)) * 10_000
    root.write_bytes("a.bin", content)
    assert root.sha256("a.bin") == hashlib.sha256(content).hexdigest()


@given(
    st.dictionaries(st.from_regex(r"[a-z]{1,3}(/[a-z]{4}){0,2}", fullmatch=True), st.binary(max_size=20), max_size=6)
)
def test_files_lists_all_that_was_written_sorted(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes]
) -> None:
    root = Storage(str(tmp_path_factory.mktemp("files")))
    contents = {f"{name}.txt": content for name, content in contents.items()}
    for name, content in contents.items():
        root.write_bytes(name, content)
    assert list(root.files()) == sorted((name, len(content)) for name, content in contents.items())


class TestLocal:
    """What holds for a folder on this machine."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Storage:
        return Storage(str(tmp_path))

    def test_a_failed_write_leaves_the_old_file_and_no_other(
        self, root: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root.write_text("a.txt", "old")

        def full_disk(handle: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            root.write_text("a.txt", "new")
        monkeypatch.undo()
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}

    def test_a_failed_copy_leaves_the_old_folder_and_no_other(self, root: Storage, tmp_path: Path) -> None:
        root.write_text("adapter/a.txt", "old")
        with pytest.raises(FileNotFoundError):
            root.put_folder(tmp_path / "none", "adapter")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        assert (tmp_path / "adapter/a.txt").read_text() == "old"

    def test_replacing_a_folder_leaves_nothing_of_the_old_one(self, root: Storage, tmp_path: Path) -> None:
        root.write_text("adapter/old.txt", "old")
        (tmp_path / "source").mkdir()
        (tmp_path / "source/new.txt").write_text("new")
        root.put_folder(tmp_path / "source", "adapter")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]
        assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new.txt"]

    def test_files_have_the_rights_of_any_other_new_file(self, root: Storage, tmp_path: Path) -> None:
        (tmp_path / "plain.txt").write_text("x")
        root.write_text("ours.txt", "x")
        assert (tmp_path / "ours.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode

    def test_work_in_progress_is_not_listed(self, root: Storage, tmp_path: Path) -> None:
        root.write_text("a.txt", "x")
        (tmp_path / f"{PRIVATE_PREFIX}abc").mkdir()
        (tmp_path / f"{PRIVATE_PREFIX}abc/half.txt").write_text("x")
        (tmp_path / f"{PRIVATE_PREFIX}file").write_text("x")
        assert [name for name, _ in root.files()] == ["a.txt"]

    def test_paths_are_plain_for_a_folder_and_uris_elsewhere(self, root: Storage, tmp_path: Path) -> None:
        assert root.path("a/b") == f"{tmp_path}/a/b"
        assert Storage(f"file://{tmp_path}/").path("a") == f"{tmp_path}/a"
        assert root.local("a") == tmp_path / "a"
        assert Storage("memory://x/").path("a") == "memory://x/a"
        assert not Storage("memory://x").is_local

    def test_a_relative_root_is_taken_from_the_current_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Storage("runs/one").write_text("a.txt", "x")
        assert (tmp_path / "runs/one/a.txt").read_text() == "x"


def test_a_remote_root_is_no_local_folder() -> None:
    with pytest.raises(InputError, match="local or shared folder only"):
        Storage("memory://x").local()


@pytest.mark.parametrize("uri", ["nonesuch://bucket/x"])
def test_an_unknown_protocol_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="nonesuch"):
        Storage(uri)


def test_a_protocol_whose_driver_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(uri: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", no_driver)
    with pytest.raises(InputError, match="Install s3fs"):
        Storage("s3://bucket/x")
