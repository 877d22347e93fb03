"""What merging and exporting hold in memory, and the benchmark that measures it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from jobs.export import ggml
from jobs.export.checkpoint import Checkpoint
from jobs.export.ctranslate2 import write_ctranslate2
from jobs.export.merging import MergedTensors, _layers

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "tests" / "benchmarks"


@pytest.fixture
def export_merge(monkeypatch: pytest.MonkeyPatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import export_merge

    return export_merge


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_merged_layer_keeps_nothing(export_merge, nano: Path, tmp_path: Path, use_dora: bool) -> None:
    export_merge.write_random_adapter(nano, use_dora, tmp_path / "adapter")
    base = Checkpoint(nano)
    merged = MergedTensors(base.weights, base.config, tmp_path / "adapter", torch.float32)
    assert sum(not torch.equal(tensor, base.weights[name]) for name, tensor in merged) > 10
    for layer in _layers(merged._model):
        assert not layer._caches
        assert not layer.merged
        assert layer.get_base_layer().weight.device.type == "meta"


def test_a_merge_leaves_the_base_as_it_was(export_merge, nano: Path, tmp_path: Path) -> None:
    export_merge.write_random_adapter(nano, True, tmp_path / "adapter")
    base = Checkpoint(nano)
    before = {name: base.weights[name].clone() for name in base.weights}
    for _ in MergedTensors(base.weights, base.config, tmp_path / "adapter", torch.float32):
        pass
    assert all(torch.equal(base.weights[name], tensor) for name, tensor in before.items())


def test_ctranslate2_quantises_copies_not_the_checkpoint(nano: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(nano)
    before = {name: checkpoint.weights[name].clone() for name in checkpoint.weights}
    write_ctranslate2(checkpoint, tmp_path, "int8")
    assert all(torch.equal(checkpoint.weights[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q5_0, GGMLQuantizationType.F16])
def test_rows_quantised_in_blocks_are_those_quantised_at_once(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    tensor = torch.randn(2 * ggml.ROWS + 7, 64, generator=torch.Generator().manual_seed(0))
    with (tmp_path / "tensor").open("wb") as out:
        ggml._write_tensor(out, "decoder.token_embedding.weight", tensor, kind)
    expected = np.ascontiguousarray(quantize(tensor.numpy(), kind)).tobytes()
    assert (tmp_path / "tensor").read_bytes().endswith(b"decoder.token_embedding.weight" + expected)


def test_the_benchmark_reads_the_anonymous_memory_of_smaps(export_merge) -> None:
    kept = np.ones(64 << 20, dtype=np.uint8)
    read = export_merge.private_bytes(os.getpid())
    rollup = Path("/proc/self/smaps_rollup").read_text()
    anonymous = int(re.search(r"^Anonymous:\s+(\d+) kB", rollup, re.MULTILINE)[1]) * 1024
    assert kept.nbytes < read
    assert abs(read - anonymous) < 8 << 20


def test_the_benchmark_finds_a_weight_that_differs_in_its_sign_alone(export_merge) -> None:
    assert export_merge.same(torch.zeros(3), torch.zeros(3))
    assert not export_merge.same(torch.zeros(3), -torch.zeros(3))
    assert not export_merge.same(torch.zeros(3), torch.zeros(3).half())


def test_the_benchmark_runs_and_finds_the_two_merges_equal(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "export_merge.py", "--shape", "nano", "--repeats", "1"]
    options = ["--adapters", "dora", "--formats", "openai", "--work", tmp_path]
    ended = subprocess.run(
        [*command, *options], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "89 of 89 weights are equal to the bit" in ended.stdout


def test_the_written_figures_are_of_whisper_medium_and_of_equal_weights() -> None:
    result = json.loads((BENCHMARKS / "results" / "export_merge.json").read_text())
    assert result["shape"] == "openai/whisper-medium"
    for found in result["merges"].values():
        assert found["equality"]["equal_to_the_bit"] == found["equality"]["weights"]
        assert found["ratios"]["memory_over_imports"] < 1
