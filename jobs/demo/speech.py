"""Speech from text, by espeak-ng: the same text and voice give the same samples, in any order and any process."""

import _ctypes
import ctypes
import threading
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
from numpy.typing import NDArray

PcmArray = NDArray[np.int16]

# Constants of espeak-ng's speak_lib.h.
SYNCHRONOUS_OUTPUT = 2
DO_NOT_EXIT = 0x8000
UTF8_TEXT = 1
RATE, PITCH, RANGE = 1, 3, 4

NOISE_SEED = 1

SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p, use_errno=False
)
_lock = threading.Lock()


class SpeechError(RuntimeError):
    """espeak-ng refused a voice or a text."""


@dataclass(frozen=True)
class Voice:
    """How a sentence is spoken.

    `name` is an accent of espeak-ng, with a variant where wanted: `en-us`, `en-gb-scotland+f3`, `es+croak`.
    """

    name: str
    rate_wpm: int = 160
    pitch: int = 50
    """0 is the lowest, 99 the highest."""
    pitch_range: int = 50
    """0 is monotone, 99 the liveliest."""


def synthesise(text: str, voice: Voice) -> tuple[PcmArray, int]:
    """Speak `text`.

    Returns:
        int16 samples (N,), mono, with a short silence at the end; and the sample rate in Hz (22,050).

    Raises:
        SpeechError: the voice is unknown, or nothing was spoken.
    """
    # espeak-ng keeps its phase and noise in static variables, which espeak_Terminate does not reset: the same call
    # twice gives different samples. Loading and unloading the library does reset them, and takes 4 ms.
    with _lock:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
        try:
            return _speak_once(library, text, voice)
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)


def _speak_once(library: ctypes.CDLL, text: str, voice: Voice) -> tuple[PcmArray, int]:
    chunks: list[bytes] = []

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int | None) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = SynthCallback(collect)
    data_path = espeakng_loader.get_data_path().encode()
    sample_rate_hz: int = library.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, data_path, DO_NOT_EXIT)
    library.espeak_SetSynthCallback(callback)
    # Breathy voices add random noise, which the library seeds by the clock.
    library.espeak_ng_SetRandSeed(NOISE_SEED)
    ctypes.CDLL(None).srand(NOISE_SEED)
    accent, _, variant = voice.name.partition("+")
    # A variant that does not exist would be left out without a word.
    known = not variant or (Path(data_path.decode()) / "voices" / "!v" / variant).is_file()
    if library.espeak_SetVoiceByName(voice.name.encode()) != 0 or not (accent and known):
        raise SpeechError(f"espeak-ng has no voice {voice.name!r}; give an accent and a variant, as in 'en-us+f3'")
    for parameter, value in ((RATE, voice.rate_wpm), (PITCH, voice.pitch), (RANGE, voice.pitch_range)):
        library.espeak_SetParameter(parameter, value, 0)
    encoded = text.encode()
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, UTF8_TEXT, None, None)
    library.espeak_Synchronize()
    pcm = np.frombuffer(b"".join(chunks), dtype=np.int16)
    if not pcm.any():
        raise SpeechError(f"espeak-ng spoke nothing for {text!r} with voice {voice.name!r}")
    return pcm, sample_rate_hz


def speech_extent(pcm: PcmArray, threshold: float = 0.02) -> tuple[int, int]:
    """First and last sample (exclusive) of the speech: where the amplitude passes `threshold` of its peak."""
    level = np.abs(pcm.astype(np.int32))
    loud = np.flatnonzero(level > threshold * int(level.max()))
    return int(loud[0]), int(loud[-1]) + 1
