from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.testing import TINY, tiny_folder, tiny_pipeline


def weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {f"{name}.{path}": weight for name, part in parts.items() for path, weight in part.named_parameters()}


@pytest.mark.parametrize("family", TINY)
def test_a_seed_decides_all_weights_and_none_is_dead(family: str):
    one, again, other = (weights(tiny_pipeline(family, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert all(weight.any() for weight in one.values())


@pytest.mark.parametrize("family", TINY)
def test_a_tiny_pipeline_is_small_and_whole(family: str):
    pipeline = tiny_pipeline(family)
    assert sum(weight.numel() for weight in weights(pipeline).values()) < 1_000_000
    assert isinstance(pipeline, DiffusionPipeline) and "scheduler" in pipeline.components


def test_making_one_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_pipeline("flux")
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_is_read_by_diffusers_alone_and_its_card_can_be_changed(tmp_path: Path):
    folder = tiny_folder("flux", tmp_path / "flux", defaults={"steps": 7})
    assert '"steps": 7' in (folder / "difflex.json").read_text()
    assert weights(DiffusionPipeline.from_pretrained(folder)).keys() == weights(tiny_pipeline("flux")).keys()
