"""Activations in files of other tools: back in a store they are what they were, and files that cannot be used are refused."""

import json
import os
import random
import resource
import shutil
import time
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from damage import mutated, odd_json
from fake_harvest import SITES, FakeHarvest, fake_shots
from safetensors.torch import load_file, save_file
from torch import Tensor

from difflex.activation_files import ActivationFormat, ImportOptions, export_activations, import_activations
from difflex.choices import StoredDtype
from difflex.cli import main
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.records import Site
from difflex.store import RecordingConfig, Store, record
from difflex.study import Study

SITE = SITES[0]
GIVEN = ImportOptions(site=SITE, model="fake")


def stored(folder: Path, dtype: StoredDtype = "bf16") -> Store:
    """A store of 60 shots of 8 rows in several shards."""
    config = RecordingConfig(dtype=dtype, batch=4, shard_bytes=4000, progress=False)
    return record(folder, fake_shots(30, steps=2), [SITE], FakeHarvest(), config)[0]


def imported(source: Path, folder: Path, options: ImportOptions | None = None) -> Store:
    return import_activations(source, folder, options or ImportOptions(), lambda model, revision: None)


def rows(store: Store) -> Tensor:
    return torch.cat([part.values.flatten(0, 1) for part in store.activations()])


@pytest.mark.parametrize("kind", ["safetensors", "npy", "parquet"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_exported_activations_come_back_exactly_with_their_shots(tmp_path: Path, kind: ActivationFormat, dtype: StoredDtype):
    store = stored(tmp_path / "before", dtype)
    export_activations(store, kind, tmp_path / "files", progress=False)
    back = imported(tmp_path / "files", tmp_path / "after")
    assert back.dtype == dtype and back.grid == store.grid and "imported from" in back.source
    assert torch.equal(rows(back), rows(store)) and rows(back).dtype == rows(store).dtype
    shots = [shot for part in store.activations() for shot in part.shots]
    assert [shot for part in back.activations() for shot in part.shots] == shots
    assert {split: back.count(split) for split in ("train", "held-out")} == {
        split: store.count(split) for split in ("train", "held-out")
    }


def test_other_tools_read_what_is_exported(tmp_path: Path):
    store = stored(tmp_path / "store")
    values, shots = rows(store).float(), [shot for part in store.activations() for shot in part.shots]
    export_activations(store, "safetensors", tmp_path / "st", progress=False)
    parts = [load_file(path) for path in sorted((tmp_path / "st").glob("*.safetensors"))]
    assert torch.equal(torch.cat([part["values"] for part in parts]).float(), values) and len(parts) > 1
    assert torch.cat([part["shots"] for part in parts]).tolist() == [row // 8 for row in range(len(values))]
    export_activations(store, "npy", tmp_path / "npy", progress=False)
    assert np.array_equal(np.load(tmp_path / "npy" / "values.npy", mmap_mode="r"), values.numpy())
    export_activations(store, "parquet", tmp_path / "pq", progress=False)
    table = pyarrow.parquet.read_table(tmp_path / "pq" / "activations-00000.parquet")
    assert table["prompt"][8].as_py() == shots[1].prompt and table["timestep"][8].as_py() == shots[1].timestep
    assert table["values"][8].as_py() == values[8].tolist()
    files = str(tmp_path / "pq" / "*.parquet")
    rows_read = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows_read) == len(values) and rows_read[8]["values"] == values[8].tolist()


def test_int8_is_exported_as_training_reads_it(tmp_path: Path):
    store = stored(tmp_path / "store", "int8")
    export_activations(store, "safetensors", tmp_path / "files", progress=False)
    [*parts] = [load_file(path)["values"] for path in sorted((tmp_path / "files").glob("*.safetensors"))]
    assert torch.equal(torch.cat(parts), rows(store))


def arrays(folder: Path, kind: str, values: Tensor) -> Path:
    """Write `values` as another tool would, in two files."""
    folder.mkdir()
    for number, part in enumerate(values.chunk(2)):
        path = folder / f"part{number}.{kind}"
        if kind == "safetensors":
            save_file({"acts": part.contiguous(), "ids": torch.arange(len(part))}, path)
        elif kind == "npy":
            np.save(path, part.numpy())
        else:
            pyarrow.parquet.write_table(
                pyarrow.table({"acts": part.flatten(0, -2).tolist(), "id": [*range(part[..., 0].numel())]}), path
            )
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "npy", "parquet"])
def test_activations_of_others_are_stored_by_image_and_a_tenth_is_held_out(tmp_path: Path, kind: str):
    values = torch.randn(40, 4, 16, generator=torch.Generator().manual_seed(0)).half().float()
    source = arrays(tmp_path / "files", kind, values)
    options = ImportOptions(site=SITE, model="fake", tokens=4, dtype="fp16")
    store = imported(source, tmp_path / "store", options)
    assert torch.equal(rows(store).float(), values.flatten(0, 1)) and store.tokens == 4
    assert 0 < store.count("held-out") < store.count() and store.count() + store.count("held-out") == 160
    assert store.shot(3).image == "files#3"


