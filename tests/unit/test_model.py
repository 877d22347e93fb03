"""A checkpoint is loaded whole, in float32, and known by its hash; one that cannot be had is an error that says why."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from jobs import model as model_module
from jobs.model import describe_base, is_multilingual, load_processor, load_prompter, load_whisper
from service.errors import SpecError

WEIGHTS = "model.safetensors"
FC1 = "model.decoder.layers.0.fc1.weight"


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_float32_in_memory_and_their_stored_precision_is_known(copy: Path, dtype: torch.dtype) -> None:
    WhisperForConditionalGeneration.from_pretrained(copy).to(dtype).save_pretrained(copy)
    whisper = load_whisper(str(copy))
    assert whisper.stored_dtype == dtype
    assert {parameter.dtype for parameter in whisper.model.parameters()} == {torch.float32}
    assert not whisper.model.training
    assert whisper.multilingual
    assert whisper.prompter().max_tokens == 448


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_used(tiny: Path, attention: str) -> None:
    assert load_whisper(str(tiny), attention=attention).model.config._attn_implementation == attention


def test_a_prompt_that_old_checkpoints_force_is_taken_off(copy: Path) -> None:
    content = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(content | {"forced_decoder_ids": [[1, None], [2, 50359]]}))
    assert load_whisper(str(copy)).model.generation_config.forced_decoder_ids is None


def test_the_prompter_is_had_without_the_weights(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    assert load_prompter(str(copy)).encode("hi", "en") == load_whisper_prompter_tokens(copy)
    assert load_processor(str(copy)).tokenizer.eos_token_id == 50257


def load_whisper_prompter_tokens(folder: Path) -> object:
    """What a prompter made by hand gives."""
    from jobs.tokens import Prompter

    return Prompter(load_processor(str(folder)).tokenizer, multilingual=True, max_tokens=448).encode("hi", "en")


@pytest.mark.parametrize(
    ("said", "vocabulary", "expected"),
    [(True, 51864, True), (False, 51865, False), (None, 51864, False), (None, 51865, True), (None, 51866, True)],
)
def test_languages_are_known_by_the_generation_config_or_the_vocabulary(
    said: bool | None, vocabulary: int, expected: bool
) -> None:
    generation = SimpleNamespace() if said is None else SimpleNamespace(is_multilingual=said)
    assert is_multilingual(generation, SimpleNamespace(vocab_size=vocabulary)) is expected


class TestUnusable:
    """Each names the setting and the checkpoint, and is bad input rather than a crash."""

    def reason(self, name: str) -> str:
        with pytest.raises(SpecError) as caught:
            load_whisper(name)
        (fault,) = caught.value.faults
        assert fault.where == "training.base_model"
        assert fault.value == name
        return fault.message

    def test_a_missing_tensor_is_not_made_up(self, copy: Path) -> None:
        state = load_file(copy / WEIGHTS)
        del state[FC1]
        save_file(state, copy / WEIGHTS, metadata={"format": "pt"})
        assert self.reason(str(copy)).endswith(f"(1 of its weights are missing: {FC1})")

    def test_a_tensor_of_another_shape_is_refused(self, copy: Path) -> None:
        state = load_file(copy / WEIGHTS) | {FC1: torch.zeros(3, 3)}
        save_file(state, copy / WEIGHTS, metadata={"format": "pt"})
        assert "is no complete Whisper checkpoint" in self.reason(str(copy))

    @pytest.mark.parametrize("size", [0, 7, 5000])
    def test_truncated_weights_are_refused(self, copy: Path, size: int) -> None:
        (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:size])
        assert "is no complete Whisper checkpoint" in self.reason(str(copy))

    def test_a_folder_without_weights_is_refused(self, copy: Path) -> None:
        (copy / WEIGHTS).unlink()
        assert "no file named model.safetensors" in self.reason(str(copy))

    def test_a_folder_without_a_tokenizer_is_refused(self, copy: Path) -> None:
        for path in copy.iterdir():
            if path.name not in (WEIGHTS, "config.json", "generation_config.json"):
                path.unlink()
        assert "is no complete Whisper checkpoint" in self.reason(str(copy))

    def test_an_empty_folder_is_refused(self, tmp_path: Path) -> None:
        assert "is no complete Whisper checkpoint" in self.reason(str(tmp_path))

    def test_a_hub_id_that_cannot_be_reached_says_how_to_go_on(self) -> None:
        assert "give a hub id or a local folder, and check the network" in self.reason("nobody/no-such-whisper")

    @pytest.mark.parametrize(
        ("error", "way_out"),
        [
            (GatedRepoError, "accept its terms on its hub page, then set HF_TOKEN"),
            (RepositoryNotFoundError, "check the name"),
        ],
    )
    def test_what_the_hub_refuses_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch, error: type[Exception], way_out: str
    ) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            try:
                raise error("401", response=SimpleNamespace(headers={}, request=None, status_code=401))  # type: ignore[call-arg]
            except error as cause:
                raise OSError("cannot load") from cause

        monkeypatch.setattr(model_module.WhisperForConditionalGeneration, "from_pretrained", refuse)
        assert way_out in self.reason("meta/gated-whisper")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_base_is_known_by_the_hash_of_its_weights(tiny: Path) -> None:
    record = describe_base(str(tiny))
    assert record.name == str(tiny)
    assert record.revision is None
    assert record.weights_sha256 == {WEIGHTS: sha256(tiny / WEIGHTS)}


def test_a_base_in_several_files_is_known_by_each(copy: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(copy)
    (copy / WEIGHTS).unlink()
    model.save_pretrained(copy, max_shard_size="4MB")
    parts = sorted(copy.glob("model-*.safetensors"))
    assert len(parts) > 1
    assert describe_base(str(copy)).weights_sha256 == {part.name: sha256(part) for part in parts}
    assert load_whisper(str(copy)).model.config.d_model == 32


def test_a_base_from_the_hub_has_its_commit(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "c0ffee" * 6 + "c0de"
    home = tmp_path / "hub/models--someone--whisper"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    shutil.copytree(tiny, home / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    record = describe_base("someone/whisper")
    assert record.revision == commit
    assert record.weights_sha256 == {WEIGHTS: sha256(tiny / WEIGHTS)}
