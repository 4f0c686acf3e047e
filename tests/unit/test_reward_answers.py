"""Extraction and exact equivalence: worked cases, and properties over generated text."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.engine.reward.answers import (
    ends_with_number,
    equivalent,
    extract,
    is_plain,
    last_boxed,
    last_number,
    last_tag,
    normalized,
    parse_number,
)

patient = settings(deadline=None)
"""On a busy machine one example may take any time."""
prose = st.text(alphabet="abc XYZ.,:=()\n$*", max_size=30)
brace_free = st.text(alphabet="abc0123^_+ \\,", max_size=8).filter(lambda text: not text.endswith("\\"))
balanced = st.recursive(brace_free, lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "}{".join(parts) + "}"))


@patient
@given(prose, balanced, prose)
def test_last_box_is_found_whatever_its_nesting(before, content, after):
    assert last_boxed(f"\\boxed{{wrong}} {before}\\boxed{{{content}}}{after}") == content.strip()


def test_box_edge_cases():
    assert last_boxed("no box") is None
    assert last_boxed(r"\boxed{5} then \boxed{6") is None, "the last box was never finished"
    assert last_boxed(r"\boxed {\left\{ 1, 2 \right\}}") == r"\left\{ 1, 2 \right\}"
    assert last_boxed(r"\boxed{\boxed{7}}") == "7"
    assert extract(r"\boxed{ }", "box") is None


@patient
@given(st.text(alphabet="abc<>/ answer", max_size=30), st.text(alphabet="abc 123", max_size=10))
def test_last_complete_tag_is_found(before, content):
    assert last_tag(f"<answer>old</answer>{before}<answer>{content}</answer> end <answer>cut off") == content.strip()


def test_tag_edge_cases():
    assert last_tag("</answer> <answer>5") is None
    assert extract("<answer>the result is \\boxed{42}.</answer>", "tag") == "42"
    assert extract("<answer>\n42\n</answer>", "tag") == "42"
    assert extract("<answer></answer>", "tag") is None
    assert extract("  \n", "text") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", "7"),
        ("The answer is -3.", "-3"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("x = \u22127", "\u22127"),
        ("about 1,234.50 dollars", "1,234.50"),
        ("-$3", "-$3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("12,345,67", "67"),
        (".5", ".5"),
        ("so it is...5", "5"),
        ("is 7.Next", "7"),
        ("5km", "5"),
        ("\\frac{3}{4} of it", "\\frac{3}{4}"),
        ("half, 1/2", "1/2"),
        ("1e9", "1e9"),
        ("use v1.5 of x2 and CO2", None),
        ("none", None),
        ("\u0667", None),  # an Arabic-Indic digit: not a form we verify
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@patient
@given(st.integers(), prose.filter(lambda text: not any(c in text for c in "0123456789")))
def test_last_number_reads_back_any_integer(value, tail):
    for written in (str(value), f"{value:,}"):
        found = last_number(f"12 then 7: {written} {tail}")
        assert found is not None
        assert parse_number(found) == value


@patient
@given(st.fractions())
def test_every_fraction_parses_exactly(value):
    assert parse_number(f"{value.numerator}/{value.denominator}") == value
    sign = "-" if value < 0 else ""
    assert parse_number(f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}") == value


@patient
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20, places=6))
def test_every_decimal_parses_exactly(value):
    assert parse_number(f"{value:f}") == Fraction(value)


@patient
@given(st.text())
def test_no_text_makes_the_parsers_raise(text):
    for how in ("last-number", "box", "tag", "text"):
        found = extract(text, how)
        assert found is None or isinstance(normalized(found), str)
    assert equivalent(text, "7") in (True, False, None)
    assert equivalent("7", text) in (True, False, None)


@patient
@given(st.text(alphabet="0123456789.,/-+$ eE{}\\frac", max_size=25))
def test_a_text_that_ends_with_a_number_has_a_last_one(text):
    if ends_with_number(text):
        assert last_number(text) is not None


def test_ends_with_number():
    assert all(map(ends_with_number, ["7", "it is 7.", "**7**", "$7$", "\\boxed{7}", "(7)\n", "3 + 4 = -7"]))
    assert not any(map(ends_with_number, ["", "7 apples", "7 = x", "seven", "7!", "7%", "v1.5"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1{,}234", 1234),
        ("10,\\!000", 10000),
        ("$\\frac12$", Fraction(1, 2)),
        ("\\$5", 5),
        ("3 / 4", Fraction(3, 4)),
        ("2.50", Fraction(5, 2)),
        ("1e-3", Fraction(1, 1000)),
        ("7.", 7),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("3 + 4", None),
        ("seven", None),
        ("", None),
    ],
)
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("7.0", "7", True),
        ("+07", "7", True),
        ("0.5", "1/2", True),
        ("2/4", "1/2", True),
        ("0.333", "1/3", False),
        ("14/2", "7", False),  # a computation is not its result
        ("\\frac{14}{2}", "7", False),
        ("3 + 4", "7", False),
        ("\\sqrt{49}", "7", False),
        ("(3)(4)", "12", False),
        ("7!", "5040", False),
        ("2^3", "8", False),
        ("x/2", "2", False),
        ("8", "7", False),
        ("7^\\circ", "7", None),  # a unit: math-verify decides
        ("x = 7", "7", None),
        ("3\\frac{1}{2}", "7/2", None),
        ("1.5+2", "7/2", False),
        ("\\text{Evelyn}", "evelyn", True),
        ("pots", "stop", False),  # math-verify says equal: s*t*o*p
        ("No.", "no", None),
        ("(x+1)^2", "(x+1)^2", True),
        ("x^2+2x+1", "(x+1)^2", None),
    ],
)
def test_equivalent(answer, gold, verdict):
    assert equivalent(answer, gold) is verdict


def test_votes_count_equal_answers_together():
    assert len({normalized(text) for text in ("1", "1.0", "2/2", "$1$", " 1. ")}) == 1
    assert normalized("Yes") == normalized("\\text{yes}") != normalized("no")
    assert is_plain("1,000")
    assert is_plain("east")
    assert not is_plain("\\sqrt{2}")


def test_extraction_is_linear_in_the_text():
    hostile = ["1,000" * 30000, "9" * 200000, "a.1" * 50000, "\\boxed{" * 20000, "\\boxed" * 30000, "\\frac{1" * 30000,
               "-" * 100000, "<answer>" * 30000, "</answer>" * 30000, "{" * 200000]  # fmt: skip
    start = time.process_time()
    for text in hostile:
        for how in ("last-number", "box", "tag"):
            extract(text, how)
    assert time.process_time() - start < 5