def test_an_export_replaces_no_file_of_others_and_completes_one_that_was_killed(tmp_path: Path):
    store, folder = stored(tmp_path / "store"), tmp_path / "files"
    folder.mkdir()
    (folder / "values.npy").write_bytes(b"mine")
    with pytest.raises(BadInput, match=r"is not empty: it has values\.npy"):
        export_activations(store, "npy", folder, progress=False)
    assert [path.name for path in folder.iterdir()] == ["values.npy"] and (folder / "values.npy").read_bytes() == b"mine"
    (folder / "values.npy").unlink()
    paths = export_activations(store, "npy", folder, progress=False)
    for path in paths[2:]:
        path.unlink()
    (folder / ".partial").mkdir()
    assert export_activations(store, "npy", folder, progress=False) == paths and len([*folder.iterdir()]) == len(paths)


def test_an_import_that_was_stopped_continues_and_is_not_made_twice(tmp_path: Path):
    export_activations(stored(tmp_path / "before"), "npy", tmp_path / "files", progress=False)
    first = imported(tmp_path / "files", tmp_path / "after").fingerprint
    assert imported(tmp_path / "files", tmp_path / "after").fingerprint == first


def damage_index(folder: Path, **changes: object) -> None:
    entries = json.loads((folder / "index.json").read_text())
    entries.pop("checksum", None)
    (folder / "index.json").write_text(json.dumps({**entries, **changes}))


def test_damaged_and_wandering_files_are_refused(tmp_path: Path):
    export_activations(stored(tmp_path / "before"), "npy", tmp_path / "files", progress=False)
    content = (tmp_path / "files" / "values.npy").read_bytes()
    (tmp_path / "files" / "values.npy").write_bytes(content[:-1] + b"x")
    with pytest.raises(BrokenFile, match=r"values.npy does not match its checksum"):
        imported(tmp_path / "files", tmp_path / "after")
    (tmp_path / "files" / "values.npy").write_bytes(content[:-64])
    with pytest.raises(BrokenFile, match="damaged"):
        imported(tmp_path / "files", tmp_path / "after")
    for name in ("../before/x.npy", "/etc/x.npy", "values.pkl"):
        damage_index(tmp_path / "files", files={name: "0"})
        with pytest.raises(BrokenFile, match="not in its folder"):
            imported(tmp_path / "files", tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_what_cannot_be_activations_is_refused(tmp_path: Path):
    cases: list[tuple[str, object, ImportOptions, type[DifflexError], str]] = [
        ("objects.npy", np.array([{}]), GIVEN, BrokenFile, "cannot be read"),
        ("numbers.npy", np.zeros((3, 2), dtype=np.int64), GIVEN, BadInput, "holds int64"),
        ("flat.npy", np.zeros(3, dtype=np.float32), GIVEN, BadInput, "row, width"),
        ("good.npy", np.zeros((3, 8), dtype=np.float32), ImportOptions(), BadInput, "--model and --site"),
        (
            "odd.npy",
            np.zeros((3, 8), dtype=np.float32),
            ImportOptions(site=SITE, model="m", tokens=2),
            BadInput,
            "not images of 2",
        ),
        ("huge.npy", np.full((30, 8), 3e38, dtype=np.float32), GIVEN, NonFinite, "the square of their norm is infinite"),
        ("nan.npy", np.full((30, 8), np.nan, dtype=np.float32), GIVEN, NonFinite, "not finite"),
    ]
    for name, array, options, error, message in cases:
        np.save(tmp_path / name, array, allow_pickle=True)  # pyright: ignore[reportArgumentType]
        with pytest.raises(error, match=message):
            imported(tmp_path / name, tmp_path / f"{name}-store", options)
    (tmp_path / "open.npy").write_bytes((tmp_path / "good.npy").read_bytes().replace(b"}", b" "))
    with pytest.raises(BrokenFile, match="cannot be read"):
        imported(tmp_path / "open.npy", tmp_path / "store", GIVEN)
    os.mkfifo(tmp_path / "pipe.npy")
    with pytest.raises(BadInput, match="is a folder, a device or a pipe"):
        imported(tmp_path / "pipe.npy", tmp_path / "store", GIVEN)
    (tmp_path / "bad.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(BrokenFile, match="cannot be read"):
        imported(tmp_path / "bad.safetensors", tmp_path / "store", GIVEN)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}, tmp_path / "two.safetensors")
    with pytest.raises(BadInput, match=r"2 tensors of activations \(a, b\). Name one with --key"):
        imported(tmp_path / "two.safetensors", tmp_path / "store", GIVEN)
    with pytest.raises(UnknownName, match="nearest: a"):
        imported(tmp_path / "two.safetensors", tmp_path / "store", ImportOptions(site=SITE, model="m", key="aa"))


