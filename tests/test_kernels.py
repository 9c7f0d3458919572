"""The Triton kernels, run by Triton's interpreter in a process of its own (`interpreted.py`), and what may be compiled."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, float]]:
    script = Path(__file__).parent / "interpreted.py"
    process = subprocess.run([sys.executable, str(script), "3"], capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", ["plain", "lazy"])
def test_updates_in_kernels_equal_those_of_the_cpu(differences: dict[str, dict[str, float]], name: str):
    entry = differences[name]
    assert entry["loss"] < 1e-5
    assert max(entry["weights"], entry["averages"]) < 1e-5
    assert entry["firings"] == 0
    assert (entry["dead"] > 0) == (name == "lazy")


def test_the_loss_with_bfloat16_copies_is_within_half_a_percent(differences: dict[str, dict[str, float]]):
    assert differences["bfloat16"]["loss"] < 5e-3


def test_the_search_selects_exactly_the_largest_scores(differences: dict[str, dict[str, float]]):
    assert differences["operations"]["selected"] == 0


def test_every_operation_equals_its_formula_in_float64(differences: dict[str, dict[str, float]]):
    entry = differences["operations"]
    assert max(entry["square"], entry["pulls"], entry["rows"]) < 1e-5
    assert max(entry["values"], entry["decoded"]) < 1e-2
