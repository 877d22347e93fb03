"""The greedy decoder says what transformers' generate() says, with adapters folded into weights or not."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import fill_adapters
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from waits import DEVICE, MatrixCasts, Waits

from jobs.adapter import attach, lora_layers
from jobs.fast.base_dtype import matrices
from jobs.fast.dora import speed_up
from jobs.fast.fold import folded, folded_weight
from jobs.fast.greedy import NEUTRAL, SYNC_STEPS, Rules, decode, why_not
from jobs.model import whisper_of
from jobs.transcribe import Generate, Greedy, transcribe
from service.spec.sections import EvaluationConfig
from service.spec.training import TrainingConfig

LANGUAGES = ["en", "es", "de", "en", "fr", "en"]


@pytest.fixture
def model(tiny: Path) -> Any:
    """Random weights, so large that what is said depends on what was heard and said."""
    torch.manual_seed(1)
    found = WhisperForConditionalGeneration.from_pretrained(tiny).eval()
    for parameter in found.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return found


def adapted(model: Any, **settings: Any) -> Any:
    """A PeftModel whose adapters have learned."""
    options = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1} | settings
    made = attach(model, TrainingConfig(**options))[0].eval()
    fill_adapters(made, 0.3)
    return made


def audio_of(model: Any, clips: int = 6) -> torch.Tensor:
    """An encoder's output (B, P, D)."""
    config = whisper_of(model).config
    return torch.randn(clips, config.max_source_positions, config.d_model, generator=torch.Generator().manual_seed(5))


def prompts(processor: Any, languages: list[str]) -> torch.Tensor:
    """(B, 4)."""
    names = [["<|startoftranscript|>", f"<|{code}|>", "<|transcribe|>", "<|notimestamps|>"] for code in languages]
    return torch.tensor([processor.tokenizer.convert_tokens_to_ids(each) for each in names])


def generated(model: Any, audio_BPD: torch.Tensor, languages: list[str], longest: int) -> list[list[int]]:
    """What generate() makes of each clip by itself, in one pass, without its prompt and its end."""
    texts = []
    for clip_PD, language in zip(audio_BPD, languages, strict=True):
        tokens = model.generate(
            encoder_outputs=BaseModelOutput(clip_PD[None]), language=language, task="transcribe",
            max_new_tokens=longest, do_sample=False, force_unique_generate_call=True,
        )[0, 4:].tolist()  # fmt: skip
        end = whisper_of(model).generation_config.eos_token_id
        texts.append(tokens[: tokens.index(end)] if end in tokens else tokens)
    return texts


@pytest.mark.parametrize("kind", ["base", "lora", "dora"])
def test_texts_are_those_of_generate_clip_by_clip(model: Any, processor: Any, kind: str) -> None:
    if kind != "base":
        model = adapted(model, use_dora=kind == "dora")
    audio_BPD, config = audio_of(model), whisper_of(model).generation_config
    expected = generated(model, audio_BPD, LANGUAGES, 40)
    assert len({tuple(text) for text in expected}) == len(expected), "clips are told apart"
    with torch.inference_mode(), folded(model):
        assert decode(model, audio_BPD, prompts(processor, LANGUAGES), Rules.of(model, 40)) == expected
        # Texts that end at different lengths, and so leave the batch one after the other.
        said = [token for text in expected for token in text]
        config.eos_token_id = max(said, key=lambda token: (sum(token in text for text in expected), -said.index(token)))
        shorter = decode(model, audio_BPD, prompts(processor, LANGUAGES), Rules.of(model, 40))
    assert len({len(text) for text in shorter}) > 2
    assert shorter == generated(model, audio_BPD, LANGUAGES, 40)
    assert shorter == [
        text[: text.index(config.eos_token_id)] if config.eos_token_id in text else text for text in expected
    ]


def test_the_decoders_positions_bound_a_text(model: Any, processor: Any) -> None:
    audio_BPD, room = audio_of(model, 2), model.config.max_target_positions - 4
    with torch.inference_mode():
        found = decode(model, audio_BPD, prompts(processor, ["en", "es"]), Rules.of(model, 10_000))
        short = decode(model, audio_BPD, prompts(processor, ["en", "es"]), Rules.of(model, 3))
    assert [len(text) for text in found] == [room, room]
    assert short == [text[:3] for text in found]


