"""Formulas as MathML, which browsers draw themselves: no JavaScript and no fonts are fetched.

The converter is the one of docutils. A formula that it does not know is a warning.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

# Between a function's name and its argument, unless that is in parentheses, TeX has a thin space and MathML has none.
APPLIED = re.compile(r"<mo>(&ApplyFunction;|\u2061)</mo>(?!\s*<m(o|row)[^>]*>\s*(<mo[^>]*>)?[(\[])")
THIN_SPACE = '<mspace width="0.17em"></mspace>'

logger = logging.getLogger(__name__)


def convert(formula: nodes.Element, block: bool) -> str:
    """Return the formula as MathML; as it was written where the converter refuses it."""
    text = formula.astext()
    try:
        return APPLIED.sub(THIN_SPACE, tex2mathml(text, as_block=block))
    except MathError as error:
        logger.warning("formula not understood: %s: %s", text, error, location=formula)
        return f"<code>{text}</code>"


def visit_inline(self: Any, node: nodes.Element) -> None:
    """Write a formula in a line."""
    self.body.append(convert(node, block=False))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.Element) -> None:
    """Write a formula of its own, which scrolls where the page is narrower."""
    self.body.append(f'<div class="math-block">{convert(node, block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
