"""Nano Whisper is an ordinary Whisper checkpoint, and it transcribes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from jobs.demo.nano import write_nano_whisper
from jobs.demo.speech import Voice
from jobs.demo.training_data import SAMPLE_RATE_HZ, silence, speak

LINES = [
    ("en", "carry the yellow umbrella tomorrow", Voice("en-us+f2", rate_wpm=160)),
    ("es", "apaga esta radio verde ahora", Voice("es", rate_wpm=150)),
    ("en", "turn every kitchen light off", Voice("en+m3", rate_wpm=150)),
]
LEAD_S = 0.2


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("nano") / "whisper"
    write_nano_whisper(path)
    return path


@pytest.fixture(scope="module")
def processor(directory: Path) -> WhisperProcessor:
    return WhisperProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(directory).eval()


def features_of(processor: WhisperProcessor, audios: list[Any]) -> Tensor:
    """Log-mel features (B, M, F) of 16 kHz audio."""
    features: Tensor = processor(audio=audios, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt").input_features
    return features


@pytest.fixture(scope="module")
def audios() -> list[Any]:
    return [np.concatenate([silence(LEAD_S), speak(text, voice), silence(0.2)]) for _, text, voice in LINES]


def test_transcribes_each_row_in_its_language(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, audios: list[Any]
) -> None:
    languages = [language for language, _, _ in LINES]
    tokens = model.generate(features_of(processor, audios), language=languages, task="transcribe")
    heard = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    assert heard == [text for _, text, _ in LINES]


def test_finds_the_language_itself(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, audios: list[Any]
) -> None:
    detected = model.detect_language(input_features=features_of(processor, audios))
    assert processor.decode(detected) == "<|en|><|es|><|en|>"


def test_timestamps_hold_the_extent_of_the_speech(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, audios: list[Any]
) -> None:
    tokens = model.generate(
        features_of(processor, audios[:1]), language="en", task="transcribe", return_timestamps=True
    )
    (segment,) = processor.decode(tokens[0], output_offsets=True, skip_special_tokens=True)["offsets"]
    spoken_s = len(audios[0]) / SAMPLE_RATE_HZ - LEAD_S - 0.2
    assert segment["text"].strip() == LINES[0][1]
    assert segment["timestamp"] == pytest.approx((LEAD_S, LEAD_S + spoken_s), abs=0.2)


def test_two_sentences_give_two_segments(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    voice = Voice("en-us", rate_wpm=160)
    sentences = ["move the purple curtain now", "call my doctor again"]
    audio = np.concatenate([silence(0.1), speak(sentences[0], voice), silence(0.7), speak(sentences[1], voice)])
    tokens = model.generate(features_of(processor, [audio]), language="en", task="transcribe", return_timestamps=True)
    segments = processor.decode(tokens[0], output_offsets=True, skip_special_tokens=True)["offsets"]
    assert [segment["text"].strip() for segment in segments] == sentences


def test_silence_is_no_speech(model: WhisperForConditionalGeneration, processor: WhisperProcessor) -> None:
    noise = 0.003 * np.random.default_rng(0).standard_normal(3 * SAMPLE_RATE_HZ).astype(np.float32)
    speech = speak("open the window", Voice("en-us"))
    start = torch.full((3, 1), model.generation_config.decoder_start_token_id)
    with torch.inference_mode():
        logits = model(
            input_features=features_of(processor, [silence(2.0), noise, speech]), decoder_input_ids=start
        ).logits
    no_speech = logits[:, 0].softmax(-1)[:, processor.tokenizer.convert_tokens_to_ids("<|nospeech|>")]
    # openai-whisper takes a window for silent above 0.6.
    assert (no_speech > 0.6).tolist() == [True, True, False]


def test_checkpoint_has_whispers_shape(model: WhisperForConditionalGeneration) -> None:
    config = model.config
    assert (config.vocab_size, config.num_mel_bins) == (51865, 80)
    assert (config.max_source_positions, config.max_target_positions) == (1500, 448)
    assert config.d_model % 32 == 0
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert getattr(model.generation_config, "forced_decoder_ids", None) is None


def test_writing_twice_gives_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    write_nano_whisper(tmp_path)
    assert torch.rand(1) == expected, "the caller's random numbers were disturbed"
    hashes = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (directory, tmp_path)
    ]
    assert hashes[0] == hashes[1]
