"""Every reason to leave a row out, shown with a real file that is broken in that way."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from engine import tone

from jobs.manifest.examine import Limits, Sound, examine
from jobs.manifest.examine_all import take
from jobs.manifest.row import KINDS, Reject, Row, Segment
from jobs.manifest.store import Store
from jobs.tokens import Prompter
from service.spec.sections import DataConfig

RATE_HZ = 16_000
OUT_OF_ORDER = (Segment(2, 3, "a"), Segment(1, 2, "b"))
LIMITS = Limits.of(DataConfig(), decode=True)
HEADER = Limits.of(DataConfig())


def noise(seconds: float, channels: int = 1, rate_hz: int = RATE_HZ) -> Any:
    """Something to hear that does not compress to nothing."""
    generator = np.random.default_rng(0)
    samples_SC = 3000 * generator.standard_normal((round(seconds * rate_hz), channels))
    return samples_SC.round().astype(np.float32) / 32768  # whole steps: the same in every lossless format


def write(path: Path, seconds: float = 4.0, rate_hz: int = RATE_HZ, channels: int = 1, **form: str) -> Path:
    """Write a good file."""
    soundfile.write(path, noise(seconds, channels, rate_hz), rate_hz, **form)
    return path


def cut_in_the_middle(path: Path, share: float = 0.5) -> Path:
    """Take away the end of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def row(path: Path | str, text: str = "hello there", **claims: Any) -> Row:
    """A row that claims nothing but a path and a text."""
    return Row(Path(path).name, str(path), text, "en", **claims)


def verdict(row: Row, limits: Limits = LIMITS) -> Sound | Reject:
    """The one verdict on a row's audio."""
    ((_, found),) = examine(row, limits)
    return found


