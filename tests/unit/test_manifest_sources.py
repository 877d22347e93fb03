"""Each kind of source gives its clips with their transcripts, and is told by what is there."""

from __future__ import annotations

import csv
import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from engine import tone, write_csv

from jobs.manifest.build import build
from jobs.manifest.row import Row, Segment
from jobs.manifest.rows import read_rows
from jobs.manifest.sources import SOURCES, SourceOptions, kind_of, make_source
from service.errors import InputError, ManifestError
from service.spec.manifests import AUTO, KINDS


def record(path: Path, seconds: float = 0.3) -> Path:
    """Write a clip that sounds like no other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, 100 + zlib.crc32(str(path).encode()) * 7000 / 2**32), 16_000)
    return path


def rows_of(location: Path | str, **options: Any) -> dict[str, Row]:
    """A source's rows by name."""
    return {row.name: row for row in make_source(str(location), SourceOptions(**options)).rows()}


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_kind_of_source_can_be_asked_for() -> None:
    assert (AUTO, *SOURCES) == KINDS


def test_other_groups_of_a_name_become_columns(tmp_path: Path) -> None:
    record(tmp_path / "eve-turn_it_on.wav")
    record(tmp_path / "eve-noise.wav")
    pattern = r"(?P<speaker>\w+)-(?:(?P<no_speech>noise)|(?P<text>.+))"
    rows = rows_of(tmp_path, pattern=pattern)
    assert rows["eve-turn_it_on.wav"].text == "turn it on"
    assert rows["eve-turn_it_on.wav"].extras == {"speaker": "eve"}
    assert rows["eve-noise.wav"].no_speech
    assert rows["eve-noise.wav"].fault is None


def test_sidecar_files_of_every_kind_are_read(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav", "c.wav", "d.wav", "e.wav", "f.wav", "deep/g.wav", "h.wav", "i.wav"):
        record(tmp_path / name)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfturn it\r\n  on \n")
    (tmp_path / "b.wav.txt").write_text("turn it off")
    (tmp_path / "c.srt").write_text("1\n00:00:00,000 --> 00:00:00,100\nturn\n\n2\n00:00:00,150 --> 00:00:00,300\nit\n")
    (tmp_path / "d.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:00.200\nstop\n")
    whisper = {
        "text": " Bonjour",
        "language": "French",
        "speaker": "eve",
        "segments": [{"start": 0, "end": 0.2, "text": " Bonjour"}],
    }
    (tmp_path / "e.json").write_text(json.dumps(whisper))
    (tmp_path / "f.json").write_text('{"no_speech": true, "text": ""}')
    (tmp_path / "deep/g.json").write_text('"hello"')
    (tmp_path / "h.json").write_text("{")
    assert kind_of(str(tmp_path)) == "sidecars"
    rows = rows_of(tmp_path, language="de")
    assert (rows["a.wav"].text, rows["a.wav"].language) == ("turn it on", "de")
    assert rows["b.wav"].text == "turn it off"
    assert rows["c.wav"].text == "turn it"
    assert rows["c.wav"].segments == (Segment(0, 0.1, "turn"), Segment(0.15, 0.3, "it"))
    assert rows["d.wav"].segments == (Segment(0, 0.2, "stop"),)
    assert (rows["e.wav"].text, rows["e.wav"].language, rows["e.wav"].extras) == ("Bonjour", "fr", {"speaker": "eve"})
    assert rows["f.wav"].no_speech
    assert rows["deep/g.wav"].text == "hello"
    for name, reason in (("h.wav", "its transcript, h.json, cannot be read"), ("i.wav", "has no transcript beside it")):
        fault = rows[name].fault
        assert fault is not None
        assert fault.kind == "no-transcript"
        assert fault.reason.startswith(reason)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'file_name,sentence,locale,speaker\na.wav,"yes, sir",en-US,eve\nb.wav,oui,fr,\n'),
        ("t.tsv", "path\tsentence\tlocale\tspeaker\na.wav\tyes, sir\ten\teve\nb.wav\toui\tfr\t\n"),
        (
            "t.jsonl",
            '{"audio_filepath": "a.wav", "text": "yes, sir", "lang": "English", "speaker": "eve", "duration": 0.3}\n\n'
            '{"audio_filepath": "b.wav", "text": "oui", "lang": "fr", "speaker": null}\n',
        ),
    ],
)
def test_tables_are_read_by_the_names_that_their_columns_have(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text("\ufeff" + content)
    assert kind_of(str(tmp_path / name)) == "table"
    rows = rows_of(tmp_path / name)
    assert (rows["a.wav"].text, rows["a.wav"].language) == ("yes, sir", "en")
    assert (rows["b.wav"].text, rows["b.wav"].language) == ("oui", "fr")
    assert rows["a.wav"].path == str(tmp_path / "a.wav")
    assert rows["a.wav"].extras["speaker"] == "eve"
    assert rows["b.wav"].extras["speaker"] == ""


def test_a_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('path\tsentence\na.wav\t"hello\nb.wav\tsay "yes"\n')
    assert [row.text for row in rows_of(tmp_path / "t.tsv").values()] == ['"hello', 'say "yes"']


def test_a_tables_columns_and_root_can_be_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [("a.wav", "hello")], ("clip", "words"))
    rows = rows_of(tmp_path / "t.csv", path_column="Clip", text_column="words", audio_root=str(tmp_path / "clips"))
    assert rows["a.wav"].path == str(tmp_path / "clips/a.wav")
    with pytest.raises(ManifestError) as caught:
        rows_of(tmp_path / "t.csv")
    assert "--path-column" in str(caught.value)
    assert "--text-column" in str(caught.value)


