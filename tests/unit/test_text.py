"""`data.text`: one form for what is trained on, for references and for what a model heard."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.score import Scorer
from jobs.text import TextNormaliser
from service.spec.job import JobSpec
from service.spec.text import TextRules


@pytest.mark.parametrize(
    ("rules", "text", "expected"),
    [
        ({}, " e\u0301te\u0301 \n la ", "été la"),
        ({"unicode": "keep"}, "e\u0301", "e\u0301"),
        ({"unicode": "NFKC"}, "ＡＢＣ ﬁ", "ABC fi"),
        ({"quotes": "plain"}, "“It’s” – so", '"It\'s" - so'),
        ({"brackets": "remove"}, "[laughs] well (ahem) {x} <noise> then", "well then"),
        ({"brackets": "remove"}, "a [b (c] d", "a d"),
        ({"punctuation": "remove"}, "Well, it's twenty-one. (Yes!) 'tis…", "Well it's twenty-one Yes tis"),
        ({"case": "lower"}, "İstanbul HELLO", "İstanbul HELLO".lower()),
        ({"case": "upper"}, "straße", "STRASSE"),
        ({"replace": [{"pattern": r"(\d+) ?%", "by": r"\1 percent"}]}, "50% off", "50 percent off"),
        ({"replace": [{"pattern": "a"}, {"pattern": "bb", "by": "c"}]}, "bab", "c"),
        ({"brackets": "remove", "punctuation": "remove", "case": "lower"}, "[Music] Hello, YOU!", "hello you"),
    ],
)  # fmt: skip
def test_each_rule_does_what_it_says(rules: dict[str, Any], text: str, expected: str) -> None:
    assert TextNormaliser(TextRules(**rules))(text) == expected


def test_without_rules_a_text_stays_as_it_is() -> None:
    assert TextNormaliser(None)(" a  [b] ") == " a  [b] "


@given(st.text(max_size=60), st.sampled_from(["keep", "NFC", "NFKC"]), st.booleans())
def test_punctuation_is_gone_whatever_the_text(text: str, unicode: Any, brackets: bool) -> None:
    rules = TextRules(unicode=unicode, punctuation="remove", brackets="remove" if brackets else "keep")
    found = TextNormaliser(rules)(text)
    assert found == " ".join(found.split())
    assert not set(found) & set(',.!?;:()[]{}"')


@pytest.mark.parametrize(
    "rules",
    [
        {"case": "title"},
        {"replace": [{"pattern": "("}]},
        {"replace": [{"pattern": "a", "by": r"\1"}]},
        {"cases": "lower"},
    ],
)
def test_rules_that_cannot_be_applied_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"data": {"text": rules}})


def test_rules_may_be_json_text() -> None:
    assert JobSpec.model_validate({"data": {"text": '{"case": "lower"}'}}).data.text == TextRules(case="lower")


def test_what_was_heard_is_scored_in_the_form_of_the_references() -> None:
    rules = TextRules(case="lower", brackets="remove", replace=[{"pattern": "colour", "by": "tint"}])  # type: ignore[list-item]
    record = {"path": "a.wav", "language": "fr", "duration_s": 1.0, "text": TextNormaliser(rules)("[bruit] La colour")}
    utterance = Scorer(None, rules).score(record, "La colour")
    assert utterance.reference == utterance.hypothesis == "la tint"
    assert utterance.words_raw.total == 0
    assert Scorer(None).score(record, "La colour").words_raw.total == 2
