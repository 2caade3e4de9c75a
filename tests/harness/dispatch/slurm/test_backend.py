"""Slurm through stand-ins for its commands: what is asked, what is understood, what is never submitted twice.

The stand-ins are programs on PATH that replay what a real Slurm answers; `tests/slurm` asks a real one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Grid, UserError, load_grid
from klab.grid.schema.sections import load_section
from klab.harness.cli.main import main
from klab.harness.dispatch.backends import Pack
from klab.harness.dispatch.hold import hold, release
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.slurm import client as scheduler
from klab.harness.dispatch.slurm.backend import SlurmExecutor
from klab.harness.dispatch.slurm.submission import folder, next_number, record_intent, submissions
from klab.harness.dispatch.status import statuses
from klab.harness.store import Run

COMMAND = """#!/bin/sh
echo "$0 $*" >> "$FAKE/calls"
name=$(basename "$0")
case "$*" in *now-30days*) test "$name" = sacct && name=sacct-by-name ;; esac
test -e "$FAKE/${name%-by-name}.err" && name=${name%-by-name} && cat "$FAKE/$name.err" >&2 && exit 1
test "$name" != sbatch && cat "$FAKE/$name.out" 2>/dev/null && exit 0
test "$name" = sbatch || exit 0
count=$(($(cat "$FAKE/count" 2>/dev/null || echo 0) + 1))
limit=$(cat "$FAKE/limit" 2>/dev/null || echo 100000)
size=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$1")
used=$(($(cat "$FAKE/used" 2>/dev/null || echo 0) + ${size:-0} + 1))
test "$used" -gt "$limit" && echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2 && exit 1
echo $used > "$FAKE/used"; echo $count > "$FAKE/count"; cp "$1" "$FAKE/script.$count"
echo "Submitted batch job $((100 + count))"
"""
DISABLED = "Slurm accounting storage is disabled"


class Fake:
    """The stand-ins' folder: what they answer, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answers(self, command: str, text: str) -> None:
        (self.folder / f"{command}.err").unlink(missing_ok=True)
        (self.folder / f"{command}.out").write_text(text)

    def fails(self, command: str, text: str) -> None:
        (self.folder / f"{command}.err").write_text(text)

    def calls(self, command: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split()[0].endswith(f"/{command}")]

    def script(self, number: int) -> str:
        return (self.folder / f"script.{number}").read_text()

    def queue(self, *rows: tuple[str, str, str, str, str, str, str, str]) -> None:
        """What squeue says: job, index, state, reason, time left, raw exit status, restarts, name."""
        widths = [20, 20, 24, 64, 20, 12, 10, 256]
        self.answers(
            "squeue", "".join("".join(f"{v:<{w}}" for v, w in zip(row, widths, strict=True)) + "\n" for row in rows)
        )


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    folder = tmp_path / "fake"
    (folder / "bin").mkdir(parents=True)
    for name in ("squeue", "sacct", "scontrol", "scancel", "sbatch", "srun"):
        path = folder / "bin" / name
        path.write_text(COMMAND)
        path.chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    found = Fake(folder)
    found.answers("scontrol", "ClusterName = lab\nMaxArraySize = 1001\nSchedulerParameters = (null)\n")
    found.answers("squeue", "")
    found.answers("sacct", "")
    return found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of six cells."""
    grid: dict[str, Any] = {"name": "six", "task": {"name": "addition"}, "policy": {"name": "tiny"}, "objective": {}}
    grid |= {"training": {"updates": 2}, "seeds": 6}
    file = tmp_path / "six.yaml"
    file.write_text(json.dumps(grid))
    return Run.create(tmp_path / "runs" / "six", load_grid(file))


def packs(run: Run, size: int = 1) -> list[Pack]:
    return [Pack(tuple(run.cells[i : i + size])) for i in range(0, len(run.cells), size)]


def submit(run: Run, **flags: Any) -> None:
    with run.lock():
        SlurmExecutor(flags).submit(run, packs(run), run.resources)


def words(run: Run) -> list[str]:
    states = SlurmExecutor().states(run)
    return [states[cell].state if cell in states else "none" for cell in run.cells]


def test_one_array_with_its_resources(fake: Fake, run: Run) -> None:
    submit(
        run, partition="gpu", gpus=1, max_parallel=2, minutes=30, sbatch={"mail-type": "END"}, setup=["module load x"]
    )
    script = fake.script(1)
    for line in ("--array=0-5%2", "--partition=gpu", "--gpus-per-node=1", "--time=30", "--mail-type=END", "--mem=4G"):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --requeue\n" in script
    assert script.index("module load x") < script.index("srun ")
    assert [each.job for each in submissions(run)] == ["101"]


def test_processes_of_several_nodes_are_told_how_to_exchange_numbers(fake: Fake, run: Run) -> None:
    submit(run, nodes=2, interface="ib0", collective_minutes=15)
    script = fake.script(1)
    for line in ("KLAB_COLLECTIVE_MINUTES=15", "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME==ib0"):
        assert script.index(f"export {line}\n") < script.index("srun ")
    with pytest.raises(UserError, match=r"resources\.interface: .*pattern"):
        load_section("resources", {"interface": "ib0; rm"})
    submit(run, interface="ib0")
    assert "SOCKET_IFNAME" not in fake.script(2)


def test_a_dry_run_shows_the_very_script(fake: Fake, run: Run) -> None:
    def plain(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("#SBATCH --job-name=klab-six-001-")]

    shown = SlurmExecutor({"max_parallel": 2}).scripts(run, packs(run), run.resources)
    assert not fake.calls("sbatch")
    assert not run.jobs.exists()
    submit(run, max_parallel=2)
    assert [plain(text) for text in shown] == [plain(fake.script(1))]


def test_arrays_stay_below_the_clusters_limit_and_share_the_cap(fake: Fake, run: Run) -> None:
    fake.answers("scontrol", "MaxArraySize            = 2\nClusterName = lab\n")
    submit(run, max_parallel=2)
    assert ["--array=0-1%1" in fake.script(n) for n in (1, 2, 3)] == [True] * 3
    assert "#SBATCH --dependency=afterany:101\n" in fake.script(3)
    assert "dependency" not in fake.script(1) + fake.script(2)
    shown = SlurmExecutor({"max_parallel": 2}).scripts(run, packs(run), run.resources)
    assert "afterany:<job of script 1>" in shown[2]


def test_a_submit_limit_is_filled_and_the_rest_is_told(fake: Fake, run: Run) -> None:
    (fake.folder / "limit").write_text("5")
    with pytest.raises(UserError, match=r"QOSMaxSubmitJobPerUserLimit.*5 of 6 jobs were submitted; launch again"):
        submit(run, max_parallel=2)
    assert sum(len(each.cells) for each in submissions(run)) == 5
    assert all(each.job for each in submissions(run))
    assert [f"afterany:{100 + n}" in fake.script(n + 1) for n in range(1, len(submissions(run)))] == [True] * 2


def test_a_refusal_leaves_nothing_behind(fake: Fake, run: Run) -> None:
    fake.fails("sbatch", "sbatch: error: invalid partition specified: gpo")
    with pytest.raises(UserError, match="Slurm refused the job: invalid partition specified: gpo"):
        submit(run)
    assert submissions(run) == []


def test_states_of_all_cells_come_from_one_query(fake: Fake, run: Run) -> None:
    submit(run)
    name = submissions(run)[0].name
    fake.queue(
        ("101", "0", "RUNNING", "None", "1:00:00", "0", "0", name),
        ("101", "1", "PENDING", "Resources", "4:00:00", "0", "0", name),
        ("101", "2", "PENDING", "BeginTime", "4:00:00", "0", "1", name),
        ("101", "3", "FAILED", "NonZeroExitCode", "4:00:00", "768", "0", name),
        ("101", "4", "TIMEOUT", "TimeLimit", "0:00", "0", "0", name),
    )
    fake.answers("sacct", f"{name}|101_5|COMPLETED|0:0|None\n")
    before = len(fake.calls("squeue"))
    states = SlurmExecutor().states(run)
    assert (len(fake.calls("squeue")) - before, len(fake.calls("sacct"))) == (1, 1)
    found = [states[cell] for cell in run.cells]
    assert [state.state for state in found] == ["running", "queued", "preempted", "failed", "failed", "ended"]
    assert found[0].seconds_left == 3600
    assert (found[1].reason, found[1].job) == ("Resources", "101_1")
    assert (found[3].exit_code, found[4].reason) == (3, "TIMEOUT")


def test_no_answer_is_unknown(fake: Fake, run: Run) -> None:
    submit(run)
    fake.fails("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    assert words(run) == ["unknown"] * 6
    fake.answers("squeue", "")
    fake.fails("sacct", "sacct: error: Problem talking to the database: Connection refused")
    assert words(run) == ["unknown"] * 6


def test_without_accounting_what_squeue_forgot_has_no_state(fake: Fake, run: Run) -> None:
    submit(run)
    fake.fails("sacct", DISABLED)
    assert words(run) == ["none"] * 6


def test_a_task_that_slurm_forgot_while_its_array_waited_was_cancelled(fake: Fake, run: Run) -> None:
    submit(run)
    name = submissions(run)[0].name
    fake.queue(*[("101", str(n), "PENDING", "Resources", "1:00", "0", "0", name) for n in (0, 1, 2, 3, 5)])
    fake.answers("sacct", f"{name}|101_[0-3,5]|PENDING|0:0|Resources\n")
    assert words(run) == ["queued"] * 4 + ["cancelled"] + ["queued"]
    fake.answers("squeue", "")
    fake.answers("sacct", "".join(f"{name}|101_{n}|NODE_FAIL|0:0|None\n" for n in (0, 1, 2, 3, 5)))
    assert words(run) == ["failed"] * 4 + ["cancelled"] + ["failed"]


def test_a_job_that_only_the_accounts_call_alive_is_forgotten_and_submitted_again(fake: Fake, run: Run) -> None:
    """A controller that starts with an older state leaves such records for ever. Its next jobs get the same numbers."""
    submit(run)
    name = submissions(run)[0].name
    records = [
        f"{name}|101_0|RUNNING|0:0|None",
        f"{name}|101_1|FAILED|3:0|None",
        f"{name}|101_[3-5%1]|PENDING|0:0|None",
    ]
    fake.answers("sacct", "\n".join(records) + "\n")
    assert words(run) == ["ended", "failed", "ended", "ended", "ended", "ended"]
    rows = statuses(run)
    assert [row.state for row in rows] == ["waiting", "failed"] + ["waiting"] * 4
    assert rows[0].detail == "Slurm has forgotten its job; launch again"
    fake.queue(*[("101", str(n), "RUNNING", "None", "1:00", "0", "0", "somebody-elses") for n in range(6)])
    assert words(run) == ["ended", "failed", "ended", "ended", "ended", "ended"]
    SlurmExecutor().cancel(run, run.cells)
    assert not fake.calls("scancel")
    (fake.folder / "count").write_text("0")  # the next job is the 101 again
    with run.lock():
        SlurmExecutor().submit(run, packs(run)[:2], run.resources)
    second = submissions(run)[1]
    assert (second.job, len(second.cells)) == ("101", 2)
    fake.queue(*[("101", str(n), "RUNNING", "None", "1:00", "0", "0", second.name) for n in range(2)])
    fake.answers("sacct", f"{second.name}|101_0|RUNNING|0:0|None\n{second.name}|101_1|RUNNING|0:0|None\n")
    assert words(run) == ["running"] * 2 + ["none"] * 4
    SlurmExecutor().cancel(run, run.cells[1:])
    assert [call.split()[2:] for call in fake.calls("scancel")] == [["101_1"]]


def test_a_job_is_asked_about_by_number_and_name(fake: Fake) -> None:
    text = "JobId=12 JobName={} UserId=ann(1) JobState=RUNNING Reason=None PreemptTime={}\n"
    for name, preempted, what in (
        ("klab-six-001-ab", "None", "running"),
        ("klab-six-001-ab", "2026-11-29T07:00:00", "preempted"),
        ("another", "2026-11-29T07:00:00", "ended"),
    ):
        fake.answers("scontrol", text.format(name, preempted))
        assert scheduler.imminent_end("12", "klab-six-001-ab") == what
    assert scheduler.imminent_end("12") == "preempted"


def test_a_silent_query_takes_no_time(fake: Fake, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(run)
    (fake.folder / "bin" / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(scheduler, "ANSWER_SECONDS", 0.2)
    assert words(run) == ["unknown"] * 6


def test_an_orphan_is_adopted_and_not_submitted_again(fake: Fake, run: Run) -> None:
    intent = record_intent(run, packs(run)[:4], cluster="lab", threads=1)  # and then the launcher died, after sbatch
    rows = [("77", str(n), "PENDING", "Priority", "1:00:00", "0", "0", intent.name) for n in range(4)]
    fake.queue(*rows)
    assert words(run) == ["queued"] * 4 + ["none"] * 2
    submit(run)
    assert [(each.job, len(each.cells)) for each in submissions(run)] == [("77", 4), ("101", 2)]


def test_whoever_only_looks_sees_an_orphan_and_does_not_write_it_down(fake: Fake, run: Run) -> None:
    intent = record_intent(run, packs(run)[:4], cluster="lab", threads=1)
    fake.queue(*[("77", str(n), "PENDING", "Priority", "1:00:00", "0", "0", intent.name) for n in range(4)])
    assert words(Run.open(run.path, read_only=True)) == ["queued"] * 4 + ["none"] * 2
    assert [each.job for each in submissions(run)] == [None]
    assert words(run) == ["queued"] * 4 + ["none"] * 2
    assert [each.job for each in submissions(run)] == ["77"]


def test_an_orphan_that_only_the_accounts_know_is_adopted(fake: Fake, run: Run) -> None:
    intent = record_intent(run, packs(run), cluster="lab", threads=1)
    fake.answers("sacct-by-name", f"{intent.name}|77_0\n{intent.name}|77_1\n")
    fake.answers("sacct", "".join(f"{intent.name}|77_{n}|FAILED|1:0|None\n" for n in range(6)))
    submit(run)
    assert [each.job for each in submissions(run)] == ["77", "101"]
    assert words(run) == ["none"] * 6  # of the new job nobody knows yet


def test_an_intent_without_a_job_is_dropped(fake: Fake, run: Run) -> None:
    record_intent(run, packs(run), cluster="lab", threads=1)  # and then the launcher died, before sbatch
    submit(run)
    assert [each.job for each in submissions(run)] == ["101"]


def test_nothing_is_submitted_while_slurm_is_silent(fake: Fake, run: Run) -> None:
    record_intent(run, packs(run), cluster="lab", threads=1)
    fake.fails("squeue", "Unable to contact slurm controller")
    with pytest.raises(UserError, match="Slurm does not answer"):
        submit(run)
    assert not fake.calls("sbatch")
    assert len(submissions(run)) == 1


def test_a_lost_answer_of_sbatch_keeps_the_intent(fake: Fake, run: Run) -> None:
    fake.fails("sbatch", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    fake.fails("sacct", "sacct: error: slurmdbd: Connection refused")
    with pytest.raises(UserError, match="does not answer"):
        submit(run)
    assert [each.job for each in submissions(run)] == [None]


def test_cancel_ends_only_jobs_without_other_cells(fake: Fake, run: Run) -> None:
    with run.lock():
        SlurmExecutor().submit(run, packs(run, 2), run.resources)
    name = submissions(run)[0].name
    fake.queue(*[("101", str(n), "RUNNING", "None", "1:00", "0", "0", name) for n in range(3)])
    SlurmExecutor().cancel(run, [run.cells[0], run.cells[1], run.cells[2]])
    assert [call.split()[2:] for call in fake.calls("scancel")] == [["101_0"]]


def test_hold_holds_jobs_whose_open_cells_are_all_held_and_release_lets_them_go(fake: Fake, run: Run) -> None:
    with run.lock():
        SlurmExecutor().submit(run, packs(run, 2), run.resources)
    name = submissions(run)[0].name
    fake.queue(*[("101", str(n), "PENDING", "Priority", "1:00", "0", "0", name) for n in range(3)])
    assert hold(run, run.cells[:3]) == run.cells[:3]
    asked = [call.split()[1:] for call in fake.calls("scontrol") if "show" not in call]
    assert asked == [["hold", "101_0"]]
    assert [row.state for row in statuses(run)] == ["held"] * 3 + ["queued"] * 3
    rows = [("101", "0", "PENDING", "JobHeldUser", "1:00", "0", "0", name)]
    fake.queue(*rows, *[("101", str(n), "PENDING", "Priority", "1:00", "0", "0", name) for n in (1, 2)])
    found = release(run, run.cells)
    assert (list(found.starting), found.waiting) == (run.cells[:3], ())
    asked = [call.split()[1:] for call in fake.calls("scontrol") if "show" not in call]
    assert asked == [["hold", "101_0"], ["release", "101_0"]]
    assert [row.state for row in statuses(run)] == ["held"] * 2 + ["queued"] * 4  # the stand-in goes on saying so
    assert all(run.cell(identity).withheld() is None for identity in run.cells)


def test_a_job_that_started_before_it_could_be_held_is_no_error(fake: Fake, run: Run) -> None:
    submit(run)
    name = submissions(run)[0].name
    fake.queue(*[("101", str(n), "PENDING", "Priority", "1:00", "0", "0", name) for n in range(6)])
    fake.fails("scontrol", "scontrol_error: Job is no longer pending execution for job 101_0")
    assert hold(run, run.cells[:1]) == run.cells[:1]
    fake.fails("scontrol", "Unable to contact slurm controller")
    with pytest.raises(UserError, match="Slurm does not answer"):
        hold(run, run.cells[1:2])
    assert run.cell(run.cells[1]).withheld() is not None


def test_cancel_says_when_slurm_is_silent(fake: Fake, run: Run) -> None:
    submit(run)
    fake.fails("squeue", "Unable to contact slurm controller")
    with pytest.raises(UserError, match="Slurm does not answer"):
        SlurmExecutor().cancel(run, run.cells)


@pytest.mark.parametrize(
    "record", ['{"schema":1}', "", "null", '{"schema":1,"name":"x","cells":[["../.."]],"job":"$(reboot)"}']
)
def test_a_damaged_record_is_a_mistake(fake: Fake, run: Run, record: str) -> None:
    submit(run)
    (submissions(run)[0].folder / "submission.json").write_text(record)
    with pytest.raises(UserError, match=r"submission\.json"):
        SlurmExecutor().states(run)


def test_klabs_own_options_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"resources\.sbatch\.array: is set by klab"):
        SlurmExecutor({"sbatch": {"array": "0-3"}}).resources(run.resources)


def test_without_slurm_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no scontrol here"):
        submit(run)


def directives(script: str) -> dict[str, str]:
    """The options in a script: name -> value; fails where one is written twice."""
    found: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            assert name not in found, name
            found[name] = value
    return found


@pytest.mark.parametrize(
    ("flags", "written", "absent"),
    [
        ({"sbatch": {"mem-per-cpu": "4G"}}, {"mem-per-cpu": "4G"}, ["mem"]),
        ({"sbatch": {"mem_per_gpu": "40G"}, "gpus": 1}, {"mem-per-gpu": "40G", "gpus-per-node": "1"}, ["mem"]),
        ({"sbatch": {"mem": False}}, {}, ["mem", "mem-per-cpu"]),
        ({"sbatch": {"mem": 0}}, {"mem": "0"}, []),
        ({"sbatch": {"cpus-per-task": 8}, "cpus": 2}, {"cpus-per-task": "8"}, []),
        ({"sbatch": {"c": 8}, "cpus": 2}, {"cpus-per-task": "8"}, ["c"]),
        ({"sbatch": {"time": 5}}, {"time": "5", "signal": "USR2@75"}, []),
        ({"sbatch": {"t": "1-0"}}, {"time": "1-0", "signal": "USR2@120"}, ["t"]),
        ({"sbatch": {"partition": "b"}, "partition": "a"}, {"partition": "b"}, []),
        ({"gpus": 4, "gpu_type": "a100"}, {"gpus-per-node": "a100:4", "ntasks-per-node": "4"}, []),
        (
            {"gpus": 4, "sbatch": {"gpus-per-node": "a100:2"}},
            {"gpus-per-node": "a100:2", "ntasks-per-node": "2"},
            ["gres"],
        ),
        (
            {"gpus": 4, "sbatch": {"gres": "gpu:a100:4"}},
            {"gres": "gpu:a100:4", "ntasks-per-node": "4"},
            ["gpus-per-node"],
        ),
        ({"sbatch": {"gres": "gpu:3,lustre:1"}}, {"gres": "gpu:3,lustre:1", "ntasks-per-node": "3"}, ["gpus-per-node"]),
        ({"gpus": 2, "sbatch": {"gres": "lustre:1"}}, {"gres": "lustre:1", "gpus-per-node": "2"}, []),
        ({"sbatch": {"G": 4}, "nodes": 2}, {"gpus": "4", "ntasks-per-node": "2"}, ["gpus-per-node", "G"]),
    ],
)
def test_options_of_the_user_replace_klabs_own(
    fake: Fake, run: Run, flags: dict[str, Any], written: dict[str, str], absent: list[str]
) -> None:
    submit(run, **flags)
    found = directives(fake.script(1))
    assert {name: found.get(name) for name in written} == written
    assert not set(absent) & set(found)


def test_threads_time_and_processes_follow_the_users_options(run: Run) -> None:
    flags = {"sbatch": {"cpus-per-task": 8, "time": "1:30:30", "gpus-per-node": "h100:2"}, "cpus": 2, "gpus": 1}
    found = SlurmExecutor(flags).resources(run.resources)
    assert (found.cpus, found.minutes, found.gpus, found.gpu_type, found.processes_per_node) == (8, 91, 2, "h100", 2)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("time", "soon", "not a time limit"),
        ("cpus-per-task", "many", "not a whole number"),
        ("gpus-per-node", "a100:0", "not a whole number"),
        ("N", 2, "is set by klab.*resources.nodes"),
        ("-J", "mine", "is set by klab"),
    ],
)
def test_values_that_sbatch_would_refuse_are_refused(run: Run, option: str, value: Any, problem: str) -> None:
    with pytest.raises(UserError, match=rf"resources\.sbatch\..*{problem}"):
        SlurmExecutor({"sbatch": {option: value}}).resources(run.resources)


def test_a_type_of_gpu_is_part_of_their_number() -> None:
    section = load_section("resources", {"gpus": "a100:4"})
    assert (section.gpus, section.gpu_type) == (4, "a100")  # type: ignore[attr-defined]
    assert load_section("resources", {"gpus": "4"}).gpus == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["a100:many", "many", ":4", "a100:", "-1", "1.5", ""])
def test_what_is_no_number_of_gpus_is_refused_alike(
    make_grid: Callable[..., Grid], capsys: pytest.CaptureFixture[str], text: str
) -> None:
    with pytest.raises(UserError, match=r"resources\.gpus: not a number of GPUs, nor type:number.* Write 4, or a100:4"):
        load_section("resources", {"gpus": text})
    make_grid("study")
    for on in ("local", "slurm"):
        assert main(["launch", "study.yaml", "--on", on, "--dry-run", "--no-check", f"--gpus={text}"]) == 2
        said = "klab: --gpus: not a number of GPUs, nor type:number (got "
        assert capsys.readouterr().err.startswith(said)


def test_the_flag_names_a_type_of_gpu_too(make_grid: Callable[..., Grid], capsys: pytest.CaptureFixture[str]) -> None:
    make_grid("study", resources={"gpus": "v100:2"})
    for text, asked in (("a100:4", "a100:4"), ("3", "v100:3")):
        assert main(["launch", "study.yaml", "--on", "slurm", "--dry-run", "--no-check", "--json", "--gpus", text]) == 0
        script = json.loads(capsys.readouterr().out)["script"]
        assert f"--gpus-per-node={asked}" in script


def test_a_cluster_without_cons_tres_is_asked_for_gpus_by_gres(fake: Fake, run: Run) -> None:
    fake.answers("scontrol", "ClusterName = lab\nMaxArraySize = 1001\nSelectType = select/cons_res\n")
    submit(run, gpus=2, gpu_type="v100")
    found = directives(fake.script(1))
    assert (found["gres"], found.get("gpus-per-node")) == ("gpu:v100:2", None)


def test_srun_gets_the_cores_per_task_that_newer_versions_do_not_pass_on(fake: Fake, run: Run) -> None:
    submit(run, cpus=3)
    script = fake.script(1)
    assert script.index("export SRUN_CPUS_PER_TASK=") < script.index("\nsrun ")


def test_another_interpreter_and_a_container(fake: Fake, run: Run) -> None:
    submit(run, python="/opt/env/bin/python", setup=["module load x"])
    command = fake.script(1).splitlines()
    assert any(line.startswith("srun ") and " klab /opt/env/bin/python -P" in line for line in command)
    submit_again = SlurmExecutor({"container": "/images/klab.sif", "gpus": 1, "setup": ["module load apptainer"]})
    (script,) = submit_again.scripts(run, packs(run), run.resources)
    inside = f"apptainer exec --nv --bind {run.path.parent} /images/klab.sif python3 -P"
    assert script.count(inside) == 2  # the job, and the repair of its pickle
    assert script.index("module load apptainer") < script.index(inside)


def test_a_job_in_a_container_is_requeued_by_its_script(fake: Fake, run: Run, tmp_path: Path) -> None:
    """There is no scontrol in the container: the process ends with a code, and the script outside asks Slurm."""
    (script,) = SlurmExecutor({"container": "klab.sif"}).scripts(run, packs(run, 6), run.resources)
    file = tmp_path / "script.sh"
    file.write_text(script.replace("test -e ", "true "))
    environment = {**os.environ, "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "mine"}
    for state, name, code, requeued in (
        ("RUNNING", "mine", 85, True),
        ("CANCELLED", "mine", 85, False),
        ("RUNNING", "mine", 1, False),
        ("RUNNING", "another", 85, False),
    ):
        (fake.folder / "calls").unlink(missing_ok=True)
        (fake.folder / "bin" / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
        fake.answers("scontrol", f"JobId=12 JobName={name} UserId=ann(1) JobState={state} Reason=None\n")
        done = subprocess.run(["bash", str(file)], env=environment)
        assert done.returncode == (0 if requeued else code)
        assert any(" requeue 12" in call for call in fake.calls("scontrol")) is requeued


def test_a_percent_sign_in_a_path_is_no_pattern(fake: Fake, run: Run, tmp_path: Path) -> None:
    grid = tmp_path / "six.yaml"
    odd = Run.create(tmp_path / "50%" / "six", load_grid(grid))
    submit(odd)
    found = directives(fake.script(1))
    folder = str(odd.jobs / "slurm" / "001").replace("%", "%%")
    assert found["output"].strip("'") == f"{folder}/%A_%a_0_log.out"
    assert found["error"].strip("'") == f"{folder}/%A_%a_0_log.err"
    assert f"{folder}/%A_%a_%t_log.out" in next(line for line in fake.script(1).splitlines() if "srun " in line)
    refused = Run.create(tmp_path / "100%job" / "six", load_grid(grid))
    with pytest.raises(UserError, match="has %j in its path"):
        launch(refused, SlurmExecutor(), workers=6)


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "launch failed requeued held"])
def test_a_held_job_is_shown_as_held_and_can_be_cancelled(fake: Fake, run: Run, reason: str) -> None:
    submit(run)
    name = submissions(run)[0].name
    fake.queue(*[("101", str(n), "PENDING", reason, "1:00:00", "0", "1", name) for n in range(6)])
    row = statuses(run)[2]
    assert (row.state, row.detail) == ("held", f"{reason}; release with: scontrol release 101_2")
    SlurmExecutor().cancel(run, [row.id])
    assert [call.split()[2:] for call in fake.calls("scancel")] == [["101_2"]]
    with run.lock():  # nothing of a held job is submitted twice
        SlurmExecutor().submit(run, packs(run), run.resources)
    assert len(fake.calls("sbatch")) == 1


def test_a_job_whose_other_cells_failed_is_ended_with_the_cancelled_one(fake: Fake, run: Run) -> None:
    with run.lock():
        SlurmExecutor().submit(run, packs(run, 2), run.resources)
    name = submissions(run)[0].name
    fake.queue(*[("101", str(n), "RUNNING", "None", "1:00", "0", "0", name) for n in range(3)])
    run.cell(run.cells[1]).record_failure("ValueError: no")
    SlurmExecutor().cancel(run, [run.cells[0]])
    assert [call.split()[2:] for call in fake.calls("scancel")] == [["101_0"]]


def test_a_number_of_a_submission_is_never_used_again(run: Run) -> None:
    for number in (1, 2):
        folder(run.jobs, number).mkdir(parents=True)
    folder(run.jobs, 1).rmdir()
    assert next_number(run.jobs) == 3
