"""Slurm's words in ours. The texts are what Slurm 22.05 answers."""

from __future__ import annotations

import pytest

from klab.harness.dispatch.backends import JobStatus
from klab.harness.dispatch.slurm.client import expand_array_id, job_status, parse_duration


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("PENDING", "queued"),
        ("RUNNING", "running"),
        ("COMPLETING", "running"),
        ("CONFIGURING", "running"),
        ("SUSPENDED", "running"),
        ("REQUEUED", "preempted"),
        ("REQUEUE_HOLD", "held"),
        ("COMPLETED", "ended"),
        ("FAILED", "failed"),
        ("TIMEOUT", "failed"),
        ("NODE_FAIL", "failed"),
        ("OUT_OF_MEMORY", "failed"),
        ("OUT_OF_ME+", "failed"),
        ("BOOT_FAIL", "failed"),
        ("DEADLINE", "failed"),
        ("PREEMPTED", "failed"),
        ("CANCELLED", "cancelled"),
        ("CANCELLED by 1000", "cancelled"),
        ("CANCELLED+", "cancelled"),
        ("REVOKED", "unknown"),
        ("SOMETHING_NEW", "unknown"),
        ("", "unknown"),
    ],
)
def test_every_word_of_slurm_has_one_of_ours(word: str, ours: str) -> None:
    assert job_status(word).state == ours


def test_a_waiting_job_says_why_and_one_that_ran_before_was_preempted() -> None:
    assert job_status("PENDING", job="7_2", reason="Resources") == JobStatus("queued", "7_2", "Resources")
    assert job_status("PENDING", reason="BeginTime", restarts=2) == JobStatus("preempted", "", "BeginTime")
    assert job_status("PENDING", reason="None").reason == ""


def test_an_error_names_its_exit_code_or_signal() -> None:
    assert job_status("FAILED", exit_code=3, signal=0) == JobStatus("failed", "", "FAILED", 3, None)
    assert job_status("FAILED", exit_code=0, signal=9) == JobStatus("failed", "", "FAILED", None, 9)
    assert job_status("OUT_OF_MEMORY", exit_code=137, signal=0) == JobStatus("failed", "", "OUT_OF_MEMORY", None, 9)
    assert job_status("CANCELLED by 0").reason == "CANCELLED by 0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12", ["12"]), ("12_3", ["12_3"]), ("12_[3]", ["12_3"]), ("12_[0-2,7%4]", ["12_0", "12_1", "12_2", "12_7"])],
)
def test_an_id_of_an_array_stands_for_its_elements(text: str, expected: list[str]) -> None:
    assert list(expand_array_id(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("04:05", 245), ("3:04:05", 11045), ("2-03:04:05", 183845), ("0:00", 0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_times_left(text: str, expected: float | None) -> None:
    assert parse_duration(text) == expected
