"""The page about TRL is true: its tables come from the code, and the studies that it shows can be planned here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from klab.grid import load_grid, parse_grid
from klab.grid.schema.training import TrainingSection
from klab.harness.engines.trl.launcher import LOOPBACK, Ranks, launch_command
from tests.support.engine_matrix import PAGE, PROBES, is_refused, updated

STUDIES = Path(__file__).parents[3] / "grid" / "studies"


def test_the_tables_are_the_codes() -> None:
    assert PAGE.read_text() == updated(PAGE.read_text())


def test_what_the_page_calls_refused_is_refused() -> None:
    refused = re.findall(r"^\| `(\w+)` \| refused", PAGE.read_text(), flags=re.MULTILINE)
    assert {"lag", "critic", "token_budget", "behaviour"} <= set(refused)
    assert all(is_refused(name, PROBES[name]) for name in refused)
    assert not any(is_refused(name, TrainingSection.model_fields[name].default) for name in PROBES)


@pytest.mark.parametrize("name", ["trl_7b", "trl_two_nodes"])
def test_the_studies_name_what_starts_their_processes(name: str) -> None:
    grid = load_grid(STUDIES / f"{name}.yaml")
    assert {cell.training.engine for cell in grid.cells} == {"trl"}
    assert grid.resources.launcher is not None
    assert grid.resources.launcher.accelerate == str(STUDIES / "accelerate" / "fsdp2.yaml")


def test_the_study_that_the_page_shows_is_the_one_there_is() -> None:
    shown = re.search(r"```yaml\n(task: \{name: gsm8k.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert shown is not None
    text = "name: shown\n" + shown[1].replace("accelerate/", f"{STUDIES}/accelerate/")
    ours, theirs = parse_grid(text, "shown.yaml"), load_grid(STUDIES / "trl_7b.yaml")
    for mine, other in zip(ours.cells, theirs.cells[::2], strict=True):
        assert mine.objective == other.objective
        assert (mine.policy, mine.task, mine.training.sampler) == (other.policy, other.task, other.training.sampler)


def test_commands_of_launchers() -> None:
    _, safe, *plain = launch_command(Ranks(8), LOOPBACK, 29500, ["RUN"])
    assert safe == "-P"
    shielded = "-m klab.harness.engines.trl.shielded"
    expected = f"{shielded} torch.distributed.run --nnodes 1 --node_rank 0 --nproc_per_node 8 --master_addr 127.0.0.1"
    worker = "--module klab.harness.engines.trl.worker RUN"
    assert " ".join(plain) == f"{expected} --master_port 29500 {worker}"
    _, _, *two = launch_command(Ranks(8, 2, 1, accelerate="fsdp.yaml"), "n1", 29500, ["RUN"])
    worker = f"--deepspeed_multinode_launcher standard {worker}"
    expected = f"{shielded} accelerate.commands.launch --config_file fsdp.yaml --num_processes 16 --num_machines 2"
    assert " ".join(two) == f"{expected} --machine_rank 1 --main_process_ip n1 --main_process_port 29500 {worker}"
