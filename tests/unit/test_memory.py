"""The memory estimate against what autograd really keeps for the backward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import WhisperConfig, WhisperForConditionalGeneration

from service import memory
from service.memory import training_memory
from service.spec.job import JobSpec
from service.spec.targets import FROZEN_ENCODER, adapted_modules
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import modules

CLIPS, TOKENS = 2, 24
DIMS = WhisperDims(
    d_model=64,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=256,
    decoder_ffn_dim=256,
    vocab_size=600,
    num_mel_bins=80,
    max_source_positions=300,
)


def kept_bytes(training: dict, *, half: bool) -> int:
    """Bytes that autograd keeps of one forward pass, the model's own weights left out."""
    torch.manual_seed(0)
    config = WhisperConfig(
        **{name: getattr(DIMS, name) for name in DIMS.__dataclass_fields__},
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        attn_implementation="sdpa",
    )
    spec = JobSpec(training=training)
    settings = spec.training
    model = get_peft_model(
        WhisperForConditionalGeneration(config),
        LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.lora_target_modules,
            use_dora=settings.use_dora,
            exclude_modules=FROZEN_ENCODER if settings.freeze_encoder else None,
        ),
    ).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    features = torch.randn(CLIPS, DIMS.num_mel_bins, 2 * DIMS.max_source_positions)
    tokens = torch.randint(0, DIMS.vocab_size, (CLIPS, TOKENS))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        logits = model(input_features=features, decoder_input_ids=tokens, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="sum")
    return sum(kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"lora_dropout": 0},
        {"use_dora": True},
        {"freeze_encoder": True},
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_target_modules": ["decoder.layers.1.self_attn.k_proj"], "lora_r": 8},
        {"use_dora": True, "lora_target_modules": ["encoder.layers.2.fc1"], "lora_r": 64},
    ],
    ids=str,
)
def test_activations_are_estimated_within_a_third_of_what_autograd_keeps(monkeypatch, training, half):
    monkeypatch.setattr(memory, "LABEL_TOKENS", TOKENS)
    spec = JobSpec(training={**training, "bf16": half, "per_dev_batch": CLIPS})
    adapted = adapted_modules(spec.training, modules(DIMS))

    estimate = training_memory(spec, DIMS, adapted, 0)
    plain = training_memory(JobSpec(training={**training, "bf16": False}), DIMS, adapted, 0)
    estimated = estimate.activations + estimate.base - plain.base  # with the cast weights, which autograd keeps too

    assert estimated == pytest.approx(kept_bytes(training, half=half), rel=1 / 3)
