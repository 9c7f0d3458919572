from pathlib import Path

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from difflex.testing import TINY, tiny_folder, tiny_pipeline


def weights(pipeline: DiffusionPipeline) -> dict[str, torch.Tensor]:
    components = {name: component for name, component in pipeline.components.items() if isinstance(component, nn.Module)}
    return {f"{name}.{path}": weight for name, component in components.items() for path, weight in component.named_parameters()}


@pytest.mark.parametrize("family", TINY)
def test_the_seed_determines_all_weights_and_none_is_zero(family: str):
    first, repeated, different = (weights(tiny_pipeline(family, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], repeated[name]) for name in first)
    assert any(not torch.equal(first[name], different[name]) for name in first)
    assert all(weight.any() for weight in first.values())


@pytest.mark.parametrize("family", TINY)
def test_a_tiny_pipeline_is_small_and_complete(family: str):
    pipeline = tiny_pipeline(family)
    assert sum(weight.numel() for weight in weights(pipeline).values()) < 1_000_000
    assert isinstance(pipeline, DiffusionPipeline) and "scheduler" in pipeline.components


def test_building_a_tiny_pipeline_keeps_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny_pipeline("flux")
    assert torch.equal(torch.rand(3), expected)


def test_diffusers_reads_a_tiny_folder_and_its_defaults_can_be_replaced(tmp_path: Path):
    folder = tiny_folder("flux", tmp_path / "flux", defaults={"steps": 7})
    assert '"steps": 7' in (folder / "difflex.json").read_text()
    assert weights(DiffusionPipeline.from_pretrained(folder)).keys() == weights(tiny_pipeline("flux")).keys()
