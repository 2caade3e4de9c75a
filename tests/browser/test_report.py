"""The report page in a real browser: loads from disk alone, sorts, filters, explains itself; light, dark and print."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser

Open = Callable[..., Any]

CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > .99) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const texts = "p, h1, h2, h3, td, th, dt, dd, li, summary, figcaption, a, label, button, .small, .interval, .value";
  for (const node of document.querySelectorAll(texts)) {
    if (!node.textContent.trim() || node.closest(".hidden, .skip") || !node.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push(node.className + ": " + node.textContent.trim().slice(0, 40));
  }
  return [...new Set(poor)];
}"""


def _shown(page: Any) -> list[str]:
    return page.eval_on_selector_all(  # type: ignore[no-any-return]
        "table.cells tbody tr:not([hidden]):not(.off) th a", "links => links.map(link => link.textContent)"
    )


def _column(page: Any, position: int) -> list[float]:
    texts = page.eval_on_selector_all(
        "table.cells tbody tr:not([hidden]):not(.off)",
        "(rows, i) => rows.map(row => row.cells[i].dataset.value ?? row.cells[i].textContent)",
        position,
    )
    return [float(text) for text in texts if text not in ("", "–")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_from_disk_without_a_word_or_a_request(visit: Open, report: Path, scheme: str) -> None:
    seen = visit(report, color_scheme=scheme)
    assert seen.messages == []
    assert seen.requests == [report.as_uri()]
    assert seen.page.evaluate("window.hit") is None
    assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    seen.picture(f"report-{scheme}")
    seen.picture(f"report-{scheme}-full", full=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(visit: Open, report: Path, scheme: str) -> None:
    page = visit(report, color_scheme=scheme).page
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert page.evaluate(CONTRAST) == []


def test_the_first_screen_says_what_matters_without_scrolling(visit: Open, report: Path) -> None:
    page = visit(report).page
    assert "made the difference" in page.inner_text("h2.headline")
    for heading in ("Best cells", "Which axes matter", "What was lost", "How much evidence"):
        box = page.locator(f"h3:text-is('{heading}')").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 900


def test_every_figure_is_drawn(visit: Open, report: Path) -> None:
    page = visit(report).page
    figures = page.locator("figure.drawing svg")
    assert figures.count() >= 13
    for i in range(figures.count()):
        box = figures.nth(i).bounding_box()
        assert box is not None
        assert box["width"] > 400
        assert box["height"] > 100
        assert figures.nth(i).get_attribute("aria-label")
        assert figures.nth(i).locator("path").count() > 3


def test_figures_follow_the_dark_mode(visit: Open, report: Path) -> None:
    page = visit(report).page
    text = page.locator("figure.drawing svg text").first
    color = "node => getComputedStyle(node).fill"
    before = text.evaluate(color)
    page.click("#theme")
    assert text.evaluate(color) != before
    page.click("#theme")
    assert text.evaluate(color) == before


def test_sorting_goes_both_ways_and_keeps_every_row(visit: Open, report: Path) -> None:
    page = visit(report).page
    rows = sorted(_shown(page))
    heads = page.locator("table.cells thead th")
    names = [heads.nth(i).inner_text().strip() for i in range(heads.count())]
    column = names.index("KL")
    button = heads.nth(column).locator("button")
    button.click()
    values = _column(page, column)
    assert values == sorted(values)
    assert heads.nth(column).get_attribute("aria-sort") == "ascending"
    button.focus()
    page.keyboard.press("Enter")
    assert _column(page, column) == sorted(values, reverse=True)
    assert sorted(_shown(page)) == rows


def test_filters_by_axis_state_and_text(visit: Open, report: Path) -> None:
    page = visit(report).page
    everything = _shown(page)
    form = page.locator("form.filters")
    form.get_by_label("weight").select_option("power")
    assert _shown(page) == ["weight power"]
    assert page.inner_text("output.count") == f"1 of {len(everything)} cells"
    form.get_by_label("weight").select_option("")
    form.get_by_label("State").select_option("lost seeds")
    assert set(_shown(page)) == {"weight truncate", "estimator k1"}
    form.get_by_label("State").select_option("")
    form.get_by_label("Search").fill("placement REWARD")
    assert _shown(page) == ["placement reward"]
    form.get_by_label("Search").fill("nothing like it")
    assert _shown(page) == []


def test_a_cell_leads_to_its_page_in_the_page(visit: Open, report: Path) -> None:
    page = visit(report).page
    page.click("table.cells a:text-is('weight truncate')")
    details = page.locator("details.cell[open]")
    assert details.count() == 1
    assert "diverged" in details.inner_text()
    assert "klab rerun" in details.inner_text()
    assert "window.hit" in details.locator(".completion").first.inner_text()
    assert details.locator(".panel svg").count() == 5


def test_tooltips_by_pointer_and_by_keyboard(visit: Open, report: Path) -> None:
    page = visit(report).page
    tip = page.locator("#tooltip")
    point = page.locator("figure[data-figure=ranking] svg .tip").first
    point.scroll_into_view_if_needed()
    point.hover()
    assert "n = 5" in tip.inner_text()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.locator("figure[data-figure=effects] svg .tip").first.focus()
    assert "=" in tip.inner_text()


def test_headings_make_an_outline_and_everything_has_a_name(visit: Open, report: Path) -> None:
    page = visit(report).page
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "nodes => nodes.map(node => Number(node.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    nameless = page.eval_on_selector_all(
        "button, a, select, input, svg[role]",
        "nodes => nodes.filter(n => !(n.textContent.trim() || n.ariaLabel || n.labels?.length)).map(n => n.outerHTML)",
    )
    assert nameless == []


@pytest.mark.parametrize("media", ["screen", "print"])
@pytest.mark.parametrize("place", ["#methods", "details.cell"])
def test_equations_are_set_as_such(visit: Open, report: Path, media: str, place: str) -> None:
    seen = visit(report)
    seen.page.emulate_media(media=media)
    seen.page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
    seen.page.locator(f"{place} .equations").first.scroll_into_view_if_needed()
    boxes = seen.page.evaluate(
        """place => {
            const boxes = [...document.querySelector(place + ' .aligned').children].map(side => ({
                ...side.firstElementChild.getBoundingClientRect().toJSON(),
                fractions: [...side.querySelectorAll('mfrac')].map(fraction =>
                    [...fraction.children].map(part => part.getBoundingClientRect().toJSON())),
            }));
            return [boxes.filter((_, i) => i % 2 == 0), boxes.filter((_, i) => i % 2)];
        }""",
        place,
    )
    lefts, rights = boxes
    assert len(lefts) == len(rights) > 5
    assert max(box["right"] for box in lefts) - min(box["right"] for box in lefts) < 1
    assert max(box["left"] for box in rights) - min(box["left"] for box in rights) < 1
    assert all(
        abs(left["top"] + left["bottom"] - right["top"] - right["bottom"]) < 60
        for left, right in zip(lefts, rights, strict=True)
    )
    fractions = [fraction for box in rights for fraction in box["fractions"]]
    assert fractions
    assert all(top["bottom"] <= bottom["top"] + 1 for top, bottom in fractions)
    assert all(above["bottom"] <= below["top"] + 12 for above, below in pairwise(rights))
    seen.picture(f"report-equations-{media}")


def test_print_shows_figures_and_leaves_out_controls(visit: Open, report: Path) -> None:
    seen = visit(report)
    seen.page.emulate_media(media="print")
    assert not seen.page.locator("form.filters").is_visible()
    assert seen.page.locator("figure.drawing svg").first.is_visible()
    assert len(seen.page.pdf()) > 50_000


def test_a_telephone_scrolls_down_and_not_sideways(visit: Open, report: Path) -> None:
    seen = visit(report)
    seen.page.set_viewport_size({"width": 390, "height": 844})
    assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    seen.picture("report-telephone")


def test_many_axes_are_columns_on_request(visit: Open, wide_report: Path) -> None:
    page = visit(wide_report).page
    column = page.locator("table.cells th.axis").first
    assert not column.is_visible()
    page.locator("form.filters").get_by_label("importance ratio").select_option("future_mean")
    assert _shown(page) == ["ratio future_mean"]
    page.click("button[data-columns]")
    assert column.is_visible()


def test_hundreds_of_cells_on_two_tasks(visit: Open, large_report: Path) -> None:
    seen = visit(large_report)
    assert seen.messages == []
    assert seen.page.locator("table.cells").count() == 2
    assert seen.page.locator("figure[data-figure$=interactions]").count() == 2
    form = seen.page.locator("form.filters").first
    form.get_by_label("KL placement").select_option("reward")
    assert form.locator("output").inner_text() == "24 of 72 cells"
    seen.picture("report-crossed", full=True)
