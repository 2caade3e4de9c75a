"""Tables of modules in the READMEs, from the first sentence of each module's docstring.

`python -m tests.support.module_tables` writes them anew; a test holds them to the code. In a README a table stands
between `<!-- modules: FOLDER -->` and `<!-- /modules -->`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
READMES = ("grid/README.md", "tasks/README.md", "harness/README.md", "reports/README.md")
_TABLE = re.compile(r"(<!-- modules: (\S+) -->\n).*?(<!-- /modules -->)", re.DOTALL)


def summary(module: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def table(folder: Path) -> str:
    """A Markdown table of the modules of a folder and of its subpackages."""
    lines = ["| module | what is in it |", "|---|---|"]
    for module in sorted(folder.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        if module.name != "__init__.py":
            lines.append(f"| `{module.relative_to(folder)}` | {summary(module).replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def updated(text: str) -> str:
    """A README's text with its tables as the code has them now."""
    return _TABLE.sub(lambda match: f"{match[1]}{table(ROOT / match[2])}{match[3]}", text)


if __name__ == "__main__":
    for name in READMES:
        readme = ROOT / name
        if readme.exists():
            readme.write_text(updated(readme.read_text()))
