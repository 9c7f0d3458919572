from pathlib import Path

import pytest

from difflex.cli import main
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


def test_a_pattern_with_a_stream_lists_sites_of_that_stream(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pattern", "single.*:text"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [f"single.{i}:text" for i in range(3)]


def test_a_module_without_a_short_name_is_printed_by_its_path(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pattern", "transformer.x_embedder"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["transformer.x_embedder"] * 2


def test_an_unknown_site_exits_2_and_is_named(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", str(folder), "--pattern", "triple.*"]) == 2
    assert "triple.*" in capsys.readouterr().err
