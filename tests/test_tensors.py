"""Tensor files: the same contents give the same bytes, and no changed byte goes unnoticed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from difflex.errors import BrokenFile
from difflex.tensors import read_tensors, write_plain_tensors, write_tensors

TENSORS = {"values": torch.arange(12.0).view(4, 3), "count": torch.tensor(7)}
HEADER = {"name": "a", "list": [1, 2.5, None], "zeros": "0" * 64}


def test_contents_return_and_equal_contents_are_equal_bytes(tmp_path: Path):
    paths = [write_tensors(tmp_path / name, 3, TENSORS, HEADER) for name in ("one", "other")]
    header, tensors = read_tensors(paths[0], 3, "")
    assert header == HEADER and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert torch.equal(read_tensors(paths[0], 3, "", rows={"values": slice(1, 3)}).tensors["values"], TENSORS["values"][1:3])


def test_every_changed_and_every_missing_byte_is_noticed(tmp_path: Path):
    path = write_tensors(tmp_path / "file", 3, TENSORS, HEADER)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(BrokenFile):
            read_tensors(path, 3, "")
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenFile):
            read_tensors(path, 3, "")


def test_the_bytes_are_those_of_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.tensors.CHUNK", 64)
    names = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {f"{name} \u00e9": torch.arange(12).view(3, 4).to(getattr(torch, name)) for name in names}
    tensors |= {"turned": torch.arange(50.0).view(5, 10).T, "one": torch.tensor(3.5), "none": torch.empty(0, 4)}
    ours = write_tensors(tmp_path / "ours", 3, tensors, {"name": 'a"\\\u00e9\n'}).read_bytes()
    with safe_open(tmp_path / "ours", "pt") as file:
        metadata = file.metadata()
    assert ours == save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def test_plain_files_are_those_of_safetensors_also_for_views(tmp_path: Path):
    tensors = {"b": torch.randn(5, 3), "a": torch.arange(4), "scalar": torch.tensor(2.0), "half": torch.randn(3).half()}
    save_file(tensors, tmp_path / "theirs")
    views = {**tensors, "b": tensors["b"].T.contiguous().T}
    assert write_plain_tensors(tmp_path / "ours", views).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_full_disk_is_named_while_a_torch_file_is_written(tmp_path: Path):
    code = (
        "import resource, signal, sys, torch; from pathlib import Path; from difflex.tensors import write_pickle\n"
        "from difflex.errors import OutOfSpace\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: write_pickle(Path(sys.argv[1]), {'a': torch.ones(10**5)})\n"
        "except OutOfSpace as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.pt"], capture_output=True, text=True)
    assert "free some space" in run.stdout and not [*tmp_path.iterdir()], run.stderr


def test_another_format_is_refused(tmp_path: Path):
    path = write_tensors(tmp_path / "file", 2, TENSORS)
    with pytest.raises(BrokenFile, match="is of format 2; this version of difflex reads format 3"):
        read_tensors(path, 3, "Make it again.")
