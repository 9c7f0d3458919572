"""Dictionaries between difflex and the tools themselves, which run in .venv-peers: `make test-peers`."""

import json
import subprocess
from pathlib import Path

import pytest
from interchange_cases import WIDTH, WRITTEN, cases, computed, differences, note, rand, read_case
from safetensors.torch import save_file

from difflex.interchange import write_dictionary

ROOT = Path(__file__).parent.parent
PEERS, SCRIPT = ROOT / ".venv-peers" / "bin" / "python", ROOT / "benchmarks" / "peers" / "interchange.py"
LIMIT = 1e-6
pytestmark = pytest.mark.peers


def run_peers(verb: str, folder: Path) -> None:
    """Let the tools write dictionaries to `folder`, or read those in it."""
    subprocess.run([PEERS, SCRIPT, verb, folder], check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dictionaries of all tools."""
    folder = tmp_path_factory.mktemp("peers")
    run_peers("write", folder)
    return folder


def show(capsys: pytest.CaptureFixture[str], lines: list[tuple[str, float, float]]) -> None:
    """Print the differences, also of a test that passes."""
    with capsys.disabled():
        print("\n" + "\n".join(f"{name:<44} codes {codes:.1e}  reconstruction {y:.1e}" for name, codes, y in lines))


def test_what_the_tools_wrote_computes_as_there(written: Path, capsys: pytest.CaptureFixture[str]):
    lines = [(f"from {folder.name}", *differences(read_case(folder), computed(folder))) for folder in cases(written)]
    with capsys.disabled():
        versions = json.loads((written / "versions.json").read_text())
        print("\n" + ", ".join(f"{name} {number}" for name, number in versions.values()))
    show(capsys, lines)
    assert max(max(line[1:]) for line in lines) < LIMIT


def test_the_tools_compute_as_here_what_difflex_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, (format, dictionary) in WRITTEN.items():
        write_dictionary(dictionary, format, tmp_path / name)
        save_file({"x": rand(256, WIDTH, seed=20)}, tmp_path / name / "x.safetensors")
        (tmp_path / name / "case.json").write_text(json.dumps({"format": format, "k": dictionary.k}))
    run_peers("read", tmp_path)
    lines = []
    for folder in cases(tmp_path):
        assert note(folder)["format"] == WRITTEN[folder.name][0]
        lines.append((f"to {folder.name}", *differences(WRITTEN[folder.name][1], computed(folder))))
    show(capsys, lines)
    assert max(max(line[1:]) for line in lines) < LIMIT
