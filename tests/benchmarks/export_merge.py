"""Memory and time of our merge beside PEFT's, on a random checkpoint of whisper-medium's shape, and of every export.

    python tests/benchmarks/export_merge.py [--shape openai/whisper-medium] [--adapters lora dora] [--repeats 3]
        [--formats ggml-f16 ggml-q8_0 ctranslate2-int8 openai] [--work DIR] [--write]

PEFT: from_pretrained, PeftModel.from_pretrained, merge_and_unload, save_pretrained. Ours: jobs.export.hf.write_hf, the
processor's files included. Both in one go, in turn, each time in a process of its own that has its imports behind it;
medians of the repeats. The files to be read are in the page cache, and nothing waits to be written to disk.
Then the weights of both are compared, bit by bit, and each format is written from the merged checkpoint once. Where
other work goes on, look at the CPU seconds; where the disk is slow, give a `--work` in memory, such as /dev/shm.

Memory is RssAnon in /proc/<pid>/status, read every 2 ms: the anonymous pages, "Anonymous" in smaps_rollup, which only
swap could take from the process. Private_Clean would count pages of mapped checkpoints too, which are the page cache's
and the kernel drops at will. And to read smaps_rollup walks the page tables under the process's own lock, which costs
the process time and misses peaks; RssAnon is a counter. "Over imports": less what the process held before its work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from jobs.adapter import ADAPTER_NAME, attach
from jobs.demo.compact import END_OF_TEXT_ID, START_ID, NanoConfig
from jobs.demo.nano import generation_config, write_processor
from jobs.demo.tokenizer import VOCABULARY_SIZE, build_tokenizer
from jobs.export.safetensors_file import write_checkpoint
from jobs.export.weights import HEAD, Weights
from jobs.model import weight_files
from jobs.train.checkpoint import write_adapter
from service.spec.export import ARTIFACTS
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import OPENAI, WhisperDims

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "export_merge.json"
NANO = "nano"
SHAPES = [NANO, *(name for name, dims in OPENAI.items() if dims.vocab_size == VOCABULARY_SIZE)]
PACKAGES = ("torch", "transformers", "peft", "safetensors", "gguf", "ctranslate2", "openai-whisper")
SAMPLED_EVERY_S = 0.002
MIB = 2**20

CHILD = """
import sys, time
from pathlib import Path
{imports}
print("imported", flush=True)
sys.stdin.readline()
began, computed = time.perf_counter(), time.process_time()
{work}
print(time.perf_counter() - began, time.process_time() - computed, flush=True)
"""

PEFT = CHILD.format(
    imports="from peft import PeftModel\nfrom transformers import WhisperForConditionalGeneration",
    work="""
base, adapter, out = sys.argv[1:]
model = WhisperForConditionalGeneration.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter)
model.merge_and_unload().save_pretrained(out)
""",
)

OURS = CHILD.format(
    imports="from jobs.export.hf import write_hf",
    work="""
base, adapter, out = sys.argv[1:]
write_hf(base, Path(adapter), Path(out))
""",
)

FORMAT = CHILD.format(
    imports="""
from importlib import import_module
from jobs.export.artifact import WRITERS
from jobs.export.checkpoint import Checkpoint
merged, family, precision, out = sys.argv[1:]
module, function = WRITERS[family]
write = getattr(import_module(module), function)
""",
    work="write(Checkpoint(Path(merged)), Path(out), precision)",
)


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        seconds: from the end of its imports to the end of its work.
        cpu_seconds: of all of its threads in that time; other work on the machine changes it less.
        imported: bytes of private memory after its imports.
        peak: bytes of private memory at its highest.
    """

    seconds: float
    cpu_seconds: float
    imported: int
    peak: int

    @property
    def over_imports(self) -> int:
        """Bytes that the work itself took."""
        return self.peak - self.imported


