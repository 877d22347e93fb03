"""The first stage finds every bad row of both manifests before a model is loaded, and knows the data by its content."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from engine import job, tone, write_csv

from jobs.prepare import prepare, split_file
from service.errors import ManifestError, SpecError
from service.spec.job import JobSpec

Rows = list[tuple[Any, ...]]
COLUMNS = ("path", "text", "language")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with four clips, a train.csv of three good rows and a val.csv of one."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", tone(0.5 + 0.25 * number), 16_000)
    write_csv(folder / "train.csv", [("0.wav", "one", "en"), ("1.wav", "dos", "es"), ("2.wav", "Three, four.", "en")])
    write_csv(folder / "val.csv", [("3.wav", "five", "en")])
    return folder


class Prepare:
    """Runs the stage on `data`."""

    def __init__(self, nano: Path, data: Path, root: Path) -> None:
        self.nano, self.data, self.root = nano, data, root

    def __call__(self, base: Path | None = None, *, bad_rows: str = "error", **training: Any) -> dict[str, Any]:
        spec = job(base or self.nano, self.data, self.root, {"data": {"bad_rows": bad_rows}}, **training)
        return self.with_spec(spec)

    def with_spec(self, spec: JobSpec) -> dict[str, Any]:
        splits = {"train": str(spec.training.train_csv), "val": str(spec.training.val_csv)}
        return prepare(spec, str(self.root), splits, spec.training.base_model)

    def stored(self, split: str = "train") -> list[dict[str, Any]]:
        return list(Dataset.from_file(str(self.root / split_file(split))))

    def faults(self, **settings: Any) -> list[str]:
        with pytest.raises(ManifestError) as caught:
            self(**settings)
        return [str(fault).replace(f"{self.data}/", "") for fault in caught.value.faults]


@pytest.fixture
def run(nano: Path, data: Path, tmp_path: Path) -> Prepare:
    return Prepare(nano, data, tmp_path / "root")


def test_rows_are_stored_with_absolute_paths_durations_and_token_counts(run: Prepare) -> None:
    result = run()
    assert [row["path"] for row in run.stored()] == [str(run.data / f"{number}.wav") for number in range(3)]
    assert [row["text"] for row in run.stored()] == ["one", "dos", "Three, four."]
    assert [row["language"] for row in run.stored()] == ["en", "es", "en"]
    assert [row["duration_s"] for row in run.stored()] == [0.5, 0.75, 1.0]
    assert [row["tokens"] for row in run.stored()] == [5, 5, 8]
    assert len(run.stored("val")) == 1
    assert result["train"]["rows"] == 3
    assert result["train"]["languages"] == {"en": 2, "es": 1}
    assert result["train"]["hours"] == pytest.approx(2.25 / 3600, abs=1e-4)
    assert result["val"]["rejected"] == 0
    assert (run.root / "rejects.csv").read_text() == "split,path,kind,reason\n"


BAD: list[tuple[tuple[str, ...], str]] = [
    (("gone.wav", "text", "en"), "no such file"),
    (("torn.wav", "text", "en"), "cannot be read as audio"),
    (("apple.m4a", "text", "en"), "convert it: ffmpeg -i"),
    (("empty.wav", "text", "en"), "holds no sound (0 frames)"),
    (("long.wav", "text", "en"), "30.5 s long; at most 30 s, so that nothing is cut off: split it"),
    (("0.wav", "", "en"), "text is empty"),
    (("0.wav", "   ", "en"), "text is empty"),
    (("", "text", "en"), "path is empty"),
    (("0.wav", "text", "xx"), "language 'xx' is unknown to the model"),
    (("0.wav", "text", "transcribe"), "language 'transcribe' is unknown to the model"),
    (("0.wav", "so " * 500, "en"), "text is 504 tokens long; the decoder takes 448"),
    (("0.wav", "stop<|endoftext|>", "en"), "text holds <|endoftext|>, which the model takes for a command"),
    (("0.wav", "text", "en", "more"), "has more fields than the header, by 1"),
]


@pytest.fixture
def bad_data(data: Path) -> Path:
    """The folder with a bad row of each kind in both CSVs."""
    (data / "torn.wav").write_bytes(b"RIFF")
    (data / "apple.m4a").write_bytes(bytes(100))
    soundfile.write(data / "empty.wav", np.zeros(0, np.float32), 16_000)
    soundfile.write(data / "long.wav", np.zeros(30 * 8_000 + 4_000, np.float32), 8_000)
    good: Rows = [("0.wav", "one", "en")]
    for name in ("train.csv", "val.csv"):
        write_csv(data / name, [*good, *(row for row, _ in BAD), *good])
    return data


def test_all_faults_of_both_manifests_come_at_once_with_their_lines(run: Prepare, bad_data: Path) -> None:
    faults = run.faults()
    assert len(faults) == 2 * len(BAD) + 1
    for name, found in (("train.csv", faults[: len(BAD)]), ("val.csv", faults[len(BAD) : -1])):
        for line, ((row, reason), fault) in enumerate(zip(BAD, found, strict=True), start=3):
            assert fault.startswith(f"{name}, line {line}: "), fault
            assert reason in fault
            assert row[0] in fault
            assert "null" not in fault, "a value that is not there is not shown"
    assert faults[-1].startswith(f"{2 * len(BAD)} rows cannot be used: mend the rows, or leave them out with --set")


def test_bad_rows_are_left_out_and_listed_on_demand(run: Prepare, bad_data: Path) -> None:
    result = run(bad_rows="reject")
    assert [row["text"] for row in run.stored()] == ["one", "one"]
    assert result["train"]["rejected"] == result["val"]["rejected"] == len(BAD)
    with open(run.root / "rejects.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [row["split"] for row in listed] == ["train"] * len(BAD) + ["val"] * len(BAD)
    for row, (bad, reason) in zip(listed, BAD * 2, strict=True):
        assert row["path"] == (str(bad_data / bad[0]) if bad[0] else "")
        assert reason in row["reason"]


def test_a_split_of_bad_rows_alone_is_refused_even_so(run: Prepare) -> None:
    write_csv(run.data / "val.csv", [("gone.wav", "text", "en")])
    faults = run.faults(bad_rows="reject")
    assert "val.csv, line 2" in faults[0]
    assert faults[-1] == "val.csv: has no usable row"


def test_very_many_faults_are_counted_and_a_hundred_shown(run: Prepare) -> None:
    write_csv(run.data / "train.csv", [("gone.wav", "text", "en")] * 2500)
    faults = run.faults()
    assert len(faults) == 102
    assert faults[100] == "...: and 2400 more rows"
    assert faults[101].startswith("2500 rows cannot be used")


def test_thirty_seconds_are_not_too_long(run: Prepare) -> None:
    soundfile.write(run.data / "0.wav", tone(30.0), 16_000)
    assert run()["train"]["rows"] == 3


def test_a_row_without_a_language_has_that_of_the_spec(run: Prepare) -> None:
    write_csv(run.data / "train.csv", [("0.wav", "hallo")], ("path", "text"))
    run(language="de")
    assert run.stored()[0]["language"] == "de"


def test_a_text_may_fill_the_decoder_to_its_last_position(run: Prepare) -> None:
    fits = " ".join(["so"] * 444)
    write_csv(run.data / "train.csv", [("0.wav", fits, "en")])
    run()
    assert run.stored()[0]["tokens"] == 448
    write_csv(run.data / "train.csv", [("0.wav", f"{fits} so", "en")])
    assert "449 tokens" in run.faults()[0]


def test_the_splits_hash_changes_with_every_part_of_a_row_and_with_nothing_else(
    run: Prepare, tmp_path: Path, nano: Path
) -> None:
    def digest(base: Path | None = None) -> str:
        return str(run(base)["train"]["sha256"])

    rows: Rows = [("0.wav", "one", "en"), ("1.wav", "two", "en")]
    write_csv(run.data / "train.csv", rows)
    first = digest()
    assert digest() == first

    changed = [
        [("0.wav", "One", "en"), rows[1]],
        [("0.wav", "one", "de"), rows[1]],
        [("2.wav", "one", "en"), rows[1]],
        [rows[1], rows[0]],
        rows[:1],
    ]
    seen = {first}
    for other in changed:
        write_csv(run.data / "train.csv", other)
        seen.add(digest())
    assert len(seen) == 1 + len(changed)

    write_csv(run.data / "train.csv", rows)
    soundfile.write(run.data / "1.wav", tone(0.5), 16_000)
    assert digest() not in seen, "another recording under the same name"
    soundfile.write(run.data / "1.wav", tone(0.75), 16_000)

    # The same content elsewhere, written in another way, is the same data.
    run.data.rename(tmp_path / "moved")
    run.data = tmp_path / "moved"
    absolute = [(str(run.data / name), text, language) for name, text, language in rows]
    write_csv(run.data / "train.csv", [(text, path) for path, text, _ in absolute], ("text", "path"))
    assert digest() == first


def test_sentences_on_both_sides_are_counted_without_regard_to_case(run: Prepare) -> None:
    write_csv(run.data / "val.csv", [("3.wav", "ONE", "en"), ("3.wav", "one", "en"), ("3.wav", "six", "en")])
    assert run()["sentences_in_both"] == 1


def test_an_unreadable_manifest_is_refused(run: Prepare) -> None:
    (run.data / "train.csv").write_text("file,text\na,b\n")
    assert run.faults() == [
        "train.csv: no column path (found: file, text); `whisper-jobs manifest build` reads such tables"
    ]


def test_a_model_that_is_not_there_is_named(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"training\.base_model.*nowhere"):
        run(tmp_path / "nowhere")


def test_progress_counts_rows_block_by_block(run: Prepare, nano: Path) -> None:
    write_csv(run.data / "train.csv", [("0.wav", f"{number}", "en") for number in range(1500)])
    seen: list[tuple[str, int]] = []
    splits = {"train": str(run.data / "train.csv")}
    spec = job(nano, run.data, run.root)
    prepare(spec, str(run.root), splits, str(nano), lambda split, rows: seen.append((split, rows)))
    assert seen == [("train", 1000), ("train", 1500)]
    assert len(run.stored()) == 1500
