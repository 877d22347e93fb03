"""The proof of an export: it is opened where it was published, by its own runtime, and heard."""

from __future__ import annotations

import json
import re
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.batches import read_clip
from jobs.export.listen import CLIPS, TASK
from jobs.export.runtimes import Decoding
from jobs.failures import GO_ON, inputs_that_were_there
from jobs.score import Scorer, Utterance, summarise
from service.errors import HungError, JobFailedError, OutOfMemoryError
from service.spec.export import ARTIFACTS, FAMILIES

COMPARABLE, DEFAULT = "comparable", "default"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Heard:
    """What a runtime made of the clips.

    Attributes:
        texts: per mode, one for each clip.
        seconds: per mode, what transcribing took, without opening the model.
        compute_type: what it computed in.
        version: of the runtime.
    """

    texts: dict[str, list[str]]
    seconds: dict[str, float]
    compute_type: str
    version: str


class RuntimeFailedError(Exception):
    """A runtime did not open an artifact, or ended over it. The message is what it said."""


def listen(
    family: str,
    folder: Path,
    records: Sequence[dict[str, Any]],
    decoding: Decoding,
    *,
    modes: Sequence[str] = (COMPARABLE, DEFAULT),
    timeout_s: float,
    progress: Callable[[int], None] = lambda done: None,
) -> Heard:
    """Transcribe clips with an artifact in its runtime, in a process of its own.

    Args:
        family: the artifact's format.
        folder: the artifact.
        records: rows with `path` and `language`.
        decoding: what makes transcripts comparable.
        modes: ways of transcribing.
        timeout_s: how long the runtime may take over one clip, or to open the model.
        progress: called with the number of clips done, over all modes.

    Raises:
        RuntimeFailedError: it could not.
    """
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as scratch:
        task = Path(scratch)
        with inputs_that_were_there():
            clips = [read_clip(record).astype(np.float32) for record in records]
        np.save(task / CLIPS, np.concatenate(clips))
        known = [
            {"language": record["language"], "samples": len(clip)} for record, clip in zip(records, clips, strict=True)
        ]
        content = {"family": family, "model": str(folder), "decoding": asdict(decoding), "modes": modes, "clips": known}
        (task / TASK).write_text(json.dumps(content))
        heard = Heard({mode: [""] * len(clips) for mode in modes}, dict.fromkeys(modes, 0.0), "", "")
        done = 0
        for line in _lines_of([sys.executable, "-m", "jobs.export.listen", scratch], timeout_s):
            if "opened" in line:
                heard = Heard(heard.texts, heard.seconds, line["opened"], line["version"])
            elif "mode" in line:
                heard.texts[line["mode"]][line["clip"]] = line["text"]
                heard.seconds[line["mode"]] += line["seconds"]
                done += 1
                progress(done)
    return heard


def _lines_of(command: list[str], timeout_s: float) -> Iterator[dict[str, Any]]:
    """The objects that a process prints, as they come.

    Raises:
        RuntimeFailedError: it ended before it said that it was done, or was silent for too long.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT, start_new_session=True)
        try:
            assert process.stdout is not None
            done = False
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while selector.select(timeout_s):
                    line = process.stdout.readline()
                    if not line:
                        break
                    content = json.loads(line)
                    done = "done" in content
                    yield content
                else:
                    raise HungError(f"a runtime gave no sign of life for {timeout_s:g} s (engine.timeout_s); {GO_ON}")
            code = process.wait()
        finally:
            process.kill()
            process.wait()
        if code or not done:
            errors.seek(0)
            raise _failure(code, errors.read().decode(errors="replace"))


def _failure(code: int, errors: str) -> Exception:
    """What became of a runtime: the artifact's fault, or this machine's, which says nothing about the artifact."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else f"its process ended with code {code}"
    if code == -signal.SIGKILL or re.match(r"[\w.]*(OutOfMemoryError|MemoryError)\b", last):
        return OutOfMemoryError(f"a runtime that an export is heard in ran out of memory ({last}); {GO_ON}")
    if re.match(r"(ImportError|ModuleNotFoundError|OSError: .*\.so)", last):
        return JobFailedError(f"a runtime that an export is heard in cannot be loaded here ({last}); {GO_ON}")
    if code < 0:
        ended = f"its process was ended by {signal.Signals(-code).name}"
        return RuntimeFailedError(f"{ended} ({lines[-1][:200]})" if lines else ended)
    return RuntimeFailedError(last)


def proven(
    name: str, references: Sequence[Utterance], heard: Heard, scorer: Scorer, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of an artifact.

    Args:
        name: the artifact.
        references: what the merged model heard in the same clips.
        heard: what its runtime heard.
        scorer: scores a text against a row's transcript.
        rows: the clips' rows.

    Returns:
        its entry in metrics.json, without its size.
    """
    seconds = max(1e-9, sum(float(row["duration_s"]) for row in rows))
    figures: dict[str, Any] = {
        "runtime": FAMILIES[ARTIFACTS[name][0]].runtime,
        "version": heard.version,
        "compute_type": heard.compute_type,
        "utterances": len(rows),
    }
    for mode, texts in heard.texts.items():
        suffix = "" if mode == COMPARABLE else "_default"
        utterances = [scorer.score(row, text) for row, text in zip(rows, texts, strict=True)]
        summary = summarise(utterances, bootstrap=0)
        figures |= {f"wer{suffix}": summary["wer"], f"cer{suffix}": summary["cer"]}
        figures[f"rtf{suffix}"] = heard.seconds[mode] / seconds
        if mode == COMPARABLE:
            same = sum(one.hypothesis == text for one, text in zip(references, texts, strict=True))
            figures["identical"] = same / len(rows)
    figures["wer_compared"] = summarise(list(references), bootstrap=0)["wer"]
    return figures
