"""The live page in a real browser: a run that goes on, the keyboard, strangers' texts, both themes, narrow screens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klab.grid import Cell
from klab.harness.serve.runs_folder import RunsFolder
from klab.harness.serve.server import LiveServer
from klab.harness.store import Run
from klab.reports import render
from tests.browser.conftest import HOSTILE, ROOT
from tests.browser.test_report import CONTRAST
from tests.reports.synthetic import large_grid, write_run
from tests.support.small_cells import small_policy

pytestmark = pytest.mark.browser

Open = Callable[..., Any]
MINUTES = 60_000

STUDY = """
name: mixed
description: Which KL estimator, where, and with which weight?
task: {name: addition, digits: 2}
training: {updates: 30, updates_per_rollout: 2, evaluate_every: 5}
objective: {algorithm: grpo, beta: 0.05}
design: one_at_a_time
axes:
  estimator: [k1, k2, k3]
  placement: [none, reward, loss]
  weight: [ppo_clip, {name: power, q: 0.5}, truncate]
seeds: 4
"""


@pytest.fixture
def serve() -> Iterator[Callable[..., LiveServer]]:
    """Starts a server that looks at every request."""
    started: list[tuple[LiveServer, threading.Thread]] = []

    def start(folder: Path, **options: Any) -> LiveServer:
        server = LiveServer(RunsFolder(folder, every=0.0), **options)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.stop()
        thread.join(timeout=20)


def _outcome(cell: Cell) -> str:
    if cell.objective.weight == "truncate":
        return "diverged" if cell.seed in (1, 3) else "finished"
    if cell.objective.estimator == "k1" and cell.seed == 2:
        return "failed"
    if cell.objective.placement == "reward":
        return "interrupted" if cell.seed < 2 else "missing"
    return "finished"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Cells in many states, two of which this process holds; every text that a stranger can choose is hostile."""
    text = STUDY.replace("Which KL estimator, where, and with which weight?", f"'{HOSTILE}'")
    run = write_run(tmp_path_factory.mktemp("live") / "mixed", text, outcome=_outcome, completion=lambda cell: HOSTILE)
    running = [
        folder
        for cell in run.cells
        if (folder := run.cell(cell)).evaluations() and not folder.result() and not folder.error()
    ]
    for folder in running:
        folder.claim(details={"executor": "local"})
        folder.append_attempt({"event": "started", "at": time.time(), "host": HOSTILE, "log": "jobs/local/1_0_log.err"})
        folder.write_heartbeat({"update": len(folder.metrics()), "updates": 30, "reward": 0.5})
    (run.jobs / "local").mkdir(parents=True)
    (run.jobs / "local" / "1_0_log.err").write_text(HOSTILE)
    failed = next(folder for cell in run.cells if (folder := run.cell(cell)).error())
    failed.record_failure(f"Traceback\nRuntimeError: {HOSTILE}\n")
    (run.report).mkdir()
    (run.report / "index.html").write_text(
        "<!DOCTYPE html><title>stranger</title><p id=said></p><script>"
        "const say = (text) => { document.getElementById('said').textContent += text; };"
        "say('origin ' + window.origin + '; ');"
        "try { localStorage.x = 1; say('stored; '); } catch { say('kept nothing; '); }"
        "try { window.opener.document.title = 'owned'; say('scripted'); }"
        " catch { say('alone; '); }"
        "for (const place of ['../../../api/runs', 'https://example.org/'])"
        " fetch(place).then(() => say('asked; ')).catch(() => say('refused; '));"
        "</script>"
    )
    assert len(running) == 2
    yield run
    for folder in running:
        folder.release_claim()


def _launched(place: Path) -> tuple[Path, subprocess.Popen[bytes]]:
    """A grid of four cells that `klab launch --on here` trains, one after another."""
    shutil.copy(ROOT / "tests" / "support" / "small_cells.py", place)
    policy = small_policy(place, "abcd")
    grid = {
        "name": "going_on",
        "description": "Does k1 hold the policy closer?",
        "task": {"name": "small_cells:Letters", "seconds": 0.03},
        "policy": {"name": "hf", "model": str(policy)},
        "training": {
            **{"updates": 24, "prompts": 2, "group_size": 4, "lr": 0.01, "evaluate_every": 4, "checkpoint_updates": 4},
            **{"evaluation_prompts": 2, "evaluation_samples": 2, "final_evaluation_samples": 2},
        },
        "design": "list",
        "cells": [{"estimator": "k1"}, {"estimator": "k3"}],
        "seeds": 2,
    }
    (place / "going_on.yaml").write_text(json.dumps(grid))
    command = [sys.executable, "-m", "klab.harness.cli.main", "launch", "going_on.yaml", "--on", "here"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(place)}
    options = ["--no-check", "--no-merge", "--cells-per-job", "1", "--device", "cpu"]
    log = (place / "launch.log").open("wb")
    return place / "runs" / "going_on", subprocess.Popen(
        [*command, *options], cwd=place, env=environment, stdout=log, stderr=log
    )


