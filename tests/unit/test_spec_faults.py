"""Bad specs: each gives one clear error that names the setting and the way out, exit code 2 and no traceback."""

import json

import pytest
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from service.cli.main import cli
from service.spec import words
from service.spec.job import JobSpec
from service.spec.search import Dimension
from service.spec.settings import settings
from service.spec.text import TextRules

DATA = {"train_csv": "train.csv", "val_csv": "val.csv"}


def flat(**settings):
    """A flat spec with the data that a job needs."""
    return DATA | settings


def spec(training=None, **more):
    """A spec in sections."""
    return {"training": DATA | (training or {})} | more


ONE_FAULT = {
    # name: (the file's content, what the error calls the place, what else it says)
    "rank of zero": (flat(lora_r=0), "lora_r", "0 is too small; give 1 or more"),
    "negative epochs": (flat(epochs=-1), "epochs", "-1 is too small; give 1 or more"),
    "epochs as a fraction": (flat(epochs=2.5), "epochs", "2.5 is not a whole number"),
    "a word for a number": (flat(lora_r="many"), "lora_r", '"many" is not a whole number'),
    "true for a number": (flat(lora_r=True), "lora_r", "true is not a number"),
    "null for a number": (flat(epochs=None), "epochs", "is null, which this setting cannot be"),
    "a list for a number": (flat(lr=[1e-4, 1e-5]), "lr", "is not a number"),
    "learning rate of zero": (flat(lr=0), "lr", "give more than 0"),
    "learning rate over one": (flat(lr=5), "lr", "5 is too large; give 1 or less"),
    "learning rate not finite": ("train_csv: train.csv\nval_csv: val.csv\nlr: .nan\n", "lr", "not a finite number"),
    "number out of all bounds": (flat(epochs=10**40), "epochs", "out of all bounds"),
    "warm-up of everything": (flat(warmup_ratio=1), "warmup_ratio", "give less than 1"),
    "dropout of one": (flat(lora_dropout=1.0), "lora_dropout", "1.0 is too large; give less than 1"),
    "a word for a switch": (flat(use_dora="maybe"), "use_dora", '"maybe" is neither true nor false'),
    "both precisions": (flat(fp16=True, bf16=True), "fp16", "bf16 exclude each other"),
    "fp16 without GPUs": (spec({"fp16": True}, resources={"gpus_per_worker": 0}), "training.fp16", "needs a GPU"),
    "another word for auto": (
        flat(per_dev_batch="automatic"),
        "per_dev_batch",
        '"automatic" is neither a whole number nor auto; give one of them',
    ),
    "no clips": (flat(per_dev_batch=0), "per_dev_batch", "0 is too small; give 1 or more, or auto"),
    "fewer than no clips": (flat(per_dev_batch=-1), "per_dev_batch", "-1 is too small; give 1 or more, or auto"),
    "half a clip": (flat(per_dev_batch=0.5), "per_dev_batch", "0.5 is not a whole number; give one such as 4, or auto"),
    "true for clips": (flat(per_dev_batch=True), "per_dev_batch", "true is not a number; give one, or auto"),
    "null for clips": (flat(per_dev_batch=None), "per_dev_batch", "is null, which this setting cannot be"),
    "auto for what is no choice": (flat(grad_accum="auto"), "grad_accum", '"auto" is not a whole number'),
    "auto multiplied": (
        spec(
            {"per_dev_batch": "auto"},
            kind="search",
            search={"space": {"lora_r": {"times": "per_dev_batch", "by": [2]}}},
        ),
        "search.space",
        "multiplies per_dev_batch for lora_r, and that may be auto, which is no number",
    ),
    "packing with nothing to choose": (
        spec({"per_dev_batch": "auto", "grad_accum": 1}, data={"packing": True}),
        "data.packing",
        "raise training.grad_accum, or switch data.packing off",
    ),
    "unknown setting": (flat(lora_rnk=8), "lora_rnk", "did you mean `lora_r`?"),
    "another tool's name": (flat(learning_rate=1e-4), "learning_rate", "did you mean `lr`?"),
    "unknown in a section": (spec(engine={"max_norm": 1}), "engine.max_norm", "did you mean `max_grad_norm`?"),
    "in the wrong section": (spec({"workers": 2}), "training.workers", "belongs under `resources:`"),
    "flat beside sections": (spec(resources={"workers": 2}) | {"lora_r": 4}, "lora_r", "belongs under `training:`"),
    "another section's, flat": (flat(batch_size=4), "batch_size", "belongs under `evaluation:`"),
    "unknown section": (spec(enginee={"weight_decay": 0}), "enginee", "did you mean `engine`?"),
    "nothing like it": (flat(qqqq=1), "qqqq", "is no setting; `whisper-jobs explain` lists all"),
    "a number for a section": (spec(engine=3), "engine", "3 is not a section"),
    "unknown kind": (spec(kind="trian"), "kind", "did you mean 'train'?"),
    "name with capitals": (spec(name="My Run"), "name", "is not a name of small letters"),
    "number for a text": (spec(name=12), "name", "is not text; put it in quotes"),
    "no training set": ({"val_csv": "val.csv"}, "train_csv", "is missing; give the CSV of the clips to train on"),
    "a list for a text": (
        flat(train_csv=["a.csv", "b.csv"]),
        "train_csv",
        '["a.csv", "b.csv"] is a list; give one text',
    ),
    "names parted by commas": (spec(export={"formats": "hf,ggml"}), "export.formats", "give it as [hf, ggml]"),
    "a name with a comma": (spec(export={"formats": ["hf,ggml"]}), "export.formats", "name each by itself: hf ggml"),
    "targets parted by commas": (flat(lora_target_modules="fc1, fc2"), "lora_target_modules", "as [fc1, fc2]"),
    "numbers parted by commas": (
        spec(augment={"speed": "0.9,1.1"}),
        "augment.speed",
        '"0.9,1.1" is not a list of numbers; give it as [0.9, 1.1]',
    ),
    "a number for a list": (
        spec(augment={"gain_db": 3}),
        "augment.gain_db",
        "is not a list of numbers; give one such as [-6.0, 6.0]",
    ),
    "a number for names": (flat(modules_to_save=3), "modules_to_save", 'of names; give one such as ["embed_tokens"]'),
    "empty path": (flat(outdir=" "), "outdir", "is empty"),
    "CSV that is not there": (flat(train_csv="trian.csv"), "train_csv", "does not exist"),
    "folder for a CSV": (flat(train_csv="."), "train_csv", "whisper-jobs manifest build"),
    "same CSV twice": (flat(val_csv="./train.csv"), "val_csv", "is the training set itself"),
    "outdir is a file": (flat(outdir="train.csv"), "outdir", "is a file; give a folder"),
    "outdir below a file": (flat(outdir="train.csv/run"), "outdir", "train.csv, a file; give a folder"),
    "outdir holds the data": (flat(outdir="."), "outdir", "holds the train_csv"),
    "unknown store": (flat(outdir="ftp://host/run"), "outdir", "give a folder, s3:// or gs://"),
    "CSV on the web": (flat(train_csv="http://x/y.csv"), "train_csv", "not known; give a CSV, s3:// or gs://"),
    "guard on the web": (spec(guard={"csv": "https://x/y.csv"}), "guard.csv", "give a CSV, s3:// or gs://"),
    "storage on the web": (spec(storage={"uri": "http://x"}), "storage.uri", "give a folder, s3:// or gs://"),
    "base on another store": (flat(base_model="ftp://x/y"), "base_model", "give a hub id, a folder, s3:// or gs://"),
    "dataset by address": (
        {"data": {"dataset": "https://huggingface.co/datasets/owner/speech"}},
        "data.dataset",
        "give the hub id, 'owner/speech'",
    ),
    "scored on the web": (
        {"kind": "evaluate", "evaluation": {"csv": "val.csv", "model": "http://x/y"}},
        "evaluation.model",
        "give a hub id, a folder, s3:// or gs://",
    ),
    "exported from the web": (
        {"kind": "export", "evaluation": {"csv": "val.csv"}, "export": {"source": "http://x/y"}},
        "export.source",
        "give a hub id, a folder, s3:// or gs://",
    ),
    "language by name": (flat(language="english"), "language", "did you mean 'en'?"),
    "language with region": (flat(base_model="openai/whisper-small", language="pt-BR"), "language", "'pt'?"),
    "unknown language": (flat(language="klingon"), "language", "give a code such as 'en'"),
    "English-only base": (flat(language="de"), "language", "knows English only; take a checkpoint without `.en`"),
    "base without owner": (flat(base_model="whisper-small"), "base_model", "did you mean 'openai/whisper-small'?"),
    "base by OpenAI's name": (flat(base_model="large-v3"), "base_model", "did you mean 'openai/whisper-large-v3'?"),
    "base with a typo": (flat(base_model="whisper-larg-v3"), "base_model", "did you mean 'openai/whisper-large-v3'?"),
    "base that is like none": (
        flat(base_model="nano"),
        "base_model",
        "hub id; give one such as 'openai/whisper-small'",
    ),
    "base by address": (
        flat(base_model="https://huggingface.co/openai/whisper-small"),
        "base_model",
        "give the hub id, 'openai/whisper-small'",
    ),
    "base folder missing": (flat(base_model="./nowhere"), "base_model", "is no folder on this machine"),
    "base is a file": (flat(base_model="./train.csv"), "base_model", "is a file; give a hub id"),
    "target with a typo": (flat(lora_target_modules=["q_porj", "fc1"]), "lora_target_modules", "did you mean q_proj"),
    "target in a missing layer": (
        spec({"base_model": "openai/whisper-large-v3-turbo", "lora_target_modules": ["decoder.layers.4.fc1"]}),
        "training.lora_target_modules",
        "its decoder has 4 layers, 0 to 3",
    ),
    "no target": (flat(lora_target_modules=[]), "lora_target_modules", "names no module; give at least one"),
    "regex with a fault": (flat(lora_target_modules=r".*(q_proj"), "lora_target_modules", "is no regular expression"),
    "regex without a match": (
        flat(lora_target_modules=r"layers\.\d+\.fc1$"),
        "lora_target_modules",
        "did you mean '.*",
    ),
    "regex over everything": (flat(lora_target_modules=r".*decoder.*"), "lora_target_modules", "a block of several"),
    "target is a layer norm": (flat(lora_target_modules=["layer_norm"]), "lora_target_modules", "a layer norm"),
    "target is the embedding": (
        flat(lora_target_modules=["embed_tokens"]),
        "lora_target_modules",
        "give modules_to_save: [embed_tokens] instead",
    ),
    "target is the head": (flat(lora_target_modules=["proj_out"]), "lora_target_modules", "modules_to_save"),
    "target is a block": (flat(lora_target_modules=["decoder"]), "lora_target_modules", "name the linear layers in it"),
    "target is an activation": (flat(lora_target_modules=["activation_fn"]), "lora_target_modules", "take it out"),
    "target is saved": (flat(modules_to_save=["fc1"]), "lora_target_modules", '"fc1" lies in modules_to_save'),
    "frozen and encoder only": (
        flat(freeze_encoder=True, lora_target_modules=["encoder.layers.0.fc1"]),
        "lora_target_modules",
        "freeze_encoder leaves that as it is",
    ),
    "saved module unknown": (flat(modules_to_save=["embed_token"]), "modules_to_save", "did you mean embed_tokens"),
    "saved by part of a name": (flat(modules_to_save=["_tokens"]), "modules_to_save", "no module's name"),
    "saved head": (flat(modules_to_save=["proj_out"]), "modules_to_save", "name embed_tokens, and both stay tied"),
    "saved list of layers": (flat(modules_to_save=["decoder.layers"]), "modules_to_save", "decoder.layers.0"),
    "saved with the embedding": (
        flat(modules_to_save=["decoder"], lora_target_modules=["encoder.layers.0.fc1"]),
        "modules_to_save",
        "holds the token embedding",
    ),
    "saved within a saved module": (
        flat(modules_to_save=["decoder.layers.0", "decoder.layers.0.fc1"]),
        "modules_to_save",
        '"decoder.layers.0.fc1" lies in decoder.layers.0, and that is trained in full already',
    ),
    "saved in a frozen encoder too": (
        flat(modules_to_save=["layer_norm"], freeze_encoder=True),
        "modules_to_save",
        "name the decoder's, such as decoder.layers.0.self_attn_layer_norm",
    ),
    "saved in a frozen encoder": (
        flat(modules_to_save=["conv1"], freeze_encoder=True),
        "modules_to_save",
        "freeze_encoder leaves that as it is",
    ),
    "pattern without a match": (
        flat(lora_rank_pattern={"decoder.layers.0.encoder_attn.k_prj": 32}),
        "lora_rank_pattern",
        "did you mean decoder.layers.0.encoder_attn.k_proj",
    ),
    "pattern beside the targets": (
        flat(lora_target_modules=["q_proj"], lora_alpha_pattern={"fc1": 8}),
        "lora_alpha_pattern",
        "matches no module with an adapter",
    ),
    "pattern with a fault": (flat(lora_rank_pattern={"fc1(": 8}), "lora_rank_pattern", "is no regular expression"),
    "pattern with a rank of zero": (flat(lora_rank_pattern={"fc1": 0}), "lora_rank_pattern[fc1]", "give 1 or more"),
    "pattern as a list": (flat(lora_rank_pattern=["fc1"]), "lora_rank_pattern", "is not an object"),
    "pattern as broken JSON": (flat(lora_rank_pattern='{"fc1": 8'), "lora_rank_pattern", "is not valid JSON"),
    "odd rank, orthogonal": (flat(lora_init="orthogonal", lora_r=7), "lora_r", "wants even ranks; give 8"),
    "odd rank in a pattern": (
        flat(lora_init="orthogonal", lora_rank_pattern={"fc1": 5}),
        "lora_rank_pattern",
        "gives 'fc1' an odd rank",
    ),
    "orthogonal convolution": (
        flat(lora_init="orthogonal", lora_target_modules=["conv1", "fc1"]),
        "lora_init",
        "no orthogonal start for the convolution",
    ),
    "convolution, changed base": (
        flat(lora_init="pissa", lora_target_modules=["conv1", "fc1"]),
        "lora_init",
        "no pissa start for the convolution",
    ),
    "DoRA with a fixed B": (flat(lora_init="mica", use_dora=True), "lora_init", "excludes use_dora"),
    "eva over a rank pattern": (
        flat(lora_init="eva", lora_rank_pattern={"fc1": 8}),
        "lora_init",
        "would overwrite lora_rank_pattern; leave one of the two out",
    ),
    "eva with flash attention": (
        spec({"lora_init": "eva"}, engine={"attention": "flash_attention_2"}),
        "engine.attention",
        "looks at the clips in float32",
    ),
    "more ranks than directions": (flat(lora_init="pissa", lora_r=1025), "lora_r", "allows 1024 at most"),
    "more ranks than directions of a gradient": (flat(lora_init="lora_ga", lora_r=513), "lora_r", "allows 512 at most"),
    "more ranks than eva finds": (flat(lora_init="eva", lora_r=257), "lora_r", "allows 256 at most"),
    "more ranks than directions, in a pattern": (
        flat(lora_init="mica", lora_rank_pattern={"fc1": 2000}),
        "lora_rank_pattern",
        "allows 1024 at most",
    ),
    "pissa without iterations": (flat(lora_init="pissa_niter_"), "lora_init", "(or pissa_niter_16)"),
    "refused initialisation": (flat(lora_init="loftq"), "lora_init", "is refused: it quantises the base"),
    "unknown initialisation": (flat(lora_init="xavier"), "lora_init", "give true, false, gaussian, orthogonal, pissa"),
    "offload contradicted": (
        flat(use_dora=True, dora_ephemeral_offload=True, lora_runtime_config={"ephemeral_gpu_offload": False}),
        "dora_ephemeral_offload",
        "keep one of the two",
    ),
    "unknown runtime option": (flat(lora_runtime_config={"offload": True}), "lora_runtime_config[offload]", "known"),
    "flash attention in float32": (
        spec({"bf16": False}, engine={"attention": "flash_attention_2"}),
        "engine.attention",
        "works in half precision only",
    ),
    "unknown attention": (spec(engine={"attention": "flash"}), "engine.attention", "did you mean 'flash_attention_2'?"),
    "unknown tracker": (spec(engine={"report_to": ["wandbb"]}), "engine.report_to", "did you mean wandb?"),
    "more workers at least than at most": (
        spec(resources={"workers": 2, "min_workers": 3}),
        "resources.min_workers",
        "is more than resources.workers (2); give 2 or less",
    ),
    "elastic without workers": (
        spec(resources={"workers": 0, "min_workers": 1}),
        "resources.min_workers",
        "has no effect with resources.workers 0",
    ),
    "one and a half GPUs": (spec(resources={"gpus_per_worker": 1.5}), "resources.gpus_per_worker", "whole number"),
    "a shared GPU": (
        spec(resources={"gpus_per_worker": 0.5, "workers": 2}),
        "resources.gpus_per_worker",
        "which NCCL refuses",
    ),
    "no model to score": ({"kind": "evaluate", "evaluation": {"csv": "val.csv"}}, "evaluation.model", "is missing"),
    "scored folder missing": (
        {"kind": "evaluate", "evaluation": {"csv": "val.csv", "model": "./gone"}},
        "evaluation.model",
        "does not exist",
    ),
    "transcripts too long": (spec(evaluation={"max_new_tokens": 445}), "evaluation.max_new_tokens", "444 or less"),
    "repeated key": ("lora_r: 4\nlora_r: 8\n", "bad.yaml:2: lora_r", "stands twice"),
    "YAML with a fault": ("training: [1, 2\n", "bad.yaml:2:1", "is not valid YAML"),
    "YAML with a tab": ("training:\n\tlora_r: 4\n", "bad.yaml:2:1", "indent with spaces"),
    "a list for a spec": ("- lora_r: 4\n", "bad.yaml", "holds a list at its top"),
    "a text for a spec": ("hello\n", "bad.yaml", "holds plain text at its top"),
    "a number as a key": ("1: 2\n", "bad.yaml: 1", "keys are names"),
    "a recursive spec": ("training: &a\n  more: *a\n", "bad.yaml", "holds far more than a spec does"),
    "a Python object": ("lora_r: !!python/object:os.system {}\n", "bad.yaml:1:9", "is not valid YAML"),
    "not UTF-8": (b"name: caf\xe9\n", "bad.yaml:1", "is not UTF-8"),
    "binary": (b"\x80\x00\x00PK", "bad.yaml", "is a binary file"),
    "an empty file": ("", "bad.yaml: training.train_csv", "is missing"),
}


