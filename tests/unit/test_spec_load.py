"""From files and flags to one spec: forms, precedence, paths, rewriting, and the hash."""

import json
from pathlib import Path

import pytest
import yaml

from service.errors import SpecError
from service.spec.check_files import FILE_CHECKS
from service.spec.checks import CHECKS, TRACKERS, require_model
from service.spec.flags import Override
from service.spec.job import JobSpec
from service.spec.load import load_spec
from service.spec.settings import settings
from service.spec.targets import adapted_modules
from service.spec.whisper_dims import OPENAI
from service.spec.whisper_modules import modules

DATA = {"train_csv": "train.csv", "val_csv": "val.csv"}


def load(folder, content, *overrides, suffix=".yaml"):
    """Load a spec from its text or content."""
    text = content if isinstance(content, str) else json.dumps(content)
    path = folder / f"spec{suffix}"
    path.write_text(text)
    return load_spec(path, [Override(name, value, f"--{name}") for name, value in overrides])


def test_a_flat_file_and_one_in_sections_are_the_same_job(folder):
    flat = load(folder, DATA | {"lora_r": 4, "name": "x"}, suffix=".json")
    nested = load(folder, {"kind": "train", "name": "x", "training": DATA | {"lora_r": 4}})

    assert flat.spec == nested.spec
    assert flat.warnings == nested.warnings == []


def test_flag_wins_over_file_and_file_over_base_and_base_over_default(folder):
    (folder / "spec.yaml").write_text("training: {train_csv: train.csv, lora_r: 4, lora_alpha: 8}\n")
    base = {"training": {"val_csv": "val.csv", "lora_r": 2, "epochs": 9}}

    spec = load_spec(Path("spec.yaml"), [Override("training.lora_r", "64", "--lora-r")], base=base).spec

    assert (spec.training.lora_r, spec.training.lora_alpha, spec.training.epochs) == (64, 8, 9)
    assert spec.training.grad_accum == settings()["training.grad_accum"].default
    assert base["training"]["lora_r"] == 2


def test_a_fault_in_the_file_is_gone_where_a_flag_replaces_it(folder):
    assert load(folder, DATA | {"lora_r": 0}, ("training.lora_r", 4)).spec.training.lora_r == 4


YAML_VALUES = {
    "lr: 5e-5": ("lr", 5e-5),
    "lr: '5e-5'": ("lr", 5e-5),
    "lr: 1E-4": ("lr", 1e-4),
    "lr: .5": ("lr", 0.5),
    "lora_r: 0x10": ("lora_r", 16),
    "lora_r: 010": ("lora_r", 10),
    "lora_r: '8'": ("lora_r", 8),
    "epochs: 4.0": ("epochs", 4),
    "use_dora: yes": ("use_dora", True),
    "use_dora: off": ("use_dora", False),
    "use_dora: 'true'": ("use_dora", True),
    "{language: no, base_model: openai/whisper-small}": ("language", "no"),
    "bf16: ~": ("bf16", None),
    "bf16:": ("bf16", None),
    "lora_target_modules: fc1": ("lora_target_modules", ["fc1"]),
    'lora_target_modules: \'["fc1", "fc2"]\'': ("lora_target_modules", ["fc1", "fc2"]),
    "lora_target_modules: [fc1, fc1]": ("lora_target_modules", ["fc1"]),
    "lora_target_modules: .*\\.fc1": ("lora_target_modules", ".*\\.fc1"),
    "lora_target_modules: all-linear": ("lora_target_modules", "all-linear"),
    "lora_target_modules: '[fc1, \"fc2\"]'": ("lora_target_modules", ["fc1", "fc2"]),
    "lora_rank_pattern: '{fc1: 4}'": ("lora_rank_pattern", {"fc1": 4}),
    "modules_to_save: embed_tokens": ("modules_to_save", ["embed_tokens"]),
    "lora_init: null": ("lora_init", True),
    "lora_init: 'true'": ("lora_init", True),
    "lora_init: false": ("lora_init", False),
    "lora_rank_pattern: {}": ("lora_rank_pattern", None),
    "lora_rank_pattern: '{\"fc1\": 4}'": ("lora_rank_pattern", {"fc1": 4}),
    "lora_rank_pattern: 'null'": ("lora_rank_pattern", None),
    "outdir: 2024-05-01": ("outdir", "2024-05-01"),
}


@pytest.mark.parametrize(("line", "expected"), YAML_VALUES.items(), ids=YAML_VALUES)
def test_yaml_is_read_by_the_rules_that_people_expect(folder, line, expected):
    settings = yaml.safe_load(line)
    lines = line.strip("{}").split(", ") if line.startswith("{language") else [line]
    assert settings

    training = load(folder, "\n".join(["train_csv: train.csv", "val_csv: val.csv", *lines])).spec.training

    name, value = expected
    found = getattr(training, name)
    assert (Path(found).name if name == "outdir" else found) == value


