"""`augment`: training clips varied at random, anew in each epoch; validation is never varied."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from service.spec.base import Float, Int, JsonText, Spec


def _check_range(value: list[float]) -> list[float]:
    if len(value) != 2 or value[0] > value[1]:
        raise PydanticCustomError("range", "is no range; give [lowest, highest]")
    return value


def _check_speeds(value: list[float]) -> list[float]:
    if any(not 0.5 <= speed <= 2 for speed in value):
        raise PydanticCustomError("speeds", "holds a speed below 0.5 or above 2; 0.9 to 1.1 are usual")
    return value


Range = Annotated[list[Float], AfterValidator(_check_range), JsonText]
Speeds = Annotated[list[Float], AfterValidator(_check_speeds), JsonText]


class AugmentConfig(Spec):
    """How training clips are varied. What is drawn depends on the seed, the epoch and the row alone: the same with any
    number of workers, and after a resumption. As it is, nothing is varied."""

    mask_time_prob: Float = Field(default=0.0, ge=0, lt=1, examples=[0.05])
    """SpecAugment: share of a clip's frames (of 10 ms) that lie in masks over time, overlaps not counted."""

    mask_time_length: Int = Field(default=10, ge=1, le=1000)
    """Length of each mask over time, in frames of 10 ms."""

    mask_time_min_masks: Int = Field(default=2, ge=0)
    """Fewest masks over time in a clip, with `mask_time_prob` above 0."""

    mask_feature_prob: Float = Field(default=0.0, ge=0, lt=1, examples=[0.05])
    """SpecAugment: share of the mel bins that lie in masks over frequency."""

    mask_feature_length: Int = Field(default=10, ge=1, le=80)
    """Width of each mask over frequency, in mel bins."""

    mask_feature_min_masks: Int = Field(default=0, ge=0)
    """Fewest masks over frequency in a clip, with `mask_feature_prob` above 0."""

    speed: Speeds = Field(default=[], examples=[[0.9, 1.0, 1.1]])
    """Speeds, of which each clip gets one; pitch changes with it. A clip is never slowed down beyond 30 s."""

    noise_prob: Float = Field(default=0.0, ge=0, le=1, examples=[0.3])
    """Share of the clips to which noise is added: white, pink or brown."""

    noise_snr_db: Range = Field(default=[10.0, 30.0])
    """Lowest and highest ratio of the clip's power to the noise's, in dB."""

    gain_db: Range = Field(default=[0.0, 0.0], examples=[[-6.0, 6.0]])
    """Lowest and highest change of volume, in dB; never beyond full scale."""

    @property
    def varies_audio(self) -> bool:
        """Whether a clip sounds different from epoch to epoch."""
        drawn = (self.mask_time_prob, self.mask_feature_prob, self.noise_prob, *self.gain_db)
        return any(drawn) or any(speed != 1 for speed in self.speed)
