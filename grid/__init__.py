"""What is compared: the axes of the objective, cells, and the grid files that enumerate them."""

from grid import catalogue
from grid.cell import Cell
from grid.definition import Grid, load_grid, parse_grid
from grid.mistake import Mistake
from grid.objective import Objective

__all__ = ["Cell", "Grid", "Mistake", "Objective", "catalogue", "load_grid", "parse_grid"]