def test_broken_lines_of_a_table_are_rows_with_a_fault(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"path": "a.wav", "text": "one"}\n{\n[1]\n{"path": "b.wav", "text": "two", "start_s": "x"}\n'
    )
    faults = [row.fault for row in make_source(str(tmp_path / "t.jsonl"), SourceOptions()).rows()]
    assert [fault.kind if fault else None for fault in faults] == [None, "bad-row", "bad-row", "bad-row"]
    (tmp_path / "t.csv").write_text('path,text\na.wav,"one" two\nb.wav,two,three\nc.wav,three\n')
    rows = list(make_source(str(tmp_path / "t.csv"), SourceOptions()).rows())
    assert [(row.text, row.fault.kind if row.fault else None) for row in rows[1:]] == [("", "bad-row"), ("three", None)]


def test_librispeechs_transcripts_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "84/121123"
    for number in range(3):
        record(folder / f"84-121123-000{number}.flac")
    (folder / "84-121123.trans.txt").write_text(
        "84-121123-0000 GO DO YOU HEAR\n84-121123-0001 BUT\n84-121123-0009 GONE\n"
    )
    record(tmp_path / "84/999/alone.flac")
    assert kind_of(str(tmp_path)) == "trans-txt"
    rows = rows_of(tmp_path)
    first = rows["84/121123/84-121123-0000.flac"]
    assert (first.text, first.extras) == ("GO DO YOU HEAR", {"speaker": "84", "chapter": "121123"})
    faults = {name: row.fault.kind for name, row in rows.items() if row.fault}
    assert faults == {
        "84/121123/84-121123-0009": "missing",
        "84/121123/84-121123-0002.flac": "no-transcript",
        "84/999/alone.flac": "no-transcript",
    }


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    """Two splits: audio in the tables themselves, and speakers."""
    import datasets
    import pyarrow as pa

    def split(first: int, count: int) -> Any:
        content = []
        for number in range(first, first + count):
            buffer = io.BytesIO()
            soundfile.write(buffer, tone(0.3, 200 + 20 * number), 16_000, format="FLAC")
            content.append({"bytes": buffer.getvalue(), "path": None if number % 2 else f"{number}.flac"})
        table = {"audio": content, "sentence": [f"sentence {number}" for number in range(first, first + count)]}
        table["client_id"] = [f"s{number % 3}" for number in range(first, first + count)]
        features = {
            "audio": datasets.Audio(),
            "sentence": datasets.Value("string"),
            "client_id": datasets.Value("string"),
        }
        # Straight from Arrow: datasets itself needs torchcodec to write audio (not to read it as it is stored).
        rows = pa.table(table, schema=datasets.Features(features).arrow_schema)
        return datasets.Dataset(rows, info=datasets.DatasetInfo(features=datasets.Features(features)))

    return datasets.DatasetDict({"train": split(0, 20), "test": split(20, 6)})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_dataset_is_read_with_its_audio_as_it_is_stored(tmp_path: Path, dataset: Any, form: str) -> None:
    if form == "saved":
        dataset.save_to_disk(tmp_path / "data")
    else:
        (tmp_path / "data").mkdir()
        for name, split in dataset.items():
            split.to_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet")
    assert kind_of(str(tmp_path / "data")) == "dataset"
    report = build(tmp_path / "data", tmp_path / "out", val_ratio=0.3)
    assert report.train + report.val == 26
    rows = table(tmp_path / "out/train.csv") + table(tmp_path / "out/val.csv")
    assert {row["client_id"] for row in rows} == {"s0", "s1", "s2"}
    assert {row["split"] for row in rows} == {"train", "test"}
    by_text = {row["text"]: tmp_path / "out" / row["path"] for row in rows}
    samples, _ = soundfile.read(by_text["sentence 7"])
    np.testing.assert_allclose(samples, tone(0.3, 340), atol=1e-4)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    build(tmp_path / "data", tmp_path / "out", val_ratio=0.3)
    assert {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()} == before


