"""Browsing in the web app: similar features, the page of a feature, maps of a dictionary, comparisons."""

import base64
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from sample_study import new_study, write_book, write_dictionary, write_matches
from test_web import DATA, SAE, WALL, Reply, Site, numbers

from difflex.features import Book
from difflex.features.entries import Example, FeatureNeighbour, TokenMap
from difflex.features.explanations import Explanation, Judgement
from difflex.study import Study
from difflex.web.feature import average_map
from difflex.web.layout import NeighbourGraph, lay_out

ITDA, OTHER = "double.1:smooth/itda-12-k4", "double.2/topk-12-k4"
PLACE = f"/api/dictionaries/{SAE}"
NEIGHBOURS = {
    9: [
        FeatureNeighbour(3, "firing", 0.6),
        FeatureNeighbour(5, "firing", 0.2),
        FeatureNeighbour(7, "direction", 0.7),
        FeatureNeighbour(3, "direction", 0.5),
    ]
}


def neighbour_study(folder: Path) -> Study:
    """A study with one book of 12 features, of which two are explained and one has neighbours."""
    study = new_study(folder)
    write_dictionary(study, SAE)
    write_book(study, SAE, explained={9: ("stars", 0.9), 10: ("ladders", 0.6)}, neighbours=NEIGHBOURS)
    write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
    with Book.edit(study.book(*study.find_dictionary(SAE))) as book:
        own, other = book.examples(8, "top")[0].id, book.examples(2, "top")[0].id
        explanation = Explanation(feature=8, backend="judge", protocol="heldout", text="rings")
        book.add_explanation(
            explanation, [Judgement(own, True, 0.75), Judgement(other, False, 0.625), Judgement(None, True, 0.5)]
        )
    return study


def content(site: Site, target: str) -> bytes:
    """The bytes at an address."""
    with urlopen(f"http://127.0.0.1:{site.port}{target}", timeout=20) as answer:
        return answer.read()


def ballot(site: Site, **changes: object) -> dict[str, object]:
    """A vote on the explanation of feature 8."""
    [entry] = site.json(f"{DATA}/8")["explanations"]  # pyright: ignore
    names = ("backend", "protocol", "text_fingerprint")
    return {name: entry[name] for name in names} | {"voter": "somebody-1", "agrees": True} | changes


def cast(site: Site, vote: object, feature: int = 8, **headers: str) -> Reply:
    body = json.dumps(vote).encode() if not isinstance(vote, bytes) else vote
    return site.get(f"{DATA}/{feature}/votes", "POST", body, **{"Content-Type": "application/json", **headers})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return neighbour_study(tmp_path_factory.mktemp("browse") / "study")


