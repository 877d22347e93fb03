"""Write the demo's folder of recordings: `python -m jobs.demo.make_speech DIRECTORY [--clips N] [--seed S]`.

A file's name carries its transcript and language: `0001__en__turn_the_kitchen_light_on.flac`. The voices are none that
nano Whisper was trained on, so that adapting it is worth while. As in a real folder the files differ in format, sample
rate and channels.
"""

import argparse
import random
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from jobs.demo.sentences import sample_sentences
from jobs.demo.speech import Voice, synthesise
from service.spec.counted import counted

SPANISH_SHARE = 0.2
# How often each sample rate comes, relative to the others. A whisper over a telephone's 8 kHz is the hardest.
SAMPLE_RATES_HZ = {8_000: 1, 16_000: 3, 22_050: 2, 32_000: 1, 44_100: 2, 48_000: 2}
FORMATS = ("wav", "flac")

# Whisperers, and accents that nano Whisper never heard.
VOICES = {
    "en": ("en-us+whisper", "en-gb-scotland+whisperf", "en-029+whisper", "en-029+f5", "en-gb-x-gbcwmd+m7"),
    "es": ("es-419+whisper", "es-419+whisperf", "es-419+f5"),
}
RATES_WPM = (140, 190)
PITCHES = (30, 70)


def demo_voice(language: str, rng: random.Random) -> Voice:
    """Draw a voice that nano Whisper has not heard."""
    return Voice(rng.choice(VOICES[language]), rng.randint(*RATES_WPM), rng.randint(*PITCHES))


def record(text: str, voice: Voice, rng: random.Random) -> tuple[NDArray[np.float32], int]:
    """Speak a sentence as some device recorded it.

    Returns:
        float32 samples (N,) or (N, 2) within -1..1, and the sample rate in Hz.
    """
    pcm, spoken_hz = synthesise(text, voice)
    (sample_rate_hz,) = rng.choices([*SAMPLE_RATES_HZ], weights=[*SAMPLE_RATES_HZ.values()])
    audio = soxr.resample(pcm.astype(np.float32) / 32768, spoken_hz, sample_rate_hz)
    # Resampling can pass full scale by a little, which a 16-bit file would clip.
    audio *= 10 ** (rng.uniform(-12, -3) / 20) / max(1.0, float(np.abs(audio).max()))
    if rng.random() < 0.25:
        # A stereo recording, the speaker a little off the middle.
        balance = rng.uniform(0.6, 0.9)
        audio = np.stack([audio, balance * audio], axis=1)
    return audio.astype(np.float32), sample_rate_hz


def make_speech(directory: Path, clips: int = 400, seed: int = 0) -> list[Path]:
    """Write `clips` recordings, no sentence twice; the same seed writes the same samples.

    Returns:
        The files, in the order of their numbers.

    Raises:
        ValueError: the grammar has too few sentences.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"demo-{seed}")
    spanish = round(clips * SPANISH_SHARE)
    lines = [("en", text) for text in sample_sentences("en", clips - spanish, seed)]
    lines += [("es", text) for text in sample_sentences("es", spanish, seed)]
    rng.shuffle(lines)
    paths = []
    for number, (language, text) in enumerate(lines, start=1):
        audio, sample_rate_hz = record(text, demo_voice(language, rng), rng)
        name = f"{number:04d}__{language}__{text.replace(' ', '_')}.{rng.choice(FORMATS)}"
        soundfile.write(directory / name, audio, sample_rate_hz, subtype="PCM_16")
        paths.append(directory / name)
    return paths


def main() -> None:
    """Parse, write, say how much."""
    parser = argparse.ArgumentParser(description="Write the demo's folder of recordings.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--clips", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    paths = make_speech(arguments.directory, arguments.clips, arguments.seed)
    print(f"{counted(len(paths), 'clip')} in {arguments.directory}")


if __name__ == "__main__":
    main()
