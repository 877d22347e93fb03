"""One row's text looked at, with the very tokenizer where a model is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.manifest.row import Reject, Row, join_text
from jobs.manifest.scripts import foreign_script
from jobs.manifest.store import comparable
from service.spec.languages import LANGUAGES, WITHOUT_SPACES

if TYPE_CHECKING:
    from jobs.tokens import Prompter


def text_faults(row: Row, prompter: Prompter | None, *, any_length: bool = False) -> list[Reject]:
    """Everything that is wrong with a row's text and language.

    Args:
        row: with the text that is trained on.
        prompter: the checkpoint's; None: languages are judged by Whisper's table, and tokens are not counted.
        any_length: whether it may be longer than the decoder holds at once.
    """
    faults = []
    if row.no_speech and row.text:
        faults.append(Reject("text-in-no-speech", "is marked as no_speech, and yet has a text"))
    spaces = row.language not in WITHOUT_SPACES
    if row.segments and comparable(join_text(row.segments, spaces=spaces)) != comparable(row.text):
        faults.append(Reject("bad-segments", "text is not what its segments say"))
    if not row.no_speech and not row.text:
        faults.append(Reject("empty-text", "text is empty"))
    if not (prompter.knows_language(row.language) if prompter else row.language in LANGUAGES):
        if prompter is None:
            faults.append(Reject("language", f"{row.language!r} is not a language code that Whisper knows"))
        else:
            hint = "" if prompter.multilingual else "; an English-only (.en) checkpoint takes en alone"
            faults.append(Reject("language", f"language {row.language!r} is unknown to the model{hint}"))
    elif prompter and row.text and not faults:
        faults += _token_faults(row, prompter, any_length=any_length)
    return faults


def _token_faults(row: Row, prompter: Prompter, *, any_length: bool) -> list[Reject]:
    if control := prompter.control_token(row.text):
        return [Reject("control-token", f"text holds {control}, which the model takes for a command; take it out")]
    tokens = prompter.count(row)
    if tokens > prompter.max_tokens and not any_length:
        text = f"text is {tokens} tokens long; the decoder takes {prompter.max_tokens}"
        return [Reject("too-many-tokens", text)]
    return []


def text_warning(row: Row) -> Reject | None:
    """What is probably not meant."""
    if script := foreign_script(row.text, row.language):
        name = LANGUAGES.get(row.language, row.language)
        return Reject("script", f"text is mostly in {script.title()} script, in which {name.title()} is not written")
    return None


def joined_reason(faults: list[Reject]) -> Reject:
    """Several faults of a row as one: the kind is the first one's."""
    return Reject(faults[0].kind, "; ".join(fault.reason for fault in faults))