def test_a_folder_with_a_metadata_file_is_a_table(tmp_path: Path) -> None:
    for number in range(30):
        record(tmp_path / f"data/{number}.wav")
    write_csv(tmp_path / "data/metadata.csv", [(f"{n}.wav", f"sentence {n}") for n in range(30)], ("file_name", "text"))
    assert kind_of(str(tmp_path / "data")) == "table"
    report = build(tmp_path / "data", tmp_path / "out", val_ratio=0.3)
    assert report.train + report.val == 30
    assert not (tmp_path / "out/audio").exists(), "files that are there are not copied"


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    for location in (str(tmp_path / "none"), str(tmp_path / "a.wav")):
        with pytest.raises(InputError, match="SOURCE"):
            kind_of(location)
    assert kind_of("mozilla-foundation/common_voice_17_0") == "dataset"
    (tmp_path / "t.csv").write_text("path,text\n")
    for kind in SOURCES:
        if kind not in ("table", "dataset"):
            with pytest.raises(InputError, match="not a folder"):
                make_source(str(tmp_path / "t.csv"), SourceOptions(), kind)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "path;text\na.wav;hi\n", "has its columns parted by ';'; part them by commas"),
        ("a.tsv", "path,text\na.wav,hi\n", "has its columns parted by ','; part them by tabs"),
        ("b.csv", "", "is empty; give a CSV with the columns path and text"),
        ("c.csv", "path,text\n", "has a header and no row; give at least one clip"),
        ("d.jsonl", "", "is empty; give a line of JSON for each clip"),
        ("e.csv", "path,words\na.wav,hi\n", "has no column text or sentence .*; give --text-column"),
    ],
)
def test_a_table_that_cannot_be_read_says_what_check_says(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ManifestError, match=rf"{name}: {says}$"):
        build(tmp_path / name, tmp_path / "out")


def test_a_hub_id_that_cannot_be_had_is_an_error_of_the_input() -> None:
    with pytest.raises(InputError, match="cannot be loaded as a dataset"):
        make_source("no-such-owner/no-such-dataset", SourceOptions())


def test_a_folder_that_links_to_itself_is_walked_once(tmp_path: Path) -> None:
    record(tmp_path / "data/a.wav")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    assert list(rows_of(tmp_path / "data")) == ["a.wav"]


def test_a_long_recording_with_captions_becomes_windows_of_itself(tmp_path: Path) -> None:
    from jobs.audio import read_audio

    generator = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / f"data/talk{index}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * generator.standard_normal(70 * 16_000).astype(np.float32), 16_000)
        cues = [(2, 12, "one"), (13, 25, "two"), (26, 40, "three"), (55, 69, f"end {index}")]
        lines = [
            f"{n}\n00:00:{a:02},000 --> 00:0{b // 60}:{b % 60:02},000\n{t} {index}\n"
            for n, (a, b, t) in enumerate(cues)
        ]
        path.with_suffix(".srt").write_text("\n".join(lines))
    report = build(tmp_path / "data", tmp_path / "out", val_ratio=0.4)
    assert report.train + report.val == 36
    assert report.rejected == 0
    sides = [{row["path"] for row in table(tmp_path / f"out/{side}.csv")} for side in ("train", "val")]
    assert not sides[0] & sides[1], "the windows of a recording are on one side"
    rows = [row for side in ("train", "val") for row in read_rows(str(tmp_path / f"out/{side}.csv"), "en")]
    first = next(row for row in rows if row.text == "one 0 two 0")
    assert first.segments == (Segment(2, 12, "one 0"), Segment(13, 25, "two 0"))
    assert (first.start_s, first.end_s) == (1.8, 25.2)
    samples = read_audio(first.path, first.start_s, first.end_s)
    whole = read_audio(first.path)
    np.testing.assert_array_equal(samples, whole[round(1.8 * 16_000) : round(25.2 * 16_000)])
