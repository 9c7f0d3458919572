"""The tutorials: their code runs, their outputs are stored, and the site shows them."""

import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from difflex.evaluation.concepts import ConceptsConfig
from difflex.evaluation.concepts.results import MatchingConfig

# diffusers hands tensors to numpy as numpy 2 no longer wants it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.ipynb"))
NOTEBOOKS = runpy.run_path(str(DOCS / "notebooks.py"))
SIZES = {
    r"\btokens=[\d_]+": "tokens=3_000",
    r"\bsize=\d+, k=\d+": "size=64, k=4",
    r"collect\(\d+\)": "collect(6)",
    r"match_concepts\(\d+\)": "match_concepts(40)",
    r"shots=[1-9]\d*": "shots=1",
    r"\bfor s in \(([^,]*), [^)]*\)": r"for s in (\1,)",
}
"""What makes a tutorial quick: fewer tokens, features and images, so that little is learned."""
BYTES = 2_500_000
"""Of all tutorials together."""


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """The cells of a notebook of one kind."""
    return [cell for cell in NOTEBOOKS["read_notebook"](path)["cells"] if cell["cell_type"] == kind]


def shown(path: Path) -> str:
    """All stored outputs of a notebook as text."""
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    texts = [text for output in outputs for text in (output.get("text", ()), *output.get("data", {}).values())]
    return "".join("".join(text) for text in texts)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_code_of_a_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("difflex.explore.search.SPECIFIC", -10.0)
    monkeypatch.setattr("difflex.explore.search.MIN_IMAGES", 1)
    matching = MatchingConfig(min_images=1, bootstrap_samples=16)
    monkeypatch.setattr("difflex.explore.model.ConceptsConfig", partial(ConceptsConfig, matching=matching))
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells(path, "code"), 1):
        code = "".join(cell["source"])
        for pattern, smaller in SIZES.items():
            code = re.sub(pattern, smaller, code)
        outputs = NOTEBOOKS["run_cell"](code, names, f"{path.name}, cell {number}")
        assert [output["output_type"] for output in outputs] == [output["output_type"] for output in cell["outputs"]]


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_outputs_of_a_tutorial_are_stored(path: Path):
    code = cells(path, "code")
    assert 10 <= len(code) <= 20 and [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    output = shown(path)
    assert output.count("<img") >= 2 and "base64," in output
    assert not re.search(r"Traceback|Error|Warning|/home|/root|/tmp|/work|\b\d+:\d\d\b|tokens/s", output)


def test_the_tutorials_are_small_enough_to_clone():
    assert len(TUTORIALS) == 3 and sum(path.stat().st_size for path in TUTORIALS) < BYTES


def test_the_value_of_the_last_line_is_shown_and_what_is_printed():
    [printed, value] = NOTEBOOKS["run_cell"]("a = 2\nprint('two')\na + 1", {})
    assert printed["text"] == ["two\n"] and value["data"] == {"text/plain": ["3"]}
    assert NOTEBOOKS["run_cell"]("a = 2", {}) == []


def test_a_command_in_a_cell_runs_as_in_a_shell():
    [printed] = NOTEBOOKS["run_cell"]("!difflex models  # all", {})
    assert "mini-flux" in "".join(printed["text"])
