"""Dictionaries, control vectors and activations between difflex and the tools themselves, in .venv-peers: `make test-peers`."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from fake_harvest import SITES, FakeHarvest, fake_shots
from interchange_cases import WIDTH, WRITTEN, cases, computed, differences, note, rand, read_case
from safetensors.torch import load_file, save_file
from torch import Tensor

from difflex.activation_files import export_activations
from difflex.choices import StoredDtype
from difflex.control_vectors import read_vectors, write_vectors
from difflex.interchange import write_dictionary
from difflex.records import Site
from difflex.steering.contrast import Contrast
from difflex.store import RecordingConfig, record

ROOT = Path(__file__).parent.parent
PEERS, SCRIPTS = ROOT / ".venv-peers" / "bin" / "python", ROOT / "benchmarks" / "peers"
LIMIT = 1e-6
pytestmark = pytest.mark.peers


def run_peers(verb: str, folder: Path, script: str = "interchange.py") -> None:
    """Let the tools write files to `folder`, or read those in it."""
    run = subprocess.run([PEERS, SCRIPTS / script, verb, folder], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]


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


def test_control_vectors_of_the_tools_are_read_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_peers("write", tmp_path, "control_vectors.py")
    expected = by_layer(tmp_path / "directions.safetensors")
    for name, halves in (("repeng.gguf", False), ("half.gguf", True), ("layers.pt", False), ("vector.pt", False)):
        directions = read_vectors(tmp_path / name).directions
        assert directions.keys() == expected.keys()
        for layer, direction in expected.items():
            assert torch.equal(directions[layer], direction.half().float() if halves else direction)
    with capsys.disabled():
        print("\n" + (tmp_path / "versions.json").read_text().strip())


@pytest.mark.parametrize("site", ["double.18", "single.9:update"])
def test_the_tools_read_exactly_the_control_vectors_of_difflex(site: str, tmp_path: Path):
    contrast = Contrast(
        site=Site.parse(site),
        model="acme/flux",
        revision=None,
        method="mean",
        pairs=2,
        timesteps=(1000.0,),
        positive=("a red star \u2605",),
        negative=("a star",),
        norm=12.5,
        direction=rand(3072),
    )
    for name in ("vector.gguf", "vector.pt"):
        write_vectors(contrast, tmp_path / name)
    run_peers("read", tmp_path, "control_vectors.py")
    for name in ("vector.gguf", "vector.pt"):
        [(layer, direction)] = by_layer(tmp_path / f"{name}.read").items()
        assert layer == int(contrast.site.path.partition(".")[2]) and torch.equal(direction, contrast.direction)


def by_layer(path: Path) -> dict[int, Tensor]:
    """Directions by layer."""
    return {int(name): direction for name, direction in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_datasets_reads_exported_activations(dtype: StoredDtype, tmp_path: Path):
    config = RecordingConfig(dtype=dtype, batch=4, shard_bytes=4000, progress=False)
    [store] = record(tmp_path / "store", fake_shots(30, steps=2), [SITES[0]], FakeHarvest(), config)
    export_activations(store, "parquet", tmp_path / "files", progress=False)
    run_peers("read", tmp_path / "files", "activations.py")
    values = torch.cat([part.values.flatten(0, 1) for part in store.activations()]).float()
    prompts = [shot.prompt for part in store.activations() for shot in part.shots for _ in range(store.tokens)]
    assert torch.equal(load_file(tmp_path / "files" / "values.read")["values"], values)
    assert json.loads((tmp_path / "files" / "prompts.read").read_text()) == prompts
