"""The default device, the GPU of a rank, and free memory."""

from pathlib import Path

import pytest
import torch

from difflex import devices
from difflex.devices import use_gpu_of_rank
from difflex.errors import BadInput


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 700_000), ("max", None)])
def test_free_memory_respects_the_limit_of_a_container(
    tmp_path: Path, limit: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
):
    for name, text in (("memory.max", limit), ("memory.current", "500000"), ("memory.stat", "anon 3\ninactive_file 200000")):
        (tmp_path / name).write_text(text + "\n")
    unlimited = devices.free_memory("cpu")
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    free = devices.free_memory("cpu")
    assert free == expected if expected is not None else free > unlimited / 2


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_the_error_for_a_missing_device_names_it(name: str):
    with pytest.raises(BadInput, match=rf"'{name}'.*cpu"):
        devices.find_device(name)


def test_the_default_device_is_a_gpu_if_there_is_one():
    assert devices.find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("rank", "visible", "expected"),
    [
        ("1", None, "1"),
        ("0", "4,6", "4"),
        ("1", "4,6", "6"),
        ("1", "4", "4"),
        ("1", "", ""),
        (None, "4,6", "4,6"),
        (None, None, None),
    ],
)
def test_a_process_of_torchrun_sees_only_its_own_gpu(rank: str | None, visible: str | None, expected: str | None):
    variables = {"LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": visible}
    environment = {name: value for name, value in variables.items() if value is not None}
    use_gpu_of_rank(environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected
