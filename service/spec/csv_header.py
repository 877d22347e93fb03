"""What the first line of a CSV shows of it: every command that reads CSVs says the same of a wrong one."""

from __future__ import annotations

from collections.abc import Sequence

from service.spec.settings import nearest

COLUMNS = ("path", "text")
"""What every manifest must have."""

EMPTY = "is empty; give a CSV with the columns path and text"
NO_ROW = "has a header and no row; give at least one clip"

_MARKS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}

PATH_NAMES = ("path", "audio", "file", "filename", "file_name", "audio_path", "audio_filepath", "audio_file", "wav")
TEXT_NAMES = ("text", "sentence", "transcript", "transcription", "normalized_text")
"""What tables of other origin call them; `manifest build` reads those."""


def form_problem(columns: Sequence[str], mark: str = ",") -> str:
    """What keeps a file from being a table, whatever columns it has; empty where nothing does.

    Args:
        columns: names, as they are read where `mark` parts them.
        mark: what parts columns in such files.
    """
    if not columns:
        return EMPTY
    if len(columns) == 1 and (
        wrong := next((other for other in _MARKS if other in columns[0] and other != mark), None)
    ):
        return f"has its columns parted by {wrong!r}; part them by {_MARKS[mark]}"
    return ""


def header_problem(columns: Sequence[str]) -> str:
    """What keeps a CSV with these columns from being a manifest; empty where nothing does.

    Args:
        columns: names, in small letters.
    """
    if problem := form_problem(columns):
        return problem
    missing = [column for column in COLUMNS if column not in columns]
    if not missing:
        return ""
    known = {"path": PATH_NAMES, "text": TEXT_NAMES}
    alike = [name for gap in missing for name in columns if name in known[gap] or nearest(gap, [name])]
    way_out = "add it"
    if len(alike) == len(missing) == 1:
        way_out = f"rename {alike[0]!r}"
    elif set(columns) & set(PATH_NAMES) and set(columns) & set(TEXT_NAMES):
        way_out = "`whisper-jobs manifest build` reads such tables"
    return f"has no column {' and no column '.join(missing)} (it has {', '.join(columns)}); {way_out}"
