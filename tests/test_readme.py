"""What the README shows is true of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from klab.grid import UserError, parse_grid
from klab.grid.algorithms import algorithm_names
from klab.grid.schema.sections import TrainingSection
from klab.harness.cli.main import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(language: str, containing: str) -> str:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    found = [text for kind, text in blocks if kind == language and containing in text]
    assert len(found) == 1
    return found[0]


def test_the_study_writes_60_configurations_and_means_48() -> None:
    grid = parse_grid(block("yaml", "my_study"), "my_study.yaml")
    assert sum(len(cell.spellings) for cell in grid.cells if cell.seed == 0) == 60
    assert len(grid.groups) == 48
    assert len(grid.cells) == 240


def test_the_typing_error_costs_the_line_that_is_shown() -> None:
    text = block("yaml", "my_study").replace("[ppo_clip", "[ppo_clp")
    with pytest.raises(UserError) as caught:
        parse_grid(text, "my_study.yaml")
    shown = block("", "did you mean").strip().removeprefix("klab: ").removesuffix("…")
    assert str(caught.value).startswith(shown)


def test_the_custom_weight_is_one_at_ratio_one() -> None:
    space: dict[str, object] = {}
    exec(block("python", "def soft"), space)
    weights = space["soft"](torch.tensor([1.0, 2.0]), torch.zeros(2), tau=2.0)  # type: ignore[operator]
    assert weights.tolist() == pytest.approx([1.0, 2.0 * 2.718281828**-2])


def test_a_real_model_needs_a_policy_and_a_task_and_nothing_else() -> None:
    (cell,) = parse_grid("name: real\n" + block("yaml", "Qwen2.5"), "real.yaml").cells
    assert cell.policy.name == "hf"
    assert cell.task.name == "gsm8k"


def test_every_setting_beyond_the_loss_is_one_of_training() -> None:
    table = README.split("## Beyond the loss")[1].split("\n## ")[0]
    for written in re.findall(r"^\| (`.+?`) \|", table, flags=re.MULTILINE):
        for setting in re.findall(r"(\w+): ", re.sub(r"\{.*?\}", "", written.replace("`", "") + " ")) or [written]:
            assert setting in TrainingSection.model_fields, written


def test_every_command_that_is_named_exists() -> None:
    named = set(re.findall(r"^klab ([a-z]+)|`klab ([a-z]+)", README, flags=re.MULTILINE))
    assert {name for pair in named for name in pair if name} <= set(COMMANDS)


def test_the_number_of_named_algorithms() -> None:
    assert f"{len(algorithm_names())} with their sources" in README


def test_pictures_and_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parents[1] / target).exists(), target
