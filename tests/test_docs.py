"""The README and the pages in docs/: links and commands lead somewhere, tests exist, and snippets run and pass mypy."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

FILES = re.compile(r"into a file `(\w+\.py)`[.:]\n\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
"""Snippets that the text says belong into a file, by its name."""

every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def without_code(text: str) -> str:
    """A page without its code blocks and code spans, in which a link would be no link."""
    return re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def snippets() -> list[pytest.ParameterSet]:
    """The Python snippets of all pages."""
    return [
        pytest.param(code, id=f"{name}-{number}")
        for page, name in zip(PAGES, IDS, strict=True)
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
        )
    ]


def modules_with_examples() -> list[pytest.ParameterSet]:
    """The modules whose docstrings hold examples."""
    files = [f for folder in ("a3c_jax", "experiments") for f in (ROOT / folder).rglob("*.py")]
    names = sorted(
        ".".join(f.relative_to(ROOT).with_suffix("").parts)
        for f in files
        if re.search(r"^ *>>> ", f.read_text("utf-8"), re.MULTILINE)
    )
    slow = {"loading", "objects", "replaying", "simulation"}
    return [
        pytest.param(name, marks=pytest.mark.slow if name.rpartition(".")[2] in slow else ())
        for name in names
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_in_the_docstrings_are_true(name: str) -> None:
    if "gymnasium" in name:
        pytest.importorskip("gymnasium")
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


@every_page
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    text = without_code(page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if file.suffix == ".py":
            continue  # test_links_into_the_code looks at those
        if anchor:
            assert anchor in anchors(file), (
                f"{page.name} links to {target}, but there is no such heading"
            )


@every_page
def test_links_into_the_code_lead_to_the_function_they_name(page: Path) -> None:
    links = re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+\.py)#L(\d+)\)", page.read_text("utf-8"))
    for name, path, number in links:
        lines = (page.parent / path).read_text("utf-8").splitlines()
        name = name.rpartition(".")[2]
        here = lines[int(number) - 1] if 0 < int(number) <= len(lines) else ""
        right = [
            n for n, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", line)
        ]
        assert re.match(rf"\s*(def|class) {name}\b", here), (
            f"{page.name} links to line {number} of {path} for {name}, which is in line {right}"
        )


@every_page
def test_every_experiment_that_a_page_names_exists(page: Path) -> None:
    for module in re.findall(r"python -m (experiments[\w.]*\w)", page.read_text("utf-8")):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page.name} runs {module}"


@every_page
def test_every_name_of_the_package_that_a_page_gives_exists(page: Path) -> None:
    # In the table of what has moved, the first column has the names of before.
    text = re.sub(r"\| before \|.*?\n\n", new_column, page.read_text("utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`(a3c_jax(?:\.\w+)+)", text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            pytest.fail(f"{page.name} names {name}, which does not exist")


def new_column(table: re.Match[str]) -> str:
    return "\n".join(row.partition("` |")[2] for row in table[0].splitlines())


def test_the_readme_is_short_and_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 180
    assert "\npip install -r requirements.txt && python -m experiments.cartpole\n" in text
    assert "\npip install -e '.[dev]' && python -m pytest\n" in text


def test_every_page_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name}" in text, f"the README does not link to docs/{page.name}"


def test_every_fault_in_the_table_has_its_test() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = re.findall(r"^\|.*\| ((?:`\w+`(?:, )?)+) \|$", page, flags=re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row) if name != "NAME"]
    assert len(names) > 10
    files = list((ROOT / "tests").glob("test_*.py"))
    tests = [file.stem for file in files]
    for file in files:
        tests += re.findall(r"^def (test_\w+)", file.read_text("utf-8"), flags=re.MULTILINE)
    for name in names:
        assert any(name in test for test in tests), f"no test is selected by -k {name}"


def write_files(folder: Path) -> None:
    """Writes the files of which a snippet is said to be the content: others import them."""
    for page in PAGES:
        for name, content in FILES.findall(page.read_text("utf-8")):
            (folder / name).write_text(content, "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("code", snippets())
def test_snippet_runs_without_a_warning(code: str, tmp_path: Path) -> None:
    if "ray=" in code:
        pytest.importorskip("ray")
    write_files(tmp_path)
    (tmp_path / "snippet.py").write_text(code, "utf-8")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "snippet.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_mypy_finds_nothing_in_the_snippets(tmp_path: Path) -> None:
    write_files(tmp_path)
    for snippet in snippets():
        (code,) = snippet.values
        assert "type: ignore" not in code
        module = re.sub(r"\W", "_", str(snippet.id))
        (tmp_path / f"{module}.py").write_text(code, "utf-8")
    config = "[mypy]\ncheck_untyped_defs = True\nignore_missing_imports = True\n"
    (tmp_path / "mypy.ini").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "."],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
