"""YAML is read as version 1.2 says, or refused, and what is written is read back."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from klab.grid import UserError, parse_grid
from klab.grid.yaml_document import dump_yaml, parse_value, parse_yaml

STUDY = """
name: {name}
task: {{name: addition, digits: 1}}
training: {{updates: {updates}, lr: {lr}, group_size: {group_size}}}
seeds: {seeds}
resources: {{minutes: {minutes}, account: {account}}}
"""
VALID = {
    "name": "study",
    "updates": "4",
    "lr": "1e-3",
    "group_size": "4",
    "seeds": "1",
    "minutes": "240",
    "account": "lab",
}


def study(**written: str) -> Any:
    return parse_grid(STUDY.format(**VALID | written), Path("study.yaml"))


@pytest.mark.parametrize("word", ["yes", "on", "y", "off", "no", "true", "TRUE", "false", "many"])
@pytest.mark.parametrize(
    ("field", "key"),
    [("updates", "training.updates"), ("lr", "training.lr"), ("seeds", "seeds"), ("minutes", "minutes")],
)
def test_a_word_where_a_number_belongs_is_refused(field: str, key: str, word: str) -> None:
    with pytest.raises(UserError) as caught:
        study(**{field: word})
    message = str(caught.value)
    assert message.startswith("study.yaml: ")
    assert key in message
    assert word.lower() in message


@pytest.mark.parametrize("word", ["on", "yes", "true"])
def test_a_word_among_the_values_of_an_axis_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=rf"training\.group_size.*{word}"):
        parse_grid(STUDY.format(**VALID) + f"axes: {{training.group_size: [2, {word}]}}", "study.yaml")


@pytest.mark.parametrize(
    ("written", "minutes"),
    [
        ("90", 90),
        ("'90'", 90),
        ("1:30:00", 90),
        ("4:00:00", 240),
        ("0:00:01", 1),
        ("00:10:30", 11),
        ("1-00:00:00", 1440),
        ("2-03:04:00", 2 * 1440 + 184),
    ],
)
def test_durations_are_minutes_or_slurms_forms_with_seconds(written: str, minutes: int) -> None:
    assert study(minutes=written).resources.minutes == minutes


@pytest.mark.parametrize("written", ["1:30", "1-12", "1:60:00", "1:00:61", "2h", "'-1:00:00'"])
def test_other_durations_are_refused_with_the_wanted_form(written: str) -> None:
    with pytest.raises(UserError, match=r"resources\.minutes: not a duration .*hours:minutes:seconds"):
        study(minutes=written)


@pytest.mark.parametrize("written", ["007", "010", "0123", "-08", "00"])
@pytest.mark.parametrize("field", ["seeds", "account", "name", "updates"])
def test_leading_zeros_are_refused_as_written(field: str, written: str) -> None:
    with pytest.raises(UserError, match=rf"line \d+, column \d+: {written} has leading zeros.*in quotes"):
        study(**{field: f"[{written}]" if field == "seeds" else written})


@pytest.mark.parametrize(("field", "key"), [("name", "name"), ("account", "resources.account")])
def test_a_number_where_text_belongs_is_to_be_put_in_quotes(field: str, key: str) -> None:
    with pytest.raises(UserError, match=rf"{key}: text belongs here \(got 2024\).*quotes: '2024'"):
        study(**{field: "2024"})
    assert study(**{field: "'2024'"})


def test_octal_numbers_are_those_of_version_1_2() -> None:
    assert study(seeds="[7, 10, 0o11, 0x1F]").seeds == (7, 10, 9, 31)


def reference(text: str) -> Any:
    """What ruamel.yaml reads, a library that follows YAML 1.2."""
    return YAML(typ="safe", pure=True).load(f"a: {text}\n")["a"]


WORDS = "yes no on off y n true false True TRUE False null Null ~ .inf -.inf .nan 1:30 2024-01-04"
SCALARS = st.one_of(
    st.from_regex(r"[-+]?[0-9._eExXoab:]{1,8}", fullmatch=True),
    st.sampled_from(WORDS.split(" ")),
    st.from_regex(r"[-+]?(0|[1-9][0-9]{0,5})(\.[0-9]{0,5})?([eE][-+]?[0-9]{1,2})?", fullmatch=True),
    st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,8}", fullmatch=True),
)


@settings(max_examples=600, deadline=None)
@given(SCALARS)
@example("1_000")
@example("1e-4")
@example("12:30:45")
@example("0o17")
def test_scalars_are_read_as_version_1_2_reads_them(text: str) -> None:
    assume("_" not in text and not re.fullmatch(r"[-+]?0[b0-9].*|[-+]0[xo].*", text))  # where ruamel reads 1.1's forms
    try:
        expected = reference(text)
    except (YAMLError, ValueError):
        assume(False)
    assume(not hasattr(expected, "year"))  # dates: a type of YAML 1.1's repository, not of the core schema
    found = parse_yaml(f"a: {text}", "fuzzed.yaml")["a"]
    assert type(found) is type(expected), (text, found, expected)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize(
    "text", ["yes", "1:30:00", "1e-4", "0o11", "010", "2024-01-04", "1_000", "null", "~", "", "=", "on"]
)
@pytest.mark.parametrize("reader", [parse_value, yaml.safe_load], ids=["1.2", "1.1"])
def test_written_text_stays_text_for_every_reader(text: str, reader: Any) -> None:
    assert reader(dump_yaml({"a": text, "b": [text]})) == {"a": text, "b": [text]}


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN)
def test_what_is_written_is_read_back(data: Any) -> None:
    assert parse_value(dump_yaml({"data": data})) == {"data": data}
