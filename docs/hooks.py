"""What mkdocs does with every page: formulas become MathML, and names of fastkd's become links to the reference.

Browsers show MathML by themselves, so that the site needs no script for it, and nothing from another place.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.+?)\\[)\]]</\1>', re.DOTALL)
_NAME = re.compile(r'(?<!">)<code>(fastkd\.[\w.]+)</code>')
_PARAMETER = re.compile(r"\n(?=\w+(?:, \w+)*: )")  # "name: what it is", at the beginning of a docstring's line


def _mathml(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]), display="inline" if found[2] == "(" else "block")


def on_page_content(html: str, page: Any, **kwargs: Any) -> str:
    """Called by mkdocs with a page and its HTML."""
    if page.file.src_uri.startswith("reference/"):
        html = _PARAMETER.sub("<br>\n", html)
    linked = _NAME.sub(r'<autoref identifier="\1" optional>\g<0></autoref>', html)
    return _FORMULA.sub(_mathml, linked)