@pytest.mark.parametrize("name", ["spec", "spec.yaml", "spec.json", "spec.conf"])
def test_json_is_known_by_its_content_and_a_byte_order_mark_is_passed_over(folder, name):
    (folder / name).write_text("\ufeff" + json.dumps(DATA | {"lora_r": 4, "$schema": "schema.json"}))

    assert load_spec(Path(name)).spec.training.lora_r == 4


def test_anchors_and_merges_of_yaml_work(folder):
    text = "training: &t {train_csv: train.csv, val_csv: val.csv, lora_r: 4}\n"
    assert load(folder, text + "engine:\n").spec.training.lora_r == 4

    merged = "training:\n  <<: {lora_r: 4, lora_alpha: 6}\n  lora_r: 8\n  train_csv: train.csv\n  val_csv: val.csv\n"
    training = load(folder, merged).spec.training
    assert (training.lora_r, training.lora_alpha) == (8, 6)


def test_a_file_of_the_old_toolkit_may_hold_every_setting_with_objects_as_json_strings(folder):
    old = DATA | {"outdir": "./out", "language": "en", "lora_init": None, "modules_to_save": None, "bf16": None}
    old |= {"lora_runtime_config": '{"ephemeral_gpu_offload": true}', "lora_rank_pattern": '{"fc1": 4, "fc2": 8}'}
    old |= {"use_dora": "true", "lr": "5e-5", "lora_target_modules": '["fc1", "fc2"]'}

    training = load(folder, old, suffix=".json").spec.training

    assert training.lora_runtime_config.ephemeral_gpu_offload is True
    assert list(training.lora_rank_pattern.items()) == [("fc1", 4), ("fc2", 8)]
    assert (training.use_dora, training.lr, training.lora_target_modules) == (True, 5e-5, ["fc1", "fc2"])


def test_local_paths_become_absolute_and_others_stay(folder, monkeypatch):
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "models" / "mine" / "config.json").write_text('{"model_type": "whisper"}')
    for name in ("model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        (folder / "models" / "mine" / name).touch()
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "spec.yaml").write_text("train_csv: train.csv\nval_csv: s3://b/val.csv\n")
    monkeypatch.setenv("HOME", str(folder / "home"))
    flags = [Override("training.base_model", "models/mine", "--base-model"), Override("training.outdir", "~/o", "--o")]

    spec = load_spec(Path("elsewhere/spec.yaml"), flags).spec

    assert spec.training.train_csv == str(folder / "train.csv")
    assert spec.training.val_csv == "s3://b/val.csv"
    assert spec.training.base_model == str(folder / "models" / "mine")
    assert spec.training.outdir == str(folder / "home" / "o")
    assert spec.storage.uri == str(folder / "runs")
    assert load(folder, DATA).spec.training.base_model == "openai/whisper-medium.en"


def test_a_path_that_is_there_beside_the_spec_alone_is_said_to_be(folder):
    (folder / "jobs" / "nano").mkdir(parents=True)
    (folder / "jobs" / "data.csv").write_text("path,text\na.wav,hi\n")
    (folder / "jobs" / "spec.yaml").write_text("base_model: nano\ntrain_csv: data.csv\nval_csv: gone.csv\n")

    with pytest.raises(SpecError) as caught:
        load_spec(Path("jobs/spec.yaml"))
    note = "is there, but relative paths start at the current folder, not at the spec's"
    told = {fault.where.rsplit(" ", 1)[-1]: fault.message for fault in caught.value.faults}
    assert told["train_csv"].endswith(f"from the current folder on; jobs/data.csv {note}")
    assert told["val_csv"].endswith("from the current folder on")
    assert told["base_model"].endswith(f"give one such as 'openai/whisper-small'; jobs/nano {note}")
    flags = [Override("training.train_csv", "data.csv", "--train-csv")]
    with pytest.raises(SpecError) as caught:
        load_spec(Path("jobs/spec.yaml"), flags)
    assert note not in str(caught.value.faults[0]), "a flag's path has nothing to do with the spec's folder"


@pytest.mark.setting("lora_target_modules", "lora_rank_pattern")
def test_o_proj_is_taken_to_mean_out_proj_everywhere_and_said(folder):
    content = DATA | {
        "lora_target_modules": ["q_proj", "o_proj", "out_proj"],
        "lora_rank_pattern": {"decoder.layers.0.self_attn.o_proj": 4, "(q|o)_proj": 2},
    }

    loaded = load(folder, content)

    assert loaded.spec.training.lora_target_modules == ["q_proj", "out_proj"]
    assert list(loaded.spec.training.lora_rank_pattern) == ["decoder.layers.0.self_attn.out_proj", "(q|o)_proj"]
    assert [line.split(": ")[1] for line in loaded.rewritten] == ["lora_target_modules", "lora_rank_pattern"]
    assert all("`o_proj` is taken to mean `out_proj`" in line for line in loaded.rewritten)
    regex = load(folder, DATA | {"lora_target_modules": r".*\.(q_proj|o_proj)"}).spec.training
    assert len(adapted_modules(regex, modules(OPENAI["openai/whisper-tiny"]))) == 2 * 3 * 4


