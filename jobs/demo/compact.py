"""Nano Whisper with a small vocabulary: what is trained and what is stored.

Of Whisper's 51,865 token rows nano learns those of its own words; all others stay alike. So one row stands for all of
them, and its logit gains log(number of others): that is exactly the full softmax. Expansion copies the row.

Shapes: B batch, M mel bins, F frames of 10 ms, P encoder positions of 20 ms, T tokens, D width, K kept token rows.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

from jobs.demo.sentences import LANGUAGES, words
from jobs.demo.tokenizer import VOCABULARY_SIZE

POSITIONS = 1500
DECODER_POSITIONS = 448
# The longest training sequence has 23 tokens.
LEARNED_DECODER_POSITIONS = 32
LEARNED_TIMESTAMPS = 401  # up to 8 s
END_OF_TEXT_ID, START_ID = 50257, 50258


@dataclass(frozen=True)
class NanoConfig:
    """The size of nano Whisper."""

    width: int = 64
    heads: int = 2
    encoder_layers: int = 2
    decoder_layers: int = 2
    feed_forward: int = 256

    def to_transformers(self, vocabulary_size: int, end_id: int, start_id: int) -> WhisperConfig:
        """The same as a transformers config."""
        return WhisperConfig(
            vocab_size=vocabulary_size,
            num_mel_bins=80,
            d_model=self.width,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
            encoder_attention_heads=self.heads,
            decoder_attention_heads=self.heads,
            encoder_ffn_dim=self.feed_forward,
            decoder_ffn_dim=self.feed_forward,
            max_source_positions=POSITIONS,
            max_target_positions=DECODER_POSITIONS,
            pad_token_id=end_id,
            bos_token_id=end_id,
            eos_token_id=end_id,
            decoder_start_token_id=start_id,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )

    def as_dict(self) -> dict[str, int]:
        """The config as JSON."""
        return asdict(self)


def kept_token_ids(tokenizer: WhisperTokenizer) -> list[int]:
    """Ids that nano learns, sorted: control tokens, timestamps, and the words with and without a leading space."""
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|transcribe|>", "<|nospeech|>", "<|notimestamps|>"]
    ids = set(tokenizer.convert_tokens_to_ids(names + [f"<|{language}|>" for language in LANGUAGES]))
    first = tokenizer.convert_tokens_to_ids("<|0.00|>")
    ids.update(range(first, first + LEARNED_TIMESTAMPS))
    for language in LANGUAGES:
        for word in words(language):
            for text in (word, " " + word):
                ids.update(tokenizer.encode(text, add_special_tokens=False))
    return sorted(ids)


class CompactWhisper(nn.Module):
    """Whisper over K kept token rows and one row for the rest."""

    def __init__(self, config: NanoConfig, kept_ids: list[int]) -> None:
        super().__init__()
        self.row_of = {token_id: row for row, token_id in enumerate(kept_ids)}
        self.other_row = len(kept_ids)
        end, start = self.row_of[END_OF_TEXT_ID], self.row_of[START_ID]
        self.whisper = WhisperForConditionalGeneration(config.to_transformers(len(kept_ids) + 1, end, start))
        other_bias = torch.zeros(len(kept_ids) + 1)
        other_bias[self.other_row] = math.log(VOCABULARY_SIZE - len(kept_ids))
        self.other_bias: Tensor
        self.register_buffer("other_bias", other_bias, persistent=False)

    def encode(self, features_BMF: Tensor) -> Tensor:
        """The encoder over any even number of frames up to 3,000, where transformers' own takes 3,000; (B, P, D)."""
        encoder = self.whisper.model.encoder
        hidden = F.gelu(encoder.conv1(features_BMF))
        hidden_BPD = F.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden_BPD = hidden_BPD + encoder.embed_positions.weight[: hidden_BPD.shape[1]]
        for layer in encoder.layers:
            hidden_BPD = layer(hidden_BPD, None)
        normed: Tensor = encoder.layer_norm(hidden_BPD)
        return normed

    def forward(self, features_BMF: Tensor, read_BT: Tensor) -> Tensor:
        """Logits over the kept rows and the other row; (B, T, K + 1)."""
        decoder = self.whisper.model.decoder
        output = decoder(input_ids=read_BT, encoder_hidden_states=self.encode(features_BMF), use_cache=False)
        logits: Tensor = F.linear(output.last_hidden_state, decoder.embed_tokens.weight) + self.other_bias
        return logits


def learned_tensors(model: CompactWhisper) -> dict[str, Tensor]:
    """The tensors that training changes, in half precision, under transformers' names."""
    tensors = {}
    for name, tensor in model.whisper.state_dict().items():
        # The encoder's positions are fixed sinusoids; the output head is the embedding.
        if name in {"model.encoder.embed_positions.weight", "proj_out.weight"}:
            continue
        kept = tensor[:LEARNED_DECODER_POSITIONS] if name == "model.decoder.embed_positions.weight" else tensor
        tensors[name] = kept.half().contiguous()
    return tensors


def expand(tensors: dict[str, Tensor], config: NanoConfig, kept_ids: list[int]) -> WhisperForConditionalGeneration:
    """Build the full model, 51,865 rows and 448 decoder positions, from the learned tensors."""
    model = WhisperForConditionalGeneration(config.to_transformers(VOCABULARY_SIZE, END_OF_TEXT_ID, START_ID))
    full: dict[str, Any] = {name: tensor.float() for name, tensor in tensors.items()}
    rows_KD = full["model.decoder.embed_tokens.weight"]
    embedding = rows_KD[-1].repeat(VOCABULARY_SIZE, 1)
    embedding[torch.tensor(kept_ids)] = rows_KD[:-1]
    full["model.decoder.embed_tokens.weight"] = full["proj_out.weight"] = embedding
    positions = full["model.decoder.embed_positions.weight"]
    # Positions beyond those learned repeat the last: transcripts do not reach them.
    unlearned = positions[-1].expand(DECODER_POSITIONS - len(positions), -1)
    full["model.decoder.embed_positions.weight"] = torch.cat([positions, unlearned])
    full["model.encoder.embed_positions.weight"] = model.model.encoder.embed_positions.weight.detach()
    model.load_state_dict(full)
    return model.eval()
