"""What all sections of a spec share: unknown keys refused, values frozen, docs taken from the text under each field."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from service.spec.read import read_flow


class Spec(BaseModel):
    """A section of a job spec. The text under a field is its only documentation: schema, help and docs come from it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        str_strip_whitespace=True,
        validate_default=True,
    )


def _no_bool(value: Any) -> Any:
    # true would silently count as 1.
    if isinstance(value, bool):
        raise PydanticCustomError("number_not_bool", "is not a number")
    return value


def parse_json_text(value: Any) -> Any:
    """Turn a string that holds JSON (an object, list, boolean or null) into what it says; leave all else alone.

    Shells and the old toolkit's files pass dict settings as JSON strings. A list or object may be written as YAML has
    it, too: `[hf, ggml]`.
    """
    if not isinstance(value, str) or not value.strip().startswith(("{", "[", '"')):
        return (
            {"true": True, "false": False, "null": None}.get(value.strip(), value) if isinstance(value, str) else value
        )
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        with contextlib.suppress(ValueError):
            return read_flow(value)
        raise PydanticCustomError(
            "json_text",
            "is not valid JSON ({reason} at character {position})",
            {"reason": error.msg.lower(), "position": error.pos},
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or nesting without end
        raise PydanticCustomError("json_text", "is not JSON that can be read") from None


def check_regex(pattern: str) -> None:
    """Refuse what Python's `re` does not take.

    Raises:
        PydanticCustomError: it is no regular expression.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise PydanticCustomError(
            "regex",
            "holds {pattern}, which is no regular expression ({reason})",
            {"pattern": repr(pattern), "reason": str(error)},
        ) from None


def parse_names(value: Any) -> Any:
    """A list of names, also as a JSON string; one plain name is a list of one."""
    value = parse_json_text(value)
    if isinstance(value, str):
        refuse_commas(value)
    return [value] if isinstance(value, str) else value


def refuse_commas(text: str) -> None:
    """Refuse several names in one text.

    Raises:
        PydanticCustomError: they are parted by commas.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) > 1:
        raise PydanticCustomError("commas", "is one text; give it as {names}", {"names": f"[{', '.join(names)}]"})


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
JsonText = BeforeValidator(parse_json_text)
Names = Annotated[list[str], BeforeValidator(parse_names)]