def test_advice_stops_nothing(folder):
    content = DATA | {"base_model": "someone/whisper-mine", "dora_ephemeral_offload": True, "lora_r": 8}

    loaded = load(folder, content)

    assert loaded.rewritten == []
    assert len(loaded.advice) == 2
    assert "has no effect without use_dora" in loaded.advice[0]
    assert "its modules are checked where the job runs" in loaded.advice[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"lora_rank_pattern": {"decoder.layers.*": 4, "decoder.layers.0.fc1": 8}}, "keys before it match"),
        ({"modules_to_save": ["layer_norm"]}, "PEFT trains those with it"),
        ({"lora_r": 2048}, "exceeds 1024, the rank of the weights themselves"),
        ({"lr": 0.1}, "5e-5 to 1e-3 are usual"),
        ({"warmup_ratio": 0.7}, "0 to 0.2 are usual"),
        ({"base_model": "openai/whisper-larg-v3"}, "did you mean 'openai/whisper-large-v3'"),
    ],
)
def test_what_is_probably_not_meant_is_advice(folder, content, says):
    advice = load(folder, DATA | content).advice

    assert any(says in line for line in advice), advice


ROUND_TRIPS = {
    "defaults": {},
    "everything": {
        "base_model": "openai/whisper-large-v3-turbo",
        "language": "de",
        "lora_target_modules": r"model\.decoder\.layers\.\d+\.(self|encoder)_attn\.o_proj",
        "lora_rank_pattern": {"layers.3.*": 8, "encoder_attn.*": 4},
        "modules_to_save": ["embed_tokens"],
        "use_dora": True,
        "dora_ephemeral_offload": True,
        "lora_runtime_config": {"ephemeral_gpu_offload": True},
        "lora_init": "gaussian",
        "lr": "3e-4",
        "outdir": "out",
        "fp16": True,
    },
}


