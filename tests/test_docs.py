"""The documents are true: their code runs, their table is current, their links and names lead somewhere."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attlas.catalogue.index import cards
from attlas.cli.app import app
from attlas.cli.catalogue import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def section(name: str) -> str:
    found = re.search(rf"<!-- {name}:begin[^>]*-->\n(.*?)<!-- {name}:end -->", README, flags=re.S)
    assert found, f"README.md has no markers {name}:begin and {name}:end"
    return found[1]


def test_readme_python_runs_in_reading_order(capsys: pytest.CaptureFixture[str]):
    code = blocks("python")
    assert len(code) >= 3
    names: dict[str, object] = {}
    for number, block in enumerate(code, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)
    assert "pairs" in capsys.readouterr().out


@pytest.mark.parametrize("page", [p for p in PAGES if p.name == "converting.md"], ids=lambda p: p.name)
def test_pages_of_python_run_in_reading_order(page: Path):
    names: dict[str, object] = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S), 1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), names)


def test_readme_command_lines_are_understood():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("attlas ")]
    assert len(lines) >= 5
    for line in lines:
        _, *arguments = shlex.split(line, comments=True)
        measures = arguments[0] in ("compare", "bench", "generate", "chat", "serve")
        done = CliRunner().invoke(app, [arguments[0], "--help"] if measures else arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"


@pytest.mark.parametrize("name", ["compare", "tests"])
def test_readme_has_the_two_commands_as_one_line_each(name: str):
    found = re.search(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, flags=re.S)
    assert found and len(found[1].strip().splitlines()) == 1
    assert "-c constraints.txt" in found[1]


def test_ci_runs_the_readme_test_command():
    assert "<!-- command: tests -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_catalogue_table_is_current():
    hint = "run: python docs/refresh.py"
    assert section("catalogue").strip() == markdown_table(cards()).strip(), hint


def test_every_card_is_in_the_table():
    listed = set(re.findall(r"^\| `([\w-]+)`", section("catalogue"), flags=re.M))
    assert listed == {c.name for c in cards()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_names_exist(page: Path):
    for name in set(re.findall(r"`(attlas(?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        resolve(name)


def resolve(name: str) -> object:
    module, *rest = name.split(".")
    found: object = import_module(module)
    for part in rest:
        module = f"{module}.{part}"
        found = getattr(found, part) if hasattr(found, part) else import_module(module)
    return found


def test_every_decision_is_indexed():
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    decisions = sorted(p.name for p in (ROOT / "docs" / "adr").glob("0*.md"))
    assert decisions and re.findall(r"\]\((0\d{3}-[\w-]+\.md)\)", index) == decisions
    for name in decisions:
        text = (ROOT / "docs" / "adr" / name).read_text(encoding="utf-8")
        assert re.match(rf"# {name[:4]} .+\n\n\d{{4}}-\d\d-\d\d\n", text), f"{name}: number and title, then the date"
        assert all(word in text for word in ("**Question.**", "**Decision.**", "**Why.**", "**Price.**")), name