def write_spec(folder, content):
    """Write a spec as YAML and return its name."""
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)).encode()
    (folder / "bad.yaml").write_bytes(content)
    return "bad.yaml"


@pytest.mark.parametrize(("content", "place", "says"), ONE_FAULT.values(), ids=ONE_FAULT)
def test_a_fault_is_one_clear_line(folder, content, place, says):
    name = write_spec(folder, content)
    # Where both CSVs are missing there are two faults.
    more = ["--val-csv", "val.csv"] if content == "" else []

    result = CliRunner().invoke(cli, ["validate", name, *more])

    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if not line.startswith("warning:")] == lines[-1:]
    assert lines[-1].startswith("error: bad.yaml")
    assert f"{place}: " in lines[-1]
    assert says in lines[-1]


JSON_FAULTS = {
    "comma too many": ('{"lora_r": 4,\n}', "bad.json:2:1", "is there a comma too many before it?"),
    "comment": ('{\n// the rank\n"lora_r": 4}', "bad.json:2:1", "JSON has no comments"),
    "YAML in a .json": ("lora_r: 4\n", "bad.json:1:1", "name the file .yaml"),
    "repeated key": ('{"lora_r": 4,\n"lora_r": 8}', "bad.json:2: lora_r", "stands twice"),
    "a number of 5,000 digits": ('{"lora_r": ' + "9" * 5000 + "}", "bad.json", "out of all bounds"),
    "nested without end": ("[" * 100_000, "bad.json", "out of all bounds"),
    "half a surrogate pair": ('{"name": "\\ud800"}', "bad.json: name", "half a surrogate pair"),
}


@pytest.mark.parametrize(("text", "place", "says"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_a_fault_of_the_json_itself_names_its_place(folder, text, place, says):
    (folder / "bad.json").write_text(text)

    result = CliRunner().invoke(cli, ["validate", "bad.json"])

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {place}")
    assert says in result.stderr


FLAG_FAULTS = {
    "--lora-r": (["--lora-r", "0"], "--lora-r: ", "is too small; give 1 or more"),
    "--lr": (["--lr", "fast"], "--lr: ", '"fast" is not a number'),
    "--lora-target-modules": (["--lora-target-modules", "q_proj", "k_porj"], "--lora-target-modules: ", "k_proj"),
    "--lora-rank-pattern": (["--lora-rank-pattern", "{oops"], "--lora-rank-pattern: ", "is not valid JSON"),
    "--set": (["--set", "engine.weight_decay=-1"], "--set engine.weight_decay: ", "give 0 or more"),
    "--set unknown": (["--set", "engine.decay=1"], "--set engine.decay: ", "did you mean `engine.weight_decay`?"),
    "--set by bare name": (["--set", "lora_r=0"], "--set lora_r: ", "0 is too small; give 1 or more"),
    "--set by a name of several": (
        ["--set", "max_wer_increase=0.1"],
        "--set max_wer_increase: ",
        "is a setting of several sections; write export.max_wer_increase or guard.max_wer_increase",
    ),
    "--set misspelt": (["--set", "lora_rr=4"], "--set lora_rr: ", "did you mean `training.lora_r`?"),
    "--set twice": (
        ["--set", "engine.threads=1", "--set", "engine.threads=3"],
        "--set engine.threads: ",
        "3 is given as 1 too; give one of the two",
    ),
    "a flag twice": (["--lora-r", "8", "--lora-r", "9"], "--lora-r: ", "9 is given as 8 too; give one of the two"),
    "both of a switch": (["--use-dora", "--no-use-dora"], "--no-use-dora: ", "contradicts --use-dora; give one"),
    "--set without value": (["--set", "engine.threads"], "--set engine.threads: ", "has no value"),
    "--set a section": (["--set", 'engine={"threads": 2}'], "--set engine: ", "is a section"),
    "--set below a setting": (
        ["--set", "training.lora_rank_pattern.fc1=3"],
        "--set training.lora_rank_pattern.fc1: ",
        "set training.lora_rank_pattern as a whole",
    ),
    "contradiction": (
        ["--lora-r", "4", "--set", "training.lora_r=8"],
        "--set training.lora_r: ",
        "contradicts --lora-r",
    ),
    "missing": (["--base-model", ""], "--base-model: ", "is empty"),
}


@pytest.mark.parametrize(("words", "place", "says"), FLAG_FAULTS.values(), ids=FLAG_FAULTS)
def test_a_fault_of_a_flag_names_the_flag(folder, words, place, says):
    arguments = ["validate", "--train-csv", "train.csv", "--val-csv", "val.csv", *words]

    result = CliRunner().invoke(cli, arguments)

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {place}")
    assert says in result.stderr


CSVS = {
    "": "is empty",
    "path,text\n": "has a header and no row",
    "path;text\na.wav;hi\n": "has its columns parted by ';'",
    "path\ttext\na.wav\thi\n": "has its columns parted by '\\t'",
    "file,text\na.wav,hi\n": "has no column path (it has file, text); rename 'file'",
    "path,sentence\na.wav,hi\n": "has no column text (it has path, sentence); rename 'sentence'",
    "a.wav,hi\nb.wav,ho\n": "has no column path and no column text",
    "audio,sentence\na.wav,hi\n": "(it has audio, sentence); `whisper-jobs manifest build` reads such tables",
    b"path,text\na.wav,hi\nb.wav,caf\xe9\n": "has a line 3 that is not UTF-8 text; save the file as "
    "UTF-8 (one in Latin-1: iconv -f latin1 -t utf-8 OLD > NEW)",
}


@pytest.mark.parametrize(("content", "says"), CSVS.items(), ids=map(repr, CSVS))
def test_a_csv_is_judged_by_its_header(folder, content, says):
    (folder / "odd.csv").write_bytes(content if isinstance(content, bytes) else content.encode())

    result = CliRunner().invoke(cli, ["validate", "--train-csv", "odd.csv", "--val-csv", "val.csv"])

    assert result.exit_code == 2
    assert result.stderr.startswith("error: --train-csv: ")
    assert len(result.stderr.splitlines()) == 1
    assert says in result.stderr


@pytest.mark.parametrize("header", ["path,text", "\ufeffpath,text,language", '" Path ",Text', "text,duration_s,path"])
def test_a_csv_with_the_right_columns_is_taken(folder, header):
    (folder / "fine.csv").write_text(f"{header}\na,b,c\n")

    result = CliRunner().invoke(cli, ["validate", "--train-csv", "fine.csv", "--val-csv", "val.csv"])

    assert result.exit_code == 0, result.output


MANY = """\
training:
  train_csv: train.csv
  val_csv: gone.csv
  lora_r: 0
  lr: fast
  fp16: true
  bf16: true
  lora_rank: 4
  lora_target_modules: [q_porj]
  lora_rank_pattern: {fc3: 2}
engine: {atention: eager}
resources: {gpus_per_worker: 1.5}
workers: 2
"""


def test_all_faults_come_at_once(folder):
    (folder / "bad.yaml").write_text(MANY)

    result = CliRunner().invoke(cli, ["validate", "bad.yaml", "--epochs", "0"])

    assert result.exit_code == 2
    first, *rest = result.stderr.splitlines()
    assert first == f"error: {len(rest)} faults"
    places = [line.strip().split(": ")[0] + ": " + line.strip().split(": ")[1] for line in rest]
    assert sorted(places) == sorted(
        [
            "bad.yaml:3: training.val_csv",
            "bad.yaml:4: training.lora_r",
            "bad.yaml:5: training.lr",
            "bad.yaml:6: training.fp16",
            "bad.yaml:8: training.lora_rank",
            "bad.yaml:9: training.lora_target_modules",
            "bad.yaml:10: training.lora_rank_pattern",
            "bad.yaml:11: engine.atention",
            "bad.yaml:12: resources.gpus_per_worker",
            "bad.yaml:13: workers",
            "--epochs: 0 is too small; give 1 or more",
        ]
    )


KINDS = {
    "trian": ["kind", "training.train_csv", "training.val_csv"],
    "Evaluate": ["kind", "evaluation.model", "evaluation.csv"],
    "qqqq": ["kind"],
}


@pytest.mark.parametrize(("kind", "places"), KINDS.items(), ids=KINDS)
def test_what_a_misspelt_kind_lacks_is_told_too(folder, kind, places):
    result = CliRunner().invoke(cli, ["validate", write_spec(folder, {"kind": kind, "engine": {}})])

    faults = [
        line for line in result.stderr.replace("error: bad.yaml:1: ", "  bad.yaml:1: ").splitlines() if ": " in line
    ]
    assert [line.split(": ")[1] for line in faults if "faults" not in line] == places


STRANGE = [
    None,
    True,
    -1,
    10**16,
    0.5,
    "x",
    "",
    [],
    [1],
    [[]],
    ["x", {}],
    [1, 2, 3],
    {},
    {"a": 1},
    {"a": {}},
    {"fc1": []},
]
INSIDE = {
    "search.space": [{"lr": {name: value}} for value in STRANGE for name in Dimension.model_fields],
    "data.text": [{name: value} for value in STRANGE for name in TextRules.model_fields]
    + [{"replace": [{"pattern": value}, {"by": value}]} for value in STRANGE],
}


@pytest.mark.parametrize("path", settings())
def test_no_fault_of_a_value_is_in_pydantics_words(path):
    section, _, name = path.rpartition(".")
    for value in [*STRANGE, *INSIDE.get(path, [])]:
        try:
            JobSpec.model_validate({section: {name: value}} if section else {name: value})
        except ValidationError as error:
            for entry in error.errors():
                text = words.message(entry)
                assert text[0].islower(), (value, text)
                assert "should" not in text, (value, text)


def test_faults_come_as_json_on_stderr(folder):
    (folder / "bad.yaml").write_text(MANY)

    result = CliRunner().invoke(cli, ["validate", "bad.yaml", "-o", "json"])

    assert result.stdout == ""
    content = json.loads(result.stderr)
    assert content["exit_code"] == result.exit_code == 2
    assert {"where": "bad.yaml:4: training.lora_r", "message": "is too small; give 1 or more", "value": 0} in content[
        "faults"
    ]
    assert content["error"].count("\n") == len(content["faults"]) - 1


def test_a_cross_check_that_rests_on_a_faulty_setting_says_nothing(folder):
    name = write_spec(folder, flat(lora_init="orthogonal", lora_r="seven", language="de", base_model=5))

    result = CliRunner().invoke(cli, ["validate", name])

    assert [line.split(": ")[1] for line in result.stderr.splitlines()[1:]] == ["base_model", "lora_r"]
