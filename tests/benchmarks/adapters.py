"""Training steps of LoRA and DoRA, by jobs/fast and by PEFT: in one process, in turn, medians.

    python tests/benchmarks/adapters.py [--shapes nano turbo-decoder ...] [--repeats 15] [--rank 16] [--dropout 0]

A step is forward and backward pass and AdamW, on random weights of these shapes:

nano           nano Whisper, all of it, in float32; what the demo trains
turbo-decoder  whisper-large-v3-turbo's 4 decoder layers over what an encoder of 1,500 positions has heard
turbo          all of it

Without --shapes: nano, and where there is an NVIDIA GPU the other two, in bfloat16 by autocast there. Then 16 tokens of
each clip are transcribed greedily, with an encoder's outputs at hand. One line of JSON per shape: medians in
milliseconds, and their ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from measured import device, machine, wait
from torch import nn
from torch.nn import functional as F
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from jobs.adapter import attach, trainable_parameters
from jobs.demo.compact import END_OF_TEXT_ID, START_ID, NanoConfig
from jobs.demo.tokenizer import VOCABULARY_SIZE
from jobs.fast.adapters import speed_up
from jobs.model import quiet_libraries
from service.spec.sections import EngineConfig
from service.spec.training import TrainingConfig
from service.spec.whisper_dims import OPENAI

SIDES = ("lora", "dora", "peft_lora", "peft_dora")
TOKENS, HEARD_TOKENS = 48, 16


def config_of(shape: str) -> WhisperConfig:
    """The shape's configuration."""
    if shape == "nano":
        return NanoConfig().to_transformers(VOCABULARY_SIZE, END_OF_TEXT_ID, START_ID)
    dims = asdict(OPENAI["openai/whisper-large-v3-turbo"])
    return WhisperConfig(
        **dims | ({} if shape == "turbo" else {"encoder_layers": 1}),
        pad_token_id=END_OF_TEXT_ID,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        decoder_start_token_id=START_ID,
    )


class Side:
    """A model with adapters, its optimizer, and the one batch that it is trained on."""

    def __init__(self, side: str, shape: str, device: torch.device, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        with device:
            base = WhisperForConditionalGeneration(config_of(shape))
        training = TrainingConfig(
            lora_r=options.rank,
            lora_alpha=2 * options.rank,
            lora_dropout=options.dropout,
            use_dora=side.endswith("dora"),
            freeze_encoder=shape == "turbo-decoder",
        )
        self.model: Any = attach(base, training)[0].to(device).train()
        ours = not side.startswith("peft")
        self.fast = speed_up(self.model, EngineConfig(fast_lora=ours, fast_dora=ours))
        parameters = [parameter for _, parameter in trainable_parameters(self.model)]
        for parameter in parameters:
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)
        config = base.config
        self.autocast: Callable[[], Any] = contextlib.nullcontext
        if device.type == "cuda":
            self.autocast = lambda: torch.autocast("cuda", torch.bfloat16)
        tokens_BT = torch.randint(0, 50_000, (options.batch, TOKENS), device=device)
        self.inputs_BT, self.labels_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        self.heard: dict[str, Any] = {
            "input_features": torch.randn(options.batch, config.num_mel_bins, 3000, device=device)
        }
        self.outputs_BPD = torch.randn(options.batch, 1500, config.d_model, device=device)
        if training.freeze_encoder:
            self.heard = {"encoder_outputs": (self.outputs_BPD,)}

    def step(self) -> None:
        """One optimizer step."""
        with self.autocast():
            logits_BTV = self.model(**self.heard, decoder_input_ids=self.inputs_BT, use_cache=False).logits
            loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), self.labels_BT.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.fast.refresh()

    def transcribe(self) -> None:
        """Some tokens, greedily."""
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=self.outputs_BPD),
                decoder_input_ids=self.inputs_BT[:, :1],
                min_new_tokens=HEARD_TOKENS,
                max_new_tokens=HEARD_TOKENS,
                do_sample=False,
            )
        self.model.train()


def medians(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call; they are made in turn, after two rounds that do not count."""
    spent: dict[str, list[float]] = {side: [] for side in calls}
    for round_ in range(-2, repeats):
        for side, call in calls.items():
            wait()
            started = time.perf_counter()
            call()
            wait()
            if round_ >= 0:
                spent[side].append(1000 * (time.perf_counter() - started))
    return {side: statistics.median(each) for side, each in spent.items()}


def peak_mib(side: Side, device: torch.device) -> float | None:
    """GPU memory that one step adds to what is held before it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    side.step()
    return round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)


def ratios(found: dict[str, float]) -> dict[str, float]:
    """DoRA over LoRA, ours and PEFT's, and ours over PEFT's."""
    pairs = {
        "dora_over_lora": ("dora", "lora"),
        "peft_dora_over_lora": ("peft_dora", "peft_lora"),
        "lora_over_peft": ("lora", "peft_lora"),
        "dora_over_peft": ("dora", "peft_dora"),
    }
    return {name: round(found[one] / found[other], 3) for name, (one, other) in pairs.items()}


def measure(shape: str, repeats: int, rank: int, dropout: float, batch: int) -> dict[str, Any]:
    """All sides of one shape; see the module."""
    gpu, place = torch.cuda.is_available(), device()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small are nano's products that more would wait for each other
    options = argparse.Namespace(rank=rank, dropout=dropout, batch=batch)
    sides = {side: Side(side, shape, place, options) for side in SIDES}
    steps = medians({name: side.step for name, side in sides.items()}, repeats)
    heard = medians({name: side.transcribe for name, side in sides.items()}, repeats)
    memory = {name: peak_mib(side, place) for name, side in sides.items()} if gpu else None
    torch.set_num_threads(threads)
    result = {
        "shape": shape,
        "batch": batch,
        "rank": rank,
        "dropout": dropout,
        "modules": len(sides["dora"].fast),
        "step_ms": steps,
        "ratios": ratios(steps),
        "transcribe_ms": heard,
        "transcribe_ratios": ratios(heard),
        "peak_mib": memory,
    }
    return {key: rounded(value) for key, value in result.items()}


def main() -> None:
    """Measure and print."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["nano", "turbo-decoder", "turbo"] if gpu else ["nano"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    quiet_libraries()
    for shape in options.shapes:
        found = measure(shape, options.repeats, options.rank, options.dropout, options.batch)
        print(json.dumps(machine() | found), flush=True)


def rounded(value: Any) -> Any:
    """Medians and ratios to a thousandth."""
    return {side: each and round(each, 3) for side, each in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
