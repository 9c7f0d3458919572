import shutil
from pathlib import Path

import pytest

from difflex.cli import main
from difflex.pipeline import profile
from difflex.pipeline.families import Family
from difflex.testing import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("models") / "flux")


def test_sites_prints_a_line_for_each_block_and_stream(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pixels", "16x24"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["site", "module", "width", "tokens", "kinds"]
    assert [line.split()[0] for line in lines[:3]] == ["double.0", "double.0:text", "double.1"] and len(lines) == 10
    assert lines[0].split() == [
        "double.0",
        "transformer.transformer_blocks.0",
        "32",
        "24",
        "residual",
        "update",
        "neurons",
        "(128)",
    ]


def test_the_sites_of_flux_are_listed_without_a_file_and_those_of_a_known_family_without_weights(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    configs = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    for model, width in ((str(configs), "32"), ("black-forest-labs/FLUX.1-dev", "3072")):
        assert main(["sites", model, "--pattern", "double.1", "--pixels", "32", "--text-length", "99"]) == 0
        image, text = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
        assert image[:2] == ["double.1", "transformer.transformer_blocks.1"] and image[2] == text[2] == width
    assert image[3:5] == ["4", "residual"] and text[3] == "99"
    assert main(["sites", str(configs), "--pixels", "33"]) == 2
    assert "Its sizes are: 32 x 32, 16 x 24" in capsys.readouterr().err


def test_a_model_of_an_unknown_family_is_loaded_for_its_sites(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(["sites", str(folder)]) == 0
    known = capsys.readouterr().out
    monkeypatch.setattr(profile, "family_of", lambda *_: Family(name="other"))
    assert main(["sites", str(folder)]) == 0 and capsys.readouterr().out == known


def test_a_pattern_with_a_stream_lists_sites_of_that_stream(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pattern", "single.*:text"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [f"single.{i}:text" for i in range(3)]


def test_a_module_without_a_short_name_is_printed_by_its_path(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pattern", "transformer.x_embedder"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["transformer.x_embedder"] * 2


def test_an_unknown_site_exits_2_and_is_named(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pattern", "triple.*"]) == 2
    assert "triple.*" in capsys.readouterr().err
