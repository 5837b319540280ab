"""Runs the code cells of a notebook in one namespace, as Jupyter would, without Jupyter.

`python tests/notebook_cells.py NOTEBOOK` writes the outputs into the file.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image


def run_cells(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell, in the notebook format; an error in a cell is raised."""
    import matplotlib

    matplotlib.use("Agg")
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), names)
            value = None
            if last is not None:
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        found = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue()}] if printed.getvalue() else []
        if value is not None:
            found.append({"output_type": "display_data", "metadata": {}, "data": _shown(value)})
        outputs.append(found)
    return outputs


def _shown(value: Any) -> dict[str, str]:
    stream = io.BytesIO()
    if isinstance(value, Image.Image):
        value.save(stream, format="PNG", optimize=True)
    elif hasattr(value, "savefig"):
        value.savefig(stream, format="png", dpi=90, bbox_inches="tight")
    else:
        return {"text/plain": repr(value)}
    return {"image/png": base64.b64encode(stream.getvalue()).decode()}


def main() -> None:
    """Fill the outputs in."""
    path = Path(sys.argv[1])
    notebook = json.loads(path.read_text())
    for cell, outputs in zip(
        (cell for cell in notebook["cells"] if cell["cell_type"] == "code"), run_cells(notebook), strict=True
    ):
        cell["outputs"] = outputs
    path.write_text(json.dumps(notebook, indent=1) + "\n")


if __name__ == "__main__":
    main()
