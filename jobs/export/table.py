"""The table of a run's exports as Markdown: `python -m jobs.export.table ROOT [--into FILE]`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from service.artifacts import METRICS, size_text
from service.storage import Storage

HEADER = ("artifact", "runtime", "computed in", "size", "WER", "compared", "same text", "by default", "RTF", "")
_BEGIN, _END = "<!-- exports -->\n", "<!-- /exports -->"


def export_rows(entries: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row of HEADER's columns for every artifact of metrics.json."""
    return [
        (
            name,
            entry.get("runtime", "transformers"),
            entry.get("compute_type", ""),
            size_text(entry["size_bytes"]) if "size_bytes" in entry else "",
            _percent(entry.get("wer")),
            _percent(entry.get("wer_compared")),
            _percent(entry.get("identical")),
            _percent(entry.get("wer_default")),
            f"{entry['rtf']:.3f}" if "rtf" in entry else "",
            "refused" if "refused" in entry else "",
        )
        for name, entry in entries.items()
    ]


def export_markdown(entries: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown, with what its columns mean and why exports were refused."""
    rows = export_rows(entries)
    columns = [index for index in range(len(HEADER)) if index < 4 or any(row[index] for row in rows)]
    ruler = ["---" if index < 3 else "---:" for index in columns]
    lines = ["| " + " | ".join(row[index] for index in columns) + " |" for row in (HEADER, *rows)]
    lines.insert(1, f"|{'|'.join(ruler)}|")
    counts = sorted({entry["utterances"] for entry in entries.values() if "utterances" in entry})
    clips = " to ".join(str(count) for count in {counts[0]: None, counts[-1]: None}) if counts else "no"
    versions = sorted({entry["version"] for entry in entries.values() if "version" in entry})
    lines += [
        "",
        f"Each artifact was read back from where it was published and transcribed held-out clips ({clips}) in its",
        "runtime: greedy for WER, for the share of clips with the same text as what it is compared with (the adapter",
        "for `hf`, `hf` for the others; beside its WER theirs on the same clips) and for RTF (seconds of computing per",
        "second of audio; of `hf` in batches); then by that runtime's own defaults.",
    ]
    refused = [f"- `{name}` was refused: {entry['refused']}" for name, entry in entries.items() if "refused" in entry]
    lines += [f"Versions: {', '.join(versions)}."] if versions else []
    return "\n".join([*lines, *([""] if refused else []), *refused]) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def main() -> None:
    """Print the table, or put it between its marks in a document."""
    parser = argparse.ArgumentParser(prog="python -m jobs.export.table", description=__doc__)
    parser.add_argument("root", help="root of a finished run")
    parser.add_argument("--into", type=Path, help="document with the marks <!-- exports --> and <!-- /exports -->")
    options = parser.parse_args()
    table = export_markdown(Storage(options.root).read_json(METRICS)["artifacts"])
    if options.into is None:
        print(table, end="")
        return
    document = options.into.read_text(encoding="utf-8")
    found = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
    if not found.search(document):
        parser.error(f"{options.into} has no marks {_BEGIN.strip()} and {_END}")
    options.into.write_text(found.sub(lambda _: _BEGIN + table + _END, document), encoding="utf-8")


if __name__ == "__main__":
    main()
