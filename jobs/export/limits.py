"""What an artifact's figures must hold to."""

from __future__ import annotations

from typing import Any

from service.spec.export import ExportConfig


def why_refused(
    name: str, figures: dict[str, Any], limits: ExportConfig, compared: str = "the merged model"
) -> str | None:
    """What is wrong with an artifact by its figures; None: nothing.

    Args:
        name: the artifact.
        figures: its `wer` and `identical`, and `wer_compared`, of what it is compared with on the same clips.
        limits: the spec's.
        compared: what that is.
    """
    reasons = []
    increase = figures["wer"] - figures["wer_compared"]
    if increase > limits.max_wer_increase:
        reasons.append(
            f"its WER, {figures['wer']:.1%}, is {increase:.1%} above {compared}'s on the same clips; "
            f"export.max_wer_increase allows {limits.max_wer_increase:.1%}"
        )
    if figures["identical"] < limits.least_identical(name):
        reasons.append(
            f"{figures['identical']:.0%} of its transcripts are {compared}'s; export.min_identical asks for "
            f"{limits.least_identical(name):.0%}"
        )
    return "; ".join(reasons) or None
