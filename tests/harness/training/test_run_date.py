"""Chat templates that print the date print that of the run, for every cell, whenever it is trained or repeated."""

from __future__ import annotations

import json
from pathlib import Path

from klab.grid import load_grid
from klab.harness.policy.load import load_policy
from klab.harness.store import Run
from klab.harness.training.data.prompts import encode_prompts
from klab.harness.training.runner import prepare_cell
from tests.support.random_checkpoints import checkpoint
from tests.support.transformers_tokenizer import character_tokenizer


def test_prompts_carry_the_date_of_the_run(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("0123456789+=[]")
    tokenizer.chat_template = "[{{ strftime_now('%Y') }}]{{ messages[0].content }}"
    grid = {
        "name": "dated",
        "task": {"name": "addition", "digits": 1},
        "policy": {"name": "hf", "model": str(checkpoint(tmp_path, "GPT2", tokenizer))},
    }
    (tmp_path / "dated.yaml").write_text(json.dumps(grid))
    study = load_grid(tmp_path / "dated.yaml")
    shown = []
    for name, created in (("old", 0.0), ("new", 1.6e9)):
        run = Run.create(tmp_path / name, study, created)
        assert Run.create(tmp_path / name, study).created == created
        cell, _ = prepare_cell(run, run.cell(run.cells[0]))
        policy = load_policy(cell.cell.policy, cell.start, 1, "cpu")
        example = cell.split("train")[0]
        (ids,) = encode_prompts(policy, cell, [example])
        shown.append(tokenizer.decode(ids))
    assert shown == [f"[{year}]{example.prompt}" for year in (1970, 2020)]