def lying_wav(folder: Path) -> Row:
    content = bytearray(write(folder / "a.wav").read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = struct.pack("<I", 2 * len(content))
    (folder / "a.wav").write_bytes(content)
    return row(folder / "a.wav")


def too_many_tokens(folder: Path) -> Row:
    return row(write(folder / "a.wav"), "word, " * 300)


def non_finite(folder: Path) -> Row:
    soundfile.write(folder / "a.wav", np.full(RATE_HZ, np.nan, np.float32), RATE_HZ, subtype="FLOAT")
    return row(folder / "a.wav")


def file_of(folder: Path, name: str, content: bytes) -> Row:
    (folder / name).write_bytes(content)
    return row(folder / name)


def samples_of(folder: Path, samples: Any, **claims: Any) -> Row:
    soundfile.write(folder / "a.wav", samples, RATE_HZ)
    return row(folder / "a.wav", **claims)


def no_wav_container(folder: Path) -> Row:
    return file_of(folder, "a.webm", b"\x1aE\xdf\xa3" + bytes(500))


Make = Callable[[Path], Row]
BROKEN: list[tuple[str, str, Make]] = [
    ("missing", "no such file", lambda f: row(f / "none.wav")),
    ("missing", "path is empty", lambda f: Row("", "", "hello", "en")),
    ("unreadable", "cannot be read as audio", lambda f: file_of(f, "a.wav", b"")),
    ("unreadable", "cannot be read as audio", lambda f: file_of(f, "a.flac", b"fLaC" + bytes(100))),
    ("unreadable", "cannot be read as audio", lambda f: file_of(f, "a.mp3", b"no sound at all " * 40)),
    ("unreadable", "no finite numbers", non_finite),
    ("container", "ffmpeg -i", lambda f: file_of(f, "a.m4a", b"\0\0\0\x20ftypM4A " + bytes(500))),
    ("container", "ffmpeg -i", lambda f: file_of(f, "a.mp4", b"\0\0\0\x20ftypisom" + bytes(500))),
    ("container", "ffmpeg -i", no_wav_container),
    ("missing", "give a path, s3:// or gs://", lambda f: row("http://127.0.0.1:9/a.wav")),
    ("truncated", "256,044 bytes, the file has 128,022", lambda f: row(cut_in_the_middle(write(f / "a.wav", 8)))),
    ("truncated", "its header promises", lying_wav),
    ("truncated", "its header promises", lambda f: row(cut_in_the_middle(write(f / "a.aiff")))),
    ("truncated", "its header promises", lambda f: row(cut_in_the_middle(write(f / "a.au")))),
    ("truncated", "lost sync", lambda f: row(cut_in_the_middle(write(f / "a.flac")))),
    ("truncated", "its header promises", lambda f: row(cut_in_the_middle(write(f / "a.mp3")))),
    ("truncated", "Ogg page", lambda f: row(cut_in_the_middle(write(f / "a.ogg"), 0.9))),
    ("truncated", "Ogg page", lambda f: row(cut_in_the_middle(write(f / "a.opus", format="OGG", subtype="OPUS")))),
    ("truncated", "its row ends at 9.00 s", lambda f: row(write(f / "a.wav"), duration_s=9.0)),
    ("truncated", "its row ends at 9.00 s", lambda f: row(write(f / "a.mp3"), duration_s=9.0)),
    ("truncated", "its row ends at 6.00 s", lambda f: row(write(f / "a.wav"), start_s=2.0, end_s=6.0)),
    ("truncated", "its segments end at 5.00 s", lambda f: row(write(f / "a.wav"), segments=(Segment(1, 5, "hi"),))),
    ("too-short", "0 frames", lambda f: samples_of(f, np.zeros(0, np.float32))),
    ("too-short", "0.050 s long", lambda f: samples_of(f, noise(0.05))),
    ("too-short", "at least 0.1 s", lambda f: row(write(f / "a.wav"), start_s=3.95)),
    ("too-long", "31.0 s long; at most 30 s", lambda f: samples_of(f, noise(31))),
    ("too-long", "30.5 s long", lambda f: row(write(f / "a.wav", 40), start_s=1.0, end_s=31.5)),
    ("silent", "dBFS", lambda f: samples_of(f, np.zeros(RATE_HZ, np.float32))),
    ("silent", "dBFS", lambda f: samples_of(f, noise(1) * 1e-3)),
    ("silent", "dBFS", lambda f: samples_of(f, np.full(RATE_HZ, 0.4, np.float32))),
    ("clipped", "at full scale", lambda f: samples_of(f, np.clip(tone(1) * 20, -1, 1))),
    ("bad-segments", "has no length", lambda f: row(write(f / "a.wav"), segments=(Segment(2, 2, "hi"),))),
    ("bad-segments", "stands after", lambda f: row(write(f / "a.wav"), segments=OUT_OF_ORDER)),
    ("bad-segments", "a segment of 35.", lambda f: row(write(f / "a.flac", 40), segments=(Segment(2, 37, "a"),))),
    ("empty-text", "text is empty", lambda f: row(write(f / "a.wav"), "")),
    ("text-in-no-speech", "and yet has a text", lambda f: row(write(f / "a.wav"), "hello", no_speech=True)),
    ("control-token", "<|endoftext|>", lambda f: row(write(f / "a.wav"), "hello<|endoftext|>")),
    ("too-many-tokens", "the decoder takes 448", too_many_tokens),
    ("language", "'xx' is unknown to the model", lambda f: replace(row(write(f / "a.wav")), language="xx")),
    ("bad-row", "as the reader said", lambda f: Row("", "", "", "en", fault=Reject("bad-row", "as the reader said"))),
    ("no-transcript", "no line", lambda f: Row("", "", "", "en", fault=Reject("no-transcript", "no line"))),
]  # fmt: skip


def judged(rows: list[Row], prompter: Prompter | None = None) -> Store:
    """A store with these rows looked at."""
    store = Store()
    for one in rows:
        for found in examine(one, LIMITS):
            take(found, store, prompter)
    store.reject_duplicates()
    return store


@pytest.fixture(scope="module")
def prompter(processor: Any) -> Prompter:
    return Prompter(processor.tokenizer, multilingual=True, max_tokens=448)


@pytest.mark.parametrize(
    ("kind", "reason", "make"), BROKEN, ids=[f"{index:02}-{kind}" for index, (kind, _, _) in enumerate(BROKEN)]
)
def test_a_row_that_cannot_be_used_is_left_out_with_its_reason(
    tmp_path: Path, prompter: Prompter, kind: str, reason: str, make: Make
) -> None:
    with judged([make(tmp_path)], prompter) as store:
        (remark,) = store.remarks()
        assert remark.kind == kind
        assert reason in remark.reason
        assert store.count() == 0


def test_every_reason_that_is_listed_has_been_shown() -> None:
    assert {kind for kind, _, _ in BROKEN} | {"duplicate", "conflict"} == set(KINDS)


def test_the_same_audio_with_the_same_text_is_kept_once(tmp_path: Path) -> None:
    names = [write(tmp_path / name) for name in ("b.wav", "a.flac", "c.wav")]
    with judged([row(names[0]), row(names[1]), row(names[2], "Hello, there!")]) as store:
        assert [(remark.name, remark.kind) for remark in store.remarks()] == [
            ("b.wav", "duplicate"),
            ("c.wav", "duplicate"),
        ]
        assert "a.flac" in next(store.remarks()).reason
        assert [Path(clip.path).name for clip in store.clips()] == ["a.flac"]


def test_the_same_audio_with_two_texts_is_kept_not_at_all(tmp_path: Path) -> None:
    with judged([row(write(tmp_path / "a.wav")), row(write(tmp_path / "b.wav"), "good bye")]) as store:
        assert [(remark.name, remark.kind) for remark in store.remarks()] == [
            ("a.wav", "conflict"),
            ("b.wav", "conflict"),
        ]
        assert "b.wav" in next(store.remarks()).reason


def test_a_row_with_several_faults_has_all_of_them_in_its_reason(tmp_path: Path) -> None:
    with judged([replace(row(tmp_path / "none.wav", ""), language="xx")]) as store:
        (remark,) = store.remarks()
        assert remark.kind == "missing"
        assert remark.reason == "no such file; text is empty; 'xx' is not a language code that Whisper knows"


GOOD: list[tuple[str, dict[str, Any]]] = [
    ("a.wav", {"subtype": "PCM_24"}),
    ("a.wav", {"subtype": "ULAW"}),
    ("a.wav", {"subtype": "ALAW"}),
    ("a.wav", {"subtype": "FLOAT"}),
    ("a.wav", {"subtype": "PCM_U8"}),
    ("a.wav", {"channels": 8}),
    ("a.wav", {"rate_hz": 8_000}),
    ("a.wav", {"rate_hz": 96_000, "channels": 8, "subtype": "PCM_24"}),
    ("a.flac", {"rate_hz": 96_000, "subtype": "PCM_24"}),
    ("a.mp3", {"rate_hz": 44_100, "channels": 2}),
    ("a.mp3", {"rate_hz": 8_000}),
    ("a.ogg", {"rate_hz": 22_050}),
    ("a.opus", {"format": "OGG", "subtype": "OPUS", "rate_hz": 48_000, "channels": 2}),
    ("a.opus", {"format": "OGG", "subtype": "OPUS", "rate_hz": 8_000}),
    ("a.aiff", {}),
    ("a.au", {"subtype": "ULAW", "rate_hz": 8_000}),
    ("a.caf", {}),
    ("a.wav", {"format": "RF64"}),
    ("a.wav", {"format": "WAVEX", "channels": 6}),
]


@pytest.mark.parametrize("limits", [LIMITS, HEADER], ids=["decode", "header"])
@pytest.mark.parametrize(("name", "form"), GOOD, ids=[f"{name}-{form}" for name, form in GOOD])
def test_a_good_file_of_any_format_is_taken(tmp_path: Path, name: str, form: dict[str, Any], limits: Limits) -> None:
    found = verdict(row(write(tmp_path / name, 1.5, **form), duration_s=1.5), limits)
    assert isinstance(found, Sound)
    assert found.duration_s == pytest.approx(1.5, abs=0.05)
    assert found.sample_rate_hz == form.get("rate_hz", RATE_HZ)
    assert (found.rms_dbfs is not None) == limits.decode


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.au", "a.mp3", "a.opus"])
def test_a_cut_file_is_noticed_from_its_bytes_alone(tmp_path: Path, name: str) -> None:
    form = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    found = verdict(row(cut_in_the_middle(write(tmp_path / name, **form), 0.8)), HEADER)
    assert isinstance(found, Reject)
    assert found.kind == "truncated"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", "a.aiff", "a.au", "a.caf"])
def test_no_cut_file_is_taken(tmp_path: Path, name: str, share: float) -> None:
    form = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    found = verdict(row(cut_in_the_middle(write(tmp_path / name, 8, **form), share)))
    assert isinstance(found, Reject)
    assert found.kind in ("truncated", "unreadable")


def test_a_wav_that_was_written_to_a_pipe_is_taken(tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "a.wav").read_bytes())
    for place in (4, content.index(b"data") + 4):
        content[place : place + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert isinstance(verdict(row(tmp_path / "a.wav")), Sound)


def test_an_mp3_with_a_tag_and_without_a_count_of_its_frames_is_taken(tmp_path: Path) -> None:
    content = write(tmp_path / "a.mp3").read_bytes()
    assert content.find(b"Xing") > 0 or content.find(b"Info") > 0
    (tmp_path / "tagged.mp3").write_bytes(b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + content)
    (tmp_path / "bare.mp3").write_bytes(content.replace(b"Xing", b"\0\0\0\0").replace(b"Info", b"\0\0\0\0"))
    assert isinstance(verdict(row(tmp_path / "tagged.mp3")), Sound)
    assert isinstance(verdict(row(tmp_path / "bare.mp3")), Sound)
    cut = verdict(row(cut_in_the_middle(tmp_path / "tagged.mp3", 0.9)))
    assert isinstance(cut, Reject)
    assert cut.kind == "truncated"


def test_silence_is_what_a_row_without_speech_may_be(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE_HZ, np.float32), RATE_HZ)
    with judged([row(tmp_path / "a.wav", "", no_speech=True)]) as store:
        assert [clip.no_speech for clip in store.clips()] == [True]


