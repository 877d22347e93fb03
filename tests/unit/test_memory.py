"""The memory estimate against what autograd really keeps for the backward pass, and what really lies in memory."""

import weakref

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from jobs.adapter import attach, trainable_parameters
from jobs.batches import Batch
from jobs.fast.adapters import speed_up
from jobs.fast.base_dtype import cast_base
from jobs.fast.fold import folded
from jobs.fast.many import ManyAdapters, Work
from jobs.train.step import forward_loss
from service.memory import WINDOW_BYTES, evaluation_memory, host_memory, training_memory
from service.plan import make_plan
from service.spec.job import JobSpec
from service.spec.targets import adapted_modules
from service.spec.whisper_dims import WhisperDims
from service.spec.whisper_modules import HEAD, modules

CLIPS, TOKENS = 2, 24
CPU = torch.device("cpu")
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


def model_of():
    """The base, with random weights."""
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
    return WhisperForConditionalGeneration(config)


def adapted_model(spec, *, half):
    """As the engine trains it."""
    model, _ = attach(model_of(), spec.training)
    speed_up(model, spec.engine)
    cast_base(model, spec, "bf16" if half else "no")
    return model.train()


def batch_of(length=TOKENS):
    """Clips as long as they may be."""
    features = torch.randn(CLIPS, DIMS.num_mel_bins, 2 * DIMS.max_source_positions)
    tokens = torch.randint(0, DIMS.vocab_size, (CLIPS, length))
    return Batch(features, tokens, tokens, list(range(CLIPS)))


class Watch:
    """Bytes that autograd keeps at most at any time, the weights of models left out."""

    def __init__(self, *models):
        self.own = {each.untyped_storage().data_ptr() for model in models for each in model.parameters()}
        self.users, self.now, self.most = {}, 0, 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda packed: packed[0])

    def pack(self, tensor):
        packed, storage = Packed([tensor]), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.own:
            self.users[place] = self.users.get(place, 0) + 1
            self.now += size if self.users[place] == 1 else 0
            self.most = max(self.most, self.now)
            weakref.finalize(packed, self.free, place, size)
        return packed

    def free(self, place, size):
        self.users[place] -= 1
        self.now -= size if self.users[place] == 0 else 0


class Packed(list):
    """A list that can be watched."""


def spec_of(training, *, half=False, **sections):
    """A train job of passes of CLIPS."""
    return JobSpec(training={**training, "bf16": half, "per_dev_batch": CLIPS}, **sections)


def estimated(spec, **options):
    """The estimate for it."""
    adapted = adapted_modules(spec.training, modules(DIMS))
    trainable = sum(module.parameters for module in adapted)
    return training_memory(spec, DIMS, adapted, trainable, **{"tokens": TOKENS} | options)


def lying(model):
    """Bytes of a base model's own weights, as they lie in memory."""
    return sum(each.nbytes for name, each in model.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("base_dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"lora_dropout": 0},
        {"use_dora": True},
        {"freeze_encoder": True},
        {"freeze_encoder": True, "lora_dropout": 0},
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_target_modules": ["decoder.layers.1.self_attn.k_proj"], "lora_r": 8},
        {"use_dora": True, "lora_target_modules": ["encoder.layers.2.fc1"], "lora_r": 64},
    ],
    ids=str,
)
def test_activations_are_estimated_within_a_third_of_what_autograd_keeps(training, half, base_dtype):
    engine = {"base_dtype": base_dtype, "fast_loss": base_dtype == "auto"}
    spec = spec_of(training, half=half, engine=engine)
    model = adapted_model(spec, half=half)
    watch = Watch(model)

    with watch.hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        options = {"freeze_encoder": spec.training.freeze_encoder, "fast_loss": spec.engine.fast_loss}
        loss = forward_loss(model, batch_of(), CPU, **options)

    assert loss.requires_grad
    estimate = estimated(spec)
    cast = estimate.base - lying(model)  # cast weights, which autograd keeps too
    assert estimate.activations + cast == pytest.approx(watch.most, rel=1 / 3)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("base_dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    "training", [{}, {"use_dora": True}, {"use_dora": True, "lora_target_modules": ["fc1"]}], ids=str
)
def test_the_base_is_counted_as_it_lies_in_memory(training, half, base_dtype):
    spec = spec_of(training, half=half, engine={"base_dtype": base_dtype})
    adapted = {module.name for module in adapted_modules(spec.training, modules(DIMS))}
    model = adapted_model(spec, half=half)

    # Linear layers in float32 are cast, and autograd keeps that; the head's is let go with the loss.
    still = [each for each in modules(DIMS) if each.kind == "linear" and each.name != HEAD and (
        base_dtype == "float32" or ("use_dora" in training and each.name in adapted)
    )]  # fmt: skip
    cast = sum(2 * each.in_features * each.out_features for each in still) if half else 0
    assert estimated(spec).base == lying(model) + cast


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 80], ids=["without keys", "with keys"])
@pytest.mark.parametrize("trials", [1, 3])
@pytest.mark.parametrize(
    "training", [{}, {"lora_dropout": 0}, {"use_dora": True}, {"lora_target_modules": ["q_proj", "v_proj"]}], ids=str
)
def test_trials_that_train_together_are_estimated_within_a_quarter_of_what_autograd_keeps(
    training, trials, half, tokens
):
    spec = spec_of(training | {"freeze_encoder": True}, half=half)
    base = model_of()
    many, batch = ManyAdapters(base), batch_of(tokens)
    models = [attach(many.twin(), spec.training)[0].train() for _ in range(trials)]
    for model in models:
        many.add(model)
    watch = Watch(base, *models)
    works = [Work(model, [batch], CLIPS * tokens, torch.Generator()) for model in models]

    with watch.hooks:
        many.gradients(works, lambda: torch.autocast("cpu", torch.bfloat16, enabled=half))

    estimate = estimated(spec, trials=trials, tokens=tokens)
    assert estimate.activations + estimate.base - lying(base) == pytest.approx(watch.most, rel=1 / 4)
    trainable = sum(parameter.nbytes for model in models for _, parameter in trainable_parameters(model))
    assert estimate.adapter == 4 * trainable, "weight, gradient, and two moments"


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("training", [{}, {"use_dora": True}, {"lora_target_modules": ["q_proj", "v_proj"]}], ids=str)
def test_the_weights_that_a_model_is_scored_with_are_counted(training, half):
    spec = spec_of(training, half=half)
    model, _ = attach(model_of(), spec.training)  # as one that is read anew: all in float32
    with torch.autocast("cpu", torch.bfloat16, enabled=half), folded(model):
        held = [each.forward.keywords["weight"] for each in model.modules() if "forward" in vars(each)]

    adapted = adapted_modules(spec.training, modules(DIMS))
    assert evaluation_memory(spec, DIMS, adapted).folded == sum(weight.nbytes for weight in held)
    slow = spec_of(training, half=half, evaluation={"fast_decoding": False})
    assert evaluation_memory(slow, DIMS, adapted).folded == 0


