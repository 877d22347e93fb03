"""Synthesised speech is repeatable, and a wrong voice is an error."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from jobs.demo.speech import SpeechError, Voice, speech_extent, synthesise

# A breathy voice draws random noise: the hardest to repeat.
BREATHY = Voice("en-us+whisper", rate_wpm=170, pitch=40)


def test_samples_do_not_depend_on_what_was_spoken_before() -> None:
    first, sample_rate_hz = synthesise("turn the light on", BREATHY)
    synthesise("busca la radio", Voice("es+f2"))
    again, _ = synthesise("turn the light on", BREATHY)
    assert sample_rate_hz == 22_050
    assert first.dtype == np.int16
    assert np.array_equal(first, again)


def test_samples_do_not_depend_on_the_process_or_the_second() -> None:
    # espeak-ng seeds its noise by the clock, in seconds; a new process takes longer than that to start and speak.
    code = "import time; from tests.unit.test_demo_speech import digest; time.sleep(1); print(digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


def digest() -> str:
    """A hash of one breathy sentence."""
    return hashlib.sha256(synthesise("turn the light on", BREATHY)[0].tobytes()).hexdigest()


def test_rate_and_pitch_change_the_speech() -> None:
    slow, _ = synthesise("turn the light on", Voice("en-us", rate_wpm=120))
    fast, _ = synthesise("turn the light on", Voice("en-us", rate_wpm=240))
    high, _ = synthesise("turn the light on", Voice("en-us", rate_wpm=240, pitch=90))
    assert len(fast) < 0.7 * len(slow)
    assert not np.array_equal(fast[: len(high)], high[: len(fast)])


@pytest.mark.parametrize("name", ["xx", "en-us+nobody", "+f1", ""])
def test_an_unknown_voice_is_refused(name: str) -> None:
    with pytest.raises(SpeechError, match="no voice"):
        synthesise("turn the light on", Voice(name))


def test_a_text_without_words_is_refused() -> None:
    with pytest.raises(SpeechError, match="spoke nothing"):
        synthesise("  ", Voice("en-us"))


def test_extent_leaves_out_the_silence_around_the_speech() -> None:
    pcm = np.zeros(1000, dtype=np.int16)
    pcm[300:700] = 8000
    assert speech_extent(pcm) == (300, 700)
