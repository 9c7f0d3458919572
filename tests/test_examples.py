"""Examples: what is kept of a stream is what a look at everything at once would choose."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_collect import FEW, GRID, SITES, SIZE, collected, met, painted, planted, shot, source, subjects
from torch import Tensor

from difflex.errors import BadInput
from difflex.features import Book, ImageAlbum
from difflex.features.collecting import AtomLocation, CollectBatch, collect
from difflex.features.entries import COVER_THRESHOLD
from difflex.features.firing import image_key, random_numbers
from difflex.records import Shot

COUNT = 60
MOMENTS = (1000.0, 500.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both books, of images each seen at two timesteps."""
    made = tmp_path_factory.mktemp("collected")
    collected(made, [*range(COUNT)], MOMENTS)
    return made


def everything(place: int = 0) -> Tensor:
    """All codes of a site: [image, timestep, token, feature]."""
    return torch.stack([torch.stack([planted(image, SITES[place], moment) for moment in MOMENTS]) for image in range(COUNT)])


def book(folder: Path, place: int = 0) -> Book:
    return Book.open(folder / f"{SITES[place].folder}.sqlite")


def is_held_out(image: int) -> bool:
    return image % 5 == 0


def number_of(shown: Shot) -> int:
    return int(shown.prompt.split()[1])


def contents(path: Path) -> list[list[tuple]]:
    """All rows of all tables."""
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
    found = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables]
    connection.close()
    return found


@pytest.mark.parametrize("place", [0, 1])
def test_the_top_examples_are_the_top_of_all(folder: Path, place: int):
    peaks = everything(place).flatten(1, 2).amax(1)
    with book(folder, place) as made:
        for feature in range(SIZE):
            for split in ("train", "held-out"):
                mine = [image for image in range(COUNT) if is_held_out(image) == (split == "held-out")]
                ranked = sorted((p for p in mine if peaks[p, feature] > 0), key=lambda p: -float(peaks[p, feature]))
                examples = made.examples(feature, "top", split)
                shown = [number_of(made.shots([each.shot])[each.shot].shot) for each in examples]
                assert shown == ranked[: FEW.top_examples]
                assert [each.peak for each in examples] == pytest.approx([float(peaks[p, feature]) for p in shown])
                assert [each.rank for each in examples] == [*range(len(shown))]


def test_the_map_of_an_example_is_where_the_feature_fires_in_that_very_shot(folder: Path):
    codes = everything()
    with book(folder) as made:
        for each in [example for feature in range(SIZE) for example in made.examples(feature)]:
            seen = made.shots([each.shot])[each.shot]
            assert seen.shot.timestep is not None and seen.shot.split == each.split
            here = codes[number_of(seen.shot), MOMENTS.index(seen.shot.timestep), :, each.feature]
            if each.kind == "silent":
                assert codes[number_of(seen.shot), :, :, each.feature].max() <= 0
                continue
            assert each.map.tokens == tuple((here > 0).nonzero()[:, 0].tolist())
            assert each.map.values == pytest.approx(here[here > 0].tolist(), rel=1e-4, abs=1e-4 * each.peak)
            assert each.peak == pytest.approx(float(codes[number_of(seen.shot), :, :, each.feature].max()))


def test_no_image_is_shown_twice_among_the_examples_of_a_feature(folder: Path):
    with book(folder) as made:
        for feature in range(SIZE):
            shots = made.shots(each.shot for each in made.examples(feature))
            files = [shots[each.shot].image.file for each in made.examples(feature)]
            assert len(files) == len(set(files)) > 0