def test_the_commands_export_import_and_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = Study.begin(tmp_path / "study", "fake")
    stored(study.activations)
    words = ["--site", str(SITE), "--to", "safetensors", "--out", str(tmp_path / "files")]
    assert main(["export-activations", str(study.folder), *words]) == 0
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "files").iterdir())]
    assert main(["export-activations", str(study.folder), *words]) == 0
    assert times == [path.stat().st_mtime_ns for path in sorted((tmp_path / "files").iterdir())]
    capsys.readouterr()
    words[3] = "npy"
    assert main(["export-activations", str(study.folder), *words]) == 2
    assert "holds other exported activations" in capsys.readouterr().err
    assert main(["import-activations", str(tmp_path / "files"), "--out", str(tmp_path / "other")]) == 0
    assert "imported from safetensors files" in capsys.readouterr().out
    assert Study.open(tmp_path / "other").stores().keys() == {Site.parse(str(SITE))}
    assert main(["itda", str(tmp_path / "other"), "--site", str(SITE), "--threshold", "0.5", "--size", "16", "--k", "2"]) == 0
    assert main(["evaluate", str(tmp_path / "other"), "--effect-shots", "0"]) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["safetensors", "npy", "parquet"])
@pytest.mark.parametrize("count", [25, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files_make_sentences(tmp_path: Path, kind: ActivationFormat, count: int):
    whole, draw = tmp_path / "whole", random.Random(f"{kind}/{count}")
    store = record(tmp_path / "store", fake_shots(6), [SITE], FakeHarvest(), RecordingConfig(batch=4, progress=False))[0]
    export_activations(store, kind, whole, progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        copy, out = Path(shutil.copytree(whole, tmp_path / f"{number}")), tmp_path / f"{number}-out"
        file = draw.choice(sorted(copy.iterdir()))
        if file.name == "index.json" and draw.random() < 0.8:
            entries = json.loads(file.read_text())
            entries.pop("checksum")
            file.write_bytes(odd_json(json.dumps(entries).encode(), draw))
        else:
            file.write_bytes(mutated(file.read_bytes(), file.suffix, draw))
        if draw.random() < 0.5:
            for name in ("index.json", "shots.jsonl", "shots.npy", "tokens.npy"):  # as files of others
                (copy / name).unlink(missing_ok=True)
        start, options = time.monotonic(), GIVEN if draw.random() < 0.5 else ImportOptions(site=SITE, model="fake", key="values")
        with suppress(DifflexError):
            assert torch.isfinite(rows(imported(copy, out, options))).all()
        assert time.monotonic() - start < 10
        shutil.rmtree(copy)
        shutil.rmtree(out, ignore_errors=True)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert growth < 300, f"{growth:.0f} MB"
