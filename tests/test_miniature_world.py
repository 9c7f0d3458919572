"""The drawn world: scenes, images, masks and captions."""

import pytest
import torch

from difflex.errors import UnknownName
from difflex.miniature.captions import WORDS, parse_caption, write_captions
from difflex.miniature.drawing import draw
from difflex.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    CONCEPTS,
    HELD_OUT_SEEDS,
    PIXELS,
    ROWS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    SceneMix,
    held_out_combination,
    scenes,
    uniform,
)

SOME = torch.arange(200)


def test_a_scene_depends_on_its_seed_alone():
    alone, together = draw(torch.tensor([17])), draw(SOME)
    assert torch.equal(alone.images[0], together.images[17])
    assert alone.captions[0] == together.captions[17]


def test_uniform_numbers_are_uniform_and_unrelated():
    u = uniform(torch.arange(4000), 8)
    assert u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(u.T) - torch.eye(8)).abs().max() < 0.06


def test_training_never_shows_a_tenth_of_the_combinations():
    grid = torch.meshgrid(torch.arange(8), torch.arange(10), torch.arange(5), indexing="ij")
    assert held_out_combination(*grid).sum() == 40
    specs = scenes(torch.arange(20_000))
    exists = torch.arange(3) < specs.count[:, None]
    assert not held_out_combination(specs.shape, specs.colour, specs.texture)[exists].any()


def test_held_out_scenes_have_held_out_combinations_only():
    specs = scenes(torch.arange(2000), held_out=True)
    exists = torch.arange(3) < specs.count[:, None]
    assert held_out_combination(specs.shape, specs.colour, specs.texture)[exists].all()


def test_two_different_objects_differ_in_shape_and_colour():
    for held_out in (False, True):
        specs = scenes(torch.arange(2000), SceneMix(0, 1, 0), held_out)
        assert (specs.shape[:, 0] != specs.shape[:, 1]).all()
        assert (specs.colour[:, 0] != specs.colour[:, 1]).all()


def test_the_mix_gives_its_shares_of_scene_kinds():
    specs = scenes(torch.arange(6000), SceneMix(0.5, 0.3, 0.2))
    assert abs((specs.count == 1).float().mean() - 0.5) < 0.03
    assert abs((specs.count == 3).float().mean() - 0.1) < 0.03


def test_objects_never_touch():
    specs = scenes(torch.arange(3000), SceneMix(0, 1, 1))
    distance = (specs.centre[:, 0] - specs.centre[:, 1]).norm(dim=1) - specs.radius[:, 0] - specs.radius[:, 1]
    assert distance.min() > 1.0


def test_masks_are_where_the_concepts_are():
    drawn = draw(SOME)
    assert torch.equal(torch.stack([drawn.mask(shape) for shape in SHAPES]).sum(0) == 1, drawn.slots >= 0)
    assert torch.equal(torch.stack([drawn.mask(ground) for ground in BACKGROUNDS]).sum(0) == 1, drawn.slots < 0)
    plain_red = drawn.mask("red") & drawn.mask("plain") & (drawn.specs.style == 0)[:, None, None]
    red, green, _ = drawn.images.movedim(1, 0)
    assert (red - green)[plain_red].mean() > 0.5


def test_token_shares_are_the_mean_of_the_mask():
    drawn = draw(SOME[:8])
    mask = drawn.mask("circle").float()
    share = drawn.on_tokens("circle", 8)
    assert torch.allclose(share[:, 2, 3], mask[:, 16:24, 24:32].mean((1, 2)))
    assert share.shape == (8, 8, 8)


def test_an_unknown_concept_is_named_with_its_neighbours():
    with pytest.raises(UnknownName, match=r"'scquare'.*square"):
        draw(SOME[:1]).mask("scquare")


def test_images_have_their_size_range_and_contrast():
    drawn = draw(SOME)
    assert drawn.images.shape == (200, 3, PIXELS, PIXELS)
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1
    assert drawn.images.flatten(1).std(dim=1).min() > 0.01


def test_the_vocabulary_holds_every_concept():
    names = {name for group in CONCEPTS.values() for name in group}
    assert names <= set(WORDS)
    assert {"above", "below", "left", "right", "of", "two", "three"} <= set(WORDS)


def test_captions_hold_known_words_only_and_fit_the_text_length():
    captions = write_captions(scenes(torch.arange(5000)))
    assert {word for caption in captions for word in caption.split()} <= set(WORDS)
    assert max(len(caption.split()) for caption in captions) + 1 <= 26
    assert len(set(captions)) > 4500


def test_captions_are_true():
    specs = scenes(torch.arange(3000))
    for i, caption in enumerate(write_captions(specs)):
        request = parse_caption(caption)
        assert sum(item.count for item in request.objects) == int(specs.count[i]), caption
        assert request.background in (None, BACKGROUNDS[specs.background[i]])
        assert request.style in (None, STYLES[specs.style[i]])
        assert all(_shows(specs, i, item) for item in request.objects), caption


def _shows(specs, scene, item) -> bool:
    """Return whether the scene has as many of these objects as the caption says."""
    names = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "row": ROWS, "column": COLUMNS}
    fits = [
        all(getattr(item, g) in (None, n[getattr(specs, g)[scene, slot]]) for g, n in names.items())
        for slot in range(int(specs.count[scene]))
    ]
    return sum(fits) >= item.count


def test_relations_are_true():
    specs = scenes(torch.arange(3000), SceneMix(0, 1, 0))
    related = 0
    for i, caption in enumerate(write_captions(specs)):
        request = parse_caption(caption)
        if request.relation:
            related += 1
            slots = [SHAPES.index(item.shape) for item in request.objects]
            first, second = ([int(s) for s in specs.shape[i]].index(slot) for slot in slots)
            step = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}[request.relation]
            places = (specs.row[i], specs.column[i])[step[0]]
            assert (places[first] - places[second]).sign() == step[1], caption
    assert related > 1000


@pytest.mark.parametrize("word", ["two red stars above a blue circle on grass", "A BIG ring!", ""])
def test_words_of_users_are_parsed(word):
    request = parse_caption(word)
    assert len(request.objects) == (2 if "stars" in word else 1 if word else 0)
    assert request.unknown == (("big",) if "BIG" in word else ())


def test_scenes_of_held_out_seeds_can_be_drawn():
    assert draw(torch.arange(4) + HELD_OUT_SEEDS).images.isfinite().all()
