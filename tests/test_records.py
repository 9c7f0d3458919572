"""Records: frozen, and sites in one notation."""

from dataclasses import FrozenInstanceError

import pytest

from difflex.errors import BadInput
from difflex.records import KINDS, STREAMS, Edit, Shot, Site


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", STREAMS)
def test_the_notation_of_a_site_is_parsed_back(kind, stream):
    site = Site("down.2.1", kind, stream)
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("double.18", Site("double.18")),
        ("single.9:update", Site("single.9", "update")),
        ("double.18:text", Site("double.18", stream="text")),
        ("double.18:neurons:text", Site("double.18", "neurons", "text")),
        ("transformer.transformer_blocks.18", Site("transformer.transformer_blocks.18")),
    ],
)
def test_every_notation_of_a_site_is_parsed(text: str, site: Site):
    assert Site.parse(text) == site
    assert str(site) == text


def test_defaults_are_left_out_of_the_notation():
    assert str(Site.parse("double.18:residual:image")) == "double.18"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "../double.18",
        "/etc",
        "a/b",
        "a\\b:update",
        "a\0",
        ":text",
        "double.18:texts",
        "double.18:update:text:image",
        "double.18:text:text",
        "double.18:image:text",
    ],
)
def test_a_text_that_is_not_a_site_is_refused(text: str):
    with pytest.raises(BadInput, match="is not a site"):
        Site.parse(text)


def test_the_folder_of_a_site_has_no_colons():
    assert Site.parse("double.18:update:text").folder == "double.18+update+text"


def test_records_are_frozen():
    shot = Shot(model="mini-flux", pixels=(64, 64), steps=4, guidance=0.0)
    with pytest.raises(FrozenInstanceError):
        shot.seed = 1  # pyright: ignore[reportAttributeAccessIssue]
    assert len({shot, shot}) == 1


def test_a_site_may_be_written_as_text_wherever_a_record_has_one():
    edit = Edit(operation="add", site="double.2:text", dictionary="double.2:text/topk-8-k2", features=(1,))  # pyright: ignore
    assert (edit.site, edit.dictionary) == (Site("double.2", stream="text"), "topk-8-k2")
    assert Site.parse(edit.site) is edit.site
    with pytest.raises(BadInput, match="7 is not a site"):
        Edit(operation="add", site=7, dictionary="d", features=(1,))  # pyright: ignore


def test_a_larger_held_out_share_holds_the_smaller_one():
    def held_out(share: float) -> set[str]:
        return {str(number) for number in range(2000) if Shot.split_of(str(number), share) == "held-out"}

    assert held_out(0.1) < held_out(0.25) < held_out(0.5)
    assert [round(len(held_out(share)) / 2000, 1) for share in (0.1, 0.5, 0.8)] == [0.1, 0.5, 0.8]
    stored = {"0", "7", "9", "10", "33", "40", "44", "51", "57", "59"}
    assert held_out(0.1) & {str(number) for number in range(60)} == stored, "the split of a prompt stays what it was"