def test_only_the_clip_is_judged_and_not_the_rest_of_its_file(tmp_path: Path) -> None:
    soundfile.write(
        tmp_path / "a.flac", np.concatenate([np.zeros(RATE_HZ), noise(1)[:, 0], np.zeros(RATE_HZ)]), RATE_HZ
    )
    parts = [(0.0, 1.0, False), (1.0, 2.0, True), (2.0, None, False)]
    for start_s, end_s, heard in parts:
        found = verdict(row(tmp_path / "a.flac", start_s=start_s, end_s=end_s))
        assert isinstance(found, Sound) == heard
    whole = verdict(row(tmp_path / "a.flac"))
    assert isinstance(whole, Sound)
    assert whole.digest != verdict(row(tmp_path / "a.flac", start_s=1.0, end_s=2.0)).digest  # type: ignore[union-attr]


def test_audio_behind_a_uri_is_looked_at_like_a_file(tmp_path: Path) -> None:
    import fsspec

    for name, keep in (("good.wav", 1.0), ("cut.wav", 0.7)):
        content = write(tmp_path / "a.wav").read_bytes()
        with fsspec.open(f"memory://rejects/{name}", "wb") as file:
            file.write(content[: int(len(content) * keep)])
    assert verdict(row("memory://rejects/good.wav")) == verdict(row(write(tmp_path / "a.wav")))
    cut = verdict(row("memory://rejects/cut.wav"))
    assert isinstance(cut, Reject)
    assert cut.kind == "truncated"


def test_any_bytes_are_judged_without_an_exception(tmp_path: Path) -> None:
    """Good files with random bytes changed, and pure noise under every header."""
    generator = np.random.default_rng(3)
    good = []
    for name in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "RF64"):
        buffer = io.BytesIO()
        soundfile.write(buffer, noise(0.4), RATE_HZ, format=name)
        good.append(buffer.getvalue())
    for turn in range(140):
        content = bytearray(good[turn % len(good)])
        for _ in range(generator.integers(1, 30)):
            content[generator.integers(0, min(len(content), 200 if turn % 2 else len(content)))] = generator.integers(
                0, 256
            )
        (tmp_path / "a.bin").write_bytes(content[: generator.integers(1, len(content) + 1)])
        for limits in (LIMITS, HEADER):
            assert isinstance(verdict(row(tmp_path / "a.bin"), limits), Sound | Reject)
