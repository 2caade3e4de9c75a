"""A real Chromium, Debian's package, driven by Playwright; tests are skipped where either is missing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Cell
from klab.reports import render
from tests.reports.synthetic import write_run

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "artefacts"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 1"> & "quotes"'


def _troubled(cell: Cell) -> str:
    if cell.objective.weight == "truncate" and cell.seed in (1, 3):
        return "diverged"
    if cell.objective.estimator == "k1" and cell.seed == 2:
        return "failed"
    return "finished"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    run = write_run(folder / "quickstart", outcome=_troubled, completion=lambda cell: HOSTILE)
    return render(run.path, folder / "report", figures=False)


@pytest.fixture(scope="session")
def large_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several hundred cells on two tasks."""
    text = """
name: crossed
task: {name: addition, digits: 2}
training: {updates: 6, updates_per_rollout: 2, evaluate_every: 3}
objective: {algorithm: grpo, beta: 0.05}
axes:
  task.digits: [2, 3]
  estimator: [k1, k2, k3]
  placement: [loss, reward, advantage]
  weight: [ppo_clip, ratio, truncate, power]
  training.lr: [1.0e-4, 3.0e-4]
seeds: 3
"""
    folder = tmp_path_factory.mktemp("crossed")
    run = write_run(folder / "crossed", text, outcome=_troubled, noise=0.03)
    return render(run.path, folder / "report", figures=False)


@pytest.fixture(scope="session")
def demo_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `make demo` where it has run, else one of the same cells with made-up numbers."""
    page = ROOT / "runs" / "quickstart" / "report" / "index.html"
    if page.exists():
        return page
    folder = tmp_path_factory.mktemp("demo")
    text = (ROOT / "grid" / "studies" / "quickstart.yaml").read_text()
    run = write_run(folder / "quickstart", text)
    return render(run.path, folder / "report", figures=False, over=("updates", "tokens"))


@pytest.fixture(scope="session")
def crowd_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 cells of one task, with long names."""
    text = """
name: crowd
task: {name: addition, digits: 2}
training: {updates: 6, updates_per_rollout: 2, evaluate_every: 3}
objective: {algorithm: grpo, beta: 0.05}
axes:
  estimator: [k1, k2, k3, abs, full]
  placement: [loss, reward, reward_to_go, advantage, loss_corrected]
  weight: [ppo_clip, ratio, truncate, power]
  training.lr: [1.0e-4, 3.0e-4]
seeds: 3
"""
    folder = tmp_path_factory.mktemp("crowd")
    run = write_run(folder / "crowd", text, outcome=_troubled, noise=0.03)
    return render(run.path, folder / "report", figures=False)


@pytest.fixture(scope="session")
def wide_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five axes, one at a time."""
    text = """
name: wide
task: {name: addition, digits: 2}
training: {updates: 4, updates_per_rollout: 2}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k3]
  placement: [loss, reward]
  ratio: [token, future_mean]
  weight: [ppo_clip, power]
  advantage: [raw, group_norm]
seeds: 3
"""
    folder = tmp_path_factory.mktemp("wide")
    return render(write_run(folder / "wide", text).path, folder / "report", figures=False)


class Visit:
    """An open page and everything it said or asked for."""

    def __init__(self, browser: Any, target: Path | str, width: int = 1280, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(target if isinstance(target, str) else target.as_uri())

    def picture(self, name: str, full: bool = False) -> None:
        """Keeps a screenshot as an artefact."""
        ARTEFACTS.mkdir(exist_ok=True)
        self.page.screenshot(path=str(ARTEFACTS / f"{name}.png"), full_page=full)


@pytest.fixture
def visit(chromium: Any) -> Iterator[Any]:
    """Opens a page, of a file or at an address; closes it afterwards."""
    opened: list[Visit] = []

    def go(target: Path | str, **options: Any) -> Visit:
        opened.append(Visit(chromium, target, **options))
        return opened[-1]

    yield go
    for each in opened:
        each.context.close()