def test_a_run_that_is_going_on_is_seen_from_its_beginning_to_its_report(
    visit: Open, serve: Open, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    seen = visit(serve(tmp_path / "runs").address.url)
    page = seen.page
    page.set_default_timeout(2 * MINUTES)
    page.wait_for_selector("text=No runs here yet")
    folder, process = _launched(tmp_path)
    try:
        page.click("a:text-is('going_on')")
        page.wait_for_selector(".description:text-is('Does k1 hold the policy closer?')")
        page.wait_for_selector(".chip[data-state=running]")
        page.wait_for_selector(".chip[data-state=waiting], .chip[data-state=queued]")
        line = "document.querySelector('[data-key=reward_mean] .lines path')?.getAttribute('d')?.length ?? 0"
        page.wait_for_function(f"() => {line} > 20")
        before = page.evaluate(line)
        page.wait_for_function(f"(before) => {line} > before", arg=before)
        page.wait_for_selector(".completion .answer-text")
        first = page.inner_text(".completion .small")
        page.wait_for_function("(first) => document.querySelector('.completion .small').innerText !== first", arg=first)
        seen.picture("live-run")
        page.click(".toggle button:text-is('Cells')")
        page.wait_for_selector(".state-word[data-state=running]")
        page.click("tr:has(.state-word[data-state=running]) th a")
        page.wait_for_selector(".state-word.large[data-state=running]")
        page.wait_for_selector(".live-panel .lines path", state="attached")
        assert "update" in page.inner_text(".run-facts")
        page.click("#crumbs a:text-is('going_on')")
        page.wait_for_function("() => document.querySelector('.chip[data-state=finished] b')?.textContent === '4'")
        assert page.locator(".chip").count() == 1
        assert process.wait(60) == 0, (tmp_path / "launch.log").read_text()
        assert not page.locator(".report-link").is_visible()
        render(folder, figures=False)
        page.wait_for_selector(".report-link:visible")
        with page.context.expect_page() as opened:
            page.click(".report-link")
        report = opened.value
        report.wait_for_selector("h1:text-is('going_on')")
        report.click("table.cells thead button >> nth=0")  # its own scripts run
        assert report.evaluate("window.origin") == "null"
    finally:
        process.kill()
        process.wait()
    assert [text for text in seen.messages if "404" not in text] == []


def test_a_strangers_report_can_do_nothing_to_anybody(visit: Open, serve: Open, mixed: Run) -> None:
    seen = visit(f"{serve(mixed.path.parent).address.url}#/mixed")
    with seen.page.context.expect_page() as opened:
        seen.page.click(".report-link")
    report = opened.value
    report.wait_for_function("() => document.getElementById('said').textContent.split('refused').length === 3")
    said = report.inner_text("#said")
    assert said.startswith("origin null; kept nothing; ")
    assert "scripted" not in said
    assert "asked" not in said
    assert seen.page.title() != "owned"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800, 390])
def test_every_view_is_quiet_legible_and_as_wide_as_the_screen(
    visit: Open, serve: Open, mixed: Run, width: int, scheme: str
) -> None:
    url = serve(mixed.path.parent).address.url
    seen = visit(url, width=width, color_scheme=scheme)
    page = seen.page
    failed = next(cell for cell in mixed.cells if mixed.cell(cell).error())
    running = next(cell for cell in mixed.cells if mixed.cell(cell).claim_holder())
    views = {
        "runs": ("#/", ".run .states-bar span"),
        "run": ("#/mixed", ".completion"),
        "cells": ("#/mixed?by=cell", "td .state-word"),
        "running": (f"#/mixed/{running}", ".settings dd"),
        "failed": (f"#/mixed/{failed}", "pre.error"),
    }
    for name, (address, sign) in views.items():
        page.evaluate("(address) => { location.hash = address; }", address)
        page.wait_for_selector(sign)
        page.wait_for_timeout(300)  # bars and links have their places
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert page.evaluate(CONTRAST) == [], name
        assert page.evaluate("window.hit") is None, name
        seen.picture(f"live-{name}-{width}-{scheme}", full=True)
    assert seen.messages == []
    assert all(request.startswith((url, "data:")) for request in seen.requests)
    page.evaluate("location.hash = '#/mixed'")
    page.wait_for_selector(".completion")
    assert page.inner_text(".description") == HOSTILE
    assert HOSTILE in page.inner_text(".completion .answer-text")


