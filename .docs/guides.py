"""Examples as pages: a script becomes a notebook, is executed, and is written down with what it printed and drew."""

import base64
import pathlib
import re
import tempfile

import jupytext
import links
import nbformat
from nbconvert.preprocessors import CellExecutionError, ExecutePreprocessor


# Expressions at the end of a cell are part of a script: what these return is not shown.
_SETUP = """
%config InlineBackend.figure_formats = ["retina"]
%config InteractiveShell.ast_node_interactivity = "none"
"""
_SECONDS = 3600


def notebook_of(script: pathlib.Path) -> nbformat.NotebookNode:
    """The script as a notebook without outputs."""
    notebook = jupytext.read(script)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def executed(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """The notebook with the outputs of its cells. Raises `RuntimeError` with the name if one of them fails."""
    notebook = nbformat.from_dict({**notebook, "cells": [nbformat.v4.new_code_cell(_SETUP), *notebook.cells]})
    # Examples save their pictures where they run.
    with tempfile.TemporaryDirectory() as folder:
        try:
            notebook, _ = ExecutePreprocessor(timeout=_SECONDS, kernel_name="python3").preprocess(
                notebook, {"metadata": {"path": folder}}
            )
        except CellExecutionError as error:
            raise RuntimeError(f"the example {name} does not run as a notebook:\n{error}") from error
    del notebook.cells[0]
    return notebook


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The first heading of the notebook."""
    return re.search(r"^# (.*)$", notebook.cells[0].source, re.MULTILINE)[1]


def write(notebook: nbformat.NotebookNode, name: str, folder: pathlib.Path) -> int:
    """Writes the page of the notebook, its figures in the folder `figures`, and returns how many figures there are."""
    parts, figures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        parts.append(_block("python", cell.source))
        outputs = cell.get("outputs", [])
        printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
        # Of a line that is written again and again the last state remains.
        printed = re.sub(r"[^\n]*\r(?!\n)", "", printed).strip("\n")
        if printed:
            parts.append(_block("{ .text .no-copy .output }", printed))
        for output in outputs:
            png = output.get("data", {}).get("image/png")
            if png:
                figures += 1
                file = folder / "figures" / f"{name}_{figures}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(png))
                width = output.get("metadata", {}).get("image/png", {}).get("width")
                size = f' width="{width}"' if width else ""
                parts.append(f"![Figure {figures} of this guide](figures/{file.name}){{ .figure{size} }}")
    text = "\n\n".join(parts)
    # (The tables of the other one have names of other libraries, some of which are the same.)
    heading, text = (text if name == "coming_from" else links.with_names(text)).split("\n", 1)
    offer = f"[Script]({name}.py){{ .offer }} [Notebook]({name}.ipynb){{ .offer }}"
    has_sections = any(
        re.search("^## ", cell.source, re.MULTILINE) for cell in notebook.cells if cell.cell_type != "code"
    )
    # Without sections there is no table of contents: the code gets its room.
    matter = "" if has_sections else "---\nhide: [toc]\n---\n\n"
    (folder / f"{name}.md").write_text(f"{matter}{heading}\n\n{offer}\n{text}\n")
    return figures


def _block(language, text):
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`{3,}", text)), default=2))
    return f"{fence} {language}\n{text}\n{fence}"
