"""SSIM, CLIP and LPIPS against their formulas, on tiny random weights and without network access."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.evaluation import ClipModel
from difflex.evaluation.image_similarity import ALEXNET, HEADS, LpipsDistance, check_measure, load_measure, ssim
from difflex.testing import tiny_clip

SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("tiny-clip"))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the weights of a CLIP."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: rewrite(folder, lambda w: w["visual_projection.weight"].fill_(torch.nan)), "hold NaN or infinity"),
        (lambda folder: rewrite(folder, lambda w: w.pop("visual_projection.weight")), "lacks 1 weights, such as visual_proj"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "cannot be opened as a CLIP"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be opened as a CLIP"),
        (lambda folder: (folder / "config.json").write_text("["), "cannot be opened as a CLIP"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{}"), "cannot be opened as a CLIP"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be opened as a CLIP"),
    ],
)
def test_a_clip_that_is_damaged_or_not_finite_is_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str):
    clip = tiny_clip(tmp_path / "clip")
    spoil(clip)
    with pytest.raises(DifflexError, match=message):
        ClipModel(str(clip), offline=True)


def test_the_checksum_of_a_clip_is_of_its_content(tmp_path: Path):
    clip = tiny_clip(tmp_path / "clip")
    before = ClipModel.checksum(str(clip))
    assert ClipModel.checksum(str(tiny_clip(tmp_path / "same"))) == before
    rewrite(clip, lambda weights: weights["visual_projection.weight"].add_(1))
    assert ClipModel.checksum(str(clip)) != before


@pytest.fixture(scope="module")
def weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of AlexNet and of LPIPS, with the published names."""
    generator = torch.Generator().manual_seed(0)
    trunk = {f"features.{n}.weight": torch.randn(o, i, s, s, generator=generator) / 20 for n, (o, i, s) in SHAPES.items()}
    trunk |= {f"features.{n}.bias": torch.randn(o, generator=generator) / 20 for n, (o, _, _) in SHAPES.items()}
    heads = {f"lin{n}.model.1.weight": torch.rand(1, o, 1, 1, generator=generator) for n, (o, _, _) in enumerate(SHAPES.values())}
    return trunk, heads


def noise(count: int, rows: int = 48, columns: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, rows, columns, generator=torch.Generator().manual_seed(seed))


def test_clip_similarity_is_1_for_equal_images_and_lower_for_others(folder: Path):
    clip, images, others = ClipModel(str(folder), offline=True), noise(3), noise(3, seed=1)
    assert torch.allclose(clip(images, images), torch.ones(3), atol=1e-5)
    assert bool((clip(images, others) < 1 - 1e-4).all())
    assert torch.allclose(clip(images, others), clip(others, images), atol=1e-6)


