"""The form of the source: how docstrings begin, how classes are named, how large doors, files and functions may be."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "difflex"

DOOR = 10
"""Public names of a package or module that other stations import from; the package `difflex` itself shows more."""
FILE, MEDIAN, FUNCTION = 400, 150, 60
FILES, LINES = 309, 60_100

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(source: Path) -> dict[str, str]:
    """The text of every Python file under `source`, by its place there."""
    return {str(file.relative_to(source)): file.read_text(encoding="utf-8") for file in sorted(source.rglob("*.py"))}


def public_names(tree: ast.Module) -> list[str]:
    """What `__all__` lists."""
    lists = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    ]
    return [name for names in lists for name in names]


def violations_in(place: str, text: str) -> Iterator[str]:
    """What is wrong with one file."""
    tree, lines = ast.parse(text), len(text.splitlines())
    if lines > FILE:
        yield f"{place} has {lines} lines, more than {FILE}"
    if place != "__init__.py" and len(names := public_names(tree)) > DOOR:
        yield f"{place} shows {len(names)} public names, more than {DOOR}"
    for node in ast.walk(tree):
        if isinstance(node, Function) and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION:
            yield f"{place}: {node.name} has {length} lines, more than {FUNCTION}"
        if isinstance(node, Function | ast.ClassDef | ast.Module) and (ast.get_docstring(node) or "").startswith("Nothing"):
            yield f"{place}: a docstring begins with 'Nothing'"


def violations(files: dict[str, str]) -> list[str]:
    """What is wrong with `files`, one by one and together."""
    found = [violation for place, text in files.items() for violation in violations_in(place, text)]
    classes = Counter(
        node.name for text in files.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)
    )
    found += [f"{count} classes are called {name}" for name, count in classes.items() if count > 1]
    lengths = [len(text.splitlines()) for text in files.values()]
    found += [f"there are {len(files)} files, more than {FILES}"] if len(files) > FILES else []
    found += [f"half of the files have under {median(lengths):g} lines, {MEDIAN} are wanted"] if median(lengths) < MEDIAN else []
    found += [f"there are {sum(lengths):,} lines, more than {LINES:,}"] if sum(lengths) > LINES else []
    return found


def test_the_source_keeps_its_form():
    assert violations(sources(SOURCE)) == []


@pytest.mark.parametrize(
    ("addition", "complaint"),
    [
        ('def f():\n    """Nothing; it is done."""', "begins with 'Nothing'"),
        ("class Site: ...", "2 classes are called Site"),
        (f"__all__ = {[f'name{i}' for i in range(DOOR + 1)]}", "public names"),
        ("\n" * FILE, f"more than {FILE}"),
        ("def f():\n" + "    pass\n" * FUNCTION, f"more than {FUNCTION}"),
    ],
)
def test_a_planted_violation_is_found(addition: str, complaint: str):
    files = {place: text for place, text in sources(SOURCE).items() if place in ("errors.py", "records.py")}
    assert not any(complaint in violation for violation in violations(files))
    files["errors.py"] += f"\n{addition}\n"
    assert any(complaint in violation for violation in violations(files))


def test_too_many_too_short_and_too_long_sources_are_found():
    assert any(f"more than {FILES}" in violation for violation in violations({f"{i}.py": "" for i in range(FILES + 1)}))
    assert any("150 are wanted" in violation for violation in violations({"a.py": "\n" * 10}))
    assert any(
        f"more than {LINES:,}" in violation
        for violation in violations({f"{i}.py": "\n" * FILE for i in range(1 + LINES // FILE)})
    )
