"""`guard`: a second manifest on which the tuned model must not become worse than the base model."""

from __future__ import annotations

from pydantic import Field

from service.spec.base import Float, Int, Spec


class GuardConfig(Spec):
    """What the base model can do already and the tuned one must still be able to do. Both transcribe a second manifest
    with timestamps, greedily; a tuned model that has become worse is not promoted. As it is, nothing is guarded."""

    csv: str | None = Field(default=None, min_length=1, examples=["data/guard.csv"])
    """CSV in the form of `training.val_csv`: general speech, other languages, recordings of any length, and silence or
    noise marked as `no_speech`. Default (null): no guard."""

    max_wer_increase: Float = Field(default=0.02, ge=0, le=1, examples=[0.01])
    """By how much the WER may lie above the base model's, over all clips with speech and in each language: a
    difference of rates, where 0.02 allows 10 % to become 12 %."""

    max_regressions: Int = Field(default=0, ge=0)
    """On how many clips the tuned model may fail where the base model does not: write text on a `no_speech` clip,
    repeat itself in a loop, or give timestamps that go back, lie beyond the clip's end or are missing."""
