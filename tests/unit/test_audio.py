"""Any audio that libsndfile opens becomes mono at 16 kHz; what it does not open is an error that says what to do."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
from engine import tone
from numpy.typing import NDArray

from jobs.audio import NOT_READ, SAMPLE_RATE_HZ, probe, read_audio
from service.errors import ManifestError

SECONDS, PITCH_HZ = 1.5, 440.0
FORMATS = [
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "FLOAT"),
    ("wav", "WAV", "ULAW"),
    ("flac", "FLAC", "PCM_16"),
    ("ogg", "OGG", "VORBIS"),
    ("opus", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
]
LOSSLESS = ("PCM_16", "PCM_24", "FLOAT")


def pitch_of(samples_S: NDArray[np.float32]) -> float:
    """The strongest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples_S * np.hanning(len(samples_S))))
    return float(spectrum.argmax() * SAMPLE_RATE_HZ / len(samples_S))


def check(samples_S: NDArray[np.float32]) -> None:
    """The test tone, whole, at 16 kHz."""
    assert samples_S.dtype == np.float32
    assert samples_S.ndim == 1
    assert samples_S.flags["C_CONTIGUOUS"]
    assert abs(len(samples_S) / SAMPLE_RATE_HZ - SECONDS) < 0.01
    assert pitch_of(samples_S) == pytest.approx(PITCH_HZ, abs=1)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 88_200, 96_000])
def test_every_rate_is_resampled_with_pitch_and_duration_kept(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.flac", tone(SECONDS, PITCH_HZ, rate_hz), rate_hz)
    samples_S = read_audio(str(tmp_path / "a.flac"))
    check(samples_S)
    assert np.abs(samples_S[1000:-1000]).max() == pytest.approx(0.5, abs=0.01)
    assert probe(str(tmp_path / "a.flac")).duration_s == pytest.approx(SECONDS, abs=1 / rate_hz)


@pytest.mark.parametrize(
    ("suffix", "container", "subtype", "channels"),
    [(*form, channels) for form in FORMATS for channels in (1, 2, 8) if channels <= 2 or form[1] != "MP3"],
)
def test_every_format_and_channel_count_is_read(
    tmp_path: Path, suffix: str, container: str, subtype: str, channels: int
) -> None:
    path, rate_hz = tmp_path / f"a.{suffix}", 48_000
    samples_SC = np.stack([tone(SECONDS, PITCH_HZ, rate_hz)] * channels, axis=1)
    soundfile.write(path, samples_SC, rate_hz, format=container, subtype=subtype)
    info = probe(str(path))
    assert (info.sample_rate_hz, info.channels, info.frames) == (rate_hz, channels, len(samples_SC))
    samples_S = read_audio(str(path))
    check(samples_S)
    assert np.abs(samples_S[1000:-1000]).max() == pytest.approx(0.5, abs=0.01 if subtype in LOSSLESS else 0.1)


def test_channels_are_averaged(tmp_path: Path) -> None:
    loud, silent = tone(0.5), np.zeros(8_000, np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([loud, silent], axis=1), SAMPLE_RATE_HZ, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(str(tmp_path / "a.wav")), loud / 2, atol=1e-7)


def test_audio_at_16_khz_is_not_resampled(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.5), SAMPLE_RATE_HZ, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(str(tmp_path / "a.wav")), tone(0.5))


def test_resampling_lets_nothing_above_8_khz_fold_back(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(0.5, 11_000, 44_100), 44_100)
    assert np.abs(read_audio(str(tmp_path / "a.wav"))[200:-200]).max() < 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    samples_S = tone(0.5)
    samples_S[100] = value
    soundfile.write(tmp_path / "a.wav", samples_S, SAMPLE_RATE_HZ, subtype="FLOAT")
    with pytest.raises(ManifestError, match=r"a\.wav: holds samples that are no finite numbers"):
        read_audio(str(tmp_path / "a.wav"))


@pytest.mark.parametrize("scheme", ["file://", "memory://"])
def test_a_uri_is_read_like_a_path(tmp_path: Path, scheme: str) -> None:
    import fsspec

    soundfile.write(tmp_path / "a.flac", tone(0.5), SAMPLE_RATE_HZ)
    content, uri = (tmp_path / "a.flac").read_bytes(), f"{scheme}{tmp_path}/a.flac"
    with fsspec.open(uri, "wb") as file:
        file.write(content)
    assert probe(uri) == probe(str(tmp_path / "a.flac"))
    np.testing.assert_array_equal(read_audio(uri), read_audio(str(tmp_path / "a.flac")))


@pytest.mark.parametrize("read", [probe, read_audio])
class TestErrors:
    """Each names the file and survives pickling, since it may be raised in another process."""

    def message(self, read: object, path: str) -> str:
        with pytest.raises(ManifestError) as caught:
            read(path)  # type: ignore[operator]
        again = pickle.loads(pickle.dumps(caught.value))
        assert type(again) is ManifestError
        assert str(again) == str(caught.value)
        assert again.faults == caught.value.faults
        assert caught.value.exit_code == 2
        assert path in str(caught.value)
        return str(caught.value)

    def test_a_missing_file_is_said_to_be_missing(self, read: object, tmp_path: Path) -> None:
        assert "no such file" in self.message(read, str(tmp_path / "a.wav"))

    def test_a_missing_uri_is_said_to_be_missing(self, read: object) -> None:
        assert "no such file" in self.message(read, "memory://nowhere/a.wav")

    @pytest.mark.parametrize("content", [b"", b"RIFF", b"no sound at all" * 100, b"fLaC" + bytes(100)])
    def test_a_corrupt_file_is_said_to_be_unreadable(self, read: object, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.flac").write_bytes(content)
        message = self.message(read, str(tmp_path / "a.flac"))
        assert "cannot be read as audio (" in message
        assert message.count("a.flac") == 1

    def test_a_folder_is_no_audio(self, read: object, tmp_path: Path) -> None:
        (tmp_path / "a.wav").mkdir()
        assert "cannot be read as audio" in self.message(read, str(tmp_path / "a.wav"))

    @pytest.mark.parametrize("suffix", NOT_READ)
    def test_a_container_that_is_not_read_comes_with_the_command_that_converts_it(
        self, read: object, tmp_path: Path, suffix: str
    ) -> None:
        path = tmp_path / f"my.clip{suffix}"
        path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
        message = self.message(read, str(path))
        assert f"ffmpeg -i {path} -ar 16000 -ac 1 {tmp_path}/my.clip.flac" in message

    def test_an_address_of_the_web_is_no_clips_place(self, read: object) -> None:
        message = self.message(read, "http://127.0.0.1:9/a.wav")
        assert "is a URI of a kind that is not known; give a path, s3:// or gs://" in message

    @pytest.mark.parametrize("uri", ["nonesuch://bucket/a.wav", "file:///nowhere/a.wav"])
    def test_a_uri_that_cannot_be_opened_is_named(self, read: object, uri: str) -> None:
        self.message(read, uri)
