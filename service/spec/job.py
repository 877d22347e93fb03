"""`JobSpec`: the one description of a job."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

from pydantic import Field

from service.spec.augment import AugmentConfig
from service.spec.base import Spec
from service.spec.export import ExportConfig
from service.spec.guard import GuardConfig
from service.spec.search import SearchConfig
from service.spec.sections import DataConfig, EngineConfig, EvaluationConfig, ResourcesConfig, StorageConfig
from service.spec.training import TrainingConfig

OUTSIDE_THE_HASH: dict[str, Any] = {
    "name": True,
    "storage": True,
    "training": {"outdir"},
    "data": {"keep_audio_gb", "prefetch", "threads"},
    "engine": {
        "base_dtype",
        "fast_dora",
        "fast_features",
        "fast_lora",
        "fast_loss",
        "keep_checkpoints",
        "keep_encoder",
        "keep_encoder_gb",
        "report_to",
        "threads",
        "timeout_s",
    },
    "search": {"concurrent", "engine", "max_failures"},
    "resources": {"min_workers", "gpus_per_worker", "cpus_per_worker", "wait_s", "max_failures"},
}
"""What changes the result by rounding at most: where artifacts go, what is kept of them, on what it is computed."""

WITHOUT_TRAINING = ("outdir", "language", "fp16", "bf16")
"""Settings of `training` that count where nothing is trained: place, language of rows, precision of transcribing."""


class JobSpec(Spec):
    """A job. All that it needs to run again as it stands, except addresses and credentials."""

    kind: Literal["train", "search", "evaluate", "export"] = "train"
    """What the job does: `train` fine-tunes, scores, merges, exports and publishes; `search` tries settings of
    `training` first, and does so with the best; `evaluate` scores a model on a CSV; `export` merges and exports an
    adapter that is there already."""

    name: str | None = Field(
        default=None, pattern=r"^[a-z0-9]([a-z0-9._-]{0,38}[a-z0-9])?$", examples=["call-centre-nl"]
    )
    """Name of the job: small letters, digits, `.`, `_` and `-`, 40 at most. Default: made from the base model and
    method."""

    data: DataConfig = DataConfig()
    """How audio reaches the model."""

    augment: AugmentConfig = AugmentConfig()
    """How training clips are varied."""

    training: TrainingConfig = TrainingConfig()
    """What is trained, on what, and how."""

    search: SearchConfig = SearchConfig()
    """For `kind: search`: what is tried, how it is chosen, and when the search ends."""

    engine: EngineConfig = EngineConfig()
    """How training steps are made."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How a model is scored."""

    export: ExportConfig = ExportConfig()
    """Formats for other runtimes, and the limits of their proof."""

    guard: GuardConfig = GuardConfig()
    """What the tuned model must still be able to do."""

    resources: ResourcesConfig = ResourcesConfig()
    """What the job asks of the cluster."""

    storage: StorageConfig = StorageConfig()
    """Where results go."""

    @property
    def title(self) -> str:
        """The job's name, or one made from what it does."""
        if self.name:
            return self.name
        models = {"evaluate": self.evaluation.model, "export": self.export.source}
        model = models.get(self.kind, self.training.base_model)
        stem = re.sub(r"[^a-z0-9.-]+", "-", (model or "model").rstrip("/").rsplit("/", 1)[-1].lower()).strip("-.")
        method = self.kind if self.kind != "train" else "dora" if self.training.use_dora else "lora"
        return f"{stem[:30] or 'model'}-{method}"

    @property
    def idle(self) -> list[str]:
        """Settings of `training` that are not the defaults and have no effect, since nothing is trained."""
        if self.kind in ("train", "search"):
            return []
        given, plain = self.training, TrainingConfig()
        names = (name for name in TrainingConfig.model_fields if name not in WITHOUT_TRAINING)
        return [name for name in names if getattr(given, name) != getattr(plain, name)]

    @property
    def sha256(self) -> str:
        """Hash of what the result depends on. Order counts in pattern settings: the first match wins.

        The settings in OUTSIDE_THE_HASH do not count, nor do those that are `idle`.
        """
        content = self.model_dump(mode="json", exclude=OUTSIDE_THE_HASH)
        plain = TrainingConfig().model_dump(mode="json")
        content["training"] |= {name: plain[name] for name in self.idle}
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    @property
    def job_id(self) -> str:
        """Name and the spec's hash: the same job has the same id, another one has another."""
        return f"{self.title}-{self.sha256[:8]}"

    @property
    def root(self) -> str:
        """Where the artifacts of this job stand: a folder or URI."""
        return self.training.outdir or f"{self.storage.uri.rstrip('/')}/{self.job_id}"

    def to_json(self) -> str:
        """The complete spec as JSON, every default written out; loading it gives an equal spec."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def differing(one: JobSpec, other: JobSpec) -> list[str]:
    """The settings in which two specs differ, at most five of them, but for the name and the place of results."""
    left, right = leaves(one.model_dump(mode="json")), leaves(other.model_dump(mode="json"))
    paths = [path for path in left if not same_value(left[path], right.get(path)) and path not in NOT_COMPARED]
    return paths[:5] or ["order of a pattern"]


NOT_COMPARED = ("name", "training.outdir")
"""Settings that say how a run is called and where it is, not what it does."""


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a spec as JSON has it, each by its path: {"training.lora_r": 16}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            flat |= leaves(value, f"{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def same_value(one: Any, other: Any) -> bool:
    """Whether two settings are alike; the order of a pattern's entries counts, since the first match wins."""
    return json.dumps(one) == json.dumps(other)
