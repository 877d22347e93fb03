"""Tokenizer and feature extractor as files: those of transformers 5, and those that older tools still read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def save_processor(tokenizer: Any, feature_extractor: Any, folder: Path) -> None:
    """Write tokenizer.json and preprocessor_config.json, and vocab.json, merges.txt, added_tokens.json and
    special_tokens_map.json, which transformers 5 has given up and converters ask for."""
    tokenizer.save_pretrained(folder)
    _name_tokens_as_before(folder / "tokenizer_config.json")
    tokenizer.save_vocabulary(str(folder))
    feature_extractor.save_pretrained(folder)
    end = tokenizer.eos_token_id
    added = sorted((index, token) for token, index in tokenizer.get_added_vocab().items() if index > end)
    special = [str(token) for index, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    legacy = {
        "added_tokens.json": {token: index for index, token in added},
        "special_tokens_map.json": {
            **{f"{role}_token": str(getattr(tokenizer, f"{role}_token")) for role in ("bos", "eos", "pad", "unk")},
            "additional_special_tokens": [token for token in special if token != tokenizer.eos_token],
        },
    }
    for name, content in legacy.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def _name_tokens_as_before(path: Path) -> None:
    """transformers 5 lists its special tokens under a name by which 4 expects a mapping, and fails; both know the old
    one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(tokens := content.pop("extra_special_tokens", None), list):
        content["additional_special_tokens"] = tokens
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
