"""The site's own lists: the reference has every public name once, and each example is described."""

import ast
import pathlib
import re
from collections import Counter

from .test_architecture import public_names


ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ast.parse((ROOT / ".docs" / "build.py").read_text())


def constant(name):
    """A constant of the script that builds the site, which needs packages that tests do not have."""
    for node in SCRIPT.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f".docs/build.py has no {name}")


def test_the_reference_has_every_public_name_once():
    listed = Counter(name for names in constant("REFERENCE").values() for name in names)
    assert set(listed) == set(public_names()) and set(listed.values()) == {1}


def test_the_examples_are_described():
    table = (ROOT / "examples" / "README.md").read_text()
    described = re.findall(r"^\| \[(\w+)\]\(\1\.py\) \|", table, re.MULTILINE)
    assert sorted(described) == sorted(script.stem for script in (ROOT / "examples").glob("*.py"))
    assert set(constant("GROUPS")) <= set(described)


def test_pages_link_to_pages_that_are_there():
    pages = ROOT / ".docs" / "pages"
    known = {page.name for page in pages.glob("*.md")} | set(constant("COPIED"))
    known |= {f"guides/{script.stem}.md" for script in (ROOT / "examples").glob("*.py")} | {"guides/index.md"}
    for page in pages.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:\s]+\.md)", page.read_text()):
            assert target in known or target.startswith("reference/"), f"{page.name} links to {target}"
