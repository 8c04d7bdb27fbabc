"""The documentation: every public name has its entry, links lead somewhere, figures and workflows are current."""

import importlib
import re
import runpy
from functools import reduce
from pathlib import Path

import pytest

import softmax_fused
from softmax_fused import distributed, information

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REFERENCE = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))]
WORKFLOWS = sorted((ROOT / ".github").rglob("*.yml"))


def entries() -> set[str]:
    """The names that the pages of the reference have an entry for."""
    names: set[str] = set()
    for block in re.findall(r"```\{eval-rst\}\n(.*?)```", REFERENCE, re.DOTALL):
        module = "".join(re.findall(r"^\.\. currentmodule:: (\S+)", block, re.MULTILINE))
        for kind, name in re.findall(r"^\.\. auto(function|class|module):: (\w[\w.]*)", block, re.MULTILINE):
            whole = name if name.startswith("softmax_fused") else f"{module}.{name}"
            members = importlib.import_module(whole).__all__ if kind == "module" else []
            names |= {whole, *(f"{whole}.{member}" for member in members)}
        names |= set(re.findall(r"^\.\. module:: (\S+)", block, re.MULTILINE))
    return names


def test_every_public_name_is_in_the_reference() -> None:
    public = {f"softmax_fused.{name}" for name in softmax_fused.__all__ if name != "__version__"}
    public |= {f"softmax_fused.distributed.{name}" for name in distributed.__all__}
    public |= {f"softmax_fused.information.{name}" for name in information.__all__}
    assert public - entries() == set()
    assert entries() - public == {"softmax_fused.patching.Patch"}, "what patch() returns"
    assert "`softmax_fused.__version__`" in REFERENCE
    overview = (DOCS / "api/index.md").read_text()
    assert [name for name in softmax_fused.__all__ if f"`softmax_fused.{name}`" not in overview] == []


def test_the_names_that_are_linked_to_exist() -> None:
    for path in sorted((DOCS / "inventories").glob("*.txt")):
        for line in path.read_text().splitlines()[3:]:
            name, kind, _ = line.split()
            module = next((it for it in ("torch", "typing", "collections.abc") if name.startswith(it)), "builtins")
            attributes = name.removeprefix(module).lstrip(".").split(".") if kind not in ("mod", "data") else []
            reduce(getattr, attributes, importlib.import_module(module))  # raises where there is no such name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [
        link.partition("#") for link in re.findall(r"\]\(([^)\s]+\.md#[^)\s]+|#[^)\s]+)\)", text) if "://" not in link
    ]
    assert [anchor for file, _, anchor in links if anchor not in anchors(page.parent / file if file else page)] == []


def anchors(page: Path) -> set[str]:
    """What a link's part behind # may be: a heading in lower case, without signs, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_takes_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_figures_of_the_kernels_are_drawn_by_their_script(tmp_path: Path) -> None:
    drawn = runpy.run_path(str(DOCS / "figures.py"))["draw"](tmp_path)
    linked = re.findall(r"\(images/(kernels-\w+\.svg)\)", (DOCS / "kernels.md").read_text())
    assert sorted(path.name for path in drawn) == sorted(linked)
    assert sorted(path.name for path in (DOCS / "images").glob("kernels-*")) == sorted(linked)
    assert all("<svg" in path.read_text() for path in drawn)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_and_templates_are_valid(path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="comes with the extra integrations")
    assert isinstance(yaml.safe_load(path.read_text()), dict)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"run: make (.*)", path.read_text()):
        assert {word for word in command.split() if "=" not in word} <= set(targets)


def test_the_version_to_cite_is_a_release() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with the extra integrations")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    releases = re.findall(r"^## \[([\d.]+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], str(citation["date-released"])) == releases[0]


def test_templates_ask_for_the_installation() -> None:
    forms = [path for path in WORKFLOWS if path.parent.name == "ISSUE_TEMPLATE" and path.stem != "config"]
    assert len(forms) == 3
    assert all("softmax-fused info" in path.read_text() for path in forms)
