"""`whisper-jobs export`: adapters of whatever origin merged, exported and proven, by the command as a user gives it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import fill_adapters, read_lines
from peft import LoraConfig, get_peft_model
from running import CLI, run
from transformers import WhisperForConditionalGeneration

from service.artifacts import verify
from service.storage import Storage

pytestmark = pytest.mark.slow

SETTINGS = ("evaluation.max_new_tokens=40", "export.proof_clips=4", "export.max_wer_increase=0.2")
SHORT = [word for setting in SETTINGS for word in ("--set", setting)]


def foreign_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter as a script with plain PEFT leaves it, in half precision, its base known by a name of that machine."""
    model = WhisperForConditionalGeneration.from_pretrained(base)
    model.config._name_or_path = "/gone/with/that/machine"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "fc1"], **settings)
    adapted = get_peft_model(model, config)
    fill_adapters(adapted, 0.005)
    adapted.half().save_pretrained(folder)
    return folder


@pytest.mark.jobs
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Could not find a config file")
def test_an_adapter_trained_elsewhere_is_exported_and_a_run_of_that_is_exported_again(
    nano: Path, manifest: Path, tmp_path: Path
) -> None:
    adapter = foreign_adapter(nano, tmp_path / "adapter", use_rslora=True, use_dora=True)
    arguments = ["export", adapter, "--base", nano, "--csv", manifest / "val.csv", "--out", tmp_path / "out", *SHORT]
    arguments += ["--formats", "ggml-q8_0", "-o", "json"]
    finished = run(*arguments, program=CLI)
    metrics = finished.json()
    assert metrics["merge"]["max_logit_difference"] <= 1e-4
    assert metrics["merge"]["tied"] is True
    assert list(metrics["artifacts"]) == ["hf", "ggml-q8_0"]
    for name, entry in metrics["artifacts"].items():
        assert "refused" not in entry
        assert 0 <= entry["wer_default"] < 1.5, name
    root = Storage(str(tmp_path / "out"))
    assert verify(root).problems == []
    manifest_json = root.read_json("manifest.json")
    assert manifest_json["kind"] == "export"
    assert set(manifest_json["wer"]) == {"model", "hf", "ggml-q8_0"}
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    lines = read_lines(tmp_path / "out/evaluation/merged.jsonl")
    assert [line["hypothesis"] for line in lines if line["hypothesis"]]
    card = (tmp_path / "out/exports/ggml-q8_0/README.md").read_text()
    assert "pywhispercpp" in card
    assert "| ggml-q8_0 | whisper.cpp | q8_0 |" in (tmp_path / "out/README.md").read_text()

    # The same command again only reads; the run's own clips and base serve another export.
    assert "complete already" in run(*arguments, program=CLI).stderr
    again = ["export", tmp_path / "out", "--formats", "ctranslate2", "--out", tmp_path / "more", *SHORT, "-o", "json"]
    more = run(*again, program=CLI).json()
    assert more["model"]["wer"] == metrics["model"]["wer"]
    assert "refused" not in more["artifacts"]["ctranslate2-float16"]
    assert verify(Storage(str(tmp_path / "more"))).problems == []


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Could not find a config file")
def test_a_format_that_cannot_hold_the_model_is_refused_and_the_rest_delivered(
    nano: Path, manifest: Path, tmp_path: Path
) -> None:
    base = WhisperForConditionalGeneration.from_pretrained(nano)
    head = base.proj_out.weight.detach().clone()
    base.config.tie_word_embeddings = False
    base.proj_out.weight = torch.nn.Parameter(head + 0.001 * torch.randn(head.shape))
    shutil.copytree(nano, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    adapter = foreign_adapter(tmp_path / "base", tmp_path / "adapter")
    arguments = ["export", adapter, "--base", tmp_path / "base", "--csv", manifest / "val.csv"]
    arguments += ["--out", tmp_path / "out", "--formats", "ggml", "ctranslate2-float32", *SHORT]
    finished = run(*arguments, program=CLI)
    assert finished.code == 17
    assert "1 of the exports did not pass: ggml-f16" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert "not tied" in finished.stdout
    root = Storage(str(tmp_path / "out"))
    assert verify(root).problems == []
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(content["refused"]) == ["ggml-f16"]
    assert "ctranslate2-float32" in content["wer"]
    assert "not tied" in (tmp_path / "out/exports/ggml-f16/REFUSED.txt").read_text()
    again = run(*arguments, program=CLI)
    assert again.code == 17, "a complete job with a refused export stays one"
    assert "complete already" in again.stderr
