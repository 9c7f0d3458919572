"""Every station with the model on another device than the rest: results equal those of the CPU, and no operation mixes devices.

Without a GPU the other device is a pretended one (`other_device`); `pytest -m gpu` runs the same on a real one.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from other_device import other_device
from PIL import Image
from torch import Tensor

import difflex
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Neurons, Normalisation, SAEWeights
from difflex.effects.removal_features import GenerationCodes, choose_features
from difflex.evaluation.anatomy import measure_anatomy
from difflex.evaluation.effect import measure_effects
from difflex.features import Book, ImageAlbum
from difflex.features.collecting import CollectBatch, CollectConfig, CollectTarget, collect
from difflex.pipeline import Pipeline
from difflex.records import ActivationBatch, Activations, Edit, Rectangle, RegionMap, Site, TransplantSource
from difflex.steering import dictionary_features, random_features, steering_hooks
from difflex.steering.contrast import contrast_features, decompose, find_contrast, pair_activations
from difflex.steering.features import measure_scales
from difflex.steering.hooks import TransplantMaps
from difflex.study import DictionaryRef, Study
from difflex.testing import tiny_folder
from difflex.web.model import PipelineFunctions, StudyModel

SITE, SIZE, WIDTH = Site("double.1"), 24, 32
PROMPTS = ["a red star", "two dots"]
GREY = [Image.new("RGB", (24, 16), (60 * number, 90, 200)) for number in range(2)]


def dictionary() -> Dictionary:
    """Return an SAE on the CPU, with a normalisation that takes every step."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(SIZE, WIDTH, generator=generator), dim=1)
    weights = SAEWeights(
        encoder=rows, decoder=rows.clone(), bias=torch.randn(WIDTH, generator=generator), encoder_bias=torch.zeros(SIZE)
    )
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    scale = torch.rand(WIDTH, generator=generator) + 0.5
    normalisation = Normalisation(method="whiten", mean=torch.zeros(WIDTH), scale=scale, basis=basis, clip=4.0)
    return SAE(kind="topk", k=4, origin=DictionaryOrigin(site=SITE), normalisation=normalisation, weights=weights, relu=True)


def harvested(pipe: Pipeline) -> list[Activations]:
    return list(pipe.harvest(pipe.shots(PROMPTS, keep_steps=[0]), [SITE, "single.0:neurons"], progress=False))


def edited(pipe: Pipeline) -> Iterator[Tensor]:
    """Generate with edits of every operation."""
    [x, _] = harvested(pipe)
    rows = x.values.flatten(0, 1)
    scales = measure_scales(dictionary().on(rows.device), [ActivationBatch(rows, *torch.zeros(2, len(rows)).long())])
    yield scales.default_strengths(dictionary().decoder, torch.arange(SIZE))
    features = tuple(scales.peaks.topk(2).indices.tolist())
    parts = [Rectangle(0, 0, 0.5, 1), RegionMap.of([[1.0, 0.5], [0.0, 0.2]])]
    of = lambda edit: dictionary_features(dictionary(), edit.features, scales)  # noqa: E731
    source = TransplantSource(prompt="a dot", seed=3)
    for operation, region in product(("add", "set", "scale", "ablate", "replace", "transplant"), parts):
        edit = Edit(
            operation=operation,
            site=SITE,
            dictionary="d",
            features=features,
            strength=2.0,
            region=region,
            source=source if operation == "transplant" else None,
        )
        maps = TransplantMaps(edit, of(edit))
        if operation == "transplant":
            with pipe.at(SITE, maps):
                pipe.generate("a dot", seed=3)
        hooks = steering_hooks([edit], of, lambda _, maps=maps: maps)
        yield pixels(pipe.generate(PROMPTS, edits=hooks)[0].image)


def pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def compared(pipe: Pipeline) -> Iterator[Tensor]:
    """Compare the model's output with and without a dictionary, and the shape of its activations."""
    shots = list(pipe.shots(PROMPTS))
    effects = measure_effects(
        [dictionary()],
        torch.ones(WIDTH),
        lambda edits: pipe.predictions(shots, SITE, edits),
        lambda edits: pipe.images(shots, SITE, edits),
    )
    yield torch.tensor([effects[0].prediction.reconstruction, effects[0].similarity["ssim"].zero])
    anatomy = measure_anatomy(harvested(pipe))
    yield torch.tensor([norm for norms in anatomy.norms.values() for norm in norms.values()])


def given(pipe: Pipeline) -> Iterator[Tensor]:
    """Harvest given images, and measure the losses on them."""
    for activations in pipe.harvest_images(GREY, [0.25, 0.75], SITE, PROMPTS, progress=False):
        yield activations.values
    yield pipe.losses(GREY, [0.5], PROMPTS)


def collected(pipe: Pipeline) -> Iterator[Tensor]:
    """Collect examples from generated and from given images."""
    device = pipe.engine.device
    shots = list(pipe.shots(PROMPTS, steps=2))

    def runs(start: int) -> Iterator[CollectBatch]:
        yield from (CollectBatch(*batch) for batch in pipe.harvest_with_images(shots[2 * start :], [SITE]))

    def images(start: int) -> Iterator[CollectBatch]:
        if not start:
            yield CollectBatch(GREY, list(pipe.harvest_images(GREY, [0.5], SITE, PROMPTS, progress=False)))

    config = CollectConfig(top_examples=2, random_examples=2, silent_examples=1, silent_pool=4, coactive=2)
    for source in (runs, images):
        with tempfile.TemporaryDirectory() as name:
            target = CollectTarget(dictionary=dictionary(), name="d", fingerprint="", book=Path(name) / "book.sqlite")
            album, state = ImageAlbum(Path(name) / "images"), Path(name) / "state"
            options = {"data": "", "checkpoint": state, "config": config, "save_seconds": 0.0, "device": device}
            [path] = collect([target], source, album, progress=False, **options)  # pyright: ignore[reportArgumentType]
            with Book.open(path) as book:
                rows = [book.feature(feature) for feature in range(SIZE)]
                yield torch.tensor([(row.firings, row.peak, row.mean, row.border or 0, row.position or 0) for row in rows])
                examples = [example for row in rows for example in book.examples(row.feature)]
                yield torch.tensor([(example.feature, example.shot, example.peak) for example in examples])


