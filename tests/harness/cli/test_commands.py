"""Each command answers as the README says: texts, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from klab.grid import Grid, catalogue
from klab.grid.custom_values import SIGNATURES
from klab.grid.glossary import GLOSSARY
from klab.grid.sources import SOURCES
from klab.harness.cli.main import COMMANDS, main
from klab.harness.cli.rerun import kernels_of, other_device, other_kernels, versions_of
from klab.harness.dispatch.launch import launch
from klab.harness.dispatch.local.backend import LocalExecutor
from klab.harness.store import Run, machine
from klab.harness.training.runtime.pack_invariance import pack_invariant
from tests.support.run_processes import controllers, kill, wait_for, workers

MakeGrid = Callable[..., Grid]
Ask = Callable[..., Any]


@pytest.fixture
def run(make_grid: MakeGrid, place: Path) -> Run:
    """Four cells: finished, failed, lost, waiting."""
    run = Run.create(place / "runs/little", make_grid(seeds=4))
    finished, failed, lost, _ = (run.cell(identity) for identity in run.cells)
    finished.write_result({"state": "finished", "updates": 4, "reward_final": float("nan")})
    for folder in (failed, lost):
        folder.append_attempt({"event": "started", "at": time.time(), "pid": 1, "log": "jobs/local-1/7_0_log.err"})
        folder.write_heartbeat({"update": 2, "updates": 4, "reward": 0.5})
    failed.record_failure("Traceback\nValueError: [red]no such thing[/red]")
    (run.jobs / "local-1").mkdir(parents=True)
    (run.jobs / "local-1/7_0_log.err").write_text("first\nsecond [bold]line[/]\n")
    return run


def test_plan_tells_cells_spellings_and_packs(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    grid = make_grid(cells=[{"estimator": "k1"}, {"estimator": "k3"}, {"beta": 0.04}], seeds=3)
    text = ask("plan", "little.yaml", "--max-parallel", "2")
    assert "6 cells = 2 configurations × 3 seeds" in text
    assert "estimator=k3 = beta=0.04" in " ".join(text.split())
    assert "2 jobs of 3 cells, 2 at a time" in text
    assert "unknown" in text
    found = ask("plan", "little.yaml", "--json", "--cells-per-job", "1")
    assert [cell["id"] for cell in found["cells"]] == [cell.id for cell in grid.cells]
    assert len(found["packs"]) == 6
    assert not (place / "runs").exists()


def test_plan_estimates_from_cells_that_were_measured(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid(seeds=4)
    run = Run.create(place / "runs/before", make_grid(name="before", seeds=1))
    run.cell(run.cells[0]).write_result({"state": "finished", "updates": 4, "seconds": 40.0})
    found = ask("plan", "little.yaml", "--json", "--max-parallel", "2")
    assert found["measured_in"] == "before"
    assert found["estimated_seconds"] == pytest.approx(1 + 2 * 40)


def test_plan_leaves_out_what_is_done(run: Run, ask: Ask) -> None:
    found = ask("plan", "little.yaml", "--json")
    assert [cell["done"] for cell in found["cells"]] == [True, False, False, False]
    assert sum(map(len, found["packs"])) == 3


def test_status_counts_and_lists_open_cells(run: Run, ask: Ask) -> None:
    text = ask("status", "little", code=1)
    assert "1 finished, 1 waiting, 1 lost, 1 failed" in text
    assert "ValueError: [red]no such thing[/red]" in text
    assert run.cells[0] not in text
    assert run.cells[0] in ask("status", str(run.path), "--all", code=1)
    found = ask("status", "little", "--json", code=1)
    assert [cell["state"] for cell in found["cells"]] == ["finished", "failed", "lost", "waiting"]
    assert found["cells"][0]["reward"] is None  # NaN is not JSON
    assert found["cells"][2]["update"] == 2


def test_logs_show_attempts_error_and_output(run: Run, ask: Ask) -> None:
    text = ask("logs", "little", run.cells[1][-8:])
    assert "started" in text
    assert "ValueError: [red]no such thing[/red]" in text
    assert "second [bold]line[/]" in text
    assert "first" not in ask("logs", "little", run.cells[1], "-n", "1")
    assert "not started yet" in ask("logs", "little", run.cells[3])
    found = ask("logs", "little", run.cells[2], "--json")
    assert found["error"] is None
    assert found["output"] == {"jobs/local-1/7_0_log.err": "first\nsecond [bold]line[/]"}


def test_a_strangers_log_path_is_not_followed_out_of_the_run(run: Run, ask: Ask, place: Path) -> None:
    (place / "secret").write_text("secret words")
    run.cell(run.cells[3]).append_attempt({"event": "started", "at": 1.0, "log": "../../secret"})
    assert "secret words" not in ask("logs", "little", run.cells[3])


def test_cancel_takes_open_cells_out(run: Run, ask: Ask) -> None:
    assert ask("cancel", "little", run.cells[3], "--json")["cancelled"] == [run.cells[3]]
    states = ask("status", "little", "--json", code=1)["states"]
    assert states == {"finished": 1, "lost": 1, "cancelled": 1, "failed": 1}
    assert "1 cells cancelled" in ask("cancel", "little")


def test_cancel_asks_before_it_stops_two_running_cells(run: Run, ask: Ask) -> None:
    folders = [run.cell(identity) for identity in run.cells[2:]]
    for folder in folders:
        folder.claim()
    try:
        assert "--yes" in ask("cancel", "little", code=2)
        assert all(folder.claim_holder() for folder in folders)
    finally:
        for folder in folders:
            folder.release_claim()


def test_axes_lists_the_catalogue(ask: Ask) -> None:
    text = ask("axes")
    for axis in catalogue.AXES.values():
        assert axis.name in text
        assert all(value in text for value in axis.values)
    assert list(ask("axes", "ratio", "--json")) == ["ratio"]


@pytest.mark.parametrize("axis", catalogue.AXES)
def test_axes_of_one_axis_prints_how_a_value_of_ones_own_is_written(ask: Ask, axis: str) -> None:
    signature = SIGNATURES[axis]
    text = ask("axes", axis)
    assert signature.call(axis) in " ".join(text.split())
    assert textwrap.indent(signature.example, "    ", lambda line: bool(line.strip())) in text + "\n"
    assert signature.written in text


def test_axes_explains_symbols_and_sources(ask: Ask) -> None:
    assert all(symbol.symbol in ask("axes", "--symbols") for symbol in GLOSSARY)
    assert "arXiv:2507.18071" in ask("axes", "--sources")
    assert [row["label"] for row in ask("axes", "--sources", "--json")] == list(SOURCES)
    assert "choose one of" in ask("axes", "weight", "--symbols", code=2)


def test_doctor_finds_this_machine_fit(ask: Ask, place: Path) -> None:
    findings = {each["what"]: each for each in ask("doctor", "--json")}
    assert findings["torch works"]["verdict"] == "ok"
    assert findings["run folders"]["verdict"] == "ok"
    assert {each["verdict"] for each in findings.values()} <= {"ok", "note"}
    told = dict(word.split("=") for word in findings["kernels"]["detail"].split())
    assert told == machine.hardware()["kernels"]
    torch.set_num_threads(1)
    assert (findings["packs"]["verdict"] == "ok") == pack_invariant()


def test_launch_here_then_rerun_finds_the_same_bits(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid(seeds=2)
    assert "2 finished" in ask("launch", "little.yaml", "--on", "here")
    run = Run.open(place / "runs/little")
    cell = run.cells[1]
    again = ask("rerun", "little", cell, "--json")
    assert again["same"] is True
    assert again["kernels"] == {"stored": [machine.hardware()["kernels"]], "repeated": [machine.hardware()["kernels"]]}
    assert again["devices"] == {"stored": "cpu", "repeated": "cpu"}
    assert "match the stored ones bit for bit" in ask("rerun", "little", cell)

    other = ask("rerun", "little", cell, "--set", "training.lr=0.5", "--json")
    assert other["cell"] != cell
    assert other["same"] is None

    path = run.cell(cell).path / "metrics.jsonl"
    rows = run.cell(cell).metrics()
    rows[2]["loss"] = rows[2]["loss"] + 1e-9
    path.unlink()
    run.cell(cell).append_metrics(rows)
    found = ask("rerun", "little", cell, "--json", code=1)
    assert found["difference"].startswith("metrics, update 3, loss: ")


def test_rerun_says_which_rewards_a_time_limit_decided(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid(task={"name": "slow_tasks:Chore", "overdue": True})
    ask("launch", "little.yaml", "--on", "here")
    run = Run.open(place / "runs/little")
    count = (run.cell(run.cells[0]).result() or {})["reward_timeouts"]
    assert count > 0
    found = ask("rerun", "little", run.cells[0], "--json")
    assert found["reward_timeouts"] == {"stored": count, "repeated": count}
    said = ask("rerun", "little", run.cells[0])
    assert f"(reward_timeouts): {count} in the stored cell, {count} here" in said


def test_rerun_refuses_settings_that_do_not_exist(run: Run, ask: Ask) -> None:
    assert "did you mean 'training.lr'" in ask("rerun", "little", run.cells[0], "--set", "training.lrr=1", code=2)
    assert "updates" in ask("rerun", "little", run.cells[0], "--set", "training.updates=-1", code=2)
    assert "section.name=value" in ask("rerun", "little", run.cells[0], "--set", "lr", code=2)


def test_launch_adopts_finished_cells_of_a_renamed_grid(run: Run, make_grid: MakeGrid, ask: Ask) -> None:
    make_grid("renamed", seeds=1)
    text = ask("launch", "renamed.yaml", "--on", "here", "--no-check", "--adopt", "little")
    assert "1 cells adopted" in text
    assert "1 finished" in text
    assert "no such run" in ask("launch", "renamed.yaml", "--no-check", "--adopt", "nothing", code=2)


def test_launch_says_when_cells_failed(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid(task={"name": "slow_tasks:Chore", "fail_unless": "there"})
    assert "the file is not there" in ask("launch", "little.yaml", "--on", "here", code=2)
    assert "1 failed" in ask("launch", "little.yaml", "--on", "here", "--no-check", code=1)
    (place / "there").touch()
    assert "1 failed" in ask("launch", "little.yaml", "--on", "here", code=1)
    assert "1 finished" in ask("launch", "little.yaml", "--on", "here", "--retry-failed")


def test_a_dry_run_writes_nothing(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid(seeds=3)
    assert "3 cells in 2 jobs" in ask("launch", "little.yaml", "--dry-run", "--max-parallel", "2")
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "nothing.yaml"), "nothing.yaml"),
        (("plan", "quickstrt"), "did you mean 'quickstart'"),
        (("axes", "wieght"), "did you mean 'weight'"),
        (("status", "litle"), "did you mean 'little'"),
        (("status", "little.yaml"), "is a grid file"),
        (("logs", "little", "nothing"), "no such cell"),
        (("report", "nothing"), "no such run"),
        (("launch", "little.yaml", "--partition", "gpu"), "--on slurm"),
        (("launch", "little.yaml", "--on", "moon"), "moon"),
        (("plann",), "plan"),
        (("plan",), "GRID"),
    ],
)
def test_mistakes_are_one_message_and_code_2(run: Run, ask: Ask, words: tuple[str, ...], said: str) -> None:
    assert said in ask(*words, code=2)


def test_another_grid_of_the_same_name_is_refused(run: Run, make_grid: MakeGrid, ask: Ask) -> None:
    make_grid(seeds=4, updates=5)
    for words in (("plan", "little.yaml"), ("launch", "little.yaml", "--dry-run")):
        assert "training.updates was 4, now 5" in ask(*words, "--no-check", code=2)
    assert "training.updates was 4, now 5" in ask("launch", "little.yaml", code=2)


def test_a_damaged_manifest_is_named(run: Run, ask: Ask) -> None:
    path = run.path / "manifest.json"
    path.write_text(path.read_text().replace('"updates": 4', '"updates": 5', 1))
    assert "manifest.json" in ask("status", "little", code=2)


@pytest.mark.parametrize(("limit", "said"), [("disk", "disk is full"), ("read", "cannot be written")])
def test_a_disk_that_refuses_is_said_plainly(limit: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.harness.cli.main import _explain

    error = OSError(28 if limit == "disk" else 30, "no", "runs/x")
    assert said in _explain(error)
    assert "runs/x" in _explain(error)


INSTALLERS = ("__editable__", "_distutils_hack")
"""What an installation adds to every process."""
LIGHT = """
import json
import sys
from klab.harness.cli.main import main
code = main(sys.argv[1:])
print(json.dumps(sorted({
    name.partition(".")[0] for name, module in list(sys.modules.items())
    if "site-packages" in (getattr(module, "__file__", None) or "")
})), file=sys.stderr)
sys.exit(code)
"""
TYPER = {"annotated_doc", "shellingham", "typer"}
SETTINGS = {*TYPER, "annotated_types", "pydantic", "pydantic_core", "rich", "typing_extensions", "typing_inspection"}
YAML = {*SETTINGS, "yaml"}


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        ("--help", TYPER),
        ("--version", SETTINGS),
        # Typer adapts types of pydantic; what a design can see is computed with distributions of scipy.
        ("plan quickstart", {*YAML, "scipy", "numpy"}),
        ("axes", SETTINGS),
        ("formula quickstart", YAML),
        ("launch quickstart --dry-run", YAML),
        ("status little", SETTINGS),
    ],
)
def test_quick_commands_import_nothing_else(words: str, packages: set[str], make_grid: MakeGrid, place: Path) -> None:
    Run.create(place / "runs/little", make_grid())
    done = subprocess.run([sys.executable, "-c", LIGHT, *words.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name for name in json.loads(done.stderr.splitlines()[-1]) if not name.startswith(INSTALLERS)}
    assert found - {"_cyutility", "charset_normalizer"} <= packages  # helpers of scipy


def test_help_names_every_command(ask: Ask) -> None:
    text = ask("--help")
    assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str, ask: Ask) -> None:
    text = ask(name, "--help")
    assert len(text.splitlines()) > 5
    assert "--json" in text


def test_a_controller_that_was_killed_is_reported_until_the_next_launch(
    make_grid: MakeGrid, ask: Ask, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = make_grid(seeds=2, updates=30, task={"name": "slow_tasks:Chore", "seconds": 0.01})
    run = Run.create(place / "runs/little", grid)
    launch(run, LocalExecutor(max_parallel=1), workers=2, cells_per_job=1)
    (controller,) = wait_for(lambda: workers(run) and controllers(run))
    assert ask("status", "little", "--json")["problem"] is None
    kill(controller)
    wait_for(lambda: not controllers(run))
    for command in (("status", "little"), ("watch", "little", "--once")):
        ask(*command, code=1)
    wait_for(lambda: not workers(run))
    assert main(["status", "little"]) == 1
    message = capsys.readouterr().err
    assert "the controller ended with 1 cell in its queue; see " in message
    assert str(run.jobs / "controller.log") in message
    ask("launch", "little.yaml", "--no-merge", "--max-parallel", "1")
    assert ask("status", "little", "--json")["states"] == {"finished": 2}
    wait_for(lambda: not controllers(run))


def test_a_launch_with_nothing_to_do_but_failed_cells_names_the_option(run: Run, ask: Ask) -> None:
    for identity in run.cells[2:]:
        run.cell(identity).write_result({"state": "finished", "updates": 4})
    text = ask("launch", "little.yaml", "--no-merge", "--detach")
    assert "nothing to do: 1 failed before; --retry-failed runs them again" in text


def test_tiny_policies_use_cores_on_a_machine_with_gpus(
    make_grid: MakeGrid, ask: Ask, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_grid(seeds=64)
    grid = json.loads((place / "little.yaml").read_text())
    (place / "tiny.yaml").write_text(json.dumps({**grid, "name": "tiny", "policy": {"name": "tiny"}}))
    devices = [str(number) for number in range(machine.cores() + 3)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(devices))
    dry = ("--no-merge", "--dry-run", "--json")
    assert ask("launch", "tiny.yaml", *dry)["workers"] == machine.cores()
    assert ask("launch", "little.yaml", *dry)["workers"] == len(devices)  # a checkpoint goes to the GPUs


def test_rerun_says_when_machines_differ_in_their_kernels() -> None:
    intel = {"MKL_CBWR": "AVX512", "ATEN_CPU_CAPABILITY": "avx512"}
    amd = {"MKL_CBWR": "AUTO", "ATEN_CPU_CAPABILITY": "avx2"}
    assert other_kernels([amd], [amd]) is None
    assert other_kernels([], [amd]) is None  # a run of an older version
    said = str(other_kernels([intel], [amd]))
    assert "computed with MKL_CBWR=AVX512 ATEN_CPU_CAPABILITY=avx512, these with MKL_CBWR=AUTO" in said
    moved = str(other_kernels([amd, intel], [amd]))
    assert "=avx2 then MKL_CBWR=AVX512" in moved
    assert "belong to no single machine" in moved


def test_rerun_says_where_the_device_was_another_one() -> None:
    assert other_device("cpu", "cpu") is None
    assert other_device(None, "cpu") is None  # a run of an older version
    assert "computed on NVIDIA H200, these on cpu" in str(other_device("NVIDIA H200", "cpu"))


def test_rerun_says_which_libraries_were_other_ones(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid()
    ask("launch", "little.yaml", "--on", "here")
    run = Run.open(place / "runs/little")
    folder = run.cell(run.cells[0])
    versions = machine.versions()
    assert versions_of(folder) == folder.attempts()[0]["versions"] == versions
    assert ask("rerun", "little", folder.id, "--json")["other_versions"] == {}
    result = folder.result() or {}
    folder.write_result({**result, "versions": {**versions, "torch": "1.0", "gone": "2"}})
    found = ask("rerun", "little", folder.id, "--json")
    assert (found["same"], found["other_versions"]) == (True, {"torch": ["1.0", versions["torch"]]})
    assert f"were made with torch 1.0, now {versions['torch']}." in ask("rerun", "little", folder.id)


def test_rerun_finds_the_kernels_of_every_life(make_grid: MakeGrid, ask: Ask, place: Path) -> None:
    make_grid()
    ask("launch", "little.yaml", "--on", "here")
    run = Run.open(place / "runs/little")
    folder = run.cell(run.cells[0])
    here = machine.hardware()["kernels"]
    assert kernels_of(folder) == [here]
    before = {**folder.attempts()[0], "kernels": {"MKL_CBWR": "AVX512"}}
    folder.append_attempt(before)
    assert kernels_of(folder) == [here, {"MKL_CBWR": "AVX512"}]
    assert "its bits belong to no single machine" in ask("rerun", "little", folder.id)
