"""`manifest build`: file names become manifests, a sentence keeps its side, what is left out is listed and why."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from disks import small_disk
from engine import tone, write_csv

from jobs.manifest.build import BuildReport, build
from jobs.manifest.rows import read_rows
from jobs.manifest.sources import SourceOptions
from service.errors import InputError, ManifestError, StorageError


def record(path: Path, seconds: float = 0.1) -> Path:
    """Write a short clip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Every clip sounds different: the same audio twice is a duplicate.
    soundfile.write(path, tone(seconds, 100 + zlib.crc32(str(path).encode()) * 7000 / 2**32), 16_000)
    return path


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def both(folder: Path) -> list[dict[str, str]]:
    """The rows of train.csv and val.csv."""
    return table(folder / "train.csv") + table(folder / "val.csv")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder of forty clips, sentence_0 to sentence_39."""
    folder = tmp_path / "clips"
    for number in range(40):
        record(folder / f"sentence_{number}.wav")
    return folder


def built(folder: Path, names: list[str], **options: str) -> dict[str, tuple[str, str]]:
    """(text, language) by file name, for files of those names among forty others."""
    for name in names:
        record(folder / name)
    build(folder, folder.parent / "out", options=SourceOptions(**options))  # type: ignore[arg-type]
    found = {Path(row["path"]).name: (row["text"], row["language"]) for row in both(folder.parent / "out")}
    return {name: found[name] for name in names}


@pytest.mark.parametrize(
    ("name", "text", "language"),
    [
        ("turn_it_on.wav", "turn it on", "en"),
        ("0001__turn_it_on.wav", "turn it on", "en"),
        ("es__abre_la_puerta.flac", "abre la puerta", "es"),
        ("0001__es__abre_la_puerta.wav", "abre la puerta", "es"),
        ("0001__haw__aloha.wav", "aloha", "haw"),
        ("clip-7__it's_on, really.wav", "it's on, really", "en"),
        ("_on_.wav", "on", "en"),
        ("0001__ñandú_corre.wav", "ñandú corre", "en"),
        ("a.b.c.wav", "a.b.c", "en"),
    ],
)
def test_the_default_pattern_takes_four_forms_of_names(clips: Path, name: str, text: str, language: str) -> None:
    assert built(clips, [name]) == {name: (text, language)}


def test_a_pattern_of_ones_own_finds_text_and_language(clips: Path) -> None:
    names = ["DE-guten_tag-7.wav", "FR-bonjour-8.wav"]
    found = built(clips, names, pattern=r"(?:(?P<language>[A-Z]{2})-)?(?P<text>[^-]+)(?:-\d+)?")
    assert found == {"DE-guten_tag-7.wav": ("guten tag", "de"), "FR-bonjour-8.wav": ("bonjour", "fr")}
    assert table(clips.parent / "out/rejects.csv") == []


def test_a_pattern_without_text_in_a_name_leaves_it_out(clips: Path) -> None:
    record(clips / "wordless.wav")
    build(clips, clips.parent, options=SourceOptions(pattern=r"(?P<text>sentence.+)|wordless"))
    assert table(clips.parent / "rejects.csv") == [
        {"path": "wordless.wav", "kind": "no-transcript", "reason": "its name holds no text"}
    ]


def test_names_without_a_language_get_the_one_given(clips: Path) -> None:
    assert built(clips, ["0001__hola.wav", "en__hello.wav"], language="es") == {
        "0001__hola.wav": ("hola", "es"),
        "en__hello.wav": ("hello", "en"),
    }


def test_sub_folders_are_searched_and_other_files_passed_over(clips: Path) -> None:
    record(clips / "deep/er/in_a_folder.WAV")
    (clips / "notes.txt").write_text("no audio")
    report = build(clips, clips.parent / "out")
    assert report.train + report.val == 41
    assert report.rejected == 0


def test_rows_lead_to_the_clips_wherever_the_manifest_is(clips: Path, tmp_path: Path) -> None:
    for out in (clips, tmp_path / "a/b/out", tmp_path):
        build(clips, out)
        rows = [row for name in ("train.csv", "val.csv") for row in read_rows(str(out / name), "en")]
        assert sorted(Path(row.path).resolve() for row in rows) == sorted(clips.glob("*.wav"))
        assert not any(Path(row["path"]).is_absolute() for row in both(out))


def test_a_folder_may_be_moved_with_its_manifest(clips: Path, tmp_path: Path) -> None:
    build(clips, clips / "manifest")
    shutil.move(clips, tmp_path / "moved")
    rows = list(read_rows(str(tmp_path / "moved/manifest/train.csv"), "en"))
    assert all(Path(row.path).is_file() for row in rows)


def test_durations_and_hours_are_those_of_the_clips(clips: Path) -> None:
    soundfile.write(clips / "long.flac", tone(2.5, rate_hz=44_100), 44_100)
    report = build(clips, clips)
    durations = {Path(row["path"]).name: row["duration_s"] for row in both(clips)}
    assert durations["long.flac"] == "2.500"
    assert durations["sentence_0.wav"] == "0.100"
    assert report.train_hours + report.val_hours == pytest.approx((2.5 + 40 * 0.1) / 3600)


def test_the_same_folder_gives_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    record(clips / "no match__here__at__all.wav")
    for out in ("one", "two"):
        build(clips, tmp_path / out)
    for name in ("train.csv", "val.csv", "rejects.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    build(clips, tmp_path / "one")
    assert (tmp_path / "one/train.csv").read_bytes() == (tmp_path / "two/train.csv").read_bytes()


def sides(folder: Path) -> dict[str, str]:
    """Side by text."""
    return {row["text"]: side for side in ("train", "val") for row in table(folder / f"{side}.csv")}


def test_a_sentence_keeps_its_side_when_files_are_added_or_taken_away(clips: Path, tmp_path: Path) -> None:
    build(clips, tmp_path / "before", val_ratio=0.3)
    for number in range(40, 80):
        record(clips / f"sentence_{number}.wav")
    for number in range(10):
        (clips / f"sentence_{number}.wav").unlink()
    build(clips, tmp_path / "after", val_ratio=0.3)
    before, after = sides(tmp_path / "before"), sides(tmp_path / "after")
    assert len(before.keys() & after.keys()) == 30
    assert all(before[text] == after[text] for text in before.keys() & after.keys())


def test_no_sentence_is_on_both_sides(clips: Path, tmp_path: Path) -> None:
    for number in range(40):
        record(clips / f"speaker2__Sentence_{number}.wav")
        record(clips / f"deep/sentence__{number}.wav")
        (clips / f"deep/sentence__{number}.wav").rename(clips / f"deep/3__es__sentence_{number}.wav")
    build(clips, tmp_path / "out", val_ratio=0.4)
    train, val = (
        {row["text"].casefold() for row in table(tmp_path / "out" / name)} for name in ("train.csv", "val.csv")
    )
    assert train
    assert val
    assert not train & val


def test_another_seed_gives_another_split(clips: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        build(clips, tmp_path / str(seed), val_ratio=0.5, seed=seed)
    assert sides(tmp_path / "1") != sides(tmp_path / "2")


def test_what_is_left_out_is_listed_with_its_reason(clips: Path, tmp_path: Path) -> None:
    record(clips / "thirty_one_seconds.wav", 31)
    record(clips / "just_thirty.wav", 30)
    (clips / "torn.flac").write_bytes(b"fLaC\0\0")
    (clips / "apple.m4a").write_bytes(bytes(100))
    soundfile.write(clips / "empty.wav", np.zeros(0, np.float32), 16_000)
    record(clips / "a__b__c__d.wav")
    record(clips / "0001__xx__wrong_language.wav")
    record(clips / "___.wav")
    report = build(clips, tmp_path / "out")
    reasons = {row["path"]: row["reason"] for row in table(tmp_path / "out/rejects.csv")}
    assert report.rejected == len(reasons) == 7
    assert reasons["thirty_one_seconds.wav"] == "31.0 s long; at most 30 s, so that nothing is cut off: split it"
    assert reasons["torn.flac"].startswith("cannot be read as audio")
    assert "ffmpeg -i" in reasons["apple.m4a"]
    assert reasons["empty.wav"] == "holds no sound (0 frames)"
    assert reasons["a__b__c__d.wav"].startswith("its name does not match the pattern")
    assert reasons["0001__xx__wrong_language.wav"] == "'xx' is not a language code that Whisper knows"
    assert reasons["___.wav"].startswith("its name does not match the pattern")
    kept = {Path(row["path"]).name for row in both(tmp_path / "out")}
    assert len(kept) == 41
    assert "just_thirty.wav" in kept


def test_a_file_name_that_is_not_utf_8_is_left_out_and_named(clips: Path, tmp_path: Path) -> None:
    shutil.copy(clips / "sentence_0.wav", os.fsencode(clips) + b"/caf\xe9.wav")
    assert build(clips, tmp_path / "out").rejected == 1
    assert table(tmp_path / "out/rejects.csv") == [
        {"path": r"caf\xe9.wav", "kind": "bad-row", "reason": "its name is not UTF-8"}
    ]


def test_a_name_with_commas_quotes_and_newlines_survives_the_csv(clips: Path) -> None:
    name = 'say "yes",\nplease.wav'
    assert built(clips, [name], pattern="(?s)(?P<text>.+)") == {name: ('say "yes", please', "en")}
    rows = list(read_rows(str(clips.parent / "out/train.csv"), "en")) + list(
        read_rows(str(clips.parent / "out/val.csv"), "en")
    )
    assert clips / name in {Path(os.path.normpath(row.path)) for row in rows}


def test_progress_counts_every_file(clips: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = build(clips, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 40) for number in range(1, 41)]
    assert isinstance(report, BuildReport)


def test_all_bad_arguments_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        build(
            tmp_path / "none",
            tmp_path,
            options=SourceOptions(pattern="(", language="english"),
            kind="names",
            val_ratio=1.0,
        )
    assert [fault.where for fault in caught.value.faults] == ["SOURCE", "--pattern", "--val-ratio", "--language"]
    with pytest.raises(InputError, match=r"--pattern.*no named group"):
        build(tmp_path, tmp_path, options=SourceOptions(pattern=".*"))


def test_a_folder_without_audio_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="holds no audio"):
        build(tmp_path, tmp_path)


def test_a_side_without_clips_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    record(tmp_path / "clips/alone.wav")
    with pytest.raises(ManifestError, match=r"leaves no (train|validation) clip: 1 usable of 1 row"):
        build(tmp_path / "clips", tmp_path / "out")
    (tmp_path / "clips/alone.wav").write_bytes(b"")
    with pytest.raises(ManifestError, match=r"left out: alone\.wav, cannot be read"):
        build(tmp_path / "clips", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_replaced_by_what_is_built_from_it(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    source = write_csv(tmp_path / "data/train.csv", [(path, path.stem) for path in clips.iterdir()], ("path", "text"))
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source.parent)
    for out, overwrite in ((source.parent, False), (tmp_path / "link", False), (source.parent, True)):
        with pytest.raises(InputError, match=r"^SOURCE: .*lies where --out writes train\.csv; give another folder$"):
            build(source, out, overwrite=overwrite, progress=no_row)
    assert list(source.parent.iterdir()) == [source]
    assert source.read_bytes() == before


def no_row(done: int, total: int) -> None:
    """Where a command is refused, no row has been looked at before."""
    raise AssertionError(f"row {done} was looked at")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val.csv", "path,text\na.wav,by hand\n"),
        ("train.csv", "path,text,language,duration_s\na.wav,by hand,en,1.0\n"),
        ("rejects.csv", "csv,line,path,kind,reason\n"),
        ("warnings.csv", "\xff"),
    ],
)
def test_a_csv_that_no_build_has_written_is_replaced_only_when_told(
    clips: Path, tmp_path: Path, name: str, content: str
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text(content, encoding="latin-1")
    with pytest.raises(InputError, match=rf"{name}: was not written by a build; give another folder, or --overwrite"):
        build(clips, mine.parent, progress=no_row)
    assert [path.read_text(encoding="latin-1") for path in mine.parent.iterdir()] == [content]
    build(clips, mine.parent, overwrite=True)
    again = {path.name: path.read_bytes() for path in mine.parent.iterdir()}
    build(clips, mine.parent)
    assert {path.name: path.read_bytes() for path in mine.parent.iterdir()} == again


def test_a_build_that_was_killed_in_its_last_moment_is_made_again(clips: Path, tmp_path: Path) -> None:
    build(clips, tmp_path / "out")
    for left in (["rejects.csv", "warnings.csv"], ["rejects.csv", "warnings.csv", "train.csv"], ["rejects.csv"]):
        for path in (tmp_path / "out").iterdir():
            if path.name not in left:
                path.unlink()
        assert build(clips, tmp_path / "out").train


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("file", "is a file; give a folder"),
        ("file/below", "lies below {}, a file; give another folder"),
        ("/proc/whisper-jobs", "cannot be written (No such file or directory); give another folder"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_decoded(
    clips: Path, tmp_path: Path, out: str, says: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError) as caught:
        build(clips, tmp_path / out, progress=no_row)
    (fault,) = caught.value.faults
    assert (fault.where, fault.value) == ("--out", str(tmp_path / out))
    assert fault.message == says.format(tmp_path / "file")


def test_a_full_or_read_only_disk_is_said_so_before_anything_is_decoded(clips: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4k"), pytest.raises(StorageError, match=r"No space left.*make room, or give"):
        (tmp_path / "disk/full").write_bytes(bytes(4096))
        build(clips, tmp_path / "disk", progress=no_row)
    with small_disk(tmp_path / "other", "1m"):
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "other"], check=True)
        with pytest.raises(StorageError, match=r"Read-only file system\); give another folder"):
            build(clips, tmp_path / "other/out", progress=no_row)
