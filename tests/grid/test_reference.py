"""grid/README.md: its examples are valid grid files, and its reference is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from klab.grid import parse_grid
from klab.grid.custom_values import SIGNATURES
from klab.grid.grid_file import KEYS
from klab.grid.reference import MARKER, attribute_docstrings, reference
from klab.grid.schema.policy import POLICIES, Lora
from klab.grid.schema.sections import AnalysisPlan, Resources, Stop
from klab.grid.schema.task import TASKS, ReasoningPart, RewardTerm
from klab.grid.schema.training import BetaControl, Critic, Sampler, TrainingSection, TrustRegion

README = Path(__file__).parents[2] / "grid/README.md"
WRITTEN, _, GENERATED = README.read_text().partition(MARKER)
EXAMPLES = re.findall(r"```yaml\n(.*?)```", WRITTEN, re.DOTALL)
SECTIONS = (
    TrainingSection, Critic, BetaControl, TrustRegion, Sampler, Lora, Resources, RewardTerm, ReasoningPart,
    AnalysisPlan, Stop,
    *POLICIES.values(), *TASKS.values(),
)  # fmt: skip


def test_the_reference_is_what_the_code_says() -> None:
    assert GENERATED.strip() == reference().strip(), "run `python -m klab.grid.reference`"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_of_a_section_has_a_meaning(section: type) -> None:
    fields = set(section.model_fields)  # type: ignore[attr-defined]
    assert fields - set(attribute_docstrings(section)) <= {"name"}


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_examples_are_grid_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "weights.py").write_text(SIGNATURES["weight"].example)
    minimal = {"name": "name: example\n", "task": "task: addition\n"}
    head = "".join(line for key, line in minimal.items() if not re.search(rf"^{key}:", text, re.MULTILINE))
    grid = parse_grid(head + text, tmp_path / "example.yaml")
    assert len(grid.groups) > 1


def test_every_key_of_a_grid_file_is_explained_and_valid() -> None:
    for key in KEYS:
        assert f"| `{key}` |" in GENERATED
