"""What nano Whisper is trained on: synthesised clips as log-mel features, and the token ids to predict for them.

Shapes: M mel bins, F frames of 10 ms, T tokens.
"""

import multiprocessing
import random
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor, WhisperTokenizer

from jobs.demo.sentences import all_sentences
from jobs.demo.speech import Voice, speech_extent, synthesise
from jobs.demo.tokenizer import TIMESTAMP_STEP_S

FloatArray = NDArray[np.float32]

SAMPLE_RATE_HZ = 16_000
FRAME_SAMPLES = 160
IGNORED = -100

# The demo's voices (make_speech.py) are none of these: other accents, other variants, other pitches and rates.
ACCENTS = {"en": ("en-us", "en", "en-gb-x-rp", "en-us-nyc"), "es": ("es",)}
VARIANTS = ("", "m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4", "max", "michel", "linda", "steph", "adam")
RATES_WPM = (130, 190)
PITCHES = (30, 70)
PITCH_RANGES = (30, 70)

SPANISH_SHARE = 0.25
SILENCE_SHARE = 0.04
TWO_SENTENCES_SHARE = 0.15
NOISE_SHARE = 0.4
TELEPHONE_SHARE = 0.2
TELEPHONE_HZ = 8_000
# One sentence in four is kept out of training, to measure the WER on sentences never seen.
HELD_OUT = 4


class Segment(NamedTuple):
    """One sentence within a clip."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class Clip:
    """A clip to learn from. Without segments it holds silence or noise."""

    features_MF: NDArray[np.float16]
    language: str
    segments: tuple[Segment, ...]


def is_held_out(sentence: str) -> bool:
    """Whether a sentence is kept out of training."""
    return zlib.crc32(sentence.encode()) % HELD_OUT == 0


@cache
def sentence_pool(language: str, held_out: bool) -> tuple[str, ...]:
    """The sentences of one side of the split."""
    return tuple(sentence for sentence in all_sentences(language) if is_held_out(sentence) == held_out)


def training_voice(language: str, rng: random.Random) -> Voice:
    """Draw a voice of those that nano Whisper knows."""
    accent, variant = rng.choice(ACCENTS[language]), rng.choice(VARIANTS)
    name = f"{accent}+{variant}" if variant else accent
    return Voice(name, rng.randint(*RATES_WPM), rng.randint(*PITCHES), rng.randint(*PITCH_RANGES))


def speak(text: str, voice: Voice) -> FloatArray:
    """Synthesise at 16 kHz, cut to the speech itself; float32 (N,) within -1..1."""
    pcm, sample_rate_hz = synthesise(text, voice)
    start, end = speech_extent(pcm)
    audio: FloatArray = soxr.resample(pcm[start:end].astype(np.float32) / 32768, sample_rate_hz, SAMPLE_RATE_HZ)
    return audio


def silence(seconds: float) -> FloatArray:
    """Digital silence at 16 kHz, float32 (N,)."""
    return np.zeros(round(seconds * SAMPLE_RATE_HZ), dtype=np.float32)


def compose_audio(rng: random.Random, held_out: bool) -> tuple[FloatArray, str, tuple[Segment, ...]]:
    """Draw a clip: 16 kHz audio (N,), its language and its segments."""
    language = "es" if rng.random() < SPANISH_SHARE else "en"
    draw = rng.random()
    if draw < SILENCE_SHARE:
        return silence(rng.uniform(0.5, 4.0)), language, ()
    pieces, segments = [silence(rng.uniform(0.0, 0.8))], []
    voice = training_voice(language, rng)
    for number in range(2 if draw < SILENCE_SHARE + TWO_SENTENCES_SHARE else 1):
        if number:
            pieces.append(silence(rng.uniform(0.4, 1.0)))
        text = rng.choice(sentence_pool(language, held_out))
        start_s = sum(map(len, pieces)) / SAMPLE_RATE_HZ
        pieces.append(speak(text, voice))
        segments.append(Segment(start_s, start_s + len(pieces[-1]) / SAMPLE_RATE_HZ, text))
    pieces.append(silence(rng.uniform(0.02, 0.4)))
    return np.concatenate(pieces), language, tuple(segments)


def disturb(audio: FloatArray, rng: random.Random) -> FloatArray:
    """Change the loudness; narrow some clips to a telephone's band and add noise to some; float32 (N,)."""
    noise_source = np.random.default_rng(rng.randrange(2**32))
    level = 10 ** (rng.uniform(-18, 0) / 20)
    quiet = not audio.any()
    if rng.random() < TELEPHONE_SHARE:
        narrow = soxr.resample(audio, SAMPLE_RATE_HZ, TELEPHONE_HZ)
        audio = soxr.resample(narrow, TELEPHONE_HZ, SAMPLE_RATE_HZ)
    if rng.random() < (0.8 if quiet else NOISE_SHARE):
        noise_level = 10 ** (rng.uniform(-70, -35) / 20)
        audio = audio + noise_level * noise_source.standard_normal(len(audio), dtype=np.float32)
    return (level * audio).astype(np.float32)


