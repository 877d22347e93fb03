"""`manifest check` finds every fault of any CSV in one run; `manifest stats` says what is in it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from disks import small_disk
from engine import tone, write_csv
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.main import main
from jobs.manifest.build import build
from jobs.manifest.check import check
from jobs.manifest.row import KINDS, Segment
from jobs.manifest.rows import format_segments, read_rows
from jobs.manifest.stats import stats
from service.errors import InputError, ManifestError, StorageError
from service.spec.utf8 import NOT_UTF8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 0.wav to 19.wav, of 0.5 to 2.4 s."""
    folder: Path = tmp_path_factory.mktemp("check")
    for number in range(20):
        soundfile.write(folder / f"{number}.wav", tone(0.5 + number / 10, 200 + 30 * number), 16_000)
    return folder


def faults(report: dict[str, Any]) -> list[tuple[int, str]]:
    """(line, kind) of each."""
    return [(fault["line"], fault["kind"]) for fault in report["faults"]]


def test_all_faults_are_found_in_one_run(folder: Path) -> None:
    content = (
        "\ufeffpath,text,language,duration_s,speaker,no_speech\r\n"
        '0.wav,"hello, ""you""",en,0.5,eve,\r\n'
        "none.wav,hello,,,,\r\n"
        "1.wav,hello, you,en,0.6,eve,,\r\n"
        '2.wav,"two\r\nlines",en,0.7,eve,\r\n'
        '3.wav,"torn" quotes,en,,,\r\n'
        "4.wav,,en,,,\r\n"
        "5.wav,,en,,,true\r\n"
        "6.wav,hello,xx,,,\r\n"
        "7.wav,hello,en,long,,\r\n"
        "8.wav,hello,en,99,,\r\n"
        "9.wav,привет,en,,,\r\n"
        "10.wav,你好,zh\r\n"
    ).encode() + b'11.wav,caf\xe9,fr,,,\r\n12.wav,"never closed,en,,,\r\n13.wav,lost,en,,,\r\n'
    (folder / "bad.csv").write_bytes(content)
    report = check([str(folder / "bad.csv")], rejects=folder / "rejects.csv")
    assert faults(report) == [
        (3, "missing"), (4, "bad-row"), (7, "bad-row"), (8, "empty-text"), (10, "language"), (11, "bad-row"),
        (12, "truncated"), (15, "bad-row"), (16, "bad-row"),
    ]  # fmt: skip
    assert [(warning["line"], warning["kind"]) for warning in report["warnings"]] == [(13, "script")]
    assert not report["ok"]
    (part,) = report["csvs"]
    assert part["usable"] == 5
    with open(folder / "rejects.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(int(row["line"]), row["kind"]) for row in listed] == faults(report)


def test_the_list_of_faults_never_takes_the_place_of_what_is_checked(folder: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [("none.wav", "hello")], ("path", "text"))
    (tmp_path / "link.csv").symlink_to(source)
    before = source.read_bytes()
    for rejects in (source, tmp_path / "link.csv"):
        with pytest.raises(InputError, match=r"--rejects: .* is one of the CSVs to check; give another file"):
            check([str(folder / "none.csv"), str(source)], rejects=rejects)
    assert source.read_bytes() == before


@pytest.mark.parametrize(("place", "says"), [(".", "is a folder; give a file"), ("/dev/null", "is no ordinary file")])
def test_a_place_for_faults_that_cannot_be_written_is_refused(folder: Path, place: str, says: str) -> None:
    with pytest.raises(InputError, match=f"--rejects: .* {says}"):
        check([str(folder / "none.csv")], rejects=folder / place)


def test_a_list_of_faults_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "a.csv", [(f"none{n}.wav", "hello") for n in range(1000)], ("path", "text"))
    check([str(source)], rejects=tmp_path / "new/folder/rejects.csv")
    assert len((tmp_path / "new/folder/rejects.csv").read_text().splitlines()) == 1001
    with small_disk(tmp_path / "disk", "16k"):
        rejects = tmp_path / "disk/rejects.csv"
        rejects.write_text("of last time")
        with pytest.raises(StorageError, match="No space left on device"):
            check([str(source)], rejects=rejects)
        assert [path.read_text() for path in (tmp_path / "disk").iterdir()] == ["of last time"]


