"""Control vectors: a contrast comes back as it was, files of other tools are read, and what cannot be is refused."""

import os
import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from difflex.cli import main
from difflex.control_vectors import VectorFile, contrast_of, layer_of, read_vectors, write_vectors
from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.records import Site
from difflex.steering.contrast import Contrast
from difflex.study import Study

SITE = Site("double.18")


def contrast(site: Site = SITE, model: str = "acme/flux") -> Contrast:
    return Contrast(
        site=site,
        model=model,
        revision=None,
        method="mean",
        pairs=2,
        timesteps=(1000.0, 500.0),
        positive=("a red star",),
        negative=("a star",),
        norm=12.5,
        direction=torch.linspace(-1, 2, 24),
    )


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def repeng_file(layers: dict[int, list[float]]) -> bytes:
    """A file as the GGUF writer that repeng uses makes it: entries of several types, each tensor at a multiple of 32 bytes."""
    entries = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")
    entries += text("controlvector.model_hint") + struct.pack("<I", 8) + text("mistral")
    entries += text("controlvector.layer_count") + struct.pack("<II", 4, len(layers))
    entries += text("some.floats") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3) + text("some.flag") + struct.pack("<I?", 7, True)
    entries += text("some.words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    infos, data = b"", b""
    for layer, values in layers.items():
        infos += text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(values), 0, len(data))
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(layers), 6) + entries + infos
    return head + bytes(-len(head) % 32) + data


@pytest.mark.parametrize("name", ["vector.gguf", "vector.pt"])
def test_a_contrast_comes_back_exactly(tmp_path: Path, name: str):
    before = contrast(Site("double.18", "update", "text"))
    vectors = read_vectors(write_vectors(before, tmp_path / name))
    after = contrast_of(vectors, None, "", None, None)
    assert torch.equal(after.direction, before.direction) and vectors.directions.keys() == {18}
    assert [getattr(after, each) for each in vars(after) if each != "direction"] == [
        getattr(before, each) for each in vars(before) if each != "direction"
    ]


def test_the_bytes_of_an_export_are_those_that_readers_expect(tmp_path: Path):
    content = write_vectors(contrast(), tmp_path / "v.gguf").read_bytes()
    assert content[:4] == b"GGUF" and struct.unpack("<IQQ", content[4:24]) == (3, 1, 4)
    for part in (text("general.architecture"), text("controlvector"), text("acme/flux:double"), text("direction.18")):
        assert part in content
    assert text("controlvector.layer_count") + struct.pack("<II", 4, 1) in content
    assert content[-96:] == struct.pack("<24f", *contrast().direction.tolist()) and len(content) % 32 == 0


def test_vectors_of_repeng_and_of_steering_vectors_are_read(tmp_path: Path):
    (tmp_path / "v.gguf").write_bytes(repeng_file({3: [1.0, 2.0], 18: [0.5, -0.5, 4.0]}))
    vectors = read_vectors(tmp_path / "v.gguf")
    assert vectors.hint == "mistral" and {layer: each.tolist() for layer, each in vectors.directions.items()} == {
        3: [1.0, 2.0],
        18: [0.5, -0.5, 4.0],
    }
    found = contrast_of(vectors, SITE, "acme/flux", None, 7.0)
    assert found.direction.tolist() == [0.5, -0.5, 4.0] and (found.norm, found.method) == (7.0, "principal")
    torch.save({"layer_activations": {18: torch.ones(3).half()}, "layer_type": "decoder_block"}, tmp_path / "v.pt")
    assert contrast_of(read_vectors(tmp_path / "v.pt"), SITE, "m", None, None).direction.tolist() == [1, 1, 1]
    torch.save({18: torch.ones(3)}, tmp_path / "w.pt")
    assert read_vectors(tmp_path / "w.pt").directions.keys() == {18}


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        ("down.2.1", "no number of its own"),
        ("mid", "no number of its own"),
        ("double.18:neurons", "no part of the residual stream"),
    ],
)
def test_a_site_without_a_layer_number_is_refused(site: str, reason: str):
    with pytest.raises(BadInput, match=reason):
        layer_of(Site.parse(site))


