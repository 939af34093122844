"""Formulas as MathML, which browsers draw without a script and without a network; MkDocs loads this as a hook."""

import html
import re
from typing import Any

from latex2mathml.converter import convert


# As pymdownx.arithmatex leaves them.
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """The page with its formulas in MathML in place of LaTeX."""
    return _FORMULA.sub(_in_mathml, content)


def _in_mathml(match):
    display = "inline" if match[1] == "span" else "block"
    return f'<{match[1]} class="formula">{convert(html.unescape(match[2]).strip(), display=display)}</{match[1]}>'
