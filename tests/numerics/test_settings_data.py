"""What the settings of data and output do: the checkpoint, both manifests, the language, the folder of the results."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import FORMS, Form, write_checkpoint_of
from engine import Call, Run, batch_of, job, logits_of, read_lines, watched, write_csv
from torch import nn
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from jobs.adapter import load_adapter
from jobs.model import load_processor
from service.spec.whisper_dims import OPENAI

EN, ES = "<|en|>", "<|es|>"
ORIGINALS = {"english-only": "tiny.en", "multilingual": "tiny", "large-v3": "large-v3"}
"""Checkpoints of OpenAI's that have the vocabulary and the mel bins of a form."""


@dataclass
class Watched:
    """A run, and what its encoder and its decoder's token embedding were given."""

    form: Form
    run: Run
    heard: list[Call]
    read: list[Call]

    def prompts(self, *, training: bool) -> set[tuple[str, ...]]:
        """The control tokens that the decoder was given before a text, in training or in generation."""
        controls = {self.form.id(token): token for token in self.form.controls[1:]}
        found = set()
        # In generation all but the first call is given one token more, of the text.
        for row in self.texts(training=training):
            if len(row) > 1:
                found.add(tuple(controls[token] for token in row if token in controls))
        return found

    def texts(self, *, training: bool) -> list[list[int]]:
        """The tokens that the decoder was given, text by text; the encoder looks up its positions as one dimension."""
        calls = [call.given["input"] for call in self.read if call.training is training]
        return [row for tokens in calls if tokens.dim() == 2 for row in tokens.tolist()]


def run_watched(form: Form, base: Path, data: Path, root: Path, **training: object) -> Watched:
    with watched(WhisperEncoder) as heard, watched(nn.Embedding) as read:
        run = Run(job(base, data, root, **training))
    return Watched(form, run, heard, read)