def test_clip_embeddings_equal_those_of_transformers(folder: Path):
    clip, image = ClipModel(str(folder), offline=True), noise(2, 32, 32)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)))
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    texts = transformers.AutoTokenizer.from_pretrained(folder)(["a red star", "night"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=(image - mean) / deviation, **texts)
    assert torch.allclose(clip.embed_images(image), output.image_embeds, atol=1e-5)
    assert torch.allclose(clip.embed_texts(["a red star", "night"]), output.text_embeds, atol=1e-5)
    logits = clip.logit_scale * clip.embed_images(image) @ clip.embed_texts(["a red star", "night"]).T
    assert torch.allclose(logits, output.logits_per_image, atol=1e-4)


def test_clip_crops_wide_images_to_the_centre(folder: Path):
    clip, wide = ClipModel(str(folder), offline=True), noise(1, 32, 64)
    changed = wide.clone()
    changed[..., :16] = 0
    assert torch.equal(clip.embed_images(wide), clip.embed_images(changed))
    changed[..., 16:20] = 0
    assert not torch.equal(clip.embed_images(wide), clip.embed_images(changed))


def test_long_texts_are_truncated(folder: Path):
    assert ClipModel(str(folder), offline=True).embed_texts(["star " * 200, "a"]).shape == (2, 32)


def direct_lpips(trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor], image: Tensor, reference: Tensor) -> float:
    """Return equation 1 of arXiv 1801.03924 for one pair, computed with torch modules."""
    torch_modules: list[torch.nn.Module] = []
    for number, (width, before, side) in SHAPES.items():
        convolution = torch.nn.Conv2d(before, width, side, stride=4 if number == 0 else 1, padding=side // 2 if number else 2)
        convolution.load_state_dict({part: trunk[f"features.{number}.{part}"] for part in ("weight", "bias")})
        torch_modules += [torch.nn.MaxPool2d(3, 2)] if number in (3, 6) else []
        torch_modules += [convolution, torch.nn.ReLU()]
    x, y, total, layer = image * 2 - 1, reference * 2 - 1, 0.0, 0
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, y = (x - shift) / scale, (y - shift) / scale
    for module in torch_modules:
        x, y = module(x), module(y)
        if isinstance(module, torch.nn.ReLU):
            distance = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
            total += float((distance * heads[f"lin{layer}.model.1.weight"]).sum(1).mean())
            layer += 1
    return total


def test_lpips_equals_its_formula(weights: tuple[dict[str, Tensor], dict[str, Tensor]]):
    images, references = noise(3), noise(3, seed=1)
    with torch.no_grad():
        direct = [direct_lpips(*weights, images[i : i + 1], references[i : i + 1]) for i in range(3)]
    assert LpipsDistance(*weights)(images, references).tolist() == pytest.approx(direct, rel=1e-4)
    assert LpipsDistance(*weights)(images, images).tolist() == [0.0] * 3 and min(direct) > 0.01


def test_images_too_small_for_lpips_are_refused(weights: tuple[dict[str, Tensor], dict[str, Tensor]]):
    with pytest.raises(BadInput, match="30 x 40 pixels are too small"):
        LpipsDistance(*weights)(noise(1, 30, 40), noise(1, 30, 40))


def test_published_weights_come_from_the_torch_cache(
    weights: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        BadInput, match=r"download it on a machine with network access and save it in .* as alexnet-owt-7be5be79\.pth"
    ):
        load_measure("lpips", offline=True)
    (tmp_path / "checkpoints").mkdir()
    for file, part in zip((ALEXNET, HEADS), weights, strict=True):
        torch.save(part, tmp_path / "checkpoints" / file.name)
    assert torch.equal(
        load_measure("lpips", offline=True)(noise(2), noise(2, seed=1)), LpipsDistance(*weights)(noise(2), noise(2, seed=1))
    )
    (tmp_path / "checkpoints" / HEADS.name).write_bytes(b"no weights")
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_measure("lpips", offline=True)


def test_weights_that_cannot_be_downloaded_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("difflex.evaluation.image_similarity.ALEXNET", ALEXNET._replace(url="http://127.0.0.1:9/none.pth"))
    with pytest.raises(BadInput, match=r"The weights of LPIPS cannot be loaded .* save it in"):
        load_measure("lpips")


def test_unknown_measures_and_models_that_are_not_clip_are_refused(folder: Path, tmp_path: Path):
    check_measure("lpips")
    check_measure("clip:some/model")
    for name in ("clip:", "clip", "ssim", "lpips:alex"):
        with pytest.raises(UnknownName, match=r"is unknown\. Write lpips, or clip:"):
            check_measure(name)
    with pytest.raises(BadInput, match="cannot be opened as a CLIP"):
        load_measure(f"clip:{tmp_path}", offline=True)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="is a model of type 'bert', not a CLIP"):
        load_measure(f"clip:{tmp_path}", offline=True)


def test_ssim_of_flat_images_has_a_closed_form():
    a, b = 0.25, 0.75
    flat = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    similarity = ssim(torch.full((2, 3, 16, 12), a), torch.full((2, 3, 16, 12), b))
    assert similarity.tolist() == pytest.approx([flat, flat])


def test_ssim_is_the_published_formula_window_by_window():
    x, y = torch.rand(2, 1, 1, 13, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bell = torch.exp(-((torch.arange(11) - 5.0) ** 2) / (2 * 1.5**2)).double()
    window = torch.outer(bell, bell) / bell.sum() ** 2
    values = []
    for row, column in [(row, column) for row in range(3) for column in range(2)]:
        a, b = (image[0, 0, row : row + 11, column : column + 11] for image in (x, y))
        m, n = (window * a).sum(), (window * b).sum()
        spread = (window * (a - m) ** 2).sum() + (window * (b - n) ** 2).sum()
        together = (window * (a - m) * (b - n)).sum()
        values.append((2 * m * n + 1e-4) / (m * m + n * n + 1e-4) * (2 * together + 9e-4) / (spread + 9e-4))
    assert float(ssim(x, y)) == pytest.approx(float(torch.stack(values).mean()))
    assert float(ssim(x, x)) == pytest.approx(1) and float(ssim(x, 1 - x)) < 0


def test_images_too_small_for_ssim_are_refused():
    with pytest.raises(BadInput, match="10 x 40"):
        ssim(torch.zeros(1, 3, 10, 40), torch.zeros(1, 3, 10, 40))
