"""CSVs looked at before their rows are: whether each is a manifest, and whether a column that is asked for is there."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.manifest.rows import KNOWN, read_columns, read_rows
from service.errors import Fault, ManifestError, StorageError
from service.spec.csv_header import NO_ROW
from service.spec.manifests import LANGUAGE, language_faults


def require_manifests(sources: Sequence[str], language: str, option: str, column: str | None) -> None:
    """Refuse CSVs that are no manifests or have no row, and a language or a column that is not there.

    Args:
        sources: paths or URIs of the CSVs.
        language: of rows that name none.
        option: asks for the column.
        column: one of those that are carried along, in small letters; None: none is asked for.

    Raises:
        ManifestError: with every fault.
    """
    faults, columns = language_faults(language), dict[str, None]()
    unreadable = False
    for source in sources:
        try:
            columns |= dict.fromkeys(read_columns(source))
            if next(read_rows(source, LANGUAGE, strict=False), None) is None:
                faults.append(Fault(source, NO_ROW))
        except ManifestError as error:
            unreadable = True
            faults += error.faults
        except StorageError as error:
            unreadable = True
            faults.append(Fault(source, f"lies in a store that cannot be used: {error}"))
    if column and column not in set(columns) - set(KNOWN) and not unreadable:
        found = ", ".join(name for name in columns if name and name not in KNOWN) or "none"
        text = f"is no column of the CSVs by which clips can be told apart (those that there are: {found})"
        faults.append(Fault(option, text, column))
    if faults:
        raise ManifestError(faults)