def test_a_missing_layer_or_site_is_named(tmp_path: Path):
    vectors = VectorFile({3: torch.ones(2), 5: torch.ones(2)}, "x")
    with pytest.raises(UnknownName, match=r"no direction of layer 18, the block of double.18. It has layers 3, 5"):
        contrast_of(vectors, SITE, "m", None, None)
    with pytest.raises(BadInput, match=r"Name it with --site"):
        contrast_of(vectors, None, "m", None, None)


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('run')",))


def test_a_pt_file_runs_no_code_and_holds_tensors(tmp_path: Path):
    for name, content in (("evil", {1: Evil()}), ("list", [1]), ("words", {"a": torch.ones(2)}), ("zero", {1: torch.zeros(2)})):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(BrokenFile):
            read_vectors(tmp_path / f"{name}.pt")
    (tmp_path / "endless.gguf").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("endless", "pipe"):
        with pytest.raises(BadInput, match="is a folder, a device or a pipe"):
            read_vectors(tmp_path / f"{name}.gguf")
    views = [
        torch.zeros(1).expand(10**11),
        torch.ones(4, device="meta"),
        torch.ones(4, dtype=torch.complex64),
        torch.ones(4).to_sparse(),
    ]
    for view in views:
        torch.save({1: view}, tmp_path / "view.pt")
        with pytest.raises(BrokenFile, match="no plain vector"):
            read_vectors(tmp_path / "view.pt")
    torch.save({1: torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pt")
    with pytest.raises(BrokenFile, match="not finite"):
        read_vectors(tmp_path / "nan.pt")


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_are_refused_or_read_but_nothing_else_happens(tmp_path: Path, count: int):
    whole, path, generator = repeng_file({3: [1.0, 2.0], 18: [0.5, -0.5]}), tmp_path / "v.gguf", random.Random(0)
    for _ in range(count):
        content = bytearray(whole[: generator.randrange(len(whole) + 1)] if generator.random() < 0.3 else whole)
        for _ in range(generator.randrange(4)):
            if content:
                content[generator.randrange(len(content))] = generator.choice((0, 1, 127, 255, generator.randrange(256)))
        path.write_bytes(content)
        with suppress(DifflexError):
            read_vectors(path)


def test_the_commands_export_and_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = Study.begin(tmp_path / "study", "acme/flux")
    contrast().save(study.contrast("red"))
    file = str(tmp_path / "red.gguf")
    assert main(["export-contrast", str(study.folder), "red", "--out", file]) == 0
    assert "layer 18, the block of double.18" in capsys.readouterr().out
    assert main(["import-contrast", str(study.folder), "again", file]) == 0
    assert torch.equal(Contrast.load(study.contrast("again")).direction, contrast().direction)
    assert main(["import-contrast", str(study.folder), "red", file]) == 0
    assert main(["import-contrast", str(Study.begin(tmp_path / "other", "acme/sdxl").folder), "red", file]) == 2
    assert "The direction is of acme/flux" in capsys.readouterr().err
    (tmp_path / "v.gguf").write_bytes(repeng_file({18: [3.0, 4.0]}))
    words = [str(tmp_path / "v.gguf"), "--site", "double.18"]
    assert main(["import-contrast", str(study.folder), "red", *words]) == 2
    assert "has another contrast red" in capsys.readouterr().err
    assert main(["import-contrast", str(study.folder), "new", *words]) == 0
    assert "norm 5 at double.18" in (shown := capsys.readouterr().out) and "mean norm of the activations is unknown" in shown
    assert main(["export-contrast", str(study.folder), "red", "--out", str(tmp_path / "red.txt")]) == 2