def test_suppressed_tokens_are_not_said(model: Any, processor: Any) -> None:
    audio_BPD = audio_of(model, 2)
    with torch.inference_mode():
        before = decode(model, audio_BPD, prompts(processor, ["en", "es"]), Rules.of(model, 12))
        model.generation_config.suppress_tokens = sorted({token for text in before for token in text[3:]})
        model.generation_config.begin_suppress_tokens = [text[0] for text in before]
        after = decode(model, audio_BPD, prompts(processor, ["en", "es"]), Rules.of(model, 12))
    assert not set(model.generation_config.suppress_tokens) & {token for text in after for token in text}
    assert not set(model.generation_config.begin_suppress_tokens) & {text[0] for text in after}
    assert after == generated(model, audio_BPD, ["en", "es"], 12)


@pytest.mark.parametrize("most", [SYNC_STEPS - 1, 3 * SYNC_STEPS])
def test_a_gpu_is_waited_for_only_where_it_is_seen_which_texts_have_ended(model: Any, most: int) -> None:
    model.generation_config.suppress_tokens, model.generation_config.begin_suppress_tokens = [1, 2], [3]
    model.to(DEVICE)
    audio_BPD = audio_of(model, 2).to(DEVICE)
    with torch.no_grad(), Waits() as waits:
        texts = decode(model, audio_BPD, torch.zeros(2, 4, dtype=torch.long, device=DEVICE), Rules.of(model, most))
    assert [len(text) for text in texts] == [most] * 2
    places = Counter(each.partition(", for ")[2] for each in waits.found)
    looks = {place: count for place, count in places.items() if "at_work_B" in place}
    assert set(looks.values()) <= {most // SYNC_STEPS}
    assert len(places.keys() - looks.keys()) == 1, f"one more, to read the texts: {places}"


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_rank_pattern": {"fc1": 7}}])
def test_folded_layers_compute_what_adapters_do_and_the_base_is_untouched(model: Any, settings: dict[str, Any]) -> None:
    wrapped = adapted(model, **settings)
    fast = speed_up(wrapped)
    assert len(fast) == (len(lora_layers(wrapped)) if settings.get("use_dora") else 0)
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    inputs = {
        name: torch.randn(3, 5, layer.get_base_layer().in_features, generator=torch.Generator().manual_seed(2))
        for name, layer in lora_layers(wrapped)
    }
    with torch.inference_mode():
        expected = {name: layer(inputs[name]) for name, layer in lora_layers(wrapped)}
        with folded(wrapped):
            found = {name: layer(inputs[name]) for name, layer in lora_layers(wrapped)}
        after = {name: layer(inputs[name]) for name, layer in lora_layers(wrapped)}
    for name, layer in lora_layers(wrapped):
        # The scale of what the adapter changes: rounding is far below it.
        plain = layer.get_base_layer()(inputs[name])
        assert (expected[name] - plain).abs().max() > 0.01
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-5)
        assert torch.equal(after[name], expected[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())


@pytest.mark.parametrize("dora", [False, True])
def test_a_folded_weight_is_pefts_merged_one(model: Any, dora: bool) -> None:
    wrapped = adapted(model, use_dora=dora)
    ours = {name: folded_weight(layer).clone() for name, layer in lora_layers(wrapped)}
    wrapped.merge_adapter()
    for name, layer in lora_layers(wrapped):
        torch.testing.assert_close(ours[name], layer.get_base_layer().weight, rtol=1e-5, atol=1e-5)


def test_layers_that_are_merged_or_switched_off_are_left_to_peft(model: Any) -> None:
    wrapped = adapted(model)
    layer = lora_layers(wrapped)[0][1]
    with wrapped.disable_adapter(), folded(wrapped):
        assert "forward" not in vars(layer)
    wrapped.merge_adapter()
    with folded(wrapped):
        assert "forward" not in vars(layer)
    wrapped.unmerge_adapter()
    with pytest.raises(RuntimeError, match="in the midst"), folded(wrapped):
        assert "forward" in vars(layer)
        raise RuntimeError("in the midst")
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_generation_config_that_asks_for_more_is_left_to_generate(model: Any, name: str) -> None:
    assert why_not(model, 1) is None
    setattr(model.generation_config, name, 3)
    assert why_not(model, 1) == f"the checkpoint's generation config has {name} 3"


def test_beams_and_other_attention_are_left_to_generate(model: Any) -> None:
    assert why_not(model, 4) == "evaluation.num_beams is 4"
    model.set_attn_implementation("eager")
    assert why_not(model, 1) == "engine.attention is eager"


@pytest.mark.parametrize(
    ("settings", "fast"), [({}, True), ({"fast_decoding": False}, False), ({"num_beams": 2}, False)]
)
def test_the_setting_says_who_decodes(
    model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], fast: bool
) -> None:
    made = []
    for kind in (Greedy, Generate):
        begin = kind.ready
        monkeypatch.setattr(kind, "ready", lambda self, begin=begin: made.append(type(self)) or begin(self))
    assert list(transcribe(model, processor, [], [], EvaluationConfig(**settings), multilingual=True)) == []
    assert made == [Greedy if fast else Generate]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_under_autocast_logits_are_those_of_the_model(model: Any, processor: Any, dtype: torch.dtype) -> None:
    audio_BPD = audio_of(model, 3)
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        found = decode(model, audio_BPD, prompts(processor, ["en", "es", "de"]), Rules.of(model, 20))
        # Token by token what one pass over the whole text finds the likeliest; bf16 leaves a few ties.
        same = total = 0
        for clip_PD, text, code in zip(audio_BPD, found, ["en", "es", "de"], strict=True):
            ids = torch.cat([prompts(processor, [code]), torch.tensor([text])], dim=1)
            logits_TV = model(encoder_outputs=(clip_PD[None],), decoder_input_ids=ids).logits[0, 3:-1].float()
            logits_TV[:, Rules.of(model, 1).suppressed] = -torch.inf
            logits_TV[0, Rules.of(model, 1).suppressed_first] = -torch.inf
            same += sum(a == b for a, b in zip(logits_TV.argmax(-1).tolist(), text, strict=True))
            total += len(text)
    assert total == 60 and same >= 57


