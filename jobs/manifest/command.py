"""`manifest build | check | stats` as a command line: parse, call one function, print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.errors import EXIT_DONE, ManifestError
from service.spec.checks import require_base
from service.spec.counted import counted
from service.spec.manifests import ALLOWED, AUTO, KINDS, LANGUAGE, LIMITS, SEED, VAL_RATIO, limits_of, option


def add_parsers(parser: argparse.ArgumentParser, add_common: Callable[[argparse.ArgumentParser], None]) -> None:
    """Give a parser the commands below `manifest`."""
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", description="Make manifests.", allow_abbrev=False)
    build.add_argument("source")
    build.add_argument("--out", required=True)
    build.add_argument("--kind", choices=KINDS, default=AUTO)
    build.add_argument("--pattern")
    build.add_argument("--val-ratio", type=float, default=VAL_RATIO)
    build.add_argument("--seed", type=int, default=SEED)
    for name in ("path-column", "text-column", "audio-root", "dataset-config"):
        build.add_argument(f"--{name}")
    build.add_argument("--allow-overlap", action="append", choices=ALLOWED, default=[])
    build.add_argument("--overwrite", action="store_true")
    check = commands.add_parser("check", description="Check manifests.", allow_abbrev=False)
    check.add_argument("csv", nargs="+")
    check.add_argument("--rejects")
    stats = commands.add_parser("stats", description="Describe manifests.", allow_abbrev=False)
    stats.add_argument("csv", nargs="+")
    stats.add_argument("--speaker")
    for command in (build, check):
        command.add_argument("--group")
        command.add_argument("--keep-duplicates", action="store_true")
        command.add_argument("--base-model")
        command.add_argument("--processes", type=int)
        for name in LIMITS:
            command.add_argument(option(name), type=float)
    for command in (build, check, stats):
        command.add_argument("--language", default=LANGUAGE)
        add_common(command)


def run(options: argparse.Namespace) -> int:
    """Do what the parsed command says; returns the exit code."""
    from jobs.progress import Reporter

    reporter = Reporter()
    try:
        result, lines, code = COMMANDS[options.command](options, reporter)
    finally:
        reporter.close()
    text = json.dumps(result, indent=2, ensure_ascii=False) if options.output == "json" else "\n".join(lines)
    print(text, flush=True)  # a full disk shows here, not when the interpreter ends
    return code


Outcome = tuple[dict[str, Any], list[str], int]


def _build(options: argparse.Namespace, reporter: Any) -> Outcome:
    from jobs.manifest.build import build
    from jobs.manifest.sources import DEFAULT_PATTERN, SourceOptions

    def progress(done: int, total: int) -> None:
        if total:
            reporter.files(done, total)
        elif done % 1000 == 0:
            reporter.show({"event": "rows", "split": options.source, "rows": done})

    report = build(
        options.source,
        Path(options.out),
        kind=options.kind,
        options=SourceOptions(
            language=options.language,
            pattern=options.pattern or DEFAULT_PATTERN,
            path_column=options.path_column,
            text_column=options.text_column,
            audio_root=options.audio_root,
            dataset_config=options.dataset_config,
        ),
        val_ratio=options.val_ratio,
        seed=options.seed,
        allowed=options.allow_overlap,
        overwrite=options.overwrite,
        progress=progress,
        **_common(options),
    )
    lines = [
        f"{report.folder}/train.csv  {counted(report.train, 'clip')}, {report.train_hours:.2f} h",
        f"{report.folder}/val.csv  {counted(report.val, 'clip')}, {report.val_hours:.2f} h",
    ]
    if report.rejected:
        why = ", ".join(f"{count} {kind}" for kind, count in report.reasons.items())
        lines.append(f"{report.folder}/rejects.csv  {counted(report.rejected, 'clip')} left out: {why}")
    else:
        lines.append("no clip was left out")
    if report.warnings:
        lines.append(f"{report.folder}/warnings.csv  {counted(report.warnings, 'clip')} whose text may not be meant")
    return asdict(report), lines, EXIT_DONE


def _check(options: argparse.Namespace, reporter: Any) -> Outcome:
    from jobs.manifest.check import check

    report = check(
        options.csv,
        language=options.language,
        rejects=Path(options.rejects) if options.rejects else None,
        progress=_row_progress(reporter),
        **_common(options),
    )
    lines = []
    for remark in report["warnings"]:
        lines.append(f"{_place(remark)}: warning: {remark['reason']}")
    for remark in report["faults"]:
        lines.append(f"{_place(remark)}: {remark['reason']}")
    for part in report["csvs"]:
        faults = sum(part["reasons"].values())
        why = f": {', '.join(f'{count} {kind}' for kind, count in part['reasons'].items())}" if faults else ""
        warnings = sum(part["warnings"].values())
        tail = f"; {counted(warnings, 'warning')}" if warnings else ""
        lines.append(f"{part['csv']}  {counted(part['rows'], 'row')}, {part['usable']:,} usable{why}{tail}")
    for what, count in report["overlap"].items():
        if count:
            lines.append(f"{counted(count, what)} in more than one of the CSVs")
    return report, lines, EXIT_DONE if report["ok"] else ManifestError.exit_code


def _stats(options: argparse.Namespace, reporter: Any) -> Outcome:
    from jobs.manifest.stats import stats

    report = stats(options.csv, language=options.language, speaker=options.speaker, progress=_row_progress(reporter))
    parts = [*report["csvs"].items(), *([("total", report["total"])] if len(options.csv) > 1 else [])]
    lines: list[str] = []
    for name, part in parts:
        lines += [name, *(f"  {label:<12}{text}" for label, text in _described(part)), ""]
    return report, lines[:-1], EXIT_DONE


def _described(part: dict[str, Any]) -> list[tuple[str, str]]:
    length, words = part["length_s"], part["vocabulary"]
    lines = [("clips", f"{part['clips']:,}, {part['hours']:.2f} h")]
    if part["no_speech"]:
        lines.append(("no speech", counted(part["no_speech"], "clip")))
    if part["with_segments"]:
        lines.append(("segments", f"{part['segments']:,} in {counted(part['with_segments'], 'clip')}"))
    if part["of_unknown_length"]:
        lines.append(("unreadable", f"{counted(part['of_unknown_length'], 'clip')}, of unknown length"))
    percentiles = ", ".join(f"{length[key]:.2f} ({key})" for key in length if key.startswith("p"))
    span = f"{length['min']:.2f} to {length['max']:.2f}, mean {length['mean']:.2f}; {percentiles}"
    lines.append(("seconds", span))
    lines.append(("languages", _listed(part["languages"])))
    speakers = part["speakers"]
    if speakers["count"]:
        lines.append(("speakers", f"{speakers['count']:,}; most: {_listed(speakers['most'], 3)}"))
    lines.append(("words", f"{words['words']:,}, {words['different']:,} different, {words['once']:,} once"))
    lines.append(("", f"{words['words_per_clip']:.1f} a clip, {words['words_per_s']:.1f} a second"))
    return lines


def _listed(table: dict[str, dict[str, Any]], most: int | None = None) -> str:
    entries = list(table.items())[:most]
    return ", ".join(f"{name} {counted(entry['clips'], 'clip')} {entry['hours']:.2f} h" for name, entry in entries)


def _common(options: argparse.Namespace) -> dict[str, Any]:
    from jobs.manifest.examine import Limits

    limits = Limits.of(limits_of(vars(options)), decode=True)
    prompter = None
    if name := options.base_model:
        require_base("--base-model", name)
        from jobs.model import load_prompter, quiet_libraries

        quiet_libraries()
        prompter = load_prompter(name, "--base-model")
    return {
        "group": options.group,
        "keep_duplicates": options.keep_duplicates,
        "processes": options.processes,
        "prompter": prompter,
        "limits": limits,
    }


def _place(remark: dict[str, Any]) -> str:
    return f"{remark['csv']}, line {remark['line']}: {remark['path']}"


def _row_progress(reporter: Any) -> Callable[[str, int], None]:
    def progress(source: str, done: int) -> None:
        if done % 1000 == 0:
            reporter.show({"event": "rows", "split": source, "rows": done})

    return progress


COMMANDS: dict[str, Callable[[argparse.Namespace, Any], Outcome]] = {"build": _build, "check": _check, "stats": _stats}
