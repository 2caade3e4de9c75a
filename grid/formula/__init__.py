"""Printed formulas: the loss and the gradient of an objective, as LaTeX, as text and as MathML.

`compose` makes equations of the catalogue's LaTeX; `formula` adds the symbols in them, what deserves a remark, and the
nearest named algorithm. Nothing here imports torch.
"""

from klab.grid.formula.formula import Explanation, Formula, cell_formula, formula
from klab.grid.formula.latex import align, to_latex
from klab.grid.formula.mathml import aligned, to_mathml
from klab.grid.formula.text import ascii_only, to_text

__all__ = [
    "Explanation",
    "Formula",
    "align",
    "aligned",
    "ascii_only",
    "cell_formula",
    "formula",
    "to_latex",
    "to_mathml",
    "to_text",
]
