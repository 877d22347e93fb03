"""Every export in its own runtime: what is written is what was merged, and what is broken is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
import whisper
from checkpoints import FORMS, write_checkpoint_of
from engine import batch_of, logits_of, merge_of
from exports import broken, exported, merged_run, read_ggml
from gguf import GGMLQuantizationType, dequantize
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from jobs.export import artifact, proof
from jobs.export.checkpoint import Checkpoint
from jobs.export.ggml import write_ggml
from jobs.export.proof import RuntimeFailedError
from service.errors import HungError, JobFailedError, OutOfMemoryError
from service.spec.job import JobSpec

HEARD = ("ggml-f16", "ggml-q8_0", "ggml-q5_0", "ctranslate2-float16", "ctranslate2-int8", "openai")


@pytest.fixture(scope="module")
def run(nano: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    return merged_run(nano, manifest, tmp_path_factory.mktemp("exports") / "run")


@pytest.fixture(scope="module")
def merged(run: JobSpec) -> Checkpoint:
    return Checkpoint(Path(run.root) / "merged")


@pytest.mark.parametrize("name", HEARD)
def test_an_export_transcribes_in_its_own_runtime_as_the_merged_model_does(run: JobSpec, name: str) -> None:
    found = exported(run, name)
    assert "refused" not in found
    assert found["utterances"] == 8
    assert found["identical"] >= (0.7 if name.endswith("q5_0") else 0.8)
    assert abs(found["wer"] - found["wer_compared"]) <= run.export.max_wer_increase
    assert 0 <= found["wer_default"] < 1
    assert found["rtf"] > 0
    assert found["rtf_default"] > 0
    folder = Path(run.root) / "exports" / name
    assert found["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert not (folder / "REFUSED.txt").exists()
    expected = {"ggml": "pywhispercpp", "ctranslate2": "faster-whisper", "openai": "openai-whisper"}
    assert found["version"].startswith(expected[name.split("-")[0]])


@pytest.mark.parametrize(("name", "kind"), [("ctranslate2-int8", "int8_float32"), ("ctranslate2-float16", "float32")])
def test_the_compute_type_that_ran_is_recorded(run: JobSpec, name: str, kind: str) -> None:
    assert exported(run, name)["compute_type"] == kind


def test_the_merged_checkpoint_is_heard_through_the_pipeline_of_transformers(run: JobSpec) -> None:
    found = exported(run, "hf")
    assert found["runtime"] == "transformers"
    assert 0 <= found["wer_default"] < 1
    assert "wer" not in found, "the merge stage has it"


BREAKAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a swapped tensor in ggml": ("ggml-f16", exports.swap_in_ggml, "export.m"),
    "wrong mel filters": ("ggml-f16", exports.spoil_mel_filters, "export.m"),
    "a truncated ggml file": ("ggml-f16", exports.truncate("*.bin"), "whisper.cpp could not run it"),
    "wrong scales in q8_0": ("ggml-q8_0", exports.spoil_scales, "export.m"),
    "wrong scales in q5_0": ("ggml-q5_0", exports.spoil_scales, "export.m"),
    "a truncated model of CTranslate2": ("ctranslate2-int8", exports.truncate("*.bin"), "could not run it"),
    "features of another size": ("ctranslate2-int8", exports.wrong_mel_bins, "could not run it"),
    "a swapped tensor in openai": ("openai", exports.swap_in_openai, "export.m"),
    "a missing tensor": ("openai", exports.drop_in_openai, "decoder.ln.weight"),
    "a truncated .pt": ("openai", exports.truncate("*.pt"), "openai-whisper could not run it"),
}


@pytest.mark.parametrize(("name", "breakage", "reason"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_export_is_refused(run: JobSpec, name: str, breakage: Callable[[Path], None], reason: str) -> None:
    with broken(name.split("-")[0], breakage):
        found = exported(run, name)
    assert reason in found["refused"]
    marked = Path(run.root) / "exports" / name / "REFUSED.txt"
    assert marked.read_text() == found["refused"] + "\n"
    assert "refused" not in exported(run, name), "made anew and whole, it passes"
    assert not marked.exists()


@pytest.mark.parametrize(("precision", "ftype"), [("f16", 1), ("q8_0", 2007), ("q5_0", 2008)])
def test_a_ggml_file_holds_what_whisper_cpp_reads(
    merged: Checkpoint, tmp_path: Path, precision: str, ftype: int
) -> None:
    merged.generation.max_length = 77  # a limit of generation, which is none of the model's
    file = read_ggml(write_ggml(merged, tmp_path, precision))
    config = merged.config
    assert file.hyperparameters == {
        "n_vocab": 51865,
        "n_audio_ctx": 1500,
        "n_audio_state": config.d_model,
        "n_audio_head": config.encoder_attention_heads,
        "n_audio_layer": config.encoder_layers,
        "n_text_ctx": 448,
        "n_text_state": config.d_model,
        "n_text_head": config.decoder_attention_heads,
        "n_text_layer": config.decoder_layers,
        "n_mels": 80,
        "ftype": ftype,
    }
    # The originals: mel filters, words and tensor names as openai-whisper has them.
    assert np.abs(file.filters - whisper.audio.mel_filters("cpu", 80).numpy()).max() < 1e-7
    encoding = whisper.tokenizer.get_tokenizer(multilingual=True).encoding
    assert file.words[:-1] == [encoding.decode_single_token_bytes(index) for index in range(50256)]
    assert len(file.words) == 50257
    dims = whisper.ModelDimensions(80, 1500, config.d_model, 2, 2, 51865, 448, config.d_model, 2, 2)
    expected = whisper.model.Whisper(dims).state_dict()
    assert set(file.tensors) == set(expected)
    content = (tmp_path / f"ggml-model-{precision}.bin").read_bytes()
    weights = dict(merged.openai_tensors())
    for name, tensor in file.tensors.items():
        shape = tuple(expected[name].shape)
        assert tensor.shape == ((*shape, 1) if name in ("encoder.conv1.bias", "encoder.conv2.bias") else shape)
        raw = np.frombuffer(content, np.uint8, tensor.size, tensor.begin)
        values = dequantize(raw, GGMLQuantizationType(tensor.type)).reshape(shape)
        error = np.abs(values - weights[name].numpy()).max() / np.abs(weights[name].numpy()).max()
        assert error <= {0: 0.0, 1: 5e-4, 8: 1 / 200, 6: 1 / 15}[tensor.type], name


def test_openai_whisper_computes_the_merged_models_logits(
    run: JobSpec, merged: Checkpoint, manifest: Path, nano: Path
) -> None:
    exported(run, "openai")
    ours = WhisperForConditionalGeneration.from_pretrained(merged.folder).float()
    theirs = whisper.load_model(f"{run.root}/exports/openai/model.pt", device="cpu")
    batch = batch_of(nano, manifest / "val.csv", 3)
    with torch.inference_mode():
        logits = theirs(batch.features_BMF, batch.inputs_BT)[batch.labels_BT >= 0]
    assert (logits - logits_of(ours, batch)).abs().max() < 1e-4


@pytest.fixture(scope="module", params=["english-only", "large-v3"])
def other_form(request: pytest.FixtureRequest, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """Vocabularies of 51,864 and 51,866 tokens, 80 and 128 mel bins. Of random weights: what it hears is noise."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_checkpoint_of(FORMS[request.param], folder / "base", window_s=30)
    rows = (manifest / "val.csv").read_text().splitlines()
    header = rows[0].split(",")
    language = header.index("language")
    english = [row for row in rows[1:] if row.split(",")[language] == "en"][:4]
    for name in ("train.csv", "val.csv"):
        (folder / name).write_text("\n".join([rows[0], *english]) + "\n")
    return merged_run(base, folder, folder / "run", scale=0.02)


