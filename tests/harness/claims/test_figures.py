"""Every figure is written, as PDF and PNG, twice the same."""

from __future__ import annotations

from pathlib import Path

from klab.harness.claims.figures import FIGURES, draw_all
from klab.harness.claims.plane import cells


def test_every_figure_is_written(tmp_path: Path) -> None:
    written = draw_all(tmp_path / "figures")
    assert {path.stem for path in written} == set(FIGURES)
    assert {path.suffix for path in written} == {".pdf", ".png"}
    for path in written:
        start = path.read_bytes()[:4]
        assert start == (b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
        assert path.stat().st_size > 5_000


def test_the_plane_has_one_exact_cell_and_every_other_is_biased() -> None:
    exact = [(cell.ratio, cell.weight) for cell in cells() if cell.squared_bias < 1e-20]
    assert exact == [("sequence_product", "ratio")]
