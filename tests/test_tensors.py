"""Tensor files: the same contents give the same bytes, and no changed byte goes unnoticed."""

from pathlib import Path

import pytest
import torch

from difflex.errors import BrokenFile
from difflex.tensors import read_tensors, write_tensors

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


def test_another_format_is_refused(tmp_path: Path):
    path = write_tensors(tmp_path / "file", 2, TENSORS)
    with pytest.raises(BrokenFile, match="is of format 2; this version of difflex reads format 3"):
        read_tensors(path, 3, "Make it again.")