def test_a_temporary_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_csv(
        tmp_path / "a.csv", [(f"{'none/' * 500}{n}.wav", "hello") for n in range(6000)], ("path", "text")
    )
    with small_disk(tmp_path / "disk", "64k"):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "disk"))
        with pytest.raises(StorageError, match="disk: the disk is full; make room, or set TMPDIR"):
            check([str(source)], processes=1)


def test_what_two_manifests_share_is_counted(folder: Path) -> None:
    rows = [(f"{number}.wav", f"text {number}", f"s{number % 3}") for number in range(20)]
    write_csv(folder / "train.csv", rows[:12], ("path", "text", "speaker"))
    write_csv(
        folder / "val.csv",
        [*rows[12:], ("3.wav", "Text 3.", "s1"), ("13.wav", "text 4", "s0")],
        ("path", "text", "speaker"),
    )
    report = check([str(folder / "train.csv"), str(folder / "val.csv")], group="speaker")
    assert report["overlap"] == {"transcript": 2, "audio": 1, "group": 3, "recording": 0}
    assert not report["ok"]
    # 3.wav is in both with one text, 13.wav twice in val.csv with two.
    assert faults(report) == [(3, "conflict"), (10, "duplicate"), (11, "conflict")]
    assert {fault["csv"] for fault in report["faults"]} == {str(folder / "val.csv")}


def test_what_build_writes_passes_the_check(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path, val_ratio=0.3)
    report = check([str(tmp_path / "train.csv"), str(tmp_path / "val.csv")])
    assert report["ok"], report
    assert report["faults"] == []


@pytest.mark.parametrize("look", [check, stats])
def test_files_that_are_no_manifests_are_all_named(folder: Path, look: Callable[[list[str]], Any]) -> None:
    (folder / "semicolons.csv").write_text("path;text\na;b\n")
    (folder / "utf16.csv").write_bytes("path,text\na,b\n".encode("utf-16"))
    (folder / "empty.csv").write_text("")
    (folder / "header.csv").write_text("path,text\n")
    names = ("none.csv", "empty.csv", "header.csv", "semicolons.csv", "utf16.csv")
    with pytest.raises(ManifestError) as caught:
        look([str(folder / name) for name in names])
    messages = [fault.message for fault in caught.value.faults]
    assert messages == [
        "no such file",
        "is empty; give a CSV with the columns path and text",
        "has a header and no row; give at least one clip",
        "has its columns parted by ';'; part them by commas",
        NOT_UTF8,
    ]


def test_a_language_or_a_column_that_there_is_not_is_refused(folder: Path) -> None:
    one = write_csv(folder / "a.csv", [("0.wav", "hello", "eve", "hall")], ("path", "text", "Speaker", "room"))
    two = write_csv(folder / "b.csv", [("1.wav", "hello", "en")], ("path", "text", "language"))
    sources = [str(one), str(two)]
    told = "is no column of the CSVs by which clips can be told apart (those that there are: speaker, room)"
    with pytest.raises(ManifestError) as caught:
        check(sources, group="speeker", language="qq")
    assert [(fault.where, fault.value) for fault in caught.value.faults] == [
        ("--language", "qq"),
        ("--group", "speeker"),
    ]
    assert caught.value.faults[1].message == told
    with pytest.raises(ManifestError) as caught:
        stats(sources, speaker="language", language="english")
    assert [fault.where for fault in caught.value.faults] == ["--language", "--speaker"]
    with pytest.raises(ManifestError, match=r"those that there are: none\)"):
        check([str(two)], group="speaker")
    assert check(sources, group=" Speaker")["ok"] is False  # both say hello
    assert list(stats(sources, speaker="Speaker")["total"]["speakers"]["most"]) == ["eve"]


