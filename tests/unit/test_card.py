"""The model card is one that the hub takes, and says what was measured and how to use the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from engine import job
from huggingface_hub import ModelCard

from jobs.card import model_card
from service.artifacts import BaseModelRecord
from service.spec.job import JobSpec

RATES = {"wer": 0.5, "wer_raw": 0.6, "cer": 0.25, "cer_raw": 0.3, "utterances": 80}
DATA = {
    "train": {"rows": 200, "hours": 0.1, "sha256": "t" * 64},
    "val": {"rows": 80, "hours": 0.04, "sha256": "v" * 64},
}


def figures(**changes: Any) -> dict[str, Any]:
    """metrics.json of a run."""
    languages = {"en": RATES, "es": RATES | {"wer": 0.75}}
    tuned = {"wer": 0.1, "cer": 0.05, "wer_interval": [0.08, 0.12], "languages": languages}
    return {
        "job_id": "nano-lora-12345678",
        "base": RATES | {"languages": languages},
        "tuned": RATES | tuned,
        "adapter": {"modules": 32, "trainable_parameters": 90112},
        "training": {"steps": 75, "effective_batch": 8, "precision": "bf16", "best_step": 50},
        "promoted": True,
        "promotion_reasons": [],
        "merge": {"max_logit_difference": 1e-6},
    } | changes


def card(
    base: BaseModelRecord | None = None, spec: JobSpec | None = None, folder: str = "", **changes: Any
) -> ModelCard:
    spec = spec or job("openai/whisper-tiny", Path("/data"), Path("/secret/folder/run"))
    base = base or BaseModelRecord(name="openai/whisper-tiny", revision="c0ffee", weights_sha256={})
    text = model_card(spec, figures(**changes), DATA | {"sentences_in_both": 2}, base, folder)
    return ModelCard(text)


def test_the_metadata_is_a_block_of_yaml_that_the_hub_takes() -> None:
    found = card()
    assert found.data.language == ["en", "es"]
    assert found.data.library_name == "peft"
    assert found.data.base_model == "openai/whisper-tiny"
    assert found.data.pipeline_tag == "automatic-speech-recognition"
    assert found.data.license == "apache-2.0"
    assert "lora" in found.data.tags
    values = {result.metric_type: result.metric_value for result in found.data.eval_results}
    assert values == {"wer": 10.0, "cer": 5.0}
    block = yaml.safe_load(str(found).split("---\n")[1])
    assert block["base_model_relation"] == "adapter"


def test_a_local_base_is_no_model_of_the_hub_and_its_folder_stays_private() -> None:
    found = card(BaseModelRecord(name="/models/nano", revision=None, weights_sha256={}))
    assert found.data.base_model is None
    assert "license" not in yaml.safe_load(str(found).split("---\n")[1])
    assert "/models" not in found.text
    assert "`nano`, adapted with LoRA" in found.text


def test_rates_stand_side_by_side_in_total_and_per_language() -> None:
    text = card().text
    assert "| WER | 50.00% | 10.00% |" in text
    assert "| CER, raw text | 30.00% | 30.00% |" in text
    assert "| WER, Spanish | 75.00% | 75.00% |" in text
    assert "Measured on 80 held-out clips (95 % interval 8.00% to 12.00%)" in text
    assert "2 sentences are in both splits" in text
    assert "v" * 64 in text


def test_method_precision_and_settings_are_named_and_no_local_paths() -> None:
    dora = job("openai/whisper-tiny", Path("/secret/data"), Path("/secret/run"), use_dora=True, lora_r=7)
    text = card(spec=dora).text
    assert "adapted with DoRA to English, Spanish speech" in text
    assert "75 steps of 8 clips in bfloat16 mixed precision; the adapter of step 50" in text
    assert '"lora_r": 7' in text
    assert "/secret" not in text


@pytest.mark.parametrize(
    ("folder", "library", "relation", "code"),
    [
        ("", "peft", "adapter", 'PeftModel.from_pretrained(base, "adapter")'),
        ("adapter", "peft", "adapter", 'PeftModel.from_pretrained(base, ".")'),
        ("merged", "transformers", "finetune", 'pipeline("automatic-speech-recognition", model=".")'),
    ],
)
def test_each_folder_has_the_card_of_what_lies_in_it(folder: str, library: str, relation: str, code: str) -> None:
    found = card(folder=folder)
    assert (found.data.library_name, found.data.base_model_relation) == (library, relation)
    assert code in found.text


def test_a_model_that_is_no_better_says_so() -> None:
    text = card(promoted=False, promotion_reasons=["its WER, 60.0%, is not below the base model's, 50.0%"]).text
    assert "Not promoted: its WER, 60.0%, is not below the base model's, 50.0%." in text


def test_it_says_what_became_of_the_ranks() -> None:
    def text(init: str) -> str:
        spec = job("openai/whisper-tiny", Path("/data"), Path("/run"), lora_init=init)
        adapter = {"modules": 30, "trainable_parameters": 9, "ranks": [3, 7], "without_adapter": ["a", "b"]}
        return str(card(spec=spec, adapter=adapter))

    assert "`pissa_niter_4` changed the base in training: the adapter here has twice the rank" in text("pissa_niter_4")
    assert "`eva` gave ranks of 3 to 7, and left 2 modules without an adapter." in text("eva")
    assert "twice the rank" not in text("eva") + text("mica")