FROZEN = {"freeze_encoder": True}
OUTPUT = DIMS.max_source_positions * DIMS.d_model * 4


@pytest.mark.parametrize(
    ("training", "sections", "on_gpu", "on_host"),
    [
        (FROZEN, {"engine": {"keep_encoder_gb": 1}}, 30 * OUTPUT, 0),
        (FROZEN, {"engine": {"keep_encoder_gb": 10 * OUTPUT / 1e9}}, 10 * OUTPUT, 10 * OUTPUT),
        (FROZEN, {"engine": {"keep_encoder_gb": 25 * OUTPUT / 1e9}}, 25 * OUTPUT, 5 * OUTPUT),
        (FROZEN, {"engine": {"keep_encoder_gb": 1, "keep_encoder": "host"}}, 0, 30 * OUTPUT),
        (FROZEN, {"engine": {"keep_encoder_gb": 1}, "resources": {"gpus_per_worker": 0}}, 0, 30 * OUTPUT),
        (FROZEN, {"engine": {"keep_encoder_gb": 1}, "augment": {"speed": [0.9, 1.1]}}, 10 * OUTPUT, 0),
        (FROZEN, {"engine": {"keep_encoder_gb": 1, "keep_encoder": "disk"}}, 0, 0),
        (FROZEN, {"engine": {"keep_encoder_gb": 1, "keep_encoder": "off"}}, 0, 0),
        (FROZEN, {}, 0, 0),
        ({}, {"engine": {"keep_encoder_gb": 1}}, 0, 0),
    ],
    ids=str,
)
def test_encoder_outputs_are_counted_where_the_spec_has_them_kept(training, sections, on_gpu, on_host):
    spec = spec_of(training, **sections)
    rows = {"train": 20, "val": 10}

    assert estimated(spec, rows=rows).kept == on_gpu
    assert host_memory(spec, DIMS, rows=rows).outputs == on_host


@pytest.mark.parametrize(
    ("training", "asked", "clips"),
    [
        ({}, 10, 30),
        ({"epochs": 1}, 10, 10),
        (FROZEN, 10, 10),
        ({}, 0, 0),
        ({}, None, 0),
        ({}, 5 * WINDOW_BYTES / 1e9, 5),
    ],
)
def test_decoded_clips_are_counted_as_far_as_there_are_clips_and_room(training, asked, clips):
    spec = spec_of(training, data={"keep_audio_gb": asked})

    assert host_memory(spec, DIMS, rows={"train": 20, "val": 10}).audio == clips * WINDOW_BYTES
    assert host_memory(spec, DIMS, rows=None).audio == round((asked or 0) * 1e9), "however many there are"


def test_what_is_kept_adds_to_the_peak(folder):
    data = {"train_csv": "train.csv", "val_csv": "val.csv", "freeze_encoder": True}
    plain, kept = (make_plan(JobSpec(training=data, engine={"keep_encoder_gb": asked})).memory for asked in (0, 10))

    assert kept.training.kept > 0
    assert kept.peak == plain.peak + kept.training.kept