CELL = st.one_of(
    st.sampled_from(["0.wav", "1.wav", "none.wav", "", "hello", "en", "xx", "0.5", "-1", "nan", "true", "{", "s3://b/c"]),
    st.just('[[0,1,"a"]]'),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
)  # fmt: skip
NAMES = ["path", "text", "language", "duration_s", "start_s", "end_s", "segments", "no_speech", "speaker", "", "x"]


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A CSV as somebody's script may have written it: quotes, newlines, ragged rows, odd line ends, broken bytes."""
    columns = ["path", "text", *draw(st.lists(st.sampled_from(NAMES[2:]), max_size=5))]
    rows = draw(st.lists(st.lists(CELL, max_size=8), max_size=6))
    out = io.StringIO()
    end = draw(st.sampled_from(["\n", "\r\n"]))
    writer = csv.writer(out, lineterminator=end, quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])))
    writer.writerows([columns, *rows])
    content = bytearray(draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + out.getvalue().encode())
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + 1] = draw(st.sampled_from([b'"', b",", b"\n", b"\r", b"\xff", b"\0", b""]))
    return bytes(content)


@given(hostile())
@example(b'path,text\n"' + b"a" * 200_000)
@example(b"path,text,segments\n0.wav,hi," + b"[" * 100_000 + b"\n")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_any_csv_is_checked_or_refused_and_never_breaks_the_check(folder: Path, content: bytes) -> None:
    (folder / "hostile.csv").write_bytes(content)
    try:
        report = check([str(folder / "hostile.csv")])
    except ManifestError as error:
        assert str(folder / "hostile.csv") in str(error)
        return
    (part,) = report["csvs"]
    assert set(part["reasons"]) <= set(KINDS)
    assert part["rows"] <= part["usable"] + sum(part["reasons"].values())
    assert all("\n" not in fault["kind"] for fault in report["faults"])
    json.dumps(report, ensure_ascii=False).encode()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    texts=st.lists(TEXT, min_size=1, max_size=8),
    times=st.lists(st.floats(0, 1000, width=32), min_size=2, max_size=2, unique=True),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_segments_and_texts_come_back_from_a_csv(folder: Path, texts: list[str], times: list[float]) -> None:
    start_s, end_s = sorted(round(value, 3) for value in times)
    texts = [" ".join(text.split()) for text in texts]
    segments = tuple(Segment(start_s, end_s, text) for text in texts if text)
    rows = [("0.wav", text, format_segments(segments)) for text in texts]
    path = write_csv(folder / "written.csv", rows, ("path", "text", "segments"))
    found = list(read_rows(str(path), "en", strict=False))
    spoken = " ".join(segment.text for segment in segments)
    assert [row.text for row in found] == [text or spoken for text in texts]  # no text of its own: the segments'
    assert all(row.segments == segments for row in found)


def test_statistics_add_up(folder: Path) -> None:
    rows = [
        ("0.wav", "Turn it on.", "en", "0.5", "eve", ""), ("1.wav", "turn it off", "en", "0.6", "ann", ""),
        ("2.wav", "你好", "zh", "", "ann", ""), ("3.wav", "", "en", "0.8", "", "true"),
    ]  # fmt: skip
    columns = ("path", "text", "language", "duration_s", "speaker", "no_speech")
    one = write_csv(folder / "one.csv", rows, columns)
    two = write_csv(folder / "two.csv", [("19.wav", "stop", "2.0", "2.4")], ("path", "text", "start_s", "end_s"))
    report = stats([str(one), str(two)])
    first, total = report["csvs"][str(one)], report["total"]
    assert (first["clips"], first["no_speech"], total["clips"]) == (4, 1, 5)
    assert first["hours"] == pytest.approx(2.6 / 3600, abs=1e-4)
    assert total["length_s"]["min"] == 0.4
    assert total["length_s"]["p50"] == 0.6
    assert total["length_s"]["max"] == 0.8
    assert {code: entry["clips"] for code, entry in total["languages"].items()} == {"en": 4, "zh": 1}
    assert first["speakers"]["count"] == 2
    assert list(first["speakers"]["most"]) == ["ann", "eve"]
    assert (first["vocabulary"]["words"], first["vocabulary"]["different"], first["vocabulary"]["once"]) == (8, 6, 4)
    assert first["vocabulary"]["most"]["turn"] == 2