def test_the_keyboard_reaches_everything_and_keeps_its_place(visit: Open, serve: Open, mixed: Run) -> None:
    page = visit(f"{serve(mixed.path.parent).address.url}#/mixed?by=cell").page
    page.wait_for_selector("td .spark")
    page.keyboard.press("/")
    page.keyboard.type("estimator k1")
    page.wait_for_function("() => document.querySelector('output.count').textContent === '4 cells'")
    assert page.evaluate("document.activeElement.type") == "search"
    assert "q=estimator+k1" in page.evaluate("location.hash")
    button = page.locator("thead [data-sort=reward] button")
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("thead [aria-sort=descending]")
    rewards = page.eval_on_selector_all(
        "td.reward", "cells => cells.map(cell => parseFloat(cell.textContent)).filter(x => !isNaN(x))"
    )
    assert rewards == sorted(rewards, reverse=True)
    box = page.locator("tbody input[type=checkbox]:not(:checked)").first
    label = box.get_attribute("aria-label")
    box.focus()
    page.keyboard.press("Space")
    page.wait_for_function("() => location.hash.includes('draw=')")
    named = "(label) => [...document.querySelectorAll('.curve-legend button')].some(each => each.ariaLabel === label)"
    page.wait_for_function(named, arg=str(label).replace("Draw", "Do not draw"))
    page.wait_for_timeout(2500)  # a refresh goes by
    assert page.evaluate("document.activeElement.ariaLabel") == label
    panel = page.locator(".live-panel svg").first
    panel.focus()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tooltip").startswith("update ")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert page.locator("#tooltip").is_hidden()
    link = page.locator("tbody th a").first
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".state-word.large")
    page.go_back()
    page.wait_for_function("() => document.querySelector('output.count')?.textContent === '4 cells'")


def test_states_choose_cells_and_colours_stay_with_their_lines(visit: Open, serve: Open, mixed: Run) -> None:
    page = visit(f"{serve(mixed.path.parent).address.url}#/mixed").page
    page.wait_for_selector(".curve-legend li")
    colours = "items => Object.fromEntries(items.map(item => [item.dataset.key, item.firstChild.className]))"
    before = page.eval_on_selector_all(".curve-legend li", colours)
    assert len(set(before.values())) == len(before)
    page.locator(".curve-legend button").first.click()
    page.wait_for_function(
        "(count) => document.querySelectorAll('.curve-legend li').length === count", arg=len(before) - 1
    )
    after = page.eval_on_selector_all(".curve-legend li", colours)
    assert after == {key: value for key, value in before.items() if key in after}
    page.click(".chip[data-state=failed]")
    page.wait_for_function("() => document.querySelector('output.count').textContent === '1 configuration'")
    assert page.get_attribute(".chip[data-state=failed]", "aria-pressed") == "true"
    page.click(".toggle button:text-is('Cells')")
    page.wait_for_function("() => document.querySelector('output.count').textContent === '1 cell'")
    page.reload()
    page.wait_for_function("() => document.querySelector('output.count')?.textContent === '1 cell'")
    page.click(".chip[data-state=failed]")
    whole = f"{len(mixed.cells)} cells"
    page.wait_for_function("(text) => document.querySelector('output.count').textContent === text", arg=whole)


def test_a_server_that_ends_is_missed_and_a_new_one_is_found(visit: Open, mixed: Run) -> None:
    server = LiveServer(RunsFolder(mixed.path.parent, every=0.0))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    page = visit(server.address.url).page
    page.wait_for_selector(".pulse[data-state=live]")
    server.stop()
    thread.join()
    page.wait_for_selector(".pulse[data-state=lost]")
    assert "does klab serve still run" in page.inner_text("#pulse")
    again = LiveServer(RunsFolder(mixed.path.parent, every=0.0), port=server.address.port)
    thread = threading.Thread(target=again.run, daemon=True)
    thread.start()
    page.wait_for_selector(".pulse[data-state=live]")
    again.stop()
    thread.join()


def test_addresses_are_relative_behind_a_secret(visit: Open, serve: Open, mixed: Run) -> None:
    server = serve(mixed.path.parent, private=True)
    seen = visit(server.address.url)
    seen.page.click("a:text-is('mixed')")
    seen.page.wait_for_selector(".completion")
    assert all(server.address.secret in request for request in seen.requests if request.startswith("http"))
    assert seen.messages == []


def test_ten_thousand_cells_are_a_page_of_the_table(visit: Open, serve: Open, tmp_path: Path) -> None:
    run = write_run(tmp_path / "large", large_grid(2000, 5, 2), outcome=lambda cell: "missing")
    page = visit(f"{serve(run.path.parent).address.url}#/large?by=cell").page
    page.set_default_timeout(2 * MINUTES)
    page.wait_for_function("() => document.querySelector('output.count')?.textContent === '10 000 cells'")
    assert page.locator("tbody tr").count() == 25
    page.click(".pager button:text-is('More') >> visible=true")
    page.wait_for_function("() => document.querySelector('.pager output').textContent.startsWith('26–50 of')")
    page.fill("input[type=search]", "k2 truncate 0.000102")
    page.wait_for_function("() => document.querySelector('output.count').textContent === '25 cells'")
    assert page.locator("tbody tr").count() == 25
    assert page.evaluate("document.querySelectorAll('*').length") < 2500


def test_paper_shows_the_run_without_its_controls(visit: Open, serve: Open, mixed: Run) -> None:
    seen = visit(f"{serve(mixed.path.parent).address.url}#/mixed", color_scheme="dark")
    seen.page.wait_for_selector(".completion")
    seen.page.emulate_media(media="print")
    for control in (".toggle", ".filters", "#theme", ".pulse"):
        assert not seen.page.locator(control).first.is_visible()
    assert seen.page.locator(".live-panel").first.is_visible()
