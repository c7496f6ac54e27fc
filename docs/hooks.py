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


def _mathml(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]), display="inline" if found[2] == "(" else "block")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Called by mkdocs with a page's HTML."""
    linked = _NAME.sub(r'<autoref identifier="\1" optional>\g<0></autoref>', html)
    return _FORMULA.sub(_mathml, linked)
