"""`guard.csv` is checked, resolved, hashed and counted as the other CSVs are; its rows may be of other kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
from click.testing import CliRunner
from datasets import Dataset
from engine import job, tone, write_csv

from jobs.inputs import require_same_inputs
from jobs.prepare import prepare, split_file
from service.cli.main import cli
from service.errors import InputError, ManifestError
from service.plan import make_plan
from service.spec.flags import Override
from service.spec.job import JobSpec
from service.spec.load import LoadedSpec, load_spec
from service.storage import Storage

DATA = {"training": {"train_csv": "train.csv", "val_csv": "val.csv"}}
HEADER = ("path", "text", "language", "segments", "no_speech")


def load(*changes: tuple[str, Any], base: dict[str, Any] | None = None) -> LoadedSpec:
    """A spec of flags alone, on the CSVs of the current folder."""
    return load_spec(None, [Override(path, value, f"--set {path}") for path, value in changes], base=base or DATA)


def guarded(base: Path, data: Path, root: Path, bad_rows: str = "error") -> JobSpec:
    """A job on `data` with `data`/guard.csv as its guard."""
    return job(base, data, root, {"guard": {"csv": str(data / "guard.csv")}, "data": {"bad_rows": bad_rows}})


@pytest.mark.setting("guard.csv")
def test_a_relative_path_is_taken_from_the_current_folder_and_its_rows_are_planned(folder: Path) -> None:
    (folder / "guard.csv").write_text("path,text\na.wav,one\nb.wav,two\n")
    spec = load(("guard.csv", "guard.csv")).spec
    assert spec.guard.csv == str(folder / "guard.csv")
    assert make_plan(spec).rows == {"train": 1, "val": 1, "guard": 2}
    assert load().spec.guard.csv is None
    assert make_plan(load().spec).rows == {"train": 1, "val": 1}
    assert load().spec.sha256 != spec.sha256


def test_its_faults_come_with_all_others_at_once(folder: Path) -> None:
    words = ["--train-csv", "gone.csv", "--val-csv", "val.csv", "--lora-r", "0", "--set", "guard.csv=guard.csv"]
    result = CliRunner().invoke(cli, ["validate", *words, "--set", "guard.max_wer_increase=-1"])
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert any("--set guard.csv: " in line and "does not exist" in line for line in lines), lines
    for place in ("--train-csv", "--lora-r", "--set guard.max_wer_increase"):
        assert any(f"{place}: " in line for line in lines), lines
    (folder / "guard.csv").write_text("path,sentence\na.wav,one\n")
    with pytest.raises(InputError, match="has no column text"):
        load(("guard.csv", "guard.csv"))


def test_it_is_not_the_training_set_and_does_not_lie_in_the_outdir(folder: Path) -> None:
    with pytest.raises(InputError, match="is the training set itself, on which no loss shows"):
        load(("guard.csv", "./train.csv"))
    (folder / "run").mkdir()
    (folder / "run/guard.csv").write_text("path,text\na.wav,one\n")
    with pytest.raises(InputError, match=r"holds the guard\.csv, which a run may overwrite"):
        load(("guard.csv", "run/guard.csv"), ("training.outdir", "run"))
    with pytest.raises(InputError, match="holds credentials") as caught:
        load(("guard.csv", "s3://me:secret@bucket/guard.csv"))
    assert "secret" not in str(caught.value)


def test_settings_without_effect_are_pointed_out(folder: Path) -> None:
    (advice,) = [line for line in load(("guard.max_regressions", 3)).advice if "guard" in line]
    assert "has no effect without guard.csv" in advice
    evaluation = {"kind": "evaluate", "evaluation": {"model": "openai/whisper-tiny", "csv": "val.csv"}}
    (advice,) = [line for line in load(("guard.csv", "val.csv"), base=evaluation).advice if "guard" in line]
    assert "has no effect with kind evaluate" in advice


@pytest.mark.parametrize("section", ["guard", "export"])
def test_a_limit_that_stops_nothing_is_refused_or_pointed_out(folder: Path, section: str) -> None:
    given = [("guard.csv", "val.csv"), ("export.formats", ["ggml"])]
    path = f"{section}.max_wer_increase"
    with pytest.raises(InputError, match="5 is too large; give 1 or less"):
        load(*given, (path, 5))
    (advice,) = [line for line in load(*given, (path, 0.25)).advice if path in line]
    assert "0.25 lets the WER rise by 25 percentage points" in advice
    assert advice.endswith("0.02 is two")
    assert not [line for line in load(*given, (path, 0.2)).advice if path in line]


def test_a_run_is_gone_on_with_only_while_it_is_what_it_was(folder: Path) -> None:
    (folder / "guard.csv").write_text("path,text\na.wav,one\n")
    spec = guarded(folder, folder, folder / "run")
    storage = Storage(spec.root)
    require_same_inputs(spec, storage)
    storage.write_json("stages/prepare.json", {})
    require_same_inputs(spec, storage)
    (folder / "guard.csv").write_text("path,text\na.wav,two\n")
    with pytest.raises(InputError, match=r"guard\.csv.*has changed since"):
        require_same_inputs(spec, storage)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """train.csv and val.csv of a clip each, and clips for a guard: short, silent and of 61 s."""
    folder = tmp_path / "data"
    folder.mkdir()
    soundfile.write(folder / "a.wav", tone(1.0), 16_000)
    soundfile.write(folder / "silence.wav", 0 * tone(2.0), 16_000)
    soundfile.write(folder / "long.wav", tone(61.0, rate_hz=8_000), 8_000)
    for name in ("train.csv", "val.csv"):
        write_csv(folder / name, [("a.wav", name, "en")])
    return folder


def prepare_with(spec: JobSpec) -> dict[str, Any]:
    csvs = {"train": spec.training.train_csv, "val": spec.training.val_csv, "guard": spec.guard.csv}
    splits = {name: str(path) for name, path in csvs.items()}
    return prepare(spec, spec.root, splits, spec.training.base_model)


def test_rows_of_any_length_of_silence_and_with_segments_are_stored_whole(
    nano: Path, data: Path, tmp_path: Path
) -> None:
    segments = '[[0, 20, "uno dos"], [35, 61, "tres"]]'
    rows = [
        ("a.wav", "train.csv", "de", "", ""),
        ("silence.wav", "", "en", "", "true"),
        ("long.wav", "", "es", segments, ""),
        ("long.wav", "so " * 900, "en", "", ""),
    ]
    write_csv(data / "guard.csv", rows, HEADER)
    spec = guarded(nano, data, tmp_path / "run")
    found = prepare_with(spec)
    stored = list(Dataset.from_file(f"{spec.root}/{split_file('guard')}"))
    assert [row["duration_s"] for row in stored] == [1, 2, 61, 61]
    assert [row["text"] for row in stored][:3] == ["train.csv", "", "uno dos tres"]
    assert [row["no_speech"] for row in stored] == [False, True, False, False]
    assert stored[2]["segments"].startswith("[[0.0, 20.0, ")
    assert found["guard"]["rows"] == 4
    assert found["guard"]["languages"] == {"de": 1, "en": 2, "es": 1}
    assert len(found["guard"]["sha256"]) == 64
    assert found["sentences_in_both"] == 0, "train and val alone are compared"


def test_its_bad_rows_are_refused_with_those_of_the_others(nano: Path, data: Path, tmp_path: Path) -> None:
    for name in ("train.csv", "guard.csv"):
        rows = [("a.wav", "one", "en"), ("long.wav", "one", "en"), ("gone.wav", "one", "en"), ("a.wav", "one", "xx")]
        write_csv(data / name, rows)
    with pytest.raises(ManifestError) as caught:
        prepare_with(guarded(nano, data, tmp_path / "run"))
    faults = [str(fault).replace(f"{data}/", "") for fault in caught.value.faults]
    assert [fault.split(": ")[0] for fault in faults[:-1]] == [
        "train.csv, line 3", "train.csv, line 4", "train.csv, line 5", "guard.csv, line 4", "guard.csv, line 5",
    ]  # fmt: skip
    spec = guarded(nano, data, tmp_path / "run", "reject")
    found = prepare_with(spec)
    assert (found["train"]["rows"], found["guard"]["rows"]) == (1, 2)
    assert "guard," in (Path(spec.root) / "rejects.csv").read_text()
