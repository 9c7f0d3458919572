"""The judge's geometry and the scores that come from its readings; its accuracy stands in the benchmark."""

import pytest
import torch

from difflex.errors import BadInput, BrokenFile
from difflex.miniature.captions import parse_caption
from difflex.miniature.drawing import Scenes, draw
from difflex.miniature.judge import (
    DetectedObject,
    Judge,
    SceneReading,
    connected_regions,
    load_judge,
    save_judge,
    training_losses,
)
from difflex.miniature.scoring import correct_attributes, score, shares_correct
from difflex.miniature.world import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    COUNTS,
    HELD_OUT_SEEDS,
    ROWS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    SceneMix,
)


def true_reading(drawn: Scenes, i: int) -> SceneReading:
    """What a perfect judge would read."""
    specs, things = drawn.specs, []
    for slot in range(int(specs.count[i])):
        names = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "row": ROWS, "column": COLUMNS}
        concepts = {group: all_[getattr(specs, group)[i, slot]] for group, all_ in names.items()}
        things.append(DetectedObject(concepts=concepts, confidence=1.0, mask=drawn.slots[i] == slot))
    ground, style = BACKGROUNDS[specs.background[i]], STYLES[specs.style[i]]
    return SceneReading(objects=tuple(things), background=ground, style=style, count=COUNTS[len(things) - 1], confidence=1.0)


def test_connected_regions_are_told_apart():
    drawn = draw(torch.arange(100))
    for labels, count in zip(connected_regions(drawn.slots >= 0), drawn.specs.count, strict=True):
        assert len(labels.unique()) - 1 == count


def test_a_true_reading_scores_everything_right():
    drawn = draw(torch.arange(300))
    for i, caption in enumerate(drawn.captions):
        right = correct_attributes(parse_caption(caption), true_reading(drawn, i))
        assert all(right.values()), (caption, right)


def test_a_wrong_image_scores_wrong():
    drawn = draw(torch.arange(300))
    verdicts = [correct_attributes(parse_caption(drawn.captions[i]), true_reading(drawn, i + 1)) for i in range(299)]
    for attribute, chance in {"shape": 0.3, "colour": 0.3, "background": 0.3, "position": 0.5}.items():
        asked = [verdict[attribute] for verdict in verdicts if attribute in verdict]
        assert sum(asked) / len(asked) < chance, attribute


def test_an_attribute_is_scored_only_where_the_caption_states_it():
    drawn = draw(torch.arange(300))
    right = correct_attributes(parse_caption("a star"), true_reading(drawn, 0))
    assert set(right) == {"shape", "count"}


def test_a_missing_object_makes_every_stated_attribute_wrong():
    nothing = SceneReading(objects=(), background="sky", style="flat", count="one", confidence=1.0)
    right = correct_attributes(parse_caption("a red star above a blue ring on sky"), nothing)
    assert right == {"shape": False, "colour": False, "count": False, "background": True, "relation": False}


def test_the_judge_learns_and_survives_the_disk(tmp_path):
    torch.manual_seed(0)
    judge = Judge()
    history = list(training_losses(judge, 25, batch=8))
    assert history[-1] < 0.85 * history[0]
    save_judge(judge, tmp_path / "judge.safetensors")
    again = load_judge(tmp_path / "judge.safetensors")
    images = draw(torch.arange(3)).images
    assert torch.equal(judge(images)["shape"], again(images)["shape"])


def test_the_judge_in_the_package_reads_true_drawings():
    drawn = draw(torch.arange(60) + HELD_OUT_SEEDS)
    verdicts = shares_correct(score(drawn.captions, drawn.images, load_judge()))
    assert {group: share for group, share in verdicts.items() if share < 0.95} == {}


def test_only_what_lies_in_the_region_counts():
    drawn = draw(torch.arange(40) + HELD_OUT_SEEDS, SceneMix(1, 0, 0))
    inside = drawn.slots >= 0
    here = score(drawn.captions, drawn.images, load_judge(), inside)
    elsewhere = score(drawn.captions, drawn.images, load_judge(), ~inside)
    assert sum(s.correct["shape"] for s in here) > 36
    assert not any(s.correct["shape"] for s in elsewhere)


def test_a_concept_fills_the_region_where_it_is_and_no_other():
    drawn, judge = draw(torch.arange(30) + HELD_OUT_SEEDS, SceneMix(1, 0, 0)), load_judge()
    whole = torch.ones(64, 64, dtype=torch.bool)
    for concept in ("red", "star", "sky", "top", "cartoon"):
        there = drawn.mask(concept).any(2).any(1)
        share = judge.share(drawn.images, concept, whole)
        assert ((share > 0.5) == there).float().mean() > 0.95, concept


def test_images_of_another_size_are_refused():
    with pytest.raises(BadInput, match=r"3 x 64 x 64.*32"):
        Judge().eval().read(torch.zeros(1, 3, 32, 32))


def test_broken_weights_are_refused_by_name(tmp_path):
    (tmp_path / "judge.safetensors").write_bytes(b"nothing")
    with pytest.raises(BrokenFile, match=r"judge\.safetensors"):
        load_judge(tmp_path / "judge.safetensors")
