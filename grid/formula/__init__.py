"""Printed formulas: composed from the catalogue's LaTeX, as LaTeX, as text and as MathML."""
