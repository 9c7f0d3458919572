"""Browsing in the web app: similar features, the page of a feature, maps of a dictionary, comparisons."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_study import new_study, write_book, write_dictionary, write_matches
from test_web import DATA, SAE, WALL, Site, numbers

from difflex.features.entries import FeatureNeighbour
from difflex.study import Study

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
    return study


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
