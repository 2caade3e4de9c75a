"""What readers see of the demo and of 200 cells: at two widths, light and dark, printed, without scripts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

Open = Callable[..., Any]
PAGES = ["demo_report", "crowd_report"]

CUT = """() => {
  const cut = [];
  if (document.documentElement.scrollWidth > innerWidth) cut.push("the page scrolls sideways");
  for (const box of document.querySelectorAll(".scroll")) {
    if (box.scrollWidth > box.clientWidth + 1 && box.checkVisibility())
      cut.push(`${box.querySelector("table").className} is ${box.scrollWidth} of ${box.clientWidth}`);
  }
  for (const svg of document.querySelectorAll("figure.drawing svg")) {
    if (!svg.checkVisibility()) continue;
    const frame = svg.getBoundingClientRect();
    if (frame.right > innerWidth) cut.push(`${svg.id} ends at ${frame.right}`);
    for (const text of svg.querySelectorAll("text")) {
      const own = text.getBoundingClientRect();
      const across = own.left < frame.left - 3 || own.right > frame.right + 3;
      if (across || own.top < frame.top - 3 || own.bottom > frame.bottom + 3)
        cut.push(`${svg.id}: ${text.textContent}`);
    }
  }
  return cut;
}"""

SMALLEST = """() => {
  const sizes = [];
  for (const svg of document.querySelectorAll("figure.drawing svg")) {
    if (!svg.checkVisibility()) continue;
    const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    for (const text of svg.querySelectorAll("text")) {
      if (text.textContent.trim()) sizes.push(parseFloat(getComputedStyle(text).fontSize) * scale);
    }
  }
  return Math.min(...sizes);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_and_labels_are_legible(
    visit: Open, request: pytest.FixtureRequest, name: str, width: int, scheme: str
) -> None:
    seen = visit(request.getfixturevalue(name), width=width, color_scheme=scheme)
    assert seen.messages == []
    assert seen.page.evaluate(CUT) == []
    assert seen.page.evaluate(SMALLEST) >= 9
    page = name.partition("_")[0]
    seen.picture(f"{page}-{width}-{scheme}")
    if scheme == "light":
        seen.picture(f"{page}-{width}-full", full=True)


def test_the_first_figure_of_a_large_study_is_within_two_screens(visit: Open, crowd_report: Path) -> None:
    page = visit(crowd_report).page
    box = page.locator("figure.drawing svg").first.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 1800


def test_a_large_table_comes_page_by_page(visit: Open, crowd_report: Path) -> None:
    page = visit(crowd_report).page
    shown = "rows => rows.filter(row => row.checkVisibility()).map(row => Number(row.cells[0].dataset.value))"
    rows = "table.cells tbody tr"
    pager = page.locator(".pager")
    assert page.eval_on_selector_all(rows, shown) == list(range(1, 26))
    assert pager.locator("output").inner_text() == "1–25 of 200"
    assert pager.get_by_text("Back").is_disabled()
    pager.get_by_text("On").click()
    assert page.eval_on_selector_all(rows, shown) == list(range(26, 51))
    page.locator("form.filters").get_by_label("KL estimator").select_option("k2")
    assert pager.locator("output").inner_text() == "1–25 of 40"
    pager.get_by_text("On").click()
    assert len(page.eval_on_selector_all(rows, shown)) == 15
    page.emulate_media(media="print")
    assert len(page.eval_on_selector_all(rows, shown)) == 40


def test_without_scripts_every_row_and_figure_is_there_and_no_dead_control(visit: Open, crowd_report: Path) -> None:
    page = visit(crowd_report, java_script_enabled=False).page
    assert page.locator("table.cells tbody tr:visible").count() == 200
    assert page.locator("figure.drawing svg").first.is_visible()
    for control in ("form.filters", "#theme", ".pager"):
        assert not page.locator(control).first.is_visible()


def test_curves_are_shown_over_updates_or_tokens(visit: Open, demo_report: Path) -> None:
    page = visit(demo_report).page
    curves = page.locator("figure[data-figure^=curves-0]")
    assert [curves.nth(i).is_visible() for i in range(curves.count())] == [True, False]
    page.locator(".effort").first.get_by_label("tokens").check()
    assert [curves.nth(i).is_visible() for i in range(curves.count())] == [False, True]
    assert page.locator(".effort").last.get_by_label("tokens").is_checked()


def test_the_demo_prints_with_figures_in_two_columns(visit: Open, demo_report: Path) -> None:
    page = visit(demo_report, width=794).page
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    first = page.locator("#figures-task figure.drawing").nth(0).bounding_box()
    second = page.locator("#figures-task figure.drawing").nth(1).bounding_box()
    assert first is not None
    assert second is not None
    assert second["x"] > first["x"] + first["width"] / 2
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_completions_are_shown_at_several_moments_of_training(visit: Open, demo_report: Path) -> None:
    page = visit(demo_report).page
    page.click("table.cells tbody tr:first-child th a")
    moments = page.locator("details.cell[open] .samples h4").all_inner_texts()
    assert len(moments) == 5
    assert moments[0] == "at the start"
    assert moments[-1] == "after 120 updates"