def test_images_drawn_at_random_are_those_of_the_lowest_draws(folder: Path):
    peaks = everything().flatten(1, 2).amax(1)
    with book(folder) as made:
        for feature in range(SIZE):
            mine = [image for image in range(COUNT) if not is_held_out(image) and peaks[image, feature] > 0]
            keys = torch.tensor([image_key(shot(image, 0.0)) for image in mine], dtype=torch.int64)
            draws = random_numbers(keys, torch.full_like(keys, feature), FEW.seed)
            chosen = {mine[place] for place in draws.argsort()[: FEW.random_examples].tolist()}
            top = {number_of(made.shots([each.shot])[each.shot].shot) for each in made.examples(feature, "top", "train")}
            examples = made.examples(feature, "quantile", "train")
            assert {number_of(made.shots([each.shot])[each.shot].shot) for each in examples} == chosen - top
            assert [each.peak for each in examples] == sorted((each.peak for each in examples), reverse=True)
            assert all(each.quantile is not None and 0 < each.quantile < 1 for each in examples)


def test_silent_images_are_silent_and_as_many_as_asked_where_there_are_enough(folder: Path):
    with book(folder) as made:
        assert [len(made.examples(SIZE - 1, "silent", split)) for split in ("train", "held-out")] == [
            FEW.silent_examples,
            FEW.silent_examples,
        ]
        assert made.examples(SIZE - 1, "top") == made.examples(SIZE - 1, "quantile") == []


def test_figures_are_those_of_all_codes(folder: Path):
    codes = everything()
    flat = codes.flatten(0, 2)
    with book(folder) as made:
        assert made.about.tokens == len(flat) and made.about.images == COUNT and made.about.timesteps == MOMENTS
        assert made.about.shots == {"train": 96, "held-out": 24} and made.about.grid == GRID
        for row in made.features():
            mine = flat[:, row.feature]
            firing = mine[mine > 0]
            assert row.firings == len(firing) and row.density == pytest.approx(len(firing) / len(flat))
            assert row.shots == int((codes[..., row.feature] > 0).any(2).sum())
            assert row.negative_share == pytest.approx(float((mine < 0).float().mean()))
            assert row.negative_peak == pytest.approx(min(0.0, float(mine.min())))
            assert sum(row.histogram.counts) == row.firings
            assert row.activity == pytest.approx((codes[..., row.feature] > 0).float().mean((0, 2)).tolist())
            if not row.firings:
                assert (row.peak, row.area, row.spread, row.coverage) == (0.0, None, None, None)
                continue
            assert row.peak == pytest.approx(float(firing.max())) and row.mean == pytest.approx(float(firing.mean()))
            assert row.area == pytest.approx(row.firings / row.shots / 16)


def test_the_histogram_holds_every_value_between_its_edges(folder: Path):
    values = everything().flatten(0, 2)[:, 3]
    with book(folder) as made:
        histogram = made.feature(3).histogram
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        assert count == int(((values >= low) & (values < high)).sum())


def test_figures_of_place_have_their_meaning(folder: Path):
    codes = everything()
    with book(folder) as made:
        for row in made.features()[:-1]:
            mine = codes[..., row.feature].clamp_min(0).reshape(-1, *GRID).double()
            outer = torch.ones(GRID, dtype=torch.bool)
            outer[1:-1, 1:-1] = False
            assert row.border == pytest.approx(float(mine[:, outer].sum() / mine.sum() / outer.double().mean()))
            shares = mine.sum(0).flatten() / mine.sum()
            assert row.position == pytest.approx(float((shares - 1 / 16).clamp_min(0).sum()), abs=1e-6)
            top = made.examples(row.feature, "top")
            covered = [sum(value >= COVER_THRESHOLD * row.peak for value in each.map.values) / 16 for each in top]
            assert row.coverage == pytest.approx(sum(covered) / len(covered), abs=0.02)
            assert row.spread is not None and row.concentration is not None
            assert 0 <= row.spread < 1 and 0.25 <= row.concentration <= 1


