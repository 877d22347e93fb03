"""`manifest build`: audio with transcripts from any source -> train.csv, val.csv, rejects.csv and warnings.csv."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.manifest.examine import Limits
from jobs.manifest.examine_all import examine_all
from jobs.manifest.parallel import usable_cpus
from jobs.manifest.place import require_build_place
from jobs.manifest.sources import Source, SourceOptions, make_source
from jobs.manifest.split import SHARED, better_seed, held_out
from jobs.manifest.store import Store
from jobs.manifest.write import TRAIN, VAL, WARNINGS, SplitWriter, write_remarks
from service.artifacts import REJECTS
from service.errors import Fault, InputError, ManifestError
from service.spec.counted import counted
from service.spec.manifests import ALLOWED, AUTO, SEED, VAL_RATIO, language_faults
from service.spec.sections import DataConfig
from service.writing import writing

if TYPE_CHECKING:
    from jobs.tokens import Prompter


@dataclass(frozen=True)
class BuildReport:
    """What was built."""

    folder: str
    train: int
    val: int
    train_hours: float
    val_hours: float
    rejected: int
    reasons: dict[str, int]
    warnings: int


def build(
    location: Path | str,
    out: Path,
    *,
    kind: str = AUTO,
    options: SourceOptions | None = None,
    val_ratio: float = VAL_RATIO,
    seed: int = SEED,
    group: str | None = None,
    allowed: Collection[str] = (),
    keep_duplicates: bool = False,
    limits: Limits | None = None,
    prompter: Prompter | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildReport:
    """Write the manifests of a source. The same source and arguments always give the same bytes.

    Args:
        location: folder, table or hub id.
        out: folder of the manifests; made if it is not there.
        kind: one of SOURCES, or `auto`: told by what is there.
        options: what to know of the source.
        val_ratio: share that is held out, 0 < val_ratio < 1.
        seed: the split's seed; see `jobs.manifest.split`.
        group: column, such as `speaker`, of whose values none is on both sides.
        allowed: what may be on both sides: of ALLOWED.
        keep_duplicates: keep clips with the same audio.
        limits: what clips must keep to; None: the defaults of a spec's `data`.
        prompter: tokenizer of the checkpoint to train; None: tokens are not counted.
        processes: that decode; None: one per CPU.
        overwrite: replace a train.csv or val.csv in `out` that no build has written.
        progress: called with (rows done, rows; 0 where that is not known).

    Raises:
        InputError: the source or an argument is unusable, or files in `out` would be lost.
        StorageError: the disk of `out` is full or read-only.
        ManifestError: nothing usable is left on one of the sides.
    """
    options = options or SourceOptions()
    source = _check_arguments(str(location), kind, options, out, val_ratio, allowed, overwrite=overwrite)
    total = source.total()
    with Store(group) as store:
        count = examine_all(
            source.rows(),
            store,
            limits or Limits.of(DataConfig(), decode=True),
            prompter,
            processes=processes or usable_cpus(),
            progress=lambda done: progress(done, total),
        )
        if not keep_duplicates:
            store.reject_duplicates()
        if group and store.count() and group not in store.columns:
            found = ", ".join(sorted(store.columns)) or "none"
            raise InputError([Fault("--group", f"is no column that the source gives (it gives {found})", group)])
        sides = _sides(store, str(location), count, val_ratio, seed, allowed)
        return _write(store, out, sides)


def _write(store: Store, out: Path, sides: bytearray) -> BuildReport:
    writer = SplitWriter(out, (TRAIN, VAL), store.columns)
    with writing(out, "give another folder"), writer.open():
        for clip in store.clips():
            writer.write(VAL if sides[clip.id] else TRAIN, clip)
        # Before train.csv and val.csv come under their names: by the rejects a build is known.
        rejected = write_remarks(out / REJECTS, store.remarks())
        warnings = write_remarks(out / WARNINGS, store.remarks(warnings=True))
    return BuildReport(
        folder=str(out),
        train=writer.clips[TRAIN],
        val=writer.clips[VAL],
        train_hours=writer.seconds[TRAIN] / 3600,
        val_hours=writer.seconds[VAL] / 3600,
        rejected=rejected,
        reasons=store.kinds(),
        warnings=warnings,
    )


def _sides(store: Store, location: str, rows: int, val_ratio: float, seed: int, allowed: Collection[str]) -> bytearray:
    def decide(seed: int) -> bytearray:
        return held_out(store, val_ratio, seed, allowed)

    sides, usable = decide(seed), store.count()
    held = sum(sides[number] for number, *_ in store.places())
    if 0 < held < usable:
        return sides
    message = f"leaves no {'validation' if usable else 'usable'} clip: {usable} usable of {counted(rows, 'row')}"
    if usable and held == usable:
        message = message.replace("validation", "train")
    if (first := next(store.remarks(), None)) is not None:
        message += f"; left out: {first.name}, {first.reason}"
    if (other := better_seed(store, decide, usable)) is not None:
        message += f"; with --seed {other} both sides have clips"
    elif usable > 1:
        names = ", ".join(name for name in SHARED.values() if name not in allowed)
        message += f"; all clips are tied together by what they share ({names}): see --allow-overlap"
    raise ManifestError([Fault(location, message)])


def _check_arguments(
    location: str,
    kind: str,
    options: SourceOptions,
    out: Path,
    val_ratio: float,
    allowed: Collection[str],
    *,
    overwrite: bool,
) -> Source:
    faults = []
    source = None
    try:
        require_build_place(out, location, overwrite=overwrite)
    except InputError as error:
        faults += error.faults
    try:
        source = make_source(location, SourceOptions(**{**vars(options), "out": out}), kind)
    except InputError as error:
        faults += error.faults
    if not 0 < val_ratio < 1:
        faults.append(Fault("--val-ratio", "must lie between 0 and 1, such as 0.1", val_ratio))
    faults += language_faults(options.language)
    if wrong := [name for name in allowed if name not in ALLOWED]:
        faults.append(Fault("--allow-overlap", f"takes {', '.join(ALLOWED)}", wrong[0]))
    if faults or source is None:
        raise InputError(faults)
    return source
