"""pydantic's validation errors as faults in plain words: what is wrong with the value, and what would be right."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from service.spec.settings import find, nearest

Context = Mapping[str, Any]


def _number(value: Any) -> str:
    return json.dumps(int(value) if isinstance(value, float) and value.is_integer() else value)


def _choices(context: Context) -> str:
    return f"is not one of {str(context['expected']).replace(' or ', ', ')}"


def _too_short(context: Context) -> str:
    least = context["min_length"]
    return f"has {context['actual_length'] or 'no'} values; give {'one' if least == 1 else least} or more"


WORDS: dict[str, str | Callable[[Context], str]] = {
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "dict_type": "is not an object",
    "extra_forbidden": "is not known there; `whisper-jobs explain` shows what is",
    "finite_number": "is not a finite number; give one",
    "float_parsing": "is not a number; give one such as 0.1",
    "float_type": "is not a number; give one such as 0.1",
    "greater_than": lambda context: f"is too small; give more than {_number(context['gt'])}",
    "greater_than_equal": lambda context: f"is too small; give {_number(context['ge'])} or more",
    "int_from_float": "is not a whole number; give one such as 4",
    "int_parsing": "is not a whole number; give one such as 4",
    "int_parsing_size": "is out of all bounds; give a smaller number",
    "int_type": "is not a whole number; give one such as 4",
    "less_than": lambda context: f"is too large; give less than {_number(context['lt'])}",
    "less_than_equal": lambda context: f"is too large; give {_number(context['le'])} or less",
    "list_type": "is not a list",
    "literal_error": _choices,
    "missing": "is missing; give it",
    "model_type": "is not an object",
    "number_not_bool": "is not a number; give one",
    "string_pattern_mismatch": "is not a name of small letters, digits, `.`, `_` and `-`, 40 at most; give one",
    "string_too_short": "is empty; give a value or leave the setting out",
    "string_type": "is not text; put it in quotes",
    "too_long": lambda context: f"has {context['actual_length']} values; give {context['max_length']}",
    "too_short": _too_short,
    "tuple_type": "is not a list of two numbers; give one such as [0.1, 0.2]",
}
"""Message by pydantic's error type; a type that is not here keeps pydantic's own words."""


def message(error: Mapping[str, Any]) -> str:
    """What a pydantic error says, in plain words that follow the setting's name and the value.

    Args:
        error: one entry of `ValidationError.errors()`.
    """
    kind, context = str(error["type"]), error.get("ctx", {})
    if error["input"] is None and not kind.startswith(("init", "targets")):
        return "is null, which this setting cannot be; give a value or leave it out"
    words = WORDS.get(kind, str(error["msg"]))
    text = words if isinstance(words, str) else words(context)
    if kind == "literal_error" and isinstance(error["input"], str):
        known = [choice.strip(" '") for choice in str(context["expected"]).replace(" or ", ",").split(",")]
        close = nearest(error["input"].lower(), known)
        text += f"; did you mean {close[0]!r}?" if close else ""
    setting = find(".".join(map(str, error["loc"][:2])))
    if kind in ("dict_type", "model_type") and setting:
        example = f"give one such as {json.dumps(setting[0].example)}"
        text += f"; {example if len(error['loc']) == 2 else f'`whisper-jobs explain {setting[0].path}` shows the form'}"
    if kind == "list_type" and setting and len(error["loc"]) == 2:
        text = f"is not a list of {setting[0].items_text}; {_as_list(error['input'], setting[0].example)}"
    if kind == "string_type" and isinstance(error["input"], list | dict):
        text = f"is {'a list' if isinstance(error['input'], list) else 'an object'}; give one text"
    return text


def _as_list(value: Any, example: Any) -> str:
    if isinstance(value, str) and "," in value:
        return f"give it as [{', '.join(part.strip() for part in value.split(','))}]"
    return f"give one such as {json.dumps(example)}"
