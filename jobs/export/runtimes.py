"""The runtimes that the formats are made for, each behind one small seam. A runtime is imported where it is opened.

Every one transcribes in two ways. `comparable`: greedy, temperature 0, no fallback, no timestamps, the same tokens
suppressed, the clip padded with silence to its window, so that what differs is the file. `default`: as a user of that
runtime gets it who gives the language alone. (Left alone, openai-whisper and faster-whisper pad a short clip's features
with zeros, which are louder than silence: a model hears that, and their texts differ.)
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Clip = np.ndarray[Any, Any]
"""Mono audio, float32 at 16 kHz, (samples,)."""

SAMPLE_RATE_HZ = 16_000
WINDOW_S = 30


@dataclass(frozen=True)
class Decoding:
    """What makes transcripts comparable.

    Attributes:
        multilingual: whether the model takes a language.
        suppress: whether tokens that no one speaks (brackets, notes) are left out, as the generation config says.
        suppress_blank: whether a transcript may not begin with a blank or be empty, as it says.
        max_new_tokens: longest transcript.
        threads: CPU threads.
    """

    multilingual: bool
    suppress: bool
    suppress_blank: bool
    max_new_tokens: int
    threads: int


class Runtime(Protocol):
    """A model that a runtime has opened."""

    compute_type: str
    """What its matrices are computed in here."""

    def comparable(self, clip: Clip, language: str) -> str:
        """The text, greedy."""

    def default(self, clip: Clip, language: str) -> str:
        """The text, by the runtime's defaults."""


class WhisperCpp:
    """whisper.cpp, by pywhispercpp."""

    def __init__(self, folder: Path, decoding: Decoding) -> None:
        from pywhispercpp.model import Model

        path = next(folder.glob("ggml-model-*.bin"))
        self.compute_type = path.stem.removeprefix("ggml-model-")
        common: dict[str, Any] = {"n_threads": decoding.threads, "print_progress": False, "print_realtime": False}
        self._default = Model(str(path), redirect_whispercpp_logs_to=None, **common)
        self._greedy = Model(
            str(path),
            redirect_whispercpp_logs_to=None,
            **common,
            greedy={"best_of": 1},
            temperature=0.0,
            temperature_inc=0.0,
            no_speech_thold=1.0,  # no probability is above it: nothing is taken for silence
            no_context=True,
            no_timestamps=True,
            single_segment=True,
            suppress_nst=decoding.suppress,
            suppress_blank=decoding.suppress_blank,
            max_tokens=decoding.max_new_tokens,
        )

    def comparable(self, clip: Clip, language: str) -> str:
        return "".join(segment.text for segment in self._greedy.transcribe(clip, language=language))

    def default(self, clip: Clip, language: str) -> str:
        return " ".join(segment.text for segment in self._default.transcribe(clip, language=language))


class FasterWhisper:
    """faster-whisper on CTranslate2."""

    def __init__(self, folder: Path, decoding: Decoding) -> None:
        from faster_whisper import WhisperModel

        self._model = WhisperModel(str(folder), device=_ctranslate2_device(), cpu_threads=decoding.threads)
        self.compute_type = str(self._model.model.compute_type)
        prompt = 4 if decoding.multilingual else 2  # start and no-timestamps; language and task between them
        self._greedy = {
            "beam_size": 1,
            "temperature": 0.0,
            "compression_ratio_threshold": None,
            "log_prob_threshold": None,
            "no_speech_threshold": None,
            "condition_on_previous_text": False,
            "without_timestamps": True,
            "suppress_tokens": [-1] if decoding.suppress else [],
            "suppress_blank": decoding.suppress_blank,
            # CTranslate2 decodes no further than half of what it is given as the whole length, prompt and all.
            "max_new_tokens": min(2 * decoding.max_new_tokens, self._model.max_length) - prompt,
        }

    def comparable(self, clip: Clip, language: str) -> str:
        return self._text(_to_window(clip), language, self._greedy)

    def default(self, clip: Clip, language: str) -> str:
        return self._text(clip, language, {})

    def _text(self, clip: Clip, language: str, options: dict[str, Any]) -> str:
        segments, _ = self._model.transcribe(clip, language=language, **options)
        return "".join(segment.text for segment in segments)


