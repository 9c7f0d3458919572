"""Execute the tutorials again and store their outputs: python docs/notebooks.py [NAME...]. Each takes minutes on two cores.

Outputs are those that Jupyter shows, without progress bars: what is printed, and the value of the last expression.
"""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"


def read_notebook(path: Path) -> dict[str, Any]:
    """Return a notebook as nested lists and dicts."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_cell(code: str, names: dict[str, Any], source: str = "<cell>") -> list[dict[str, Any]]:
    """Run the code of a cell, whose variables are `names`, and return its outputs as a notebook stores them."""
    tree, value, printed = ast.parse(re.sub(r"^!difflex (.*)", _command, code, flags=re.MULTILINE), source), None, io.StringIO()
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, source, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), source, "eval"), names)
        data = {} if value is None else _shown(value)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if data:
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def _command(line: re.Match[str]) -> str:
    """Return the Python of a command."""
    return f"_ = __import__('difflex.cli').cli.main({shlex.split(line[1], comments=True)})"


def _shown(value: object) -> dict[str, list[str]]:
    """Return how a notebook shows a value."""
    show = getattr(value, "_repr_html_", None)
    html = {} if show is None else {"text/html": [show()]}
    return {**html, "text/plain": repr(value).splitlines(keepends=True)}


def execute(path: Path) -> None:
    """Run the cells of a notebook in an empty folder and store their outputs in it."""
    notebook, names, count = read_notebook(path), {"__name__": "__main__"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count, began = count + 1, time.monotonic()
            outputs = run_cell("".join(cell["source"]), names, f"{path.name}, cell {count}")
            for output in outputs:
                output |= {"execution_count": count} if output["output_type"] == "execute_result" else {}
            cell |= {"execution_count": count, "outputs": outputs}
            print(f"{path.name}, cell {count}: {time.monotonic() - began:.1f} s", flush=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(*chosen: str) -> None:
    """Execute the tutorials of these names, or all."""
    warnings.simplefilter("ignore")
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        if not chosen or path.stem in chosen:
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                execute(path)
            print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
