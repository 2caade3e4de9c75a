"""What the READMEs show is true of the code: every example runs, every command, link and table is as written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from klab.grid import UserError, load_grid, parse_grid
from klab.harness.cli.main import COMMANDS
from klab.harness.store import Run
from klab.harness.training import run_cells
from klab.tasks import Example, load_task
from tests.support.module_tables import READMES, ROOT, updated
from tests.support.small_cells import small_policy

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "harness/engines/README.md",
    *(name for name in READMES if (ROOT / name).exists()),
)


def block(page: str, language: str, containing: str) -> str:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    found = [text for kind, text in blocks if kind == language and containing in text]
    assert len(found) == 1
    return found[0]


def test_a_newcomer_reads_eight_kilobytes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def test_the_study_writes_60_configurations_and_means_48() -> None:
    grid = parse_grid(block("README.md", "yaml", "my_study"), "my_study.yaml")
    assert sum(len(cell.spellings) for cell in grid.cells if cell.seed == 0) == 60
    assert len(grid.groups) == 48
    assert len(grid.cells) == 240


def test_the_typing_error_costs_the_line_that_is_shown() -> None:
    text = block("README.md", "yaml", "my_study").replace("[ppo_clip", "[ppo_clp")
    with pytest.raises(UserError) as caught:
        parse_grid(text, "my_study.yaml")
    shown = block("README.md", "", "did you mean").strip().removeprefix("klab: ").removesuffix("…")
    assert str(caught.value).startswith(shown)


def test_the_custom_weight_is_one_at_ratio_one() -> None:
    space: dict[str, object] = {}
    exec(block("README.md", "python", "def soft"), space)
    weights = space["soft"](torch.tensor([1.0, 2.0]), torch.zeros(2), tau=2.0)  # type: ignore[operator]
    assert weights.tolist() == pytest.approx([1.0, 2.0 * 2.718281828**-2])


def test_a_real_model_needs_a_policy_and_a_task_and_nothing_else() -> None:
    (cell,) = parse_grid("name: real\n" + block("README.md", "yaml", "Qwen2.5-0.5B"), "real.yaml").cells
    assert cell.policy.name == "hf"
    assert cell.task.name == "gsm8k"


def test_the_task_that_is_shown_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sorting_example.py").write_text(block("tasks/README.md", "python", "class Sorting"))
    monkeypatch.syspath_prepend(tmp_path)
    grid = {
        "name": "sorting",
        "task": {"name": "sorting_example:Sorting", "length": 2},
        "policy": {"name": "hf", "model": str(small_policy(tmp_path / "start", "abcd>"))},
        "training": {"updates": 2, "prompts": 2, "group_size": 2, "evaluation_prompts": 4, "evaluation_samples": 1},
    }
    (tmp_path / "sorting.yaml").write_text(json.dumps(grid))
    run = Run.create(tmp_path / "run", load_grid(tmp_path / "sorting.yaml"))
    assert set(run_cells(run.path, run.cells).values()) == {"finished"}


def test_the_dataset_and_the_reward_that_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"{a}+{b}", "answer": f"{a + b:03}"} for a in range(12) for b in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    (cell,) = parse_grid(block("tasks/README.md", "yaml", "sums.jsonl"), tmp_path / "sums.yaml").cells
    task = load_task(cell.task)
    example = task.split("held_out")[0]
    assert example.prompt.endswith(" =")
    assert re.fullmatch(r"\d{3}", example.answer)
    assert task.score(example, example.answer).reward == 1.0
    space: dict[str, object] = {}
    exec(block("tasks/README.md", "python", "def brief"), space)
    score = space["brief"]("1+1 =", "002", "002")  # type: ignore[operator]
    assert (score.reward, score.correct) == (pytest.approx(0.97), True)


def test_the_sorting_task_scores_letters_at_their_place() -> None:
    space: dict[str, object] = {}
    exec(block("tasks/README.md", "python", "class Sorting"), space)
    task = space["Sorting"](length=3)  # type: ignore[operator]
    assert task.score(Example("cba>", "abc"), "abd").reward == pytest.approx(2 / 3)
    prompts = [example.prompt for name in ("train", "held_out") for example in task.split(name)]
    assert len(set(prompts)) == len(prompts) == 64


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page: str) -> None:
    named = re.findall(r"^klab ([a-z][a-z-]*)|`klab ([a-z][a-z-]*)", (ROOT / page).read_text(), flags=re.MULTILINE)
    assert {name for pair in named for name in pair if name} <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(#[^)]+)?\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        file = ((ROOT / page).parent / target) if target else ROOT / page
        assert file.exists(), (page, target)
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads}
            assert anchor[1:] in anchors, (page, target, anchor)


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_modules_are_those_of_the_code(page: str) -> None:
    text = (ROOT / page).read_text()
    assert updated(text) == text, f"`make docs` writes the tables of {page} anew"