def test_spread_and_concentration_of_known_maps():
    from difflex.features.entries import LEVELS
    from difflex.features.examples import FeatureMaps
    from difflex.features.results import map_shapes

    def seen(*tokens: int, levels: tuple[int, ...] = ()) -> FeatureMaps:
        given = torch.tensor(levels or (LEVELS,) * len(tokens)).to(torch.int16)
        one, peak = torch.zeros(1, dtype=torch.int32), torch.ones(1)
        none = torch.zeros(1, 0, dtype=torch.int32)
        return FeatureMaps(one, one, peak, one.long(), one + len(tokens), none, torch.tensor(tokens).to(torch.int16), given)

    point = map_shapes(seen(5), 1, GRID)
    assert (float(point.spread[0]), float(point.concentration[0])) == (0.0, 1.0)
    corners = map_shapes(seen(0, 15), 1, GRID)
    assert float(corners.spread[0]) == pytest.approx(0.5) and float(corners.concentration[0]) == pytest.approx(0.5)
    uneven = map_shapes(seen(0, 1, 2, 3, levels=(LEVELS, LEVELS // 3, LEVELS // 3, LEVELS // 3)), 1, GRID)
    assert float(uneven.concentration[0]) == pytest.approx(0.5, abs=1e-4)


def test_fellows_are_features_that_fire_beside_and_not_by_chance():
    from difflex.features.examples import FeatureMaps
    from difflex.features.results import firing_neighbours

    beside = torch.tensor([[1, 2], [1, 2], [1, -1], [2, -1]], dtype=torch.int32)
    groups = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    nothing = FeatureMaps.empty(2)._replace(groups=groups, coactive=beside)
    found = firing_neighbours(nothing, torch.tensor([0.1, 0.01, 0.3]))
    assert [(each.feature, each.value) for each in found[0]] == [(1, 0.75)], "feature 2 is everywhere"


def test_nearest_directions_are_those_of_the_highest_cosine():
    from difflex.features.results import direction_neighbours

    directions = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = directions @ directions.T - 3 * torch.eye(20)
    for feature, found in enumerate(direction_neighbours(directions)):
        assert [each.feature for each in found] == cosines[feature].argsort(descending=True)[: len(found)].tolist()
        assert [each.value for each in found] == pytest.approx(
            cosines[feature].sort(descending=True).values[: len(found)].tolist()
        )


def test_the_order_and_the_batches_of_images_do_not_matter(folder: Path, tmp_path: Path):
    order = [*range(COUNT)]
    random.Random(3).shuffle(order)
    collected(tmp_path, order, MOMENTS, batch=7)
    for place in (0, 1):
        with book(folder, place) as one, book(tmp_path, place) as other:
            for feature in range(SIZE):
                for a, b in zip(one.examples(feature), other.examples(feature), strict=True):
                    assert (a.kind, a.split, a.rank, a.peak, a.quantile, a.map) == (
                        b.kind,
                        b.split,
                        b.rank,
                        b.peak,
                        b.quantile,
                        b.map,
                    )
                    assert one.shots([a.shot])[a.shot].shot == other.shots([b.shot])[b.shot].shot


def test_a_image_that_comes_twice_is_one_example(folder: Path, tmp_path: Path):
    collected(tmp_path, [*range(COUNT), *range(20)], MOMENTS)
    with book(folder) as one, book(tmp_path) as other:
        for feature in range(SIZE):
            kept = [[(each.kind, each.split, each.rank, each.peak) for each in made.examples(feature)] for made in (one, other)]
            assert kept[0] == kept[1]


def test_sorting_in_at_any_moment_gives_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.features.examples.PENDING_MAPS", 0)
    monkeypatch.setattr("difflex.features.examples.COPIED_MAPS", 7)
    monkeypatch.setattr("difflex.features.firing.ENCODED_TOKENS", 9)
    collected(tmp_path, [*range(COUNT)], MOMENTS)
    assert all(contents(folder / f"{site.folder}.sqlite") == contents(tmp_path / f"{site.folder}.sqlite") for site in SITES)


def test_only_images_that_are_shown_stay_and_all_of_them(folder: Path, tmp_path: Path):
    shown = set()
    for place in (0, 1):
        with book(folder, place) as made:
            shown |= {image.file for image in made.images()}
    assert {path.name for path in (folder / "images").iterdir()} == shown
    there = ImageAlbum(tmp_path / "images").add(painted(10_000))[0].file
    collected(tmp_path, [*range(20)], MOMENTS)
    assert (tmp_path / "images" / there).exists(), "what others show is not touched"


def test_killed_and_resumed_gives_the_very_book(tmp_path: Path):
    script = Path(__file__).parent / "fake_collect.py"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    collected(whole, [*range(120)], MOMENTS)
    state, stamp = broken / "state.safetensors", 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, script, broken], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "begins\n"
        while not state.exists() or state.stat().st_mtime_ns == stamp:
            assert process.poll() is None, "it was to be killed before it ended"
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        stamp = state.stat().st_mtime_ns
    subprocess.run([sys.executable, script, broken, "--delay", "0"], check=True, capture_output=True)
    assert not (broken / "state.safetensors").exists()
    for site in SITES:
        assert contents(whole / f"{site.folder}.sqlite") == contents(broken / f"{site.folder}.sqlite")


def test_a_pass_goes_on_where_it_was_and_begins_anew_when_asked_for_something_else(tmp_path: Path):
    starts: list[int] = []

    class Stopped(Exception):
        pass

    def stopping(start: int):
        starts.append(start)
        for number, each in enumerate(source([*range(COUNT)], MOMENTS)(start)):
            if number == 4:
                raise Stopped
            yield each

    def run(data: str) -> None:
        state = tmp_path / "state.safetensors"
        album = ImageAlbum(tmp_path / "images")
        collect(subjects(tmp_path), stopping, album, data=data, checkpoint=state, config=FEW, save_seconds=0.0, progress=False)

    for data in ("one", "one", "two"):
        with pytest.raises(Stopped):
            run(data)
    assert starts == [0, 20, 0]


def test_atoms_show_the_patch_they_are_whether_the_stream_shows_it_or_not(tmp_path: Path):
    asked: list[Shot] = []

    def draw(shots):
        asked.extend(shots)
        return [painted(number_of(each)) for each in shots]

    patches = {0: AtomLocation(shot(3, 500.0), 7), 2: AtomLocation(shot(700, 1000.0), 1), 4: AtomLocation(shot(700, 500.0), 2)}
    given = [subject.__class__(**{**vars(subject), "patches": patches}) for subject in subjects(tmp_path)]
    flow, album = source([*range(20)]), ImageAlbum(tmp_path / "images")
    collect(given, flow, album, data="x", checkpoint=tmp_path / "s", config=FEW, draw=draw, progress=False)
    assert [number_of(each) for each in asked] == [700]
    with book(tmp_path) as made:
        found = {feature: made.patch(feature) for feature in range(SIZE)}
    assert {feature for feature, patch in found.items() if patch} == {0, 2, 4}
    for feature, at in patches.items():
        patch = found[feature]
        assert patch is not None and patch.image is not None
        assert (patch.token, patch.shot) == (at.token, at.shot)
        assert album.open(patch.image.file).tobytes() == painted(number_of(at.shot)).tobytes()


def test_images_of_several_sizes_do_not_make_one_book(tmp_path: Path):
    def flow(start: int):
        yield met([1, 2], (1000.0,))
        small = met([3], (1000.0,))
        yield CollectBatch(
            small.images, [each.__class__(**{**vars(each), "values": each.values[:, :4]}) for each in small.activations]
        )

    with pytest.raises(BadInput, match="Images of several sizes: 16 tokens"):
        collect(subjects(tmp_path), flow, ImageAlbum(tmp_path), data="x", checkpoint=tmp_path / "s", config=FEW, progress=False)
