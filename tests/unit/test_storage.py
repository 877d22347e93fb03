"""Files are written whole or not at all, and what is in the making is never seen."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ExistsError, InputError, NotFoundError
from service.storage import PRIVATE_PREFIX, Storage


@pytest.fixture(params=["local", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """An empty root of each kind."""
    monkeypatch.setenv("WHISPER_JOBS_CACHE", str(tmp_path / "cache"))
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


def test_a_folder_is_replaced_as_a_whole(root: Storage) -> None:
    root.write_text("out/adapter/old.txt", "old")
    with root.new_folder("out/adapter") as folder:
        (folder / "deep").mkdir()
        (folder / "new.txt").write_text("new")
        (folder / "deep/two.txt").write_text("two")
    assert dict(root.files()) == {"out/adapter/new.txt": 3, "out/adapter/deep/two.txt": 3}


def test_a_folder_that_was_not_filled_to_the_end_leaves_the_old_one(root: Storage) -> None:
    root.write_text("adapter/a.txt", "old")
    with pytest.raises(KeyError), root.new_folder("adapter") as folder:
        (folder / "a.txt").write_text("new")
        raise KeyError
    assert root.read_bytes("adapter/a.txt") == b"old"
    assert [name for name, _ in root.files()] == ["adapter/a.txt"]


def test_a_file_that_was_not_filled_to_the_end_leaves_the_old_one(root: Storage) -> None:
    with root.new_file("data/train.arrow") as path:
        path.write_text("rows")
    with pytest.raises(KeyError), root.new_file("data/train.arrow") as path:
        path.write_text("half of the r")
        raise KeyError
    assert root.read_bytes("data/train.arrow") == b"rows"
    assert [name for name, _ in root.files()] == ["data/train.arrow"]


def test_of_two_writers_of_one_file_the_first_wins(root: Storage) -> None:
    root.create_bytes("manifest.json", b"first")
    with pytest.raises(ExistsError, match=r"manifest\.json.*is there already") as caught:
        root.create_bytes("manifest.json", b"second")
    assert caught.value.exit_code == 2
    assert root.read_bytes("manifest.json") == b"first"
    assert [name for name, _ in root.files()] == ["manifest.json"]


def test_a_fetched_file_or_folder_is_a_readable_copy(root: Storage) -> None:
    root.write_text("data/train.arrow", "rows")
    root.write_text("data/deep/val.arrow", "more")
    assert root.fetch("data/train.arrow").read_text() == "rows"
    assert root.fetch("data/train.arrow").name == "train.arrow"
    assert (root.fetch("data") / "deep/val.arrow").read_text() == "more"
    with pytest.raises(NotFoundError, match="data/test"):
        root.fetch("data/test.arrow")
    root.write_text("data/train.arrow", "ROWS")
    assert root.fetch("data/train.arrow").read_text() == "ROWS"


def test_a_piece_of_a_file_is_read(root: Storage) -> None:
    root.write_text("a.txt", "0123456789")
    assert root.read_bytes("a.txt", 3, 4) == b"3456"
    assert root.read_bytes("a.txt", 8) == b"89"


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

    def test_replacing_a_folder_leaves_nothing_of_the_old_one(self, root: Storage, tmp_path: Path) -> None:
        root.write_text("adapter/old.txt", "old")
        with root.new_folder("adapter") as folder:
            (folder / "new.txt").write_text("new")
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
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
    with pytest.raises(InputError, match="is no local folder"):
        Storage("memory://x").local()


@pytest.mark.parametrize("uri", ["nonesuch://bucket/x"])
def test_an_unknown_protocol_is_refused(uri: str) -> None:
    with pytest.raises(InputError, match="nonesuch"):
        Storage(uri)


def test_a_protocol_whose_driver_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(uri: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", no_driver)
    with pytest.raises(InputError, match=r'Install s3fs.*pip install "\.\[s3\]" in the checkout'):
        Storage("s3://bucket/x")
