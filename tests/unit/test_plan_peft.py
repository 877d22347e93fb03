"""Which modules are adapted, with what rank, and how many parameters train: our closed forms against PEFT itself."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import WhisperForConditionalGeneration
from whisper_shapes import NANO, meta_whisper

from service.plan import describe_adapter
from service.spec.job import JobSpec
from service.spec.targets import FROZEN_ENCODER, adapted_modules, resolve_targets
from service.spec.whisper_modules import modules

ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
CASES = {
    "defaults": {},
    "attention only": {"lora_target_modules": ["q_proj", "v_proj"], "lora_r": 4},
    "by part of a name": {"lora_target_modules": ["encoder_attn.k_proj", "decoder.layers.1.fc1"]},
    "by whole name": {"lora_target_modules": ["model.encoder.layers.1.self_attn.q_proj"]},
    "over twenty names": {
        "lora_target_modules": [
            m.name for m in modules(NANO) if m.kind == "linear" and m.name != "proj_out" and ".0." not in m.name
        ]
    },
    "regex": {"lora_target_modules": r"model\.decoder\.layers\.[02]\.(self|encoder)_attn\.[qv]_proj"},
    "all-linear": {"lora_target_modules": "all-linear"},
    "convolutions": {"lora_target_modules": ["conv1", "conv2", "fc1"]},
    "convolutions with DoRA": {"lora_target_modules": ["conv1", "conv2", "fc1"], "use_dora": True},
    "DoRA": {"use_dora": True, "lora_r": 3},
    "frozen encoder": {"freeze_encoder": True},
    "frozen encoder, regex": {"freeze_encoder": True, "lora_target_modules": r".*\.fc[12]", "use_dora": True},
    "rank pattern": {"lora_rank_pattern": {"decoder.layers.0.encoder_attn.k_proj": 32, "fc1": 2}},
    "first pattern wins": {"lora_rank_pattern": {"decoder.layers.*": 5, "fc1": 7, "encoder.*q_proj": 9}},
    "alternatives in a pattern": {"lora_rank_pattern": {"q_proj|fc2": 6}, "use_dora": True},
    "alpha pattern": {"lora_alpha_pattern": {"decoder.layers.*": 48, "fc1": 8}},
    "part of a name is no match": {"lora_rank_pattern": {"c1": 6, "proj": 7, "attn.q_proj": 9, "out_proj": 2}},
    "embeddings in full": {"modules_to_save": ["embed_tokens"]},
    "layer norms in full": {"modules_to_save": ["layer_norm"], "use_dora": True},
    "a module in full": {"modules_to_save": ["encoder.layers.0.fc1", "conv1"], "lora_target_modules": ["fc1", "fc2"]},
    "a layer in full": {"modules_to_save": ["decoder.layers.0"]},
    "nested in full": {"modules_to_save": ["decoder.layers.0", "decoder.layers.0.fc1"]},
    "positions in full": {"modules_to_save": ["embed_positions"]},
    "encoder in full": {"modules_to_save": ["encoder"]},
    "all at once": {
        "lora_target_modules": ALL,
        "use_dora": True,
        "freeze_encoder": True,
        "modules_to_save": ["embed_tokens", "decoder.layer_norm"],
        "lora_rank_pattern": {"encoder_attn.*": 12, "decoder.layers.1.*": 4},
        "lora_alpha_pattern": {"layers.1.*": 7},
    },
}


def peft_model(training):
    """The model as PEFT makes it from the settings themselves, not from names that we have resolved."""
    model = WhisperForConditionalGeneration(copy.deepcopy(meta_whisper(NANO).config))
    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        target_modules=training.lora_target_modules,
        exclude_modules=FROZEN_ENCODER if training.freeze_encoder else None,
        modules_to_save=training.modules_to_save,
        ensure_weight_tying="embed_tokens" in (training.modules_to_save or ()),
        use_dora=training.use_dora,
        rank_pattern=training.lora_rank_pattern or {},
        alpha_pattern=training.lora_alpha_pattern or {},
    )
    return get_peft_model(model, config)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("training", CASES.values(), ids=CASES)
def test_modules_ranks_alphas_and_parameters_are_pefts(training):
    spec = JobSpec(training=training)
    model = peft_model(spec.training)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }

    adapted = adapted_modules(spec.training, modules(NANO))

    assert {m.name: (m.rank, m.alpha) for m in adapted} == {
        name: (layer.r["default"], layer.lora_alpha["default"]) for name, layer in layers.items()
    }
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert describe_adapter(spec, NANO, adapted).trainable_parameters == trainable
    by_layer = {
        name: sum(p.numel() for key, p in layer.named_parameters() if "lora_" in key) for name, layer in layers.items()
    }
    assert {m.name: m.parameters for m in adapted} == by_layer


def test_resolving_names_alone_gives_the_same_modules():
    training = JobSpec(training=CASES["all at once"]).training
    names = [name for name, module in meta_whisper(NANO).named_modules() if isinstance(module, torch.nn.Linear)]

    assert set(resolve_targets(training, names)) == {m.name for m in adapted_modules(training, modules(NANO))}


@pytest.mark.parametrize("training", CASES.values(), ids=CASES)
def test_every_adapted_module_belongs_to_a_part(training):
    spec = JobSpec(training=training)
    adapted = adapted_modules(spec.training, modules(NANO))

    report = describe_adapter(spec, NANO, adapted)

    assert sum(part["modules"] for part in report.parts.values()) == len(adapted) == report.modules
