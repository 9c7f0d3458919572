"""Collecting: examples and statistics from batches of images equal those computed from all codes at once."""

import multiprocessing
import random
import signal
import sqlite3
import time
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from fake_collect import (
    FEW,
    GRID,
    SITES,
    SIZE,
    collect_fakes,
    fake_batch,
    fake_image,
    fake_shot,
    fake_source,
    planted_values,
    targets,
)
from torch import Tensor

from difflex.errors import BadInput
from difflex.features import Book, ImageAlbum
from difflex.features.collecting import AtomLocation, CollectBatch, CollectConfig, collect
from difflex.features.collector import FeatureMaps
from difflex.features.entries import COVER_THRESHOLD, LEVELS, Example
from difflex.features.firing import image_key, random_numbers
from difflex.features.results import direction_neighbours, firing_neighbours, map_shapes
from difflex.records import Shot
from difflex.tensors import write_tensors

COUNT = 60
TIMESTEPS = (1000.0, 500.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The books of both sites, from images at two timesteps each."""
    folder = tmp_path_factory.mktemp("books")
    collect_fakes(folder, [*range(COUNT)], TIMESTEPS)
    return folder


def all_codes(place: int = 0) -> Tensor:
    """Return the codes of all images at a site: [image, timestep, token, feature]."""
    codes = [planted_values(image, SITES[place], timestep) for image in range(COUNT) for timestep in TIMESTEPS]
    return torch.stack(codes).unflatten(0, (COUNT, len(TIMESTEPS)))


def open_book(folder: Path, place: int = 0) -> Book:
    return Book.open(folder / f"{SITES[place].folder}.sqlite")


def is_held_out(image: int) -> bool:
    return image % 5 == 0


def image_number(shot: Shot) -> int:
    return int(shot.prompt.split()[1])


def contents(path: Path) -> list[list[tuple]]:
    """Return all rows of all tables."""
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    rows = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    connection.close()
    return rows


def shot_image(book: Book, example: Example) -> int:
    """Return the number of the image of an example."""
    return image_number(book.shots([example.shot])[example.shot].shot)


@pytest.mark.parametrize("place", [0, 1])
def test_top_examples_are_the_images_with_the_highest_peaks(folder: Path, place: int):
    peaks = all_codes(place).flatten(1, 2).amax(1)
    with open_book(folder, place) as book:
        for feature in range(SIZE):
            for split in ("train", "held-out"):
                images = [image for image in range(COUNT) if is_held_out(image) == (split == "held-out")]
                firing = [image for image in images if peaks[image, feature] > 0]
                ranked = sorted(firing, key=lambda image: -float(peaks[image, feature]))
                examples = book.examples(feature, "top", split)
                numbers = [shot_image(book, example) for example in examples]
                assert numbers == ranked[: FEW.top_examples]
                assert [example.peak for example in examples] == pytest.approx(peaks[numbers, feature].tolist())
                assert [example.rank for example in examples] == [*range(len(numbers))]


def test_the_map_of_an_example_holds_the_codes_of_its_shot(folder: Path):
    codes = all_codes()
    with open_book(folder) as book:
        for example in [example for feature in range(SIZE) for example in book.examples(feature)]:
            shot = book.shots([example.shot])[example.shot].shot
            assert shot.timestep is not None and shot.split == example.split
            image_codes = codes[image_number(shot), :, :, example.feature]
            values = image_codes[TIMESTEPS.index(shot.timestep)]
            if example.kind == "silent":
                assert image_codes.max() <= 0
                continue
            assert example.map.tokens == tuple((values > 0).nonzero()[:, 0].tolist())
            assert example.map.values == pytest.approx(values[values > 0].tolist(), rel=1e-4, abs=1e-4 * example.peak)
            assert example.peak == pytest.approx(float(image_codes.max()))


def test_the_examples_of_a_feature_show_each_image_once(folder: Path):
    with open_book(folder) as book:
        for feature in range(SIZE):
            examples = book.examples(feature)
            shots = book.shots(example.shot for example in examples)
            files = [shots[example.shot].image.file for example in examples]
            assert len(files) == len(set(files)) > 0


def test_random_examples_are_the_images_with_the_lowest_random_numbers(folder: Path):
    peaks = all_codes().flatten(1, 2).amax(1)
    with open_book(folder) as book:
        for feature in range(SIZE):
            images = [image for image in range(COUNT) if not is_held_out(image) and peaks[image, feature] > 0]
            keys = torch.tensor([image_key(fake_shot(image, 0.0)) for image in images], dtype=torch.int64)
            draws = random_numbers(keys, torch.full_like(keys, feature), FEW.seed)
            lowest = {images[place] for place in draws.argsort()[: FEW.random_examples].tolist()}
            top = {shot_image(book, example) for example in book.examples(feature, "top", "train")}
            examples = book.examples(feature, "quantile", "train")
            assert {shot_image(book, example) for example in examples} == lowest - top
            assert [example.peak for example in examples] == sorted((example.peak for example in examples), reverse=True)
            assert all(example.quantile is not None and 0 < example.quantile < 1 for example in examples)


def test_the_key_of_an_image_never_changes():
    shot = replace(fake_shot(1, 3.0), image="1.png", noise=0.5)
    assert image_key(shot) == 5923727986635371865, "another key would change all random examples"


def test_a_dead_feature_has_all_silent_examples_and_no_others(folder: Path):
    with open_book(folder) as book:
        counts = [len(book.examples(SIZE - 1, "silent", split)) for split in ("train", "held-out")]
        assert counts == [FEW.silent_examples, FEW.silent_examples]
        assert book.examples(SIZE - 1, "top") == book.examples(SIZE - 1, "quantile") == []


def test_statistics_equal_those_of_all_codes(folder: Path):
    codes = all_codes()
    flat = codes.flatten(0, 2)
    with open_book(folder) as book:
        about = book.about
        assert about.tokens == len(flat) and about.images == COUNT and about.timesteps == TIMESTEPS
        assert about.shots == {"train": 96, "held-out": 24} and about.grid == GRID
        for row in book.features():
            values, fires = flat[:, row.feature], codes[..., row.feature] > 0
            positive = values[values > 0]
            assert row.firings == len(positive) and row.density == pytest.approx(len(positive) / len(flat))
            assert row.shots == int(fires.any(2).sum())
            assert row.negative_share == pytest.approx(float((values < 0).float().mean()))
            assert row.negative_peak == pytest.approx(min(0.0, float(values.min())))
            assert sum(row.histogram.counts) == row.firings
            assert row.activity == pytest.approx(fires.float().mean((0, 2)).tolist())
            if not row.firings:
                assert (row.peak, row.area, row.spread, row.coverage) == (0.0, None, None, None)
                continue
            assert row.peak == pytest.approx(float(positive.max())) and row.mean == pytest.approx(float(positive.mean()))
            assert row.area == pytest.approx(row.firings / row.shots / 16)


def test_the_histogram_holds_every_value_between_its_edges(folder: Path):
    values = all_codes().flatten(0, 2)[:, 3]
    with open_book(folder) as book:
        histogram = book.feature(3).histogram
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        assert count == int(((values >= low) & (values < high)).sum())


def test_spatial_statistics_follow_their_definitions(folder: Path):
    codes = all_codes()
    border = torch.ones(GRID, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    with open_book(folder) as book:
        for row in book.features()[:-1]:
            values = codes[..., row.feature].clamp_min(0).reshape(-1, *GRID).double()
            assert row.border == pytest.approx(float(values[:, border].sum() / values.sum() / border.double().mean()))
            shares = values.sum(0).flatten() / values.sum()
            assert row.position == pytest.approx(float((shares - 1 / 16).clamp_min(0).sum()), abs=1e-6)
            maps = [example.map for example in book.examples(row.feature, "top")]
            covered = [sum(value >= COVER_THRESHOLD * row.peak for value in values) / 16 for _, values in maps]
            assert row.coverage == pytest.approx(sum(covered) / len(covered), abs=0.02)
            assert row.spread is not None and row.concentration is not None
            assert 0 <= row.spread < 1 and 0.25 <= row.concentration <= 1


def single_map(*tokens: int, levels: tuple[int, ...] = ()) -> FeatureMaps:
    """Return a map of feature 0 with these tokens."""
    entries = torch.tensor(levels or (LEVELS,) * len(tokens)).to(torch.int16)
    zero, peak = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    coactive = torch.zeros(1, 0, dtype=torch.int32)
    return FeatureMaps(zero, zero, peak, zero.long(), zero + len(tokens), coactive, torch.tensor(tokens).to(torch.int16), entries)


def test_spread_and_concentration_of_known_maps():
    point = map_shapes(single_map(5), 1, GRID)
    assert (float(point.spread[0]), float(point.concentration[0])) == (0.0, 1.0)
    corners = map_shapes(single_map(0, 15), 1, GRID)
    assert float(corners.spread[0]) == pytest.approx(0.5) and float(corners.concentration[0]) == pytest.approx(0.5)
    uneven = map_shapes(single_map(0, 1, 2, 3, levels=(LEVELS, LEVELS // 3, LEVELS // 3, LEVELS // 3)), 1, GRID)
    assert float(uneven.concentration[0]) == pytest.approx(0.5, abs=1e-4)


def test_firing_neighbours_fire_together_more_often_than_by_chance():
    coactive = torch.tensor([[1, 2], [1, 2], [1, -1], [2, -1]], dtype=torch.int32)
    groups = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    maps = FeatureMaps.empty(2)._replace(groups=groups, coactive=coactive)
    neighbours = firing_neighbours(maps, torch.tensor([0.1, 0.01, 0.3]))
    assert [(neighbour.feature, neighbour.value) for neighbour in neighbours[0]] == [(1, 0.75)], "feature 2 fires everywhere"


def test_direction_neighbours_have_the_highest_cosine():
    directions = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = directions @ directions.T - 3 * torch.eye(20)
    for feature, neighbours in enumerate(direction_neighbours(directions)):
        values, order = cosines[feature].sort(descending=True)
        assert [neighbour.feature for neighbour in neighbours] == order[: len(neighbours)].tolist()
        assert [neighbour.value for neighbour in neighbours] == pytest.approx(values[: len(neighbours)].tolist())


def test_the_order_and_the_batches_of_images_do_not_matter(folder: Path, tmp_path: Path):
    order = [*range(COUNT)]
    random.Random(3).shuffle(order)
    collect_fakes(tmp_path, order, TIMESTEPS, batch=7)
    for place in (0, 1):
        with open_book(folder, place) as ordered, open_book(tmp_path, place) as shuffled:
            for feature in range(SIZE):
                for a, b in zip(ordered.examples(feature), shuffled.examples(feature), strict=True):
                    assert replace(a, id=0, shot=0) == replace(b, id=0, shot=0)
                    assert ordered.shots([a.shot])[a.shot].shot == shuffled.shots([b.shot])[b.shot].shot


def test_an_image_that_comes_twice_is_one_example(folder: Path, tmp_path: Path):
    collect_fakes(tmp_path, [*range(COUNT), *range(20)], TIMESTEPS)
    with open_book(folder) as once, open_book(tmp_path) as twice:
        for feature in range(SIZE):
            for a, b in zip(once.examples(feature), twice.examples(feature), strict=True):
                assert (a.kind, a.split, a.rank, a.peak) == (b.kind, b.split, b.rank, b.peak)


def test_merging_more_often_gives_the_same_books(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.features.collector.PENDING_MAPS", 0)
    monkeypatch.setattr("difflex.features.collector.COPIED_MAPS", 7)
    monkeypatch.setattr("difflex.features.firing.ENCODED_TOKENS", 9)
    collect_fakes(tmp_path, [*range(COUNT)], TIMESTEPS)
    assert all(contents(folder / f"{site.folder}.sqlite") == contents(tmp_path / f"{site.folder}.sqlite") for site in SITES)


def test_the_album_keeps_exactly_the_images_of_examples(folder: Path, tmp_path: Path):
    files = set()
    for place in (0, 1):
        with open_book(folder, place) as book:
            files |= {image.file for image in book.images()}
    assert {path.name for path in (folder / "images").iterdir()} == files
    older = ImageAlbum(tmp_path / "images").add(fake_image(10_000))[0].file
    collect_fakes(tmp_path, [*range(20)], TIMESTEPS)
    assert (tmp_path / "images" / older).exists(), "images that were there before are not removed"


def test_a_book_can_have_fewer_examples_than_one_feature_may_have(tmp_path: Path):
    source, album = fake_source([1, 2]), ImageAlbum(tmp_path / "images")
    collect(targets(tmp_path), source, album, data="x", checkpoint=tmp_path / "s", config=CollectConfig(), progress=False)
    with open_book(tmp_path) as book:
        assert 0 < sum(len(book.examples(feature, "top")) for feature in range(SIZE)) < CollectConfig().top_examples


def test_a_killed_and_resumed_pass_makes_the_same_books(tmp_path: Path):
    whole, resumed, images = tmp_path / "whole", tmp_path / "resumed", [*range(120)]
    collect_fakes(whole, images, TIMESTEPS)
    state, stamp = resumed / "state.safetensors", 0
    for _ in range(3):
        arguments = {"delay": 0.05, "save_seconds": 0.0}
        context = multiprocessing.get_context("fork")  # starts at once, unlike a new interpreter
        process = context.Process(target=collect_fakes, args=(resumed, images, TIMESTEPS), kwargs=arguments)
        process.start()
        while not state.exists() or state.stat().st_mtime_ns == stamp:
            assert process.is_alive(), "the process ended before it was killed"
            time.sleep(0.01)
        time.sleep(0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        stamp = state.stat().st_mtime_ns
    collect_fakes(resumed, images, TIMESTEPS)
    assert not state.exists()
    for site in SITES:
        assert contents(whole / f"{site.folder}.sqlite") == contents(resumed / f"{site.folder}.sqlite")


def test_a_pass_resumes_for_the_same_data_and_restarts_for_other_data(tmp_path: Path):
    starts: list[int] = []

    class Stopped(Exception):
        pass

    def stopping_source(start: int):
        starts.append(start)
        yield from islice(fake_source([*range(COUNT)], TIMESTEPS)(start), 4)
        raise Stopped

    def run(data: str) -> None:
        state = tmp_path / "state.safetensors"
        album = ImageAlbum(tmp_path / "images")
        collect(
            targets(tmp_path), stopping_source, album, data=data, checkpoint=state, config=FEW, save_seconds=0.0, progress=False
        )

    for data in ("one", "one", "two"):
        with pytest.raises(Stopped):
            run(data)
    assert starts == [0, 20, 0]


@pytest.mark.parametrize("damaged", ["checkpoint", "image", "missing image"])
def test_a_pass_starts_again_without_its_checkpoint_if_that_or_an_image_is_damaged(
    folder: Path, tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
):
    starts: list[int] = []

    def source(start: int, batches: int | None = None):
        starts.append(start)
        yield from islice(fake_source([*range(COUNT)], TIMESTEPS)(start), batches)
        if batches:
            raise KeyboardInterrupt

    state, album = tmp_path / "state.safetensors", ImageAlbum(tmp_path / "images")
    arguments = {"data": "fake", "checkpoint": state, "config": FEW, "save_seconds": 0.0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        collect(targets(tmp_path), lambda start: source(start, 4), album, **arguments)
    path = state if damaged == "checkpoint" else next(album.folder.iterdir())
    if damaged == "missing image":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    collect(targets(tmp_path), source, album, **arguments)
    assert starts == [0, 0] and not state.exists()
    output = capsys.readouterr().out
    assert str(path) in output and "The pass starts again, without the checkpoint." in output
    for site in SITES:
        assert contents(folder / f"{site.folder}.sqlite")[1:] == contents(tmp_path / f"{site.folder}.sqlite")[1:]


def test_a_checkpoint_has_all_of_its_images_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pass that is killed before the new checkpoint is written continues from the older one."""
    writes = [0]

    def killed(*arguments: object) -> None:
        writes[0] += 1
        if writes[0] == 8:
            raise KeyboardInterrupt
        write_tensors(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("difflex.features.registry.write_tensors", killed)
    state, album = tmp_path / "state.safetensors", ImageAlbum(tmp_path / "images")
    arguments = {"data": "fake", "checkpoint": state, "config": FEW, "save_seconds": 0.0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        collect(targets(tmp_path), fake_source([*range(COUNT)], TIMESTEPS), album, **arguments)
    starts: list[int] = []

    def source(start: int):
        starts.append(start)
        yield from fake_source([*range(COUNT)], TIMESTEPS)(start)

    collect(targets(tmp_path), source, album, **arguments)
    assert starts == [35]


def test_images_of_atoms_come_from_the_source_or_are_drawn(tmp_path: Path):
    drawn: list[int] = []

    def draw(shots):
        drawn.extend(image_number(shot) for shot in shots)
        return [fake_image(image_number(shot)) for shot in shots]

    shots = (fake_shot(3, 500.0), fake_shot(700, 1000.0), fake_shot(700, 500.0))
    locations = {0: AtomLocation(shots[0], 7), 2: AtomLocation(shots[1], 1), 4: AtomLocation(shots[2], 2)}
    atoms = [replace(target, patches=locations) for target in targets(tmp_path)]
    source, album = fake_source([*range(20)]), ImageAlbum(tmp_path / "images")
    collect(atoms, source, album, data="x", checkpoint=tmp_path / "s", config=FEW, draw=draw, progress=False)
    assert drawn == [700]
    with open_book(tmp_path) as book:
        patches = {feature: book.patch(feature) for feature in range(SIZE)}
    assert {feature for feature, patch in patches.items() if patch} == {0, 2, 4}
    for feature, location in locations.items():
        patch = patches[feature]
        assert patch is not None and patch.image is not None
        assert (patch.token, patch.shot) == (location.token, location.shot)
        assert album.open(patch.image.file).tobytes() == fake_image(image_number(location.shot)).tobytes()


def test_only_the_images_of_the_most_atoms_that_fire_are_drawn_beyond_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    drawn: list[int] = []

    def draw(shots):
        drawn.extend(image_number(shot) for shot in shots)
        return [fake_image(image_number(shot)) for shot in shots]

    # Image 701 has two atoms that fire, 700 one, and 702 the one that never does (and one that is in the source as well).
    places = {0: 700, 1: 701, 2: 701, SIZE - 1: 702, 3: 5}
    locations = {feature: AtomLocation(fake_shot(image, 500.0), 1) for feature, image in places.items()}
    atoms = [replace(targets(tmp_path)[0], patches=locations)]
    for most, expected in ((2, [701, 700]), (0, [])):
        drawn.clear()
        options = {"data": "x", "checkpoint": tmp_path / "s", "config": FEW, "progress": False, "most_patches": most}
        collect(atoms, fake_source([*range(20)]), ImageAlbum(tmp_path / "images"), draw=draw, **options)  # pyright: ignore
        assert drawn == expected
        assert f"3 images that atoms were taken from are not among the images: {most} are generated" in capsys.readouterr().out


def test_a_state_that_takes_long_to_save_is_saved_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saves, clock = [], [0.0]
    monkeypatch.setattr("difflex.features.collecting.time.monotonic", lambda: clock[0])

    def save(self: object, collectors: object, registry: object) -> None:
        saves.append(clock[0])
        clock[0] += 5.0

    def source(start: int):
        for batch in fake_source([*range(300)], batch=1)(start):
            clock[0] += 1.0
            yield batch

    monkeypatch.setattr("difflex.features.collecting.CollectCheckpoint.save", save)
    album = ImageAlbum(tmp_path / "images")
    collect(targets(tmp_path), source, album, data="x", checkpoint=tmp_path / "s", config=FEW, save_seconds=10.0, progress=False)
    assert [round(later - earlier) for earlier, later in pairwise(saves)][:2] == [106, 106]  # 5 seconds are a twentieth of 100


def test_images_of_several_sizes_are_refused(tmp_path: Path):
    def source(start: int):
        yield fake_batch([1, 2], (1000.0,))
        images, activations = fake_batch([3], (1000.0,))
        yield CollectBatch(images, [replace(part, values=part.values[:, :4]) for part in activations])

    with pytest.raises(BadInput, match="Images of several sizes: 16 tokens"):
        collect(targets(tmp_path), source, ImageAlbum(tmp_path), data="x", checkpoint=tmp_path / "s", config=FEW, progress=False)