@pytest.mark.parametrize("content", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_resolved_spec_loads_to_an_equal_one_from_any_folder(folder, content, form, monkeypatch):
    first = load(folder, DATA | content)
    resolved = folder / f"resolved.{form}"
    resolved.write_text(first.spec.to_json() if form == "json" else yaml.safe_dump(json.loads(first.spec.to_json())))
    (folder / "other").mkdir()
    monkeypatch.chdir(folder / "other")

    second = load_spec(resolved)

    assert second.spec == first.spec
    if form == "json":
        assert second.spec.sha256 == first.spec.sha256
        assert second.spec.to_json() == first.spec.to_json()
    assert second.rewritten == []
    assert [line.split(": ", 2)[2] for line in second.advice] == [line.split(": ", 2)[2] for line in first.advice]


@pytest.mark.setting("lora_rank_pattern")
def test_the_order_of_patterns_is_part_of_the_hash(folder):
    pattern = {"decoder.layers.*": 4, "fc1": 8}
    one = load(folder, DATA | {"lora_rank_pattern": pattern}).spec
    other = load(folder, DATA | {"lora_rank_pattern": dict(reversed(pattern.items()))}).spec

    assert one.sha256 != other.sha256
    ranks = [
        {m.name: m.rank for m in adapted_modules(spec.training, modules(OPENAI["openai/whisper-tiny"]))}
        for spec in (one, other)
    ]
    assert ranks[0]["model.decoder.layers.0.fc1"] == 4
    assert ranks[1]["model.decoder.layers.0.fc1"] == 8


def test_place_and_patience_are_not_part_of_the_hash(folder):
    plain = load(folder, {"training": DATA}).spec
    moved = {"name": "x", "storage": {"uri": "elsewhere"}, "resources": {"wait_s": 1, "min_workers": 1}}
    other = load(folder, {"training": DATA | {"outdir": "out"}} | moved).spec

    assert plain.sha256 == other.sha256
    assert load(folder, {"training": DATA | {"seed": 1}}).spec.sha256 != plain.sha256


@pytest.mark.parametrize(
    "job",
    [
        {"kind": "evaluate", "evaluation": {"model": "openai/whisper-tiny", "csv": "val.csv"}},
        {"kind": "export", "export": {"source": "s3://b/adapter"}, "evaluation": {"csv": "val.csv"}},
    ],
)
def test_what_only_training_needs_is_pointed_out_in_other_jobs_and_not_part_of_their_hash(folder, job):
    plain = load(folder, job)
    loaded = load(folder, job | {"training": {"lora_r": 4, "epochs": 7, "use_dora": True, "bf16": False}})
    one = load(folder, job | {"training": {"lr": 1e-4, "seed": 1}})

    assert plain.advice == []
    (line,) = loaded.advice
    assert "training.epochs: has no effect with kind" in line
    assert line.endswith(", which trains nothing, nor have lora_r, use_dora")
    assert one.advice[0].endswith("nor has lr")
    assert plain.spec.sha256 == one.spec.sha256 != loaded.spec.sha256
    assert loaded.spec.sha256 == load(folder, job | {"training": {"bf16": False}}).spec.sha256


def test_files_need_not_be_there_where_only_the_form_is_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.json").write_text(json.dumps(DATA | {"base_model": "./gone"}))

    spec = load_spec(Path("spec.json"), check_files=False).spec

    assert spec.training.base_model == str(tmp_path / "gone")


PARTS = {
    "weights (model.safetensors or pytorch_model.bin); save the model there": [],
    "feature extractor (preprocessor_config.json or processor_config.json)": ["model.safetensors"],
    "tokenizer (tokenizer.json or vocab.json); save the base model's WhisperProcessor there": [
        "pytorch_model.bin",
        "processor_config.json",
    ],
}


@pytest.mark.parametrize(("says", "there"), PARTS.items(), ids=[says.split()[0] for says in PARTS])
def test_a_local_base_model_must_be_whole(folder, says, there):
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").write_text('{"model_type": "whisper"}')
    for name in there:
        (folder / "mine" / name).touch()

    with pytest.raises(SpecError) as caught:
        load(folder, DATA | {"base_model": "mine"})

    assert f"holds no {says}" in str(caught.value)
    assert len(caught.value.faults) == 1


def test_credentials_are_refused_and_not_shown(folder):
    with pytest.raises(SpecError) as caught:
        load(folder, DATA | {"train_csv": "s3://me:SECRET@host/train.csv"})

    assert "come from the environment" in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_a_model_that_only_the_cluster_knows_is_checked_there(folder):
    content = DATA | {"base_model": "someone/mine", "language": "de", "lora_target_modules": ["q_proj", "fc3"]}
    spec = load(folder, content).spec

    with pytest.raises(SpecError) as caught:
        require_model(spec, OPENAI["openai/whisper-tiny.en"])
    advice = require_model(load(folder, DATA | {"lora_r": 512}).spec, OPENAI["openai/whisper-tiny.en"])

    assert [fault.where for fault in caught.value.faults] == ["training.lora_target_modules", "training.language"]
    assert "exceeds 384" in advice[0]


def test_every_kind_of_job_has_its_checks():
    kinds = set(settings()["kind"].schema["enum"])

    assert set(CHECKS) == set(FILE_CHECKS) == kinds


def test_the_known_trackers_are_accelerates():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert sorted(TRACKERS) == sorted(LOGGER_TYPE_TO_CLASS)


def test_errors_survive_the_way_through_a_process_border(folder):
    import pickle

    with pytest.raises(SpecError) as caught:
        load(folder, DATA | {"lora_r": 0, "lr": "x"})

    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.faults, again.exit_code) == (str(caught.value), caught.value.faults, 2)


def test_every_key_of_the_reference_is_a_setting_and_there_is_no_other():
    reference = """base_model train_csv val_csv outdir language seed epochs lr warmup_ratio per_dev_batch grad_accum
        logging_steps save_steps eval_steps fp16 bf16 freeze_encoder lora_r lora_alpha lora_dropout lora_target_modules
        modules_to_save use_dora dora_ephemeral_offload lora_runtime_config lora_init lora_rank_pattern
        lora_alpha_pattern merge_lora"""

    assert sorted(reference.split()) == sorted(s.name for s in settings().values() if s.section == "training")
    assert JobSpec().training.lr == 5e-5


def test_a_dataset_takes_the_place_of_both_manifests(folder):
    loaded = load_spec(None, [Override("data.dataset", "owner/speech", "--set data.dataset")])

    assert loaded.spec.training.train_csv is None
    with pytest.raises(SpecError, match="give one of the two"):
        load_spec(
            None,
            [
                Override("data.dataset", "owner/speech", "--set data.dataset"),
                Override("training.train_csv", "train.csv", "--train-csv"),
            ],
        )


def test_settings_of_a_dataset_without_one_are_pointed_out(folder):
    names = {"data.group": "speaker", "training.train_csv": "train.csv", "training.val_csv": "val.csv"}
    found = load_spec(None, [Override(path, value, f"--set {path}") for path, value in names.items()])

    assert any("data.group" in line and "has no effect without data.dataset" in line for line in found.advice)
