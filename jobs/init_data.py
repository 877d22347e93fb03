"""The initialisations that look at clips of the training set first, by PEFT's own functions, in float32.

Legend: N clips, B clips in a batch, T tokens, D a layer's inputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, get_eva_state_dict
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor
from torch.nn import functional as F

from jobs.batches import Batch, label_tokens
from jobs.tokens import IGNORE
from jobs.train.step import forward_loss
from service.errors import Fault, JobFailedError, SpecError

EVA_CLIPS = 8
"""Clips in one of EVA's forward passes, or more where they have too few tokens."""

EVA_POSITIONS = 1024
"""Positions of a batch that EVA looks at, evenly spaced: neighbouring frames of 20 ms are much alike."""

EVA_PASSES = 200
"""Forward passes, over the same batches again and again, in which EVA has to settle."""


@dataclass(frozen=True)
class InitClips:
    """Clips of the training set as they are, unvaried.

    Attributes:
        rows: N rows.
        read: makes a batch of rows.
        device: where the model is.
        freeze_encoder: whether the encoder is left as it is.
    """

    rows: list[int]
    read: Callable[[list[int]], Batch]
    device: torch.device
    freeze_encoder: bool

    def singly(self) -> list[Batch]:
        """Batches of one clip: nothing in them is padding of tokens, and they take the least memory."""
        return [self.read([row]) for row in self.rows]


def eva_directions(model: Any, config: LoraConfig, clips: InitClips) -> dict[str, Tensor]:
    """EVA: the principal components of each module's inputs. How many a module gets is its rank, which may be 0.

    PEFT's own input functions are those of language models. Ours take the decoder's positions with a label; of the
    audio all positions count, as they do in training.

    Args:
        model: the untouched base.
        config: modules and rank.
        clips: what to look at.

    Returns:
        per module a matrix (rank, D), ready to be A.

    Raises:
        SpecError: the clips have too few tokens for that rank.
        JobFailedError: the components have not settled.
    """
    config.init_lora_weights, config.eva_config = "eva", EvaConfig()
    # A randomised decomposition of 2 r components (PEFT's rho) wants twice as many rows.
    wanted = 4 * config.r
    passes = 0

    def forward(model: Any, batch: dict[str, Tensor]) -> None:
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES:
            raise JobFailedError(
                f"training.lora_init: eva's components have not settled in {EVA_PASSES} passes; raise "
                "engine.init_clips, lower training.lora_r, or take another initialisation"
            )
        model(input_features=batch["features_BMF"], decoder_input_ids=batch["inputs_BT"], use_cache=False)

    def inputs_of_layer(layer_input: tuple[Tensor, ...], labelled_BT: Tensor, name: str) -> Tensor:
        inputs = layer_input[0]
        of_decoder = inputs.shape[:2] == labelled_BT.shape
        rows = inputs[labelled_BT] if of_decoder else inputs.flatten(0, -2)
        kept = min(len(rows), max(EVA_POSITIONS, wanted))
        return rows[torch.arange(kept, device=rows.device) * len(rows) // kept]

    found: dict[str, Tensor] = get_eva_state_dict(
        model,
        _eva_batches(clips, wanted),
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=lambda batch, config: batch["labels_BT"] != IGNORE,
        prepare_layer_inputs_fn=inputs_of_layer,
        gather_distributed_inputs=False,  # rank 0 is alone here
        show_progress_bar=False,
    )
    return found


def _eva_batches(clips: InitClips, wanted: int) -> list[dict[str, Tensor]]:
    """Batches with that many label tokens or more."""
    groups: list[list[Batch]] = [[]]
    for single in clips.singly():
        if len(groups[-1]) >= EVA_CLIPS and label_tokens(groups[-1]) >= wanted:
            groups.append([])
        groups[-1].append(single)
    if len(groups) > 1 and label_tokens(groups[-1]) < wanted:
        last = groups.pop()
        groups[-1] += last
    if (held := label_tokens(groups[0])) < wanted:
        way_out = f"of {len(clips.rows)} clips have {held} tokens, and lora_init eva wants {wanted} for this rank; "
        raise SpecError([Fault("training.lora_r", f"{way_out}lower lora_r, or raise engine.init_clips")])
    return [_join(group) for group in groups]


def _join(singles: list[Batch]) -> dict[str, Tensor]:
    longest = max(single.inputs_BT.shape[1] for single in singles)

    def padded(tokens_BT: Tensor, fill: int) -> Tensor:
        return F.pad(tokens_BT, (0, longest - tokens_BT.shape[1]), value=fill)

    return {
        "features_BMF": torch.cat([single.features_BMF for single in singles]),
        "inputs_BT": torch.cat([padded(single.inputs_BT, 0) for single in singles]),
        "labels_BT": torch.cat([padded(single.labels_BT, IGNORE) for single in singles]),
    }


def prepare_corda(model: Any, config: LoraConfig, clips: InitClips) -> None:
    """CorDA: leave on each base layer the singular vectors of its weight times its inputs' covariance.

    Args:
        model: the untouched base.
        config: modules and ranks.
        clips: what to look at, clip by clip: PEFT takes the covariance of one sequence at a time.
    """
    config.init_lora_weights, config.corda_config = "corda", CordaConfig()

    def run() -> None:
        for batch in clips.singly():
            model(
                input_features=batch.features_BMF.to(clips.device),
                decoder_input_ids=batch.inputs_BT.to(clips.device),
                use_cache=False,
            )

    preprocess_corda(model, config, run)


def prepare_lora_ga(model: Any, config: LoraConfig, clips: InitClips) -> None:
    """LoRA-GA: leave on each base layer the gradient of the loss with respect to its weight, a mean over clips.

    Args:
        model: the untouched base.
        config: modules and ranks.
        clips: what to take the gradient on.

    Raises:
        JobFailedError: a module got no gradient, or one that is no number: PEFT would begin it as plain LoRA.
    """
    config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()

    def backward() -> None:
        for batch in clips.singly():
            loss = forward_loss(model, batch, clips.device, freeze_encoder=clips.freeze_encoder)
            (loss / label_tokens([batch])).backward()

    with warnings.catch_warnings():
        # The first layer's inputs need no gradient; its weights get theirs all the same.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, backward)
    for name in config.target_modules or ():
        gradient = getattr(model.get_submodule(name), "_peft_loraga_grad", None)
        if gradient is None or not math.isfinite(float(gradient.abs().sum())):
            raise JobFailedError(f"training.lora_init: lora_ga has no gradient for {name}; take another initialisation")
