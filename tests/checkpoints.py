"""For tests: small checkpoints in the shapes of OpenAI's English-only and large-v3 ones, of random weights."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from engine import TINY_WINDOW_S
from transformers import (
    AddedToken,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from jobs.demo import tokenizer as multilingual


@dataclass(frozen=True)
class Form:
    """What tells two families of Whisper checkpoints apart.

    Attributes:
        words: tokens of text; the end token comes next, then the other control tokens, then the timestamps.
        languages: how many of them.
        old: whether its generation config forces a prompt, as those of 2022 did.
    """

    words: int
    languages: int
    mel_bins: int
    is_multilingual: bool
    old: bool = False

    @property
    def controls(self) -> list[str]:
        """Control tokens in the order of their ids; the first one has the id `words`."""
        first, *others = multilingual.special_tokens()
        tail = others[1 + multilingual.LANGUAGE_COUNT :]
        languages = list(multilingual.LANGUAGES)[: self.languages]
        return [first, others[0], *(f"<|{code}|>" for code in languages), *tail]

    def id(self, token: str) -> int:
        """A control token's id."""
        return self.words + self.controls.index(token)

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return self.words + len(self.controls) + multilingual.TIMESTAMP_COUNT


FORMS = {
    "english-only": Form(words=50256, languages=99, mel_bins=80, is_multilingual=False, old=True),
    "multilingual": Form(words=50257, languages=99, mel_bins=80, is_multilingual=True),
    "large-v3": Form(words=50257, languages=100, mel_bins=128, is_multilingual=True),
}
"""With the ids and shapes of `whisper-tiny.en` (51,864), `whisper-tiny` (51,865) and `whisper-large-v3` (51,866)."""


def write_checkpoint_of(form: Form, folder: Path, window_s: int = TINY_WINDOW_S) -> Path:
    """Write a checkpoint of that form; returns the folder."""
    end, start = form.id("<|endoftext|>"), form.id("<|startoftranscript|>")
    config = WhisperConfig(
        vocab_size=form.vocabulary,
        num_mel_bins=form.mel_bins,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_source_positions=50 * window_s,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.generation_config = _generation_config(form, config)
    model.save_pretrained(folder)
    _tokenizer(form).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=form.mel_bins, chunk_length=window_s).save_pretrained(folder)
    if form.old:
        path = folder / "generation_config.json"
        forced = {"forced_decoder_ids": [[1, form.id("<|notimestamps|>")]]}
        path.write_text(json.dumps(json.loads(path.read_text()) | forced))
    return folder


def _generation_config(form: Form, config: WhisperConfig) -> GenerationConfig:
    ids = {"no_timestamps_token_id": form.id("<|notimestamps|>"), "prev_sot_token_id": form.id("<|startofprev|>")}
    known = {}
    if form.is_multilingual:
        languages = form.controls[2 : 2 + form.languages]
        known["lang_to_id"] = {token: form.id(token) for token in languages}
        known["task_to_id"] = {task: form.id(f"<|{task}|>") for task in ("transcribe", "translate")}
    return GenerationConfig(
        is_multilingual=form.is_multilingual,
        decoder_start_token_id=config.decoder_start_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_length=448,
        return_timestamps=False,
        **ids,
        **known,
    )


def _tokenizer(form: Form) -> WhisperTokenizer:
    vocabulary, merges = multilingual.vocabulary_and_merges()
    words = {token: number for token, number in vocabulary.items() if number < form.words}
    # The English vocabulary has one token of text fewer; ours leaves out the youngest merge.
    kept = [pair for pair in merges if "".join(pair) in words]
    end = form.controls[0]
    with tempfile.TemporaryDirectory() as directory:
        spellings = Path(directory) / "normalizer.json"
        spellings.write_text(json.dumps(multilingual.read_spellings()), encoding="utf-8")
        tokenizer = WhisperTokenizer(
            vocab=words | {end: form.words}, merges=kept, normalizer_file=str(spellings), pad_token=end
        )
    tokenizer.add_special_tokens({"additional_special_tokens": form.controls[1:]})
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=False) for token in multilingual.timestamp_tokens()]
    )
    tokenizer.set_prefix_tokens()
    assert [tokenizer.convert_tokens_to_ids(token) for token in form.controls] == [form.id(t) for t in form.controls]
    assert len(tokenizer) == form.vocabulary
    return tokenizer
