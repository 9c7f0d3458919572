"""Concepts in words: trials and pairs, files, and the judges by CLIP embeddings and by a VLM."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from difflex.effects.concept_specs import ConceptSpec, Verdicts, read_concepts, similarity_judge, vlm_judge
from difflex.effects.judging import SteeringTrial
from difflex.errors import BadInput
from difflex.explanation import PresenceAnswer, PresenceQuestion
from difflex.records import Rectangle

LEFT = Rectangle(0.0, 0.0, 0.5, 1.0)
RED = ConceptSpec(
    concept="red", group="colour", instead=("green", "blue"), prompts=("a {} ball", "a {} house on a hill"), region=LEFT
)
COLOURS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}
SPECS: Mapping[str, ConceptSpec] = {"red": RED}


def image(left: str, right: str) -> Tensor:
    """Two halves of plain colours."""
    halves = [torch.tensor(COLOURS[colour]).view(3, 1, 1).expand(3, 4, 2) for colour in (left, right)]
    return torch.cat(halves, dim=2)


def by_mean(pixels: Tensor) -> Tensor:
    return F.normalize(pixels.mean((2, 3)), dim=1)


def judge(unedited: Tensor) -> Verdicts:
    words = lambda texts: torch.tensor([COLOURS[text] for text in texts])  # noqa: E731
    return similarity_judge(by_mean, words, 10.0, SPECS, lambda trials: unedited)


def test_trials_alternate_prompts_and_other_concepts_with_different_seeds():
    task = RED.task(6)
    assert [trial.prompt for trial in task.trials] == [
        "a green ball",
        "a green house on a hill",
        "a blue ball",
        "a blue house on a hill",
        "a green ball",
        "a green house on a hill",
    ]
    assert [trial.seed for trial in task.trials] == list(range(6)) and {trial.region for trial in task.trials} == {LEFT}
    assert [RED.with_concept(trial).prompt for trial in task.trials[:2]] == ["a red ball", "a red house on a hill"]
    assert RED.rest(task.trials[3]) == "a something house on a hill"


def test_pairs_differ_only_in_the_concept_and_are_unique():
    assert RED.pairs(100)[:2] == [("a red ball", "a green ball"), ("a red house on a hill", "a green house on a hill")]
    assert len(set(RED.pairs(100))) == len(RED.pairs(100)) == 4 and len(RED.pairs(3)) == 3


@pytest.mark.parametrize("wrong", [{"instead": ()}, {"prompts": ("a ball",)}, {"prompts": ()}, {"concept": ""}])
def test_an_incomplete_concept_is_refused(wrong: dict[str, object]):
    words = {"concept": "red", "group": "colour", "instead": ("green",), "prompts": ("a {}",), **wrong}
    with pytest.raises(BadInput, match="is incomplete"):
        ConceptSpec(**words)


def test_the_similarity_judge_finds_a_concept_only_in_its_region():
    trials = RED.task(3).trials
    unedited = torch.stack([image("green", "green"), image("green", "blue"), image("blue", "red")])
    before = judge(unedited)(RED.task(3), trials, unedited)
    # The last is red on the right only, outside the region.
    assert [verdict.shows for verdict in before] == [False] * 3 and all(verdict.right["the rest"] for verdict in before)
    edited = torch.stack([image("red", "green"), image("red", "green"), image("green", "red")])
    after = judge(unedited)(RED.task(3), trials, edited)
    assert [verdict.shows for verdict in after] == [True, True, False]
    # The right half of the second now looks like that of the first.
    assert [verdict.right["the rest"] for verdict in after] == [True, False, True]
    assert all(0.99 < verdict.confidence <= 1 for verdict in after)


def test_the_vlm_judge_gets_the_image_the_region_and_the_rest_of_the_prompt():
    received: list[PresenceQuestion] = []

    def ask(questions: Sequence[PresenceQuestion]) -> list[PresenceAnswer]:
        received.extend(questions)
        return [
            PresenceAnswer(shows=question.part is not None and question.part.getextrema()[0] == (255, 255), rest=False)
            for question in questions
        ]

    images = torch.stack([image("red", "blue"), image("green", "red")])
    verdicts = vlm_judge(ask, SPECS)(RED.task(2), RED.task(2).trials, images)
    assert [verdict.shows for verdict in verdicts] == [True, False] and verdicts[0].right == {"the rest": False}
    assert [question.rest for question in received] == ["a something ball", "a something house on a hill"]
    assert received[0].part is not None and received[0].part.size == (2, 4) and received[0].image.size == (4, 4)
    everywhere = [SteeringTrial("a green ball", 0, None)]
    vlm_judge(ask, SPECS)(RED.task(1), everywhere, images[:1])
    assert received[-1].part is None


def test_a_region_smaller_than_a_pixel_is_one_pixel():
    tiny = Rectangle(0.5, 0.5, 0.501, 0.501)
    parts: list[Image.Image | None] = []

    def ask(questions: Sequence[PresenceQuestion]) -> list[PresenceAnswer]:
        parts.extend(question.part for question in questions)
        return [PresenceAnswer(shows=True, rest=True)]

    vlm_judge(ask, SPECS)(RED.task(1), [SteeringTrial("a green ball", 0, tiny)], image("red", "blue")[None])
    assert parts[0] is not None and parts[0].size == (1, 1)


def test_concepts_are_read_from_a_file(tmp_path: Path):
    path = tmp_path / "concepts.toml"
    path.write_text(
        '[[concept]]\nname = "red"\ngroup = "colour"\ninstead = ["green", "blue"]\n'
        'prompts = ["a {} ball", "a {} house on a hill"]\nregion = [0, 0, 0.5, 1]\n'
        '[[concept]]\nname = "a dog"\ninstead = "a cat"\nprompts = "{} in the snow"\nfeature = 7\n'
    )
    specs = read_concepts(path).specs
    assert specs["red"] == RED
    dog = specs["a dog"]
    assert dog.feature == 7 and dog.group == "concept" and dog.instead == ("a cat",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no concept"),
        ("concept = 3", "has no concept"),
        ("[[concept]\n", "cannot be read as concepts"),
        ('[[concept]]\nname = "red"\ninstaed = ["green"]\nprompts = ["a {}"]', "The key 'instaed' is unknown; nearest: instead"),
        ('[[concept]]\nname = "red"\ninstead = [3]\nprompts = ["a {}"]', "not a tuple, each item text"),
        ('[[concept]]\nname = "red"\ninstead = ["green"]\nprompts = ["a {}"]\nfeature = "one"', "not a whole number"),
        (
            '[[concept]]\nname = "red"\ninstead = ["green"]\nprompts = ["a {}"]\nregion = [0, 0, 1]',
            "is not LEFT,TOP,RIGHT,BOTTOM",
        ),
        ('[[concept]]\nname = "red"\nprompts = ["a {}"]', "is incomplete"),
        ('[[concept]]\nname = "red"\ngroup = "a/b"\ninstead = ["green"]\nprompts = ["a {}"]', "cannot be part of a file name"),
        (f'[[concept]]\nname = "red"\ngroup = "{"x" * 300}"\ninstead = ["green"]\nprompts = ["a {{}}"]', "up to 100 letters"),
        ('[[concept]]\nname = "red"\ninstead = ["green"]\nprompts = ["a {}\\u0000"]', "without NUL"),
        ('[[concept]]\nname = "red"\ninstead = ["green"]\nprompts = ["a {}"]\nfeature = -1', "no feature -1"),
        ('[[concept]]\nname = "red"\ninstead = ["green"]\nprompts = ["a {}"]\nregion = [0, 0, nan, 1]', "four numbers"),
        ('[[concept]]\nname = "red"\ninstead = ["green"]\nprompts = ["a {}"]\n' * 2, "describes the concept 'red' twice"),
        ("x = " + "[" * 10_000, "cannot be read as concepts"),
    ],
)
def test_a_wrong_concept_file_is_explained(tmp_path: Path, text: str, message: str):
    path = tmp_path / "concepts.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_concepts(path)
    with pytest.raises(BadInput, match="cannot be read as concepts"):
        read_concepts(tmp_path / "nowhere.toml")
