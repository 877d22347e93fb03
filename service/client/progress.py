"""What a job's log says of its progress. Its lines are made by jobs/progress.py; a test holds the two together."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

_LINE = re.compile(r"^\s*(?P<elapsed>\d+(?::\d\d){1,2})  (?P<text>.*)$")
_BAR = re.compile(
    r"^(?P<what>[a-z][^/]*?) (?P<done>\d+)/(?P<total>\d+)(?:  (?P<detail>.*?))?(?:  eta (?P<eta>[\d:]+))?$"
)
_STEP = re.compile(r"^loss (?P<loss>\S+)  lr (?P<lr>\S+)$")
_WER = re.compile(r"^(?:(?P<what>[a-z]+) )?WER (?P<wer>[\d.]+)%, CER (?P<cer>[\d.]+)%(?: at step (?P<step>\d+))?$")
_STAGES = r"dataset|prepare|describe|evaluate|search|train(?:-t\d+)?|winner|merge|guard|publish|export-[a-z0-9_-]+"
_STAGE = re.compile(rf"^(?P<stage>{_STAGES})  (?P<text>.+)$")
_ROOT = re.compile(r"^(?P<job_id>\S+)  -> (?P<root>\S.*)$")

BASE = "base"


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        elapsed: since the job's program has begun, `m:ss` or `h:mm:ss`.
        stage: what it does now.
        what: what is counted: `step`, `transcribing (base)`, ...
        done: of it; None where nothing is counted.
        total: in all.
        eta: until that much is done.
        loss: of the last step that was told.
        base_wer: of the base model, as a fraction.
        wer: of the last evaluation.
        wer_step: its step; None for the published model.
        root: where the results go.
    """

    elapsed: str | None = None
    stage: str | None = None
    what: str | None = None
    done: int | None = None
    total: int | None = None
    eta: str | None = None
    loss: float | None = None
    lr: float | None = None
    base_wer: float | None = None
    wer: float | None = None
    wer_step: int | None = None
    root: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def words(self) -> str:
        """In one line: `train  step 80/234  loss 0.334  WER 23.0%  eta 1:32`."""
        parts = [self.stage or "starting"]
        if self.total:
            parts.append(f"{self.what} {self.done}/{self.total}")
        if self.loss is not None and self.stage and self.stage.startswith("train"):
            parts.append(f"loss {self.loss:.3f}")
        if self.wer is not None or self.base_wer is not None:
            before = f"{self.base_wer:.1%} -> " if self.base_wer is not None and self.wer is not None else ""
            parts.append(f"WER {before}{self.wer if self.wer is not None else self.base_wer:.1%}")
        if self.eta:
            parts.append(f"eta {self.eta}")
        return "  ".join(parts)


def advance(progress: Progress, line: str) -> Progress:
    """The progress after a line of the log; a line that says nothing of it leaves it as it is."""
    event = read_line(line)
    if event is None:
        return progress
    progress = replace(progress, elapsed=event["elapsed"])
    kind = event["event"]
    if kind == "stage":
        nothing: dict[str, Any] = {"what": None, "done": None, "total": None, "eta": None}
        return replace(progress, stage=event["stage"], **nothing)
    if kind == "progress":
        counted = {name: event[name] for name in ("what", "done", "total", "eta")}
        learned = {name: event[name] for name in ("loss", "lr") if name in event}
        return replace(progress, **counted, **learned)
    if kind == "evaluation":
        if event["what"] == BASE:
            return replace(progress, base_wer=event["wer"])
        return replace(progress, wer=event["wer"], wer_step=event["step"])
    return replace(progress, root=event["root"]) if kind == "root" else progress


def read_line(line: str) -> dict[str, Any] | None:
    """What a line of the log says, as an event: `stage`, `progress`, `evaluation`, `root` or `notice`.

    None: it is no line of a job's progress (but of its summary, a warning, or Ray's own).
    """
    if not (found := _LINE.match(line.rstrip())):
        return None
    said = {"elapsed": found["elapsed"]}
    text = found["text"]
    if stage := _STAGE.match(text):
        return said | {"event": "stage", "stage": stage["stage"], "text": stage["text"]}
    if wer := _WER.match(text):
        return said | {
            "event": "evaluation",
            "what": wer["what"] or "validation",
            "wer": round(float(wer["wer"]) / 100, 4),
            "cer": round(float(wer["cer"]) / 100, 4),
            "step": int(wer["step"]) if wer["step"] else None,
        }
    if bar := _BAR.match(text):
        event = said | {"event": "progress", "what": bar["what"], "done": int(bar["done"]), "total": int(bar["total"])}
        step = _STEP.match(bar["detail"] or "")
        learned = {"loss": float(step["loss"]), "lr": float(step["lr"])} if step else {}
        return event | {"eta": bar["eta"]} | learned
    if root := _ROOT.match(text):
        return said | {"event": "root", "job_id": root["job_id"], "root": root["root"]}
    return said | {"event": "notice", "text": text}