@pytest.mark.parametrize("kind", ["base", "lora", "dora", "cast"])
def test_under_autocast_matrices_are_cast_once_and_texts_and_logits_are_the_same_to_the_bit(
    model: Any, processor: Any, kind: str
) -> None:
    """cast: as in a training, where the base's own matrices are held in bfloat16."""
    if kind != "base":
        settings = {"use_dora": True} if kind == "dora" else {"lora_target_modules": ["q_proj", "v_proj"]}
        model = adapted(model, **settings)
    if kind == "cast":
        for module in matrices(model):
            module.to(torch.bfloat16)
    audio_BPD, whisper, logits = audio_of(model), whisper_of(model), []
    whisper.proj_out.register_forward_hook(lambda module, given, output: logits.append(output))
    given = (model, audio_BPD, prompts(processor, LANGUAGES), Rules.of(model, 12))
    with torch.no_grad(), folded(model), torch.autocast("cpu", torch.bfloat16):
        expected = decode(*given)  # folded outside of autocast: nothing is held in its precision
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), folded(model), MatrixCasts() as casts:
        found = decode(*given)
        held = [weakref.ref(vars(each)["forward"].keywords["weight"]) for each in _held(whisper)]
    assert casts.count == 0
    assert found == expected
    assert len(logits) == 24 and all(torch.equal(logits[step], logits[step + 12]) for step in range(12))
    assert len(held) == (9 if kind == "cast" else 21), "all matrices, or folded ones and the head"
    assert all(each() is None for each in held if each() is not whisper.proj_out.weight)
    assert _held(whisper) == []


def test_without_autocast_nothing_is_held_but_folded_weights(model: Any) -> None:
    with folded(model):
        assert _held(model) == []
    wrapped = adapted(model)
    with folded(wrapped):
        folds = _held(whisper_of(wrapped))
        assert folds == [layer for name, layer in lora_layers(wrapped) if ".decoder." in name]
        assert {vars(each)["forward"].keywords["weight"].dtype for each in folds} == {torch.float32}


def _held(whisper: Any) -> list[Any]:
    """What computes with a weight that is not the model's own, in the decoder and behind it."""
    return [each for each in (*whisper.model.decoder.modules(), whisper.proj_out) if "forward" in vars(each)]
