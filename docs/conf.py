"""How Sphinx builds the documentation: `make docs`, or python -m sphinx -W docs build/docs. It needs no network."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

import softmax_fused

project = "softmax_fused"
author = "The softmax_fused authors"
copyright = "2026, the softmax_fused authors"
version = release = softmax_fused.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "mathml",
]
html_math_renderer = "mathml"
exclude_patterns = ["inventories", "extensions", "static"]
nitpicky = True  # a type or a role that leads nowhere is a warning

# Markdown. Notebooks are shown with the outputs that they hold: a test runs them.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
suppress_warnings = ["mystnb.unknown_mime_type"]
highlight_language = "default"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

# The reference. In docstrings a name in single backticks is code, and a link where it is the name of something.
default_role = "py:obj"
nitpick_ignore_regex = [("py:obj", r".*")]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

# The names of torch and of Python that are linked to, in the plain text of Sphinx's first inventory format: the pages
# are the same with and without a network.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable/", str(HERE / "inventories/torch.txt")),
    "python": ("https://docs.python.org/3/", str(HERE / "inventories/python.txt")),
}

pygments_style = "tango"
pygments_dark_style = "github-dark"
html_theme = "furo"
html_title = f"softmax_fused {version}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072B2", "color-brand-content": "#0072B2"},
    "dark_css_variables": {"color-brand-primary": "#56B4E9", "color-brand-content": "#56B4E9"},
}

# Names as annotations and torch's modules have them, which are documented under another.
DOCUMENTED_AS = {
    "Tensor": "torch.Tensor",
    "dist.ProcessGroup": "torch.distributed.ProcessGroup",
    "torch.nn.modules.activation.LogSoftmax": "torch.nn.LogSoftmax",
    "torch.nn.modules.activation.Softmax": "torch.nn.Softmax",
    "torch.nn.modules.loss.CrossEntropyLoss": "torch.nn.CrossEntropyLoss",
}


def rename_target(app: Sphinx, env: BuildEnvironment, node: nodes.Element, content: nodes.Element) -> None:
    """Have a reference that leads nowhere lead to the documented name, for intersphinx, which is asked next."""
    node["reftarget"] = DOCUMENTED_AS.get(node["reftarget"], node["reftarget"])


def setup(app: Sphinx) -> None:
    """Ask before intersphinx, whose priority is 500."""
    app.connect("missing-reference", rename_target, priority=400)