def contrasted(pipe: Pipeline) -> Iterator[Tensor]:
    """Find a contrast, take it apart, and edit along it."""
    sides = pair_activations(lambda shots: pipe.harvest(shots, SITE), list(pipe.shots("")), [("red", "blue"), ("dot", "star")])
    contrast = find_contrast(*sides, region=lambda _: Rectangle(0, 0, 0.5, 0.5))
    yield contrast.direction
    for on in (dictionary(), dictionary().on(pipe.engine.device)):
        yield torch.tensor([(part.feature, part.code, part.explained) for part in decompose(contrast.direction, on, 3)])
    edit = Edit(operation="add", site=SITE, contrast="c", unit="norm", region=Rectangle(0, 0, 0.5, 0.5))
    for features in (contrast_features(contrast), random_features(contrast_features(contrast))):
        hooks = steering_hooks([edit], lambda _, features=features: features)
        yield pixels(pipe.generate(PROMPTS, edits=hooks)[0].image)


def removed(pipe: Pipeline) -> Iterator[Tensor]:
    """Choose the features of a concept and remove them."""
    codes = GenerationCodes(dictionary())
    for activations in pipe.harvest(pipe.shots(PROMPTS), SITE):
        codes.add(activations)
    cut = choose_features(codes, ["red", "two"], "red", 2)
    yield torch.tensor(cut.floors)
    yield pixels(pipe.generate(PROMPTS, edits=cut.steering_hooks(-2.0))[0].image)


def plain(pipe: Pipeline) -> Iterator[Tensor]:
    """Harvest from prompts, and encode with dictionaries on the model's device."""
    for activations in harvested(pipe):
        yield activations.values
        width = activations.values.shape[-1]
        own = (
            dictionary()
            if activations.site == SITE
            else Neurons(width=width, k=3, origin=DictionaryOrigin(site=activations.site))
        )
        yield own.on(activations.values.device).encode(activations.values.flatten(0, 1)).values


def served(pipe: Pipeline) -> Iterator[Tensor]:
    """Read an image and paint one, as for the browser."""
    functions = PipelineFunctions(pipe.shots, pipe.generate, pipe.harvest_with_images, pipe.at, SITE)
    with tempfile.TemporaryDirectory() as folder:
        study = Study.begin(Path(folder), pipe.name, pipe.revision)
        ref = DictionaryRef(SITE, "topk-24-k4")
        dictionary().save(study.dictionary(*ref))
        model = StudyModel(study, functions)
        [shot] = model.shots("a red star", [3], None)
        read = model.read(shot, [ref], lambda step, steps: None)
        yield from (torch.from_numpy(part.values) for part in read.fired)
        edit = Edit(operation="add", site=SITE, dictionary=ref.label, features=(1,), strength=5.0, unit="code")
        for image in [read.image, *model.images([shot, replace(shot, seed=8)], [edit], lambda step, steps: None)]:
            yield pixels(image)


STATIONS: tuple[Callable[[Pipeline], Iterator[Tensor]], ...] = (
    plain,
    edited,
    compared,
    given,
    collected,
    contrasted,
    removed,
    served,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("flux", tmp_path_factory.mktemp("model"), defaults={"pixels": [[16, 24]], "steps": 1})


@contextmanager
def placed(folder: Path, name: str, offload: bool) -> Iterator[Pipeline]:
    """Yield the model on a device."""
    with ExitStack() as stack:
        pipe = difflex.load(
            folder, precision="fp32", device="cuda" if name == "cuda" else "cpu", offload=offload and name == "cuda"
        )
        if name == "pretended":
            device = stack.enter_context(other_device())
            if offload:
                pipe.diffusers.enable_model_cpu_offload(device=device)
            else:
                pipe.diffusers.to(device)
        yield pipe


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[Tensor]]:
    with placed(folder, "cpu", False) as pipe:
        return {station.__name__: list(station(pipe)) for station in STATIONS}


@pytest.mark.parametrize("name", ["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("station", "offload"), [*((station, False) for station in STATIONS), (given, True), (collected, True)])
def test_a_station_gives_the_same_with_the_model_elsewhere(
    folder: Path, expected: dict[str, list[Tensor]], station: Callable, name: str, offload: bool
):
    with placed(folder, name, offload) as pipe:
        found = list(station(pipe))
        assert all(part.device.type == "cpu" or part.device == pipe.engine.device for part in found)
        found = [part.cpu() for part in found]
    assert len(found) == len(expected[station.__name__])
    for part, same in zip(found, expected[station.__name__], strict=True):
        # Attention and products of other kernels round differently; an image may then differ by a level here and there.
        torch.testing.assert_close(part, same, rtol=1e-3, atol=1.0 if part.dtype == torch.uint8 else 1e-3, check_dtype=False)


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    with other_device() as device:
        here, there = torch.arange(3.0), torch.arange(3.0).to(device)
        assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3] and there[torch.tensor([2])].tolist() == [2]
        assert torch.zeros(2, device=device).device == torch.tensor([1], device=device).device == there.device
        for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()], lambda: here @ there):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()
        here.copy_(there * 2)
        assert here.tolist() == [0, 2, 4]
