"""`data.text`: how transcripts are put into one form, for training and scoring alike."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from service.spec.base import Spec, check_regex


def _check_pattern(value: str) -> str:
    check_regex(value)
    return value


class Replacement(Spec):
    """One rule of one's own."""

    pattern: Annotated[str, AfterValidator(_check_pattern)] = Field(min_length=1)
    """Regular expression, as Python's `re.sub` takes it."""

    by: str = ""
    """What takes the place of a match; `\\1` is its first group."""

    @model_validator(mode="after")
    def _check_groups(self) -> Replacement:
        try:
            re.sub(self.pattern, self.by, "")
        except (re.error, IndexError) as error:
            told = {"by": repr(self.by), "reason": str(error)}
            raise PydanticCustomError("replacement", "has {by}, which does not fit ({reason})", told) from None
        return self


class TextRules(Spec):
    """Rules, in the order in which they are applied. White space always becomes single spaces."""

    unicode: Literal["keep", "NFC", "NFKC"] = "NFC"
    """Unicode's normal form: NFC joins letters and their accents, NFKC also makes full-width letters plain."""

    quotes: Literal["keep", "plain"] = "keep"
    """`plain`: typographic quotation marks, apostrophes and dashes become those of ASCII."""

    brackets: Literal["keep", "remove"] = "keep"
    """`remove`: take out [what] (stands) {in} <brackets>: notes of transcribers such as [laughs]."""

    replace: list[Replacement] = Field(default=[])
    """Rules of one's own: a list of {"pattern": ..., "by": ...}."""

    punctuation: Literal["keep", "remove"] = "keep"
    """`remove`: take out all punctuation but apostrophes and hyphens inside words."""

    case: Literal["keep", "lower", "upper"] = "keep"
    """`lower` or `upper`: no difference between small and capital letters."""
