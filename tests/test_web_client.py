"""The client for notebooks, over a real socket."""

import socket
from collections.abc import Iterator

import pytest
from test_web import SAE, Site, book_study, study  # noqa: F401 (a fixture)

from difflex.errors import BadInput, DifflexError, UnknownName
from difflex.study import Study
from difflex.web import Client


@pytest.fixture(scope="module")
def site(study: Study) -> Iterator[Site]:  # noqa: F811 (the fixture)
    site = Site(study, token="right")
    yield site
    site.close()


@pytest.fixture
def client(site: Site) -> Client:
    return Client(f"http://127.0.0.1:{site.port}/?token=right")


def test_a_client_reads_what_the_pages_show(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    [dictionary] = client.dictionaries()
    name = f"{dictionary.site}/{dictionary.label}"
    assert name == SAE and dictionary.features == 12
    assert [tile.feature for tile in client.features(name, sort="peak", where="peak>10")] == [11, 10]
    assert [tile.feature for tile in client.features(name, where=["peak>5", "peak<8"], sort="feature", ascending=True)] == [5, 6]
    assert [tile.feature for tile in client.features(name, concept="red")] == [0, 4]
    assert [tile.feature for tile in client.features(name, words="ladders")] == [10]
    feature = client.feature(name, 9)
    assert feature.explanations[0].text.startswith("stars") and feature.figures["peak"] == 10.0
    assert client.search("red")[0].tile.feature == 1
    assert client.image(feature.examples[0].image).size == (8, 8)


def test_features_come_in_parts_as_they_are_needed(client: Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("difflex.web.client.PART", 5)
    asked = []
    read = client._read
    monkeypatch.setattr(client, "_read", lambda target: asked.append(target) or read(target))
    tiles = client.features(SAE, sort="feature", ascending=True)
    assert [next(tiles).feature for _ in range(5)] == [*range(5)] and len(asked) == 1
    assert [tile.feature for tile in tiles] == [*range(5, 12)] and len(asked) == 3


def test_what_the_server_refuses_is_an_error_with_its_sentence(client: Client, site: Site):
    with pytest.raises(UnknownName, match="numbered from 0 to 11"):
        client.feature(SAE, 12)
    with pytest.raises(UnknownName, match="nearest: double"):
        next(client.features("double.1:smooth/topk-12-k5"))
    with pytest.raises(BadInput, match="is not a condition"):
        next(client.features(SAE, where="peak"))
    with pytest.raises(UnknownName, match="missing"):
        client.image("0" * 32 + ".webp")
    with pytest.raises(UnknownName):
        client.image("../study.json")
    with pytest.raises(DifflexError, match="the token that difflex serve printed"):
        Client(f"http://127.0.0.1:{site.port}", token="wrong").dictionaries()
    assert Client(f"http://127.0.0.1:{site.port}", token="right").dictionaries()


def test_an_address_without_a_server_says_how_to_begin_one():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(BadInput, match=r"does not answer: .*difflex serve STUDY"):
        Client(f"http://127.0.0.1:{port}").search("red")
    for url in ("127.0.0.1:8765", "file:///etc/passwd", "http://"):
        with pytest.raises(BadInput, match="is not the address of a server"):
            Client(url)
