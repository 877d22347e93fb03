"""A manifest is a CSV as spreadsheets and scripts write them; what is no such CSV is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine import write_csv
from hypothesis import given
from hypothesis import strategies as st

from jobs.manifest.row import Row
from jobs.manifest.rows import read_rows
from service.errors import ManifestError
from service.spec.utf8 import NOT_UTF8


def rows_of(path: Path, content: str | bytes) -> list[Row]:
    """What is read of a file of that content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(str(path), "en"))


def fault_of(path: Path, content: str | bytes) -> str:
    """The one thing that is wrong with it."""
    with pytest.raises(ManifestError) as caught:
        rows_of(path, content)
    assert str(path) in str(caught.value)
    (fault,) = caught.value.faults
    return str(fault).replace(str(path), "CSV")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "train.csv"


def test_paths_are_taken_relative_to_the_manifest(source: Path) -> None:
    rows = rows_of(source, "path,text\na.wav,one\nsub/b.wav,two\n/elsewhere/c.wav,three\ns3://bucket/d.wav,four\n")
    folder = source.parent
    expected = [f"{folder}/a.wav", f"{folder}/sub/b.wav", "/elsewhere/c.wav", "s3://bucket/d.wav"]
    assert [row.path for row in rows] == expected


def test_paths_of_a_remote_manifest_are_taken_relative_to_its_address() -> None:
    import fsspec

    with fsspec.open("memory://bucket/data/val.csv", "wt") as file:
        file.write("path,text\nclips/a.wav,one\n")
    assert [row.path for row in read_rows("memory://bucket/data/val.csv", "en")] == ["memory://bucket/data/clips/a.wav"]


def test_a_manifest_given_relative_to_the_current_folder_has_absolute_paths(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of(source, "path,text\na.wav,one\n")
    monkeypatch.chdir(source.parent)
    assert [row.path for row in read_rows("train.csv", "en")] == [str(source.parent / "a.wav")]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('path,text\na.wav,"hello, you"\n', ["hello, you"]),
        ('path,text\na.wav,"he said ""hi"""\n', ['he said "hi"']),
        ('path,text\na.wav,"two\nlines"\nb.wav,one\n', ["two\nlines", "one"]),
        ("path,text\r\na.wav,one\r\nb.wav,two\r\n", ["one", "two"]),
        ("path,text\ra.wav,one\r", ["one"]),
        ("path,text\na.wav,one", ["one"]),
        ("path,text\n\n\na.wav,one\n\n", ["one"]),
        ("\ufeffpath,text\na.wav,ñandú\n", ["ñandú"]),
        ("Path , TEXT\na.wav,  one  \n", ["one"]),
        ("id,text,speaker,path\n7,one,eve,a.wav\n", ["one"]),
        ('path,text\na.wav,a 5" nail\n', ['a 5" nail']),
        ("path,text\na.wav,one,,\n", ["one"]),
        ("path,text\na.wav\n", [""]),
        ("path,text\n", []),
    ],
    ids=["comma", "quotes", "newline", "CRLF", "CR", "no last newline", "blank lines", "BOM", "case and blanks",
         "more columns", "quote within", "empty fields to the right", "short row", "header alone"],
)  # fmt: skip
def test_every_dialect_that_spreadsheets_write_is_read(source: Path, content: str, texts: list[str]) -> None:
    rows = rows_of(source, content)
    assert [row.text for row in rows] == texts
    assert {row.path for row in rows} <= {str(source.parent / name) for name in ("a.wav", "b.wav")}
    assert all(row.fault is None for row in rows)


def test_the_language_column_wins_over_the_default_where_it_is_filled(source: Path) -> None:
    rows = rows_of(source, "path,text,language\na.wav,one,ES\nb.wav,two,\nc.wav,three,  de \nd.wav,four\n")
    assert [row.language for row in rows] == ["es", "en", "de", "en"]


def test_a_comma_without_quotes_is_the_rows_fault(source: Path) -> None:
    faulty, good = rows_of(source, "path,text\na.wav,hello, you\nb.wav,hello\n")
    assert faulty.fault
    assert faulty.fault.kind == "bad-row"
    assert faulty.fault.reason.startswith("has more fields than the header, by 1")
    assert good.fault is None


def test_a_row_knows_the_line_in_which_it_ends(source: Path) -> None:
    rows = rows_of(source, 'path,text\na.wav,"two\nlines"\n\nb.wav,one\n')
    assert [row.line for row in rows] == [3, 5]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@given(texts=st.lists(TEXT, max_size=5))
def test_whatever_csv_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = write_csv(tmp_path_factory.getbasetemp() / "any.csv", [("a.wav", text) for text in texts], ("path", "text"))
    assert [row.text for row in read_rows(str(path), "en")] == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\none\n", "CSV: has no column path (it has text); add it"),
        (
            "file,transcript\na,one\n",
            "CSV: has no column path and no column text (it has file, transcript); "
            "`whisper-jobs manifest build` reads such tables",
        ),
        ("", "CSV: is empty; give a CSV with the columns path and text"),
        ("path,text,Text\na.wav,one,two\n", "CSV: has the column text twice; keep one"),
        ('path,text\na.wav,one\nb.wav,"two\n\n', "CSV, line 3: is not valid CSV: unexpected end of data"),
        ('path,text\na.wav,"one" two\n', "CSV, line 2: is not valid CSV: ',' expected after '\"'"),
        (b"path,text\na.wav,caf\xe9\n", f"CSV, line 2: {NOT_UTF8}"),
        (
            b"path,text\n" + b"a.wav,hello\n" * 3000 + b"b.wav,\xff\n",
            f"CSV, line 3002: {NOT_UTF8}",
        ),
        ("path,text\na.wav,one\n".encode("utf-16"), f"CSV, line 1: {NOT_UTF8}"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_place(source: Path, content: str | bytes, message: str) -> None:
    assert fault_of(source, content) == message


def test_a_missing_manifest_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.csv: no such file"):
        list(read_rows(str(tmp_path / "none.csv"), "en"))
    with pytest.raises(ManifestError, match="cannot be read"):
        list(read_rows(str(tmp_path), "en"))