def private_bytes(pid: int) -> int:
    """The anonymous memory of a process; 0 when it has ended."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) * 1024 if found else 0


def measure(code: str, arguments: list[str], inputs: list[Path], out: Path) -> Run:
    """Run code once in a process of its own, into an empty folder, and watch its memory."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    warm(inputs)
    os.sync()
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | quiet | {"PYTHONPATH": str(ROOT)},
    )
    assert child.stdin
    assert child.stdout
    assert child.stdout.readline() == "imported\n", f"{arguments}: did not start"
    imported = peak = private_bytes(child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    while child.poll() is None:
        peak = max(peak, private_bytes(child.pid))
        time.sleep(SAMPLED_EVERY_S)
    assert child.returncode == 0, f"{arguments}: ended with {child.returncode}"
    with child:
        seconds, cpu_seconds = map(float, child.stdout.read().split())
        return Run(seconds, cpu_seconds, imported, peak)


def warm(folders: list[Path]) -> None:
    """Read files, so that all of them are in the page cache."""
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(16 * MIB):
                    pass


def median(runs: list[Run]) -> Run:
    """The median of each figure."""
    return Run(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.cpu_seconds for run in runs),
        round(statistics.median(run.imported for run in runs)),
        round(statistics.median(run.peak for run in runs)),
    )


def write_base(shape: str, folder: Path) -> None:
    """Write a checkpoint of random weights, one after another."""
    dims = OPENAI.get(shape) or WhisperDims(64, 2, 2, 2, 2, 256, 256, VOCABULARY_SIZE)
    size = NanoConfig(
        dims.d_model, dims.encoder_attention_heads, dims.encoder_layers, dims.decoder_layers, dims.encoder_ffn_dim
    )
    config = size.to_transformers(VOCABULARY_SIZE, END_OF_TEXT_ID, START_ID)
    config.architectures, config.dtype = ["WhisperForConditionalGeneration"], torch.float32
    assert WhisperDims.from_config(config.to_dict()) == dims
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != HEAD}
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, sizes in shapes.items():
            yield name, 0.02 * torch.randn(sizes, generator=generator)

    folder.mkdir()
    write_checkpoint(folder, tensors(), shapes, torch.float32)
    tokenizer = build_tokenizer()
    config.save_pretrained(folder)
    generation_config(tokenizer, size).save_pretrained(folder)
    write_processor(folder, tokenizer)


