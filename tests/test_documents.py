"""The README, docs/ and the API reference: short enough to read, no link leads nowhere, every public name is explained."""

import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from extras import needs

import hf_littlebit

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the headings of `page`: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_names_every_page():
    links = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {link.partition("#")[0] for link in links}


def test_the_workflows_call_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text())["jobs"]
        steps = [step for job in jobs.values() for step in job["steps"]]
        called = {word for step in steps for word in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.MULTILINE)}
        rows = [row for job in jobs.values() for row in job.get("strategy", {}).get("matrix", {}).get("include", [])]
        assert called | {row["target"] for row in rows} <= targets, file.name


@pytest.fixture
def reference():
    """What .ci/reference.py defines."""
    return runpy.run_path(str(ROOT / ".ci" / "reference.py"))


def test_every_public_name_has_a_docstring(reference):
    assert reference["faults"](hf_littlebit) == []
    named = [name for name, _ in reference["public"](hf_littlebit)]
    assert set(hf_littlebit.__all__) < set(named) and "LittleBitLinear.dense" in named


def test_a_name_without_a_docstring_is_found(reference):
    module = ModuleType("example")
    exec(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Pair:\n    left: int\n    @property\n    def right(self): pass\n    def _own(self): pass\n"
        "def good(x, y):\n    '''Say something.\n\n    Args:\n        x, y: numbers.\n    '''\n"
        "def bad(x):\n    '''Say something.\n\n    Args:\n        x: a number.\n        z: another.\n    '''\n",
        vars(module),
    )
    module.__all__ = ["Pair", "good", "bad"]
    assert reference["faults"](module) == [
        "Pair has no docstring.",
        "Pair.right has no docstring.",
        "bad has no argument 'z', which its docstring explains.",
    ]


@needs("pdoc")
def test_the_reference_is_built_without_a_warning(reference, tmp_path):
    reference["build"](tmp_path)
    page = (tmp_path / "hf_littlebit.html").read_text()
    assert all(f'id="{name}"' in page for name in hf_littlebit.__all__)