def _ctranslate2_device() -> str:
    """`auto`, but the CPU where a GPU lacks the libraries of CUDA 12 that CTranslate2 was built with.

    torch brings those of CUDA 13, and without its own CTranslate2 fails in the midst of the first clip.
    """
    import ctypes

    for library in ("libcublas.so.12", "libcudnn.so.9"):
        try:
            ctypes.CDLL(library)
        except OSError:
            return "cpu"
    return "auto"


class OpenAIWhisper:
    """openai-whisper."""

    def __init__(self, folder: Path, decoding: Decoding) -> None:
        import torch
        import whisper

        torch.set_num_threads(decoding.threads)
        self._model = whisper.load_model(str(folder / "model.pt"))
        on_gpu = self._model.device.type == "cuda"
        self.compute_type = "float16" if on_gpu else "float32"
        self._common = {"fp16": on_gpu, "verbose": None}
        self._greedy = whisper.DecodingOptions(
            without_timestamps=True,
            suppress_tokens="-1" if decoding.suppress else "",
            suppress_blank=decoding.suppress_blank,
            sample_len=decoding.max_new_tokens,
            fp16=on_gpu,
        )

    def comparable(self, clip: Clip, language: str) -> str:
        import whisper

        mel_MF = whisper.log_mel_spectrogram(_to_window(clip), self._model.dims.n_mels).to(self._model.device)
        return str(whisper.decode(self._model, mel_MF, replace(self._greedy, language=language)).text)

    def default(self, clip: Clip, language: str) -> str:
        return str(self._model.transcribe(clip, language=language, **self._common)["text"])


class Transformers:
    """transformers, by its pipeline."""

    def __init__(self, folder: Path, decoding: Decoding) -> None:
        import torch
        from transformers import pipeline
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(decoding.threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Half precision on a CPU is slow or missing; a GPU takes the checkpoint as it is stored.
        dtype: Any = "auto" if device == "cuda" else torch.float32
        self._pipeline = pipeline("automatic-speech-recognition", model=str(folder), device=device, dtype=dtype)
        self.compute_type = str(self._pipeline.model.dtype).removeprefix("torch.")
        self._multilingual = decoding.multilingual
        self._greedy = {"num_beams": 1, "do_sample": False, "max_new_tokens": decoding.max_new_tokens}

    def comparable(self, clip: Clip, language: str) -> str:
        return self._text(clip, language, self._greedy)

    def default(self, clip: Clip, language: str) -> str:
        return self._text(clip, language, {})

    def _text(self, clip: Clip, language: str, options: dict[str, Any]) -> str:
        told = {"language": language, "task": "transcribe"} if self._multilingual else {}
        raw = {"raw": clip, "sampling_rate": SAMPLE_RATE_HZ}
        text: str = self._pipeline(raw, generate_kwargs=told | options)["text"]
        return text


RUNTIMES: Mapping[str, tuple[Callable[[Path, Decoding], Runtime], str]] = {
    "hf": (Transformers, "transformers"),
    "ggml": (WhisperCpp, "pywhispercpp"),
    "ctranslate2": (FasterWhisper, "faster-whisper"),
    "openai": (OpenAIWhisper, "openai-whisper"),
}
"""By family: what opens an artifact's folder, and the distribution that it comes in."""


def _to_window(clip: Clip) -> Clip:
    """A clip with silence after it, as long as the model's window."""
    return np.pad(clip, (0, max(0, WINDOW_S * SAMPLE_RATE_HZ - len(clip))))


def runtime_version(family: str) -> str:
    """A runtime's distribution with its version: `pywhispercpp 1.5.1`."""
    name = RUNTIMES[family][1]
    return f"{name} {importlib.metadata.version(name)}"