def write_random_adapter(base: Path, use_dora: bool, folder: Path) -> None:
    """Write an adapter of default rank and targets, no value of which is zero."""
    with torch.device("meta"):
        model: Any = WhisperForConditionalGeneration(WhisperForConditionalGeneration.config_class.from_pretrained(base))
        model, _ = attach(model, TrainingConfig(use_dora=use_dora))
    generator = torch.Generator().manual_seed(1)
    # DoRA's magnitudes are lengths.
    state = {
        name: 0.03 * torch.randn(tensor.shape, generator=generator)
        if "magnitude" not in name
        else 0.5 + torch.rand(tensor.shape, generator=generator)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    write_adapter(folder, model.peft_config[ADAPTER_NAME], state)


def differing(one: Path, other: Path) -> tuple[list[str], int]:
    """The weights that are not the same to the last bit in two checkpoints, and how many there are in all."""
    ours, theirs = Weights(weight_files(str(one))), Weights(weight_files(str(other)))
    names = sorted({*ours, *theirs})
    return [name for name in names if name not in ours or name not in theirs or not same(ours[name], theirs[name])], (
        len(names)
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits."""
    bits = torch.uint8
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.view(bits), other.view(bits))


def compare(name: str, base: Path, adapter: Path, place: Path, repeats: int) -> dict[str, Any]:
    """Merge with both, in turn; print and return the medians, the ratios, and how many weights differ."""
    sides, runs = {"PEFT": PEFT, "ours": OURS}, {"PEFT": [], "ours": []}
    for _ in range(repeats):
        for side, code in sides.items():
            runs[side].append(measure(code, [str(base), str(adapter)], [base, adapter], place / side))
    unequal, count = differing(place / "ours", place / "PEFT")
    medians = {side: median(of) for side, of in runs.items()}
    for side, run in medians.items():
        show(f"{name}, {side}", run)
    peft, ours = medians["PEFT"], medians["ours"]
    return {
        "ratios": {
            "memory_over_imports": round(ours.over_imports / peft.over_imports, 4),
            "memory_with_imports": round(ours.peak / peft.peak, 4),
            "seconds": round(ours.seconds / peft.seconds, 3),
            "cpu_seconds": round(ours.cpu_seconds / peft.cpu_seconds, 3),
        },
        "equality": {"weights": count, "equal_to_the_bit": count - len(unequal), "differing": unequal[:5]},
        "bytes": {side: figures(run) for side, run in medians.items()},
        "seconds": {side: seconds(of) for side, of in runs.items()},
    }


def seconds(runs: list[Run]) -> dict[str, list[float]]:
    """By the clock and of the processors, one of each run."""
    return {"clock": [round(run.seconds, 2) for run in runs], "cpu": [round(run.cpu_seconds, 2) for run in runs]}


def figures(run: Run) -> dict[str, int]:
    """Memory in bytes."""
    return {"imports": run.imported, "peak": run.peak, "peak_over_imports": run.over_imports}


def show(name: str, run: Run) -> None:
    """Print a line of the table."""
    sizes = (run.imported, run.peak, run.over_imports)
    print(
        f"{name:<18}"
        + "".join(f"{size / MIB:>14,.0f}" for size in sizes)
        + f"{run.seconds:>10.1f}{run.cpu_seconds:>13.1f}",
        flush=True,
    )


def device() -> dict[str, Any]:
    """The machine, in figures."""
    models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="openai/whisper-medium")
    parser.add_argument("--adapters", choices=["lora", "dora"], nargs="+", default=["lora", "dora"])
    parser.add_argument("--repeats", type=int, default=3)
    formats = ["ggml-f16", "ggml-q8_0", "ctranslate2-int8", "openai"]
    parser.add_argument("--formats", choices=sorted({*ARTIFACTS} - {"hf"}), nargs="*", default=formats)
    parser.add_argument("--work", type=Path, help="folder for four checkpoints' files; a temporary one by default")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        result = run(options, Path(folder))
    for name, found in result["merges"].items():
        ratios, equality = found["ratios"], found["equality"]
        print(
            f"{name}: ours takes {ratios['memory_over_imports']:.3f} of PEFT's memory (imports subtracted; "
            f"{ratios['memory_with_imports']:.3f} with them), {ratios['seconds']:.2f} of its time and "
            f"{ratios['cpu_seconds']:.2f} of its CPU time; "
            f"{equality['equal_to_the_bit']} of {equality['weights']} weights are equal to the bit"
        )
    if options.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    if any(found["equality"]["differing"] for found in result["merges"].values()):
        sys.exit("the two merges are not the same")


def run(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """All measurements, as they are written to the results."""
    base = place / "base"
    write_base(options.shape, base)
    print(
        f"{'MiB of memory':<18}{'after imports':>14}{'peak':>14}{'over imports':>14}{'seconds':>10}{'CPU seconds':>13}"
    )
    merges = {}
    for name in options.adapters:
        write_random_adapter(base, name == "dora", place / name)
        label = {"lora": "LoRA", "dora": "DoRA"}[name]
        merges[name] = compare(label, base, place / name, place, options.repeats)
    exports = {}
    for name in options.formats:
        family, precision = ARTIFACTS[name]
        arguments = [str(place / "ours"), family, precision]
        alone = measure(FORMAT, arguments, [place / "ours"], place / "export")
        show(name, alone)
        size = sum(path.stat().st_size for path in (place / "export").iterdir())
        exports[name] = figures(alone) | {"size": size, "seconds": seconds([alone])}
    arguments = [a for a in sys.argv[1:] if a != "--write"]
    return {
        "command": shlex.join(["python", str(Path(__file__).relative_to(ROOT)), *arguments]),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": device(),
        "shape": options.shape,
        "checkpoint_bytes": sum(path.stat().st_size for path in weight_files(str(base))),
        "merges": merges,
        "exports": exports,
    }


if __name__ == "__main__":
    main()
