"""The geometry of the judge and the scores of its readings; the benchmark measures its accuracy."""

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
    """Return the reading of a perfect judge."""
    specs, objects = drawn.specs, []
    for slot in range(int(specs.count[i])):
        names = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES, "row": ROWS, "column": COLUMNS}
        concepts = {group: group_names[getattr(specs, group)[i, slot]] for group, group_names in names.items()}
        objects.append(DetectedObject(concepts=concepts, confidence=1.0, mask=drawn.slots[i] == slot))
    ground, style = BACKGROUNDS[specs.background[i]], STYLES[specs.style[i]]
    return SceneReading(objects=tuple(objects), background=ground, style=style, count=COUNTS[len(objects) - 1], confidence=1.0)


def test_connected_regions_have_different_labels():
    drawn = draw(torch.arange(100))
    for labels, count in zip(connected_regions(drawn.slots >= 0), drawn.specs.count, strict=True):
        assert len(labels.unique()) - 1 == count


def test_all_attributes_of_a_true_reading_are_correct():
    drawn = draw(torch.arange(300))
    for i, caption in enumerate(drawn.captions):
        correct = correct_attributes(parse_caption(caption), true_reading(drawn, i))
        assert all(correct.values()), (caption, correct)


def test_attributes_of_a_wrong_image_are_correct_by_chance_only():
    drawn = draw(torch.arange(300))
    verdicts = [correct_attributes(parse_caption(drawn.captions[i]), true_reading(drawn, i + 1)) for i in range(299)]
    for attribute, chance in {"shape": 0.3, "colour": 0.3, "background": 0.3, "position": 0.5}.items():
        stated = [verdict[attribute] for verdict in verdicts if attribute in verdict]
        assert sum(stated) / len(stated) < chance, attribute


def test_an_attribute_is_scored_only_where_the_caption_states_it():
    drawn = draw(torch.arange(300))
    correct = correct_attributes(parse_caption("a star"), true_reading(drawn, 0))
    assert set(correct) == {"shape", "count"}


def test_a_missing_object_makes_every_stated_attribute_wrong():
    empty = SceneReading(objects=(), background="sky", style="flat", count="one", confidence=1.0)
    correct = correct_attributes(parse_caption("a red star above a blue ring on sky"), empty)
    assert correct == {"shape": False, "colour": False, "count": False, "background": True, "relation": False}


def test_the_judge_learns_and_is_saved_and_loaded(tmp_path):
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


def test_only_objects_in_the_region_count():
    drawn = draw(torch.arange(40) + HELD_OUT_SEEDS, SceneMix(1, 0, 0))
    inside = drawn.slots >= 0
    inside_scores = score(drawn.captions, drawn.images, load_judge(), inside)
    outside_scores = score(drawn.captions, drawn.images, load_judge(), ~inside)
    assert sum(s.correct["shape"] for s in inside_scores) > 36
    assert not any(s.correct["shape"] for s in outside_scores)


def test_a_concept_fills_the_region_only_in_images_that_show_it():
    drawn, judge = draw(torch.arange(30) + HELD_OUT_SEEDS, SceneMix(1, 0, 0)), load_judge()
    whole = torch.ones(64, 64, dtype=torch.bool)
    for concept in ("red", "star", "sky", "top", "cartoon"):
        visible = drawn.mask(concept).any(2).any(1)
        share = judge.share(drawn.images, concept, whole)
        assert ((share > 0.5) == visible).float().mean() > 0.95, concept


def test_images_of_another_size_are_refused():
    with pytest.raises(BadInput, match=r"3 x 64 x 64.*32"):
        Judge().eval().read(torch.zeros(1, 3, 32, 32))


def test_damaged_weights_are_named_in_the_error(tmp_path):
    (tmp_path / "judge.safetensors").write_bytes(b"nothing")
    with pytest.raises(BrokenFile, match=r"judge\.safetensors"):
        load_judge(tmp_path / "judge.safetensors")