def in_english(tones: Path, folder: Path) -> Path:
    """The same clips with rows that are all English."""
    shutil.copytree(tones, folder)
    for path in folder.glob("*.csv"):
        path.write_text(path.read_text().replace(",es", ",en"))
    return folder


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A whole run on a checkpoint of each form, merged. Its rows name their language; the spec says another one."""
    form, folder = FORMS[request.param], tmp_path_factory.mktemp("form")
    base = write_checkpoint_of(form, folder / "base")
    data = tones if form.is_multilingual else in_english(tones, folder / "data")
    language = "de" if form.is_multilingual else "en"
    found = run_watched(form, base, data, folder / "run", language=language, use_dora=True, lr=0.02)
    found.run.merge()
    return found


@pytest.mark.setting("base_model")
@pytest.mark.parametrize("name", FORMS)
def test_the_small_checkpoints_have_the_ids_and_bins_of_openais(name: str) -> None:
    dims = OPENAI[f"openai/whisper-{ORIGINALS[name]}"]
    assert (FORMS[name].vocabulary, FORMS[name].mel_bins) == (dims.vocab_size, dims.num_mel_bins)
    assert dims.english_only is not FORMS[name].is_multilingual


@pytest.mark.setting("base_model")
def test_the_encoder_is_given_as_many_mel_bins_as_it_has(trained: Watched) -> None:
    shapes = {tuple(call.given["input_features"].shape[1:]) for call in trained.heard}
    assert shapes == {(trained.form.mel_bins, 200)}


@pytest.mark.setting("base_model", "language")
def test_training_and_generation_begin_with_the_checkpoints_own_prompt(trained: Watched) -> None:
    start, task, plain = "<|startoftranscript|>", "<|transcribe|>", "<|notimestamps|>"
    expected: set[tuple[str, ...]] = {(start, plain)}
    if trained.form.is_multilingual:  # a row's own language wins over the spec's
        expected = {(start, EN, task, plain), (start, ES, task, plain)}
    assert trained.prompts(training=True) == expected
    assert trained.prompts(training=False) == expected


@pytest.mark.setting("base_model", "merge_lora")
def test_adapter_and_merged_model_fit_the_checkpoint(trained: Watched, tones: Path) -> None:
    base, root, form = Path(trained.run.spec.training.base_model), trained.run.root, trained.form
    batch = batch_of(base, Path(str(trained.run.spec.training.val_csv)), 5)
    untouched = logits_of(WhisperForConditionalGeneration.from_pretrained(base), batch)
    merged_model = WhisperForConditionalGeneration.from_pretrained(root / "merged")
    merged = logits_of(merged_model, batch)
    adapted = logits_of(load_adapter(WhisperForConditionalGeneration.from_pretrained(base), root / "adapter"), batch)
    assert float((merged - adapted).abs().max()) <= 1e-4
    assert float((merged - untouched).abs().max()) > 0.1
    assert (merged_model.config.vocab_size, merged_model.config.num_mel_bins) == (form.vocabulary, form.mel_bins)
    generation = GenerationConfig.from_pretrained(root / "merged")
    assert generation.is_multilingual is form.is_multilingual
    assert generation.no_timestamps_token_id == form.id("<|notimestamps|>")
    assert getattr(generation, "forced_decoder_ids", None) is None
    assert ("<|yue|>" in getattr(generation, "lang_to_id", {})) is (form.languages == 100)


@pytest.mark.setting("val_csv", "outdir")
def test_every_row_of_the_held_out_manifest_is_scored_before_and_after(trained: Watched) -> None:
    csv = Path(str(trained.run.spec.training.val_csv))
    rows = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    for name in ("base", "tuned", "merged"):
        lines = read_lines(trained.run.root / f"evaluation/{name}.jsonl")
        assert [(line["path"], line["reference"]) for line in lines] == [(str(csv.parent / p), t) for p, t, _ in rows]
    assert trained.run.result["base"]["utterances"] == trained.run.result["tuned"]["utterances"] == 5


class TestLanguage:
    """language: what rows that name none are trained and decoded in."""

    @pytest.fixture(scope="class")
    def without(self, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
        """A run on manifests without languages, merged."""
        form, folder = FORMS["multilingual"], tmp_path_factory.mktemp("language")
        shutil.copytree(tones, folder / "data")
        for path in (folder / "data").glob("*.csv"):
            rows = [line.split(",")[:2] for line in path.read_text().splitlines()[1:]]
            write_csv(path, [tuple(row) for row in rows], ("path", "text"))
        base = write_checkpoint_of(form, folder / "base")
        found = run_watched(form, base, folder / "data", folder / "run", language="es")
        found.run.merge()
        return found

    @pytest.mark.setting("language")
    def test_it_is_in_the_prompt_of_rows_that_name_none(self, without: Watched) -> None:
        expected = {("<|startoftranscript|>", ES, "<|transcribe|>", "<|notimestamps|>")}
        assert without.prompts(training=True) == without.prompts(training=False) == expected
        assert list(without.run.result["tuned"]["languages"]) == ["es"]

    @pytest.mark.setting("language", "merge_lora")
    def test_the_merged_model_transcribes_in_it_unless_told_otherwise(self, without: Watched) -> None:
        content = json.loads((without.run.root / "merged/generation_config.json").read_text())
        assert (content["language"], content["task"]) == ("es", "transcribe")
        model = WhisperForConditionalGeneration.from_pretrained(without.run.root / "merged").eval()
        with watched(nn.Embedding) as calls:
            model.generate(torch.zeros(1, 80, 200), max_new_tokens=2)
        prompts = Watched(without.form, without.run, [], calls).prompts(training=False)
        assert prompts == {("<|startoftranscript|>", ES, "<|transcribe|>", "<|notimestamps|>")}


@pytest.mark.setting("train_csv", "val_csv")
def test_paths_are_taken_from_the_manifests_folder_and_both_manifests_are_kept_apart(
    tiny: Path, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for number in range(4):
        shutil.copy(tones / f"{number:02}.wav", tmp_path / f"a/{number}.wav")
    write_csv(tmp_path / "a/b/train.csv", [("../0.wav", "one", "en"), (tmp_path / "a/1.wav", "two", "en")])
    write_csv(tmp_path / "a/val.csv", [("2.wav", "three", "en"), ("3.wav", "four", "en")])
    monkeypatch.chdir(tmp_path / "elsewhere")
    csvs = {"train_csv": str(tmp_path / "a/b/train.csv"), "val_csv": str(tmp_path / "a/val.csv")}
    base = write_checkpoint_of(FORMS["multilingual"], tmp_path / "base")
    found = run_watched(FORMS["multilingual"], base, tones, tmp_path / "run", epochs=2, **csvs)
    end = FORMS["multilingual"].id("<|endoftext|>")
    trained = [row[4:] for row in found.texts(training=True)]
    tokenizer = load_processor(str(base)).tokenizer
    texts = [tokenizer.decode([t for t in row if t != end]).strip() for row in trained]
    assert sorted(texts) == ["one", "one", "two", "two"]
    assert [line["reference"] for line in read_lines(tmp_path / "run/evaluation/tuned.jsonl")] == ["three", "four"]
    assert list((tmp_path / "elsewhere").iterdir()) == [], "results are in outdir and nowhere else"
