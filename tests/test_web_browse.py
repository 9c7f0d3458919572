"""Browsing in the web app: similar features, the page of a feature, maps of a dictionary, comparisons."""

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sample_study import new_study, write_book, write_dictionary, write_matches
from test_web import DATA, SAE, WALL, Reply, Site, numbers

from difflex.features import Book
from difflex.features.entries import Example, FeatureNeighbour, TokenMap
from difflex.features.explanations import Explanation, Judgement
from difflex.study import Study
from difflex.web.feature import average_map

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
    assert f'href="/image/{SAE}/48"' in page and "/paint?site=double.1%3Asmooth&amp;dictionary=topk-12-k4&amp;feature=8" in page


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