@pytest.fixture(scope="module")
def site(study: Study) -> Iterator[Site]:
    site = Site(study)
    yield site
    site.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with three dictionaries: two whose books have the same images, and one of which the book has others."""
    study = neighbour_study(tmp_path_factory.mktemp("pair") / "study")
    write_dictionary(study, ITDA)
    write_book(study, ITDA)
    write_matches(study, ITDA, (0.8, 0.3, 0.8, 0.2), per_concept=1)
    write_dictionary(study, OTHER)
    write_book(study, OTHER, shade=50)
    site = Site(study)
    yield site
    site.close()


def test_a_wall_of_what_is_like_a_feature_shows_each_neighbour_once_nearest_first(site: Site):
    assert numbers(site, "like=9") == [9, 7, 3, 5] and numbers(site, "like=0") == [0]
    assert numbers(site, "like=9&where=peak>5") == [9, 7, 5] and numbers(site, "like=9&q=stars") == [9]
    page = site.get(f"{WALL}?like=9&where=peak>5").text
    assert "like feature 9" in page and 'href="?where=peak%3E5" aria-label="Remove: like feature 9"' in page
    assert f'href="{WALL}?like=9"' in site.get(f"{WALL}/9").text
    assert site.get(f"{DATA}?like=12").status == 404 and site.get(f"{DATA}?like=-1").status == 422


def test_an_explanation_shows_what_the_judge_saw(site: Site):
    [entry] = site.json(f"{DATA}/8")["explanations"]  # pyright: ignore
    assert [(image["fires"], image["score"], image["shot"]) for image in entry["judged"]] == [
        (True, 0.75, 48),
        (False, 0.625, 12),
    ]
    page = site.get(f"{WALL}/8").text
    assert "2 judged images" in page and 'class="wrong">judged 0.62, wrong' in page
    assert f'href="/image/{SAE}/48"' in page and "/paint?" not in page, "there is no model"


def test_a_vote_is_stored_in_the_study_once_for_each_browser(site: Site, study: Study):
    assert cast(site, ballot(site)).status == 200
    for voter, agrees in (("somebody-2", True), ("somebody-1", False)):
        reply = cast(site, ballot(site, voter=voter, agrees=agrees), Origin=f"http://127.0.0.1:{site.port}")
        assert reply.status == 200
    [entry] = site.json(f"{DATA}/8")["explanations"]  # pyright: ignore
    assert (entry["agree"], entry["disagree"]) == (1, 1) == (json.loads(reply.text)["agree"], json.loads(reply.text)["disagree"])
    votes = json.loads(study.votes(*study.find_dictionary(SAE), 8).read_text())["votes"]
    assert {"voter": "somebody-1", "feature": 8, "backend": "judge", "protocol": "heldout", "agrees": False}.items() <= votes[
        1
    ].items()
    assert "Agree <output>1</output>" in site.get(f"{WALL}/8").text


def test_a_vote_that_cannot_be_stored_is_refused(site: Site, study: Study, tmp_path: Path):
    assert cast(site, ballot(site), Origin="http://evil.example").status == 403
    assert cast(site, b"agrees=true", 8, **{"Content-Type": "text/plain"}).status == 422 == cast(site, b"{").status
    for changes in ({"voter": "../../x"}, {"agrees": "perhaps"}, {"more": 1}, {"backend": "b" * 300}):
        assert cast(site, ballot(site, **changes)).status == 422, changes
    assert cast(site, ballot(site), feature=12).status == 404 == cast(site, ballot(site, backend="another")).status
    reply = cast(site, ballot(site, text_fingerprint="of another text"))
    assert reply.status == 409 and "Reload" in reply.text
    stuck = neighbour_study(tmp_path / "study")
    (stuck.folder / "votes").write_text("a file, as if nothing could be written here")
    other = Site(stuck)
    try:
        reply = cast(other, ballot(other))
        assert reply.status == 409 and "cannot be written" in reply.text and other.get(f"{WALL}/8").status == 200
    finally:
        other.close()


def test_a_damaged_file_of_votes_hides_no_feature(site: Site, study: Study):
    path = study.votes(*study.find_dictionary(SAE), 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{")
    assert site.get(f"{WALL}/9").status == 200
    vote = ballot(site) | {
        name: site.json(f"{DATA}/9")["explanations"][0][name]  # pyright: ignore
        for name in ("backend", "protocol", "text_fingerprint")
    }
    reply = cast(site, vote, feature=9)
    assert reply.status == 409 and "Delete it" in reply.text


def test_the_average_of_the_maps_is_that_of_random_images():
    maps = [TokenMap((0, 2), (4.0, 2.0)), TokenMap((2,), (1.0,))]
    examples = [
        Example(feature=0, kind="quantile", split="train", rank=i, shot=i, peak=4.0, map=where) for i, where in enumerate(maps)
    ]
    top = replace(examples[0], kind="top", map=TokenMap((3,), (9.0,)))
    average = average_map([top, *examples], (2, 2))
    assert average is not None and average.images == 2 and [*base64.b64decode(average.levels)] == [255, 0, 191, 0]
    assert average_map([top], (2, 2)) is None and average_map(examples, None) is None


def planted_graph(groups: int = 12, of_each: int = 40, known: float = 0.8) -> tuple[NeighbourGraph, np.ndarray]:
    """A graph in which most neighbours of a feature are of its group, and the groups; two features have no neighbours."""
    rng, size = np.random.default_rng(5), groups * of_each
    group = rng.permutation(np.arange(size) % groups)
    source = np.repeat(np.arange(size), 8)
    own = np.array([rng.choice(np.flatnonzero(group == group[feature])) for feature in source])
    target = np.where(rng.random(len(source)) < known, own, rng.integers(0, size, len(source)))
    value, kind = rng.uniform(0.2, 0.8, len(source)), np.arange(len(source)) % 2
    return NeighbourGraph.of(size + 2, source, target, value, kind), group


def test_features_of_a_planted_group_are_together_on_the_map():
    graph, group = planted_graph()
    shares: list[float] = []
    places = lay_out(graph, shares.append)
    assert np.isnan(places[-2:]).all() and np.nanmin(places) >= 0 and np.nanmax(places) <= 1 and shares[-1] == 1
    points = places[:-2]
    distance = np.square(points[:, None] - points[None]).sum(-1) + np.eye(len(points)) * 9
    nearest = np.argsort(distance, axis=1)[:, :10]
    assert (group[nearest] == group[:, None]).mean() > 0.9, "1 in 12 by chance"
    assert np.array_equal(places, lay_out(graph), equal_nan=True), "the same graph has the same map"


@pytest.mark.parametrize("pairs", [[], [(0, 1)], [(0, 1), (2, 3)], [(0, 0)]])
def test_a_graph_of_few_features_has_a_map(pairs: list[tuple[int, int]]):
    source, target = np.array(pairs, dtype=int).reshape(-1, 2).T
    places = lay_out(NeighbourGraph.of(5, source, target, np.ones(len(pairs)), np.zeros(len(pairs))))
    connected = {feature for pair in pairs if pair[0] != pair[1] for feature in pair}
    assert set(np.flatnonzero(~np.isnan(places[:, 0]))) == connected


def mapped(site: Site) -> dict[str, Any]:
    """The map of the dictionary, when it is computed."""
    deadline = time.monotonic() + 20
    while (answer := site.json(f"{PLACE}/map"))["done"] < 1:  # pyright: ignore
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return answer  # pyright: ignore


def test_a_map_has_a_place_for_each_feature_with_neighbours(site: Site):
    answer = mapped(site)
    assert answer["features"] == 12 and answer["placed"] == 4 and answer["columns"][0]["column"] == "ap"
    places = np.frombuffer(content(site, f"{PLACE}/map/places"), "<u2").reshape(12, 2)
    assert sorted(set(np.flatnonzero(places[:, 0] != 65535))) == [3, 5, 7, 9]
    [ring] = [entry for entry in answer["concepts"] if entry["concept"] == "ring"]
    assert ring["features"] == 2 and [ring["x"], ring["y"]] in places[[3, 7]].tolist()
    concepts = content(site, f"{PLACE}/map/colours/concept")
    assert [answer["legend"][number] for number in concepts[:8]] == ["red", "blue", "star", "ring"] * 2 and concepts[
        8:
    ] == b"\xff" * 4
    density = content(site, f"{PLACE}/map/colours/peak")
    assert len(density) == 12 and density[0] == 0 and density[11] == 254
    page = site.get(f"/map/{SAE}").text
    assert "Map of" in page and f'href="/map/{SAE}"' in site.get(WALL).text


def test_a_wall_shows_the_features_in_a_part_of_the_map(site: Site):
    mapped(site)
    places = np.frombuffer(content(site, f"{PLACE}/map/places"), "<u2").reshape(12, 2)
    assert sorted(numbers(site, "within=0,0,1,1")) == [3, 5, 7, 9]
    x, y = (places[7] / 65534).tolist()
    assert numbers(site, f"within={max(0, x - 1e-3)},{max(0, y - 1e-3)},{min(1, x + 1e-3)},{min(1, y + 1e-3)}") == [7]
    assert "in a part of the map" in site.get(f"{WALL}?within=0,0,1,1").text
    for text in ("1,1,0,0", "0,0,1", "0,0,1,nan", "a,b,c,d", "-1,0,1,1"):
        assert site.get(f"{DATA}?within={text}").status == 422, text
    assert site.get(f"{PLACE}/map/colours/beauty").status == 404


def test_a_map_follows_a_book_that_is_made_again(tmp_path: Path):
    study = neighbour_study(tmp_path / "study")
    site = Site(study)
    try:
        assert mapped(site)["placed"] == 4
        write_book(study, SAE, data="of other images")
        assert mapped(site)["placed"] == 0 and numbers(site, "within=0,0,1,1") == []
    finally:
        site.close()


def test_two_dictionaries_are_compared_by_the_concepts_that_one_detects(pair: Site):
    answer = pair.json(f"/api/compare?left={SAE}&right={ITDA}")
    rows = {row["concept"]: (row["left"], row["right"]) for row in answer["concepts"]}  # pyright: ignore
    assert [*rows] == ["red", "star", "blue"], "best detected first; neither detects a ring"
    assert [tile["feature"] for tile in rows["red"]] == [0, 0] and [tile["ap"] for tile in rows["star"]] == [0.6, 0.8]
    page = pair.get("/compare").text
    assert "Compare" in page and f'href="{WALL}/0"' in page and f'href="/d/{ITDA}/0"' in page
    assert "/compare?left=double.1%3Asmooth%2Ftopk-12-k4" in pair.get(WALL).text
    assert f"<option>{ITDA}</option>" in pair.get(f"{WALL}/9").text


def test_features_that_fire_at_the_same_places_of_the_same_images_match(pair: Site):
    answer = pair.json(f"/api/compare/7?left={SAE}&right={ITDA}")
    assert answer["tile"]["feature"] == 7 and len(answer["images"]) == 1  # pyright: ignore
    [match] = answer["matches"]  # pyright: ignore
    assert match["tile"]["feature"] == 7 and match["similarity"] == pytest.approx(1.0)
    assert match["covered"] == [answer["images"][0]["covered"]]  # pyright: ignore
    page = pair.get(f"/compare?left={SAE}&right={ITDA}&feature=7").text
    assert "similarity 1.00" in page and f'href="/image/{ITDA}/42"' in page


def test_a_comparison_that_is_not_possible_says_why(pair: Site):
    for target, status in (
        (f"/api/compare/12?left={SAE}&right={ITDA}", 404),
        (f"/compare?left={SAE}&right=double.9/topk-1-k1", 404),
    ):
        assert pair.get(target).status == status
    assert pair.get(f"/compare?left={SAE}&right={ITDA}&feature=-1").status == 422
    other = f"/compare?left={SAE}&right={OTHER}&feature=7"
    assert "None of its strongest images is in the book" in pair.get(other).text
    assert pair.json(f"/api/compare/7?left={SAE}&right={OTHER}")["matches"] == []  # pyright: ignore


def test_comparing_reads_no_table_from_end_to_end(pair: Site, study: Study):
    with Book.open(study.book(*study.find_dictionary(SAE))) as book:
        connection, plans = book._connection, list[str]()

        def explain(query: str, *values: object) -> list[sqlite3.Row]:
            plans.extend(row["detail"] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values))
            return []

        book._query = explain  # pyright: ignore
        book.shots_of("a.webp")
        book.features_in([3, 4], 10)
        book.examples_in([3, 4], [1, 2])
    assert len(plans) >= 4 and not [plan for plan in plans if re.match(r"SCAN (?!json_each)", plan)], plans


def test_dictionaries_of_another_study_are_compared_with(study: Study, tmp_path: Path):
    other = new_study(tmp_path / "other", model="another")
    write_dictionary(other, OTHER)
    write_book(other, OTHER, shade=50)
    write_matches(other, OTHER, (0.8, 0.3, 0.8, 0.2), per_concept=1)
    site = Site(study, against=other)
    try:
        page = site.get("/compare").text
        assert f'value="against/{OTHER}" selected' in page and f"{OTHER} of other" in page, "the other study is the first choice"
        assert f'href="{WALL}/0"' in page and f'href="/d/{OTHER}' not in page, "the other study has no pages here"
        answer = site.json(f"/api/compare?left={SAE}&right=against/{OTHER}")
        assert answer["right"]["study"] == "other" and answer["left"]["study"] == ""  # pyright: ignore
        image = answer["concepts"][0]["right"]["image"]  # pyright: ignore
        assert not (study.images / image).exists() and site.get(f"/images/{image}").status == 200
        assert site.get(f"/api/compare?left={SAE}&right=against/{SAE}").status == 404
        assert site.get(f"/compare?left={SAE}&right=against/{OTHER}&feature=1").status == 200
    finally:
        site.close()
    site = Site(study)
    try:
        assert site.get(f"/api/compare?left={SAE}&right=against/{OTHER}").status == 404
    finally:
        site.close()


def test_of_large_maps_only_the_strongest_examples_are_shown(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.web.feature.MOST_BYTES", 12)
    examples = site.json(f"{DATA}/8")["examples"]  # pyright: ignore
    assert [example["shot"] for example in examples] == [48, 49, 50], "three maps of four tokens fit"