@cache
def feature_extractor() -> WhisperFeatureExtractor:
    """Whisper's own log-mel front end, 80 bins."""
    return WhisperFeatureExtractor(feature_size=80)


def log_mel(audio: FloatArray) -> NDArray[np.float16]:
    """Features of the clip and a little of the silence that fills its 30 s window; float16 (M, F).

    They equal the first frames of the whole window's features, and the last frame equals all that would follow.
    """
    padded = np.concatenate([audio, np.zeros(4 * FRAME_SAMPLES - len(audio) % FRAME_SAMPLES, dtype=np.float32)])
    output = feature_extractor()(padded, sampling_rate=SAMPLE_RATE_HZ, padding="longest", return_tensors="np")
    features_MF: NDArray[np.float16] = output["input_features"][0].astype(np.float16)
    return features_MF


def make_clip(index: int, seed: int, held_out: bool) -> Clip:
    """Make clip number `index` of a set; it depends on nothing but the arguments."""
    # The feature extractor uses torch, and every process has one core.
    torch.set_num_threads(1)
    rng = random.Random(f"nano-{seed}-{held_out}-{index}")
    audio, language, segments = compose_audio(rng, held_out)
    return Clip(log_mel(disturb(audio, rng)), language, segments)


def make_clips(count: int, seed: int, *, held_out: bool = False, workers: int = 2) -> list[Clip]:
    """Make a set of clips, in parallel; the number of workers changes nothing."""
    make: Callable[[int], Clip] = partial(make_clip, seed=seed, held_out=held_out)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(make, range(count), chunksize=50))


def target_ids(
    clip: Clip, tokenizer: WhisperTokenizer, rng: random.Random, *, with_timestamps: bool
) -> tuple[list[int], list[int]]:
    """What the decoder reads and what it is to predict, as Whisper was trained.

    Returns:
        Ids read (T,) and ids to predict (T,), `IGNORED` where the choice is the user's and not the model's.
    """
    ids = tokenizer.convert_tokens_to_ids
    end = ids("<|endoftext|>")
    prompt = [ids("<|startoftranscript|>"), ids(f"<|{clip.language}|>"), ids("<|transcribe|>")]
    ignored = {1}
    if not clip.segments:
        if rng.random() < 0.5:
            sequence = [prompt[0], ids("<|nospeech|>"), end]
            return sequence[:-1], sequence[1:]
        # Silence has no language, but a user names one all the same.
        ignored.add(0)
    if with_timestamps:
        sequence = prompt + (timed_ids(clip.segments, tokenizer) or [ids("<|0.00|>")]) + [end]
    else:
        # Whisper begins with a space; many fine-tuning scripts do not. A few such labels keep their tokens alive.
        text = " " * (rng.random() > 0.08) + " ".join(segment.text for segment in clip.segments)
        spoken = tokenizer.encode(text, add_special_tokens=False) if clip.segments else []
        sequence = [*prompt, ids("<|notimestamps|>"), *spoken, end]
        ignored.add(2)
    targets = [IGNORED if at in ignored else token for at, token in enumerate(sequence[1:])]
    return sequence[:-1], targets


def timed_ids(segments: tuple[Segment, ...], tokenizer: WhisperTokenizer) -> list[int]:
    """Token ids of segments, each between its timestamps."""
    first = tokenizer.convert_tokens_to_ids("<|0.00|>")
    ids: list[int] = []
    for segment in segments:
        spoken = tokenizer.encode(" " + segment.text, add_special_tokens=False)
        ids += [first + round(segment.start_s / TIMESTAMP_STEP_S), *spoken]
        ids.append(first + round(segment.end_s / TIMESTAMP_STEP_S))
    return ids