def test_the_commands_print_tables_and_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "build", str(folder), "--out", str(tmp_path), "--val-ratio", "0.3", "-o", "json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["train"] + built["val"] == 20
    csvs = [str(tmp_path / "train.csv"), str(tmp_path / "val.csv")]
    assert main(["manifest", "check", *csvs]) == 0
    assert "rows, " in capsys.readouterr().out
    assert main(["manifest", "stats", *csvs, "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["clips"] == 20
    assert main(["manifest", "stats", *csvs]) == 0
    assert "20, 0.01 h" in capsys.readouterr().out
    with open(csvs[0], "a") as file:
        file.write("none.wav,hello,en,1.0\n")
    assert main(["manifest", "check", *csvs]) == 2
    assert "none.wav: no such file" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["build", "SOURCE", "--out", "OUT"], ["check", "SOURCE"]])
def test_limits_that_are_out_of_their_range_are_all_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    given = [{"SOURCE": str(folder), "OUT": str(tmp_path / "out")}.get(word, word) for word in words]
    limits = ["--silence-dbfs=5", "--min-duration-s=99", "--clipped-share=1.5"]
    assert main(["manifest", *given, *limits]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 3 faults",
        "  --min-duration-s: 99 is too large; give less than 30",
        "  --silence-dbfs: 5 is too large; give 0 or less",
        "  --clipped-share: 1.5 is too large; give 1 or less",
    ]


def test_one_of_a_kind_is_said_in_the_singular(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(write_csv(folder / "a.csv", [("0.wav", "привет", "en", "eve")], ("path", "text", "language", "speaker")))
    assert main(["manifest", "check", one]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{one}  1 row, 1 usable; 1 warning"
    assert main(["manifest", "stats", one]) == 0
    said = capsys.readouterr().out
    assert "en 1 clip 0.00 h" in said
    assert "1 clips" not in said


def test_check_counts_tokens_with_the_models_own_tokenizer(
    folder: Path, nano: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_csv(folder / "long.csv", [("0.wav", "word, " * 300), ("1.wav", "hi<|en|>")], ("path", "text"))
    assert main(["manifest", "check", str(folder / "long.csv"), "--base-model", str(nano), "-o", "json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert [fault["kind"] for fault in report["faults"]] == ["too-many-tokens", "control-token"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("nope", "is neither a folder on this machine nor a hub id"),
        ("whisper-smal", "did you mean 'openai/whisper-small'?"),
        ("./nowhere", "is no folder on this machine"),
        (".", "holds no "),
    ],
)
def test_a_model_that_cannot_be_one_is_said_so_at_once(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: str,
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(folder / "a.csv", [("0.wav", "hello")], ("path", "text"))
    assert main(["manifest", "check", str(folder / "a.csv"), "--base-model", model]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f'error: --base-model: "{model}" ')
    assert says in told


def test_a_model_that_cannot_be_read_is_named_as_it_was_given(
    folder: Path, nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((nano / "config.json").read_bytes())
    assert main(["manifest", "check", str(folder / "a.csv"), "--base-model", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f'error: --base-model: "{tmp_path}" is no complete Whisper checkpoint')


def test_many_rows_are_looked_at_in_processes_with_the_same_result(folder: Path, tmp_path: Path) -> None:
    rows = [(f"{number % 20}.wav" if number % 7 else "none.wav", f"text {number}") for number in range(700)]
    path = write_csv(folder / "many.csv", rows, ("path", "text"))
    reports = [check([str(path)], processes=processes, keep_duplicates=True) for processes in (1, 2)]
    assert reports[0] == reports[1]
    assert reports[0]["csvs"][0]["reasons"] == {"missing": 100}
