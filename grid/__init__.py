"""What is compared: the axes of the objective, cells, and the grid files that enumerate them.

Names are imported when they are first asked for: looking at a run needs none of the models of a grid file.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grid import catalogue
    from grid.cell import Cell
    from grid.definition import Grid, load_grid, parse_grid
    from grid.mistake import Mistake
    from grid.objective import Objective
else:
    import importlib

    _HOMES = {
        "Cell": "cell",
        "Grid": "definition",
        "Mistake": "mistake",
        "Objective": "objective",
        "load_grid": "definition",
        "parse_grid": "definition",
    }

    def __getattr__(name):
        if name == "catalogue":
            return importlib.import_module("grid.catalogue")
        if name not in _HOMES:
            raise AttributeError(f"module 'grid' has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(f"grid.{_HOMES[name]}"), name)
        return found


__all__ = ["Cell", "Grid", "Mistake", "Objective", "catalogue", "load_grid", "parse_grid"]
