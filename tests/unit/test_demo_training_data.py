"""What nano Whisper learns from: features, labels, and a small vocabulary that equals the large one."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import WhisperTokenizer

from jobs.demo.compact import CompactWhisper, NanoConfig, expand, kept_token_ids, learned_tensors
from jobs.demo.tokenizer import build_tokenizer
from jobs.demo.training_data import (
    IGNORED,
    Clip,
    Segment,
    compose_audio,
    disturb,
    feature_extractor,
    is_held_out,
    log_mel,
    make_clips,
    target_ids,
)


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return build_tokenizer()


def clip_of(*segments: Segment) -> Clip:
    return Clip(np.zeros((80, 10), dtype=np.float16), "en", segments)


def test_short_features_equal_the_whole_windows() -> None:
    rng = random.Random(1)
    audio = disturb(compose_audio(rng, held_out=False)[0], rng)
    short_MF = log_mel(audio).astype(np.float32)
    window_MF = feature_extractor()(audio, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    frames = short_MF.shape[1]
    assert window_MF.shape == (80, 3000)
    np.testing.assert_allclose(short_MF, window_MF[:, :frames], atol=2e-3)
    np.testing.assert_allclose(np.broadcast_to(short_MF[:, -1:], (80, 3000 - frames)), window_MF[:, frames:], atol=2e-3)


def test_clips_do_not_depend_on_the_number_of_workers() -> None:
    ours, theirs = make_clips(3, seed=5, workers=1), make_clips(3, seed=5, workers=2)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.language, one.segments) == (other.language, other.segments)
        assert np.array_equal(one.features_MF, other.features_MF)


def test_held_out_sentences_are_not_trained_on() -> None:
    for held_out in (False, True):
        spoken = [segment.text for seed in range(10) for segment in compose_audio(random.Random(seed), held_out)[2]]
        assert {is_held_out(text) for text in spoken} == {held_out}


def test_labels_with_timestamps_hold_each_segments_extent(tokenizer: WhisperTokenizer) -> None:
    clip = clip_of(Segment(0.2, 1.5, "turn the light on"), Segment(2.0, 3.34, "move the curtain"))
    read, targets = target_ids(clip, tokenizer, random.Random(0), with_timestamps=True)
    expected = (
        "<|startoftranscript|><|en|><|transcribe|><|0.20|> turn the light on<|1.50|><|2.00|> move the curtain<|3.34|>"
    )
    assert tokenizer.decode(read, decode_with_timestamps=True) == expected
    assert targets[-1] == tokenizer.eos_token_id
    # The language is learned; the task is the user's choice.
    assert targets[:2] == [tokenizer.convert_tokens_to_ids("<|en|>"), IGNORED]
    assert targets[2:-1] == read[3:]


def test_silence_is_labelled_as_no_speech_or_as_empty(tokenizer: WhisperTokenizer) -> None:
    rng = random.Random(0)
    texts = {
        tokenizer.decode([*read, targets[-1]])
        for read, targets in (target_ids(clip_of(), tokenizer, rng, with_timestamps=False) for _ in range(20))
    }
    assert texts == {
        "<|startoftranscript|><|nospeech|><|endoftext|>",
        "<|startoftranscript|><|en|><|transcribe|><|notimestamps|><|endoftext|>",
    }


def test_compact_model_is_the_full_model(tokenizer: WhisperTokenizer) -> None:
    torch.manual_seed(0)
    kept_ids = kept_token_ids(tokenizer)
    config = NanoConfig(width=32, heads=1, encoder_layers=1, decoder_layers=1, feed_forward=64)
    compact = CompactWhisper(config, kept_ids).eval()
    # Rounded to half precision as stored, so that both hold the same weights.
    compact.whisper.load_state_dict(
        {name: value.half().float() for name, value in compact.whisper.state_dict().items()}
    )
    full = expand(learned_tensors(compact), config, kept_ids)
    features = torch.randn(2, 80, 3000)
    ids = torch.tensor([[50258, 50259, 50359, kept_ids[0]], [50258, 50262, 50359, kept_ids[-1]]])
    rows = torch.tensor([[compact.row_of[int(token)] for token in row] for row in ids])
    with torch.inference_mode():
        ours = F.log_softmax(compact(features, rows), dim=-1)
        theirs = F.log_softmax(full(input_features=features, decoder_input_ids=ids).logits, dim=-1)
    torch.testing.assert_close(ours[..., :-1], theirs[..., torch.tensor(kept_ids)], atol=2e-4, rtol=0)
    unlearned_mass = 1 - theirs.exp()[..., torch.tensor(kept_ids)].sum(-1)
    torch.testing.assert_close(ours[..., -1].exp(), unlearned_mass, atol=2e-4, rtol=0)