@pytest.mark.parametrize("name", ["ggml-f16", "ctranslate2-float32", "openai"])
def test_other_vocabularies_and_mel_bins_are_held_too(
    other_form: JobSpec, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = artifact.listen

    def greedy(*given: Any, **options: Any) -> Any:  # the defaults' fall-backs over noise take minutes
        return everything(*given, **options | {"modes": ["comparable"]})

    monkeypatch.setattr(artifact, "listen", greedy)
    found = exported(other_form, name)
    assert "could not" not in found.get("refused", "")
    assert "cannot hold" not in found.get("refused", "")
    english = "english-only" in other_form.training.base_model
    if name == "ctranslate2-float32" or (name == "openai" and not english):
        # The same arithmetic as transformers', so the same noise. openai-whisper has an English vocabulary of its own,
        # which is not this checkpoint's.
        assert found["identical"] >= 0.75


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Input and output embeddings")
def test_an_untied_head_is_refused_by_formats_that_have_one_matrix(nano: Path, manifest: Path, tmp_path: Path) -> None:
    base = WhisperForConditionalGeneration.from_pretrained(nano)
    base.config.tie_word_embeddings = False
    head = base.model.decoder.embed_tokens.weight.detach().clone()
    base.proj_out.weight = torch.nn.Parameter(head + 0.001 * torch.randn(head.shape))
    shutil.copytree(nano, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    spec = merged_run(tmp_path / "base", manifest, tmp_path / "run")
    merged = Checkpoint(tmp_path / "run/merged")
    assert "proj_out.weight" in merged.weights
    for name in ("ggml-f16", "openai"):
        assert "not tied" in exported(spec, name)["refused"]
    found = exported(spec, "ctranslate2-float32")
    assert "refused" not in found
    assert found["identical"] == 1.0


def test_a_converter_that_fails_costs_its_own_format_alone(run: JobSpec) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("no such layer\nand more")

    with broken("ggml", fail):
        found = exported(run, "ggml-f16")
    assert found["refused"] == "it could not be written: ValueError: no such layer"

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with broken("ggml", full), pytest.raises(OSError, match="No space left"):
        exported(run, "ggml-f16")


def test_what_this_machine_lacks_is_no_verdict_on_an_export(run: JobSpec) -> None:
    for code, text, kind in (
        (1, "ImportError: libcudnn.so.9: cannot open shared object file", JobFailedError),
        (-9, "", OutOfMemoryError),
        (1, "torch.cuda.OutOfMemoryError: CUDA out of memory", OutOfMemoryError),
        (1, "MemoryError", OutOfMemoryError),
        (-6, "GGML_ASSERT(n_dims == 2)", RuntimeFailedError),
        (1, "RuntimeError: size mismatch for decoder.ln.weight", RuntimeFailedError),
    ):
        assert type(proof._failure(code, text)) is kind, text
    short = run.model_copy(update={"engine": run.engine.model_copy(update={"timeout_s": 0.01})})
    with pytest.raises(HungError, match="gave no sign of life"):
        exported(short, "ggml-f16")


def test_a_merge_that_is_cut_off_after_the_adapter_was_scored_goes_on(
    nano: Path, manifest: Path, tmp_path: Path
) -> None:
    spec = merged_run(nano, manifest, tmp_path / "run").model_copy(update={"kind": "export"})
    first, again = merge_of(spec), merge_of(spec)
    assert first["model"] == again["model"]
    assert first["artifact"]["identical"] == again["artifact"]["identical"] == 1.0


def test_a_base_of_an_older_or_odder_make_is_merged_too(nano: Path, manifest: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(nano, base)
    generation = json.loads((base / "generation_config.json").read_text())
    odd = {"temperature": 0.0, "top_p": 0.9, "early_stopping": True}  # which transformers loads, and will not save
    (base / "generation_config.json").write_text(json.dumps(generation | odd))
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    spec = merged_run(base, manifest, tmp_path / "run")
    saved = json.loads((tmp_path / "run/merged/generation_config.json").read_text())
    assert saved["lang_to_id"] == generation["lang_to_id"]
    assert "refused" not in exported(spec, "hf")
    tokens = json.loads((tmp_path / "run/merged/tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokens, "a list of that name is an error in transformers 4"
    assert "<|startoftranscript|>" in tokens["additional_special_tokens"]
