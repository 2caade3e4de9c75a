"""`klab claims` prints the book."""

from __future__ import annotations

import json

import pytest

from klab.harness.cli.main import main


def test_one_claim_is_printed_in_full_with_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "C13"]) == 0
    out = capsys.readouterr().out
    assert "holds" in out
    assert "1.875" in out
    assert "C13b" in out
    assert "fails" in out


def test_json_is_strict_and_has_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "C35", "C14", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert [one["id"] for one in found["claims"]] == ["C14", "C35"]
    assert {one["verdict"] for one in found["claims"]} == {"fails"}
    assert all(one["numbers"] for one in found["claims"])


def test_markdown_is_a_table_and_a_section_per_claim(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "C02", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# The book of claims")
    assert "## C02: overclaimed" in out


def test_an_unknown_claim_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "C97"]) == 2
    assert "C97" in capsys.readouterr().err
