"""The command line: one module per command, and what they share.

`python -m klab.harness.cli.main` and an empty entry of PYTHONPATH put the working folder in front of what is installed.
This package is imported before anything else that could be shadowed, and takes it out again.
"""

import sys
from pathlib import Path

from klab.grid.user_code import leave_out_working_folder

if Path(sys.argv[0]).name in ("klab", "-m"):
    leave_out_working_folder()
