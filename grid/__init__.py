"""What is compared: the axes of the objective, cells, and the grid files that enumerate them.

Names are imported on first use, so that reading a finished run does not load the models of a grid file.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klab.grid import catalogue
    from klab.grid.cell import Cell
    from klab.grid.errors import UserError
    from klab.grid.grid_file import Grid, load_grid, parse_grid
    from klab.grid.objective import Objective
else:
    import importlib

    _HOMES = {
        "Cell": "cell",
        "Grid": "grid_file",
        "UserError": "errors",
        "Objective": "objective",
        "load_grid": "grid_file",
        "parse_grid": "grid_file",
    }

    def __getattr__(name):
        if name == "catalogue":
            return importlib.import_module("klab.grid.catalogue")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found


__all__ = ["Cell", "Grid", "Objective", "UserError", "catalogue", "load_grid", "parse_grid"]
