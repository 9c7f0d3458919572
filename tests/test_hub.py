"""Repositories of the hub: what is downloaded is what was pushed, or is refused, by the real client over a real socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub, fake_hub, use_hub

from difflex.dictionaries import Dictionary, DictionaryOrigin, Neurons
from difflex.errors import BadInput, BrokenFile, DifflexError, UnknownName
from difflex.hub import commit_files, dictionary_snapshot, prepare_repository, snapshot
from difflex.records import Site

NAME = "acme/flux"
PLACES = ("double.2+neurons/neurons-8-k2", "double.2+neurons/neurons-8-k4", "single.0+neurons/neurons-8-k2")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with three dictionaries at two sites in a repository, and an empty cache."""
    with fake_hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        files = {}
        for place in PLACES:
            site, _, label = place.partition("/")
            origin = DictionaryOrigin(site=Site.parse(site.replace("+", ":")), model="mini-flux")
            folder = Neurons(width=8, k=int(label[-1]), origin=origin).save(tmp_path / "made" / place)
            files |= {f"{place}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        hub.repository(NAME).commit(files)
        yield hub


def test_a_dictionary_is_the_one_that_was_pushed_and_names_its_commit(hub: FakeHub):
    loaded = Dictionary.from_pretrained(NAME, "single.0:neurons")
    assert loaded.name == "single.0:neurons/neurons-8-k2"
    assert loaded.origin.training["hub"] == {"repository": NAME, "commit": hub.repositories[NAME].branches["main"]}
    assert loaded.encode(torch.eye(8)).values.shape == (8, 2)


def test_only_the_files_of_the_dictionary_are_downloaded(hub: FakeHub):
    Dictionary.from_pretrained(NAME, label="neurons-8-k4")
    assert [
        request for request in hub.requests if "resolve" in request and "safetensors" in request and "-k4" not in request
    ] == []


def test_a_pinned_revision_stays_what_it_was(hub: FakeHub):
    first = hub.repositories[NAME].branches["main"]
    hub.repositories[NAME].commit({f"{PLACES[2]}/config.json": b"{}"})
    assert Dictionary.from_pretrained(NAME, "single.0:neurons", revision=first).size == 8
    with pytest.raises(UnknownName, match=r"site 'single.0:neurons' is unknown"):
        Dictionary.from_pretrained(NAME, "single.0:neurons")


def test_offline_loads_what_was_loaded_before_and_nothing_else(hub: FakeHub):
    Dictionary.from_pretrained(NAME, "single.0:neurons")
    hub.requests.clear()
    assert Dictionary.from_pretrained(NAME, "single.0:neurons", offline=True).size == 8
    with pytest.raises(UnknownName, match=r"not in the local cache, or not all of it. Run it once without --offline"):
        Dictionary.from_pretrained(NAME, "double.2:neurons", "neurons-8-k2", offline=True)
    with pytest.raises(UnknownName, match="acme/other is not in the local cache"):
        snapshot("acme/other", offline=True)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("site", "label", "message"),
    [
        ("single.1:neurons", None, "the site 'single.1:neurons' is unknown; nearest: single.0:neurons"),
        ("double.2:neurons", "neurons-8-k9", "the label 'neurons-8-k9' is unknown; nearest: neurons-8-k"),
        ("double.2:neurons", None, "has 2 dictionaries that fit.*double.2:neurons/neurons-8-k2, double.2:neurons/neurons-8-k4"),
        (None, None, "has 3 dictionaries that fit"),
    ],
)
def test_a_dictionary_that_is_not_one_is_refused_with_those_that_are(hub: FakeHub, site: str, label: str, message: str):
    with pytest.raises(DifflexError, match=message):
        dictionary_snapshot(NAME, site, label)


def test_a_repository_without_dictionaries_is_refused(hub: FakeHub):
    hub.repository("acme/other").commit({"model.safetensors": b"x", "a/b/config.json": b"{}"})
    with pytest.raises(UnknownName, match="has no dictionaries of difflex"):
        dictionary_snapshot("acme/other")


@pytest.mark.parametrize("name", ["flux", "a/b/c", "../flux", "a/..", "", "acme/flux dev", "https://huggingface.co/acme/flux"])
def test_what_is_no_name_of_a_repository_is_refused(name: str):
    with pytest.raises(BadInput, match="Write OWNER/NAME"):
        snapshot(name)


@pytest.mark.parametrize("path", ["../evil.py", "/etc/evil", "a/../../evil", "..\\evil", "C:evil"])
def test_a_repository_that_lists_files_outside_of_its_folder_is_refused(hub: FakeHub, tmp_path: Path, path: str):
    hub.listed.append(path)
    with pytest.raises(BrokenFile, match="outside of its folder"):
        snapshot(NAME)
    assert not list((tmp_path / "cache").rglob("*evil*")) and not [each for each in hub.requests if "resolve" in each]


@pytest.mark.parametrize("name", ["config.json", "dictionary.safetensors"])
def test_a_download_with_flipped_bits_is_refused_and_not_kept(hub: FakeHub, name: str):
    hub.damage = lambda path, content: bytes(255 - each for each in content) if path.endswith(name) else content
    with pytest.raises(BrokenFile, match=f"{name} of {NAME} did not match the checksum"):
        Dictionary.from_pretrained(NAME, "single.0:neurons")
    hub.damage = lambda path, content: content
    assert Dictionary.from_pretrained(NAME, "single.0:neurons").size == 8


def test_a_download_that_is_cut_off_is_refused_and_then_completed(hub: FakeHub):
    hub.damage = lambda path, content: content[:-5] if path.endswith("safetensors") else content
    with pytest.raises(UnknownName, match=r"peer closed connection.*Check the connection and run it again"):
        Dictionary.from_pretrained(NAME, "single.0:neurons")
    hub.damage = lambda path, content: content
    assert Dictionary.from_pretrained(NAME, "single.0:neurons").size == 8


@pytest.mark.parametrize("token", ["", "hf_wrong"])
def test_a_private_repository_needs_the_token(hub: FakeHub, token: str, monkeypatch: pytest.MonkeyPatch):
    hub.repositories[NAME].private = True
    assert dictionary_snapshot(NAME, "single.0:neurons").label == "neurons-8-k2"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        UnknownName, match=r"acme/flux is private.*(There is no token|does not accept the token).*HF_TOKEN"
    ) as error:
        dictionary_snapshot(NAME, "single.0:neurons")
    assert TOKEN not in str(error.value) and "hf_wrong" not in str(error.value)


def test_unknown_repositories_and_revisions_are_named(hub: FakeHub):
    with pytest.raises(UnknownName, match="acme/none does not exist on the hub"):
        snapshot("acme/none")
    with pytest.raises(UnknownName, match="has no revision v9"):
        snapshot(NAME, "v9")


def test_an_unreachable_hub_is_named(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnknownName, match="The hub cannot be used for acme/other"):
        snapshot("acme/other")


def test_a_commit_on_top_of_a_replaced_one_is_refused_whole(hub: FakeHub, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    parent = prepare_repository(NAME, private=False, revision=None)
    head = hub.repositories[NAME].commit({"b.txt": b"b"})
    with pytest.raises(BadInput, match="has changed during the push"):
        commit_files(NAME, {"a.txt": tmp_path / "a.txt"}, "Add a", None, parent)
    assert hub.repositories[NAME].branches["main"] == head
