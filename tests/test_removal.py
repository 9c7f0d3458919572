"""Concept removal: the right features are removed, losses are counted, and nothing else changes."""

import math
import multiprocessing
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflex.cli import main
from difflex.dictionaries import DictionaryOrigin, Neurons
from difflex.effects import Provenance
from difflex.effects.drawn_world import CAPTION_GROUPS, ConceptCaption, DrawnJudge, captions_by_concept
from difflex.effects.judging import JudgeVerdict
from difflex.effects.removal import FinishedRemoval, RemovalConfig, RemovalResults, RemovedConcept
from difflex.effects.removal_features import (
    FeatureCut,
    GenerationCodes,
    MatchedFeatures,
    RemovalImages,
    RemovalRates,
    RemovalTrial,
    best_trial,
    candidate_cuts,
    choose_features,
    importance,
    matched_features,
    removal_rates,
)
from difflex.errors import BadInput, BrokenFile, DifflexError
from difflex.miniature import draw, load_judge
from difflex.miniature.world import BACKGROUNDS, CONCEPTS, HELD_OUT_SEEDS, SceneMix
from difflex.records import Activations, HookContext, Shot, Site
from difflex.steering import SteeringHook
from difflex.study import DictionaryRef, Study

SITES = ("double.1", "single.0")
SITE = Site("double.1", "neurons")
PLACE = DictionaryRef(SITE, "neurons-8-k2")
WIDTH, TOKENS = 8, 6
NAMED = ["red", "red", "blue", "blue", "green", "green"]
NEURONS = {"red": (2, 5), "blue": (3, 3), "green": (1, 1)}
"""The neuron of each concept at the first and at the second step; neuron 0 fires everywhere, neuron 7 nowhere."""


def neurons(k: int = 2) -> Neurons:
    return Neurons(width=WIDTH, k=k, origin=DictionaryOrigin(site=SITE, model="m"))


def activations(step: int, names: list[str]) -> Activations:
    """The neuron of the named concept fires at one token of each image, neuron 0 at all of them."""
    x = torch.zeros(len(names), TOKENS, WIDTH)
    x[:, :, 0] = 1.0
    for image, name in enumerate(names):
        x[image, 2, NEURONS[name][step]] = 3.0
    shot = Shot(model="m", pixels=(8, 8), steps=2, guidance=0.0, timestep=1000.0 - 500 * step)
    return Activations(site=SITE, values=x, shots=(shot,) * len(names), grid=(2, 3))


def firings(names: list[str] = NAMED) -> GenerationCodes:
    codes = GenerationCodes(neurons())
    for batch in (names[:4], names[4:]):
        for step in (0, 1):
            if batch:
                codes.add(activations(step, batch))
    return codes


def at(step: int) -> HookContext:
    shots = tuple(Shot(model="m", prompt=str(i), pixels=(8, 8), steps=2, guidance=0.0) for i in range(len(NAMED)))
    return HookContext(step, 1000.0 - 500 * step, None, shots, (2, 3))


def edited(cut: FeatureCut, strength: float, step: int) -> Tensor:
    [steering] = cut.steering_hooks(strength)
    x = activations(step, NAMED).values
    new = steering.change(x.clone(), at(step))
    return x if new is None else new


def verdict(shows: bool, **right: bool) -> JudgeVerdict:
    return JudgeVerdict(shows, right, 1.0)


def test_the_features_of_a_concept_have_a_larger_share_of_the_codes_where_it_is_named_at_each_step():
    for concept, speaks in NEURONS.items():
        assert choose_features(firings(), NAMED, concept, 1).features == tuple((feature,) for feature in speaks)


def test_importance_is_the_share_of_codes_with_the_concept_minus_that_without():
    scores = importance(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]))
    assert torch.allclose(scores, torch.tensor([0.25 - 0.5, 0.75, -0.5]))


def test_features_without_importance_are_never_chosen():
    assert choose_features(firings(), NAMED, "red", 8).features == ((2,), (5,))


def test_matched_features_are_cut_at_the_edited_steps_above_their_means():
    cut = matched_features(firings(), [5, 2], steps=range(1, 2))
    assert cut.features == ((), (5, 2)) and cut.floors[0] == ()
    assert cut.first(1).floors[1] == choose_features(firings(), NAMED, "red", 1).floors[1]


def test_other_steps_are_not_edited():
    cut = choose_features(firings(), NAMED, "red", 1, steps=range(1, 2))
    assert cut.features == ((), (5,))
    assert torch.equal(edited(cut, 0.0, 0), activations(0, NAMED).values)
    assert not torch.equal(edited(cut, 0.0, 1), activations(1, NAMED).values)


@pytest.mark.parametrize(("strength", "left"), [(0.0, 0.0), (-2.0, -6.0), (1.0, 3.0)])
def test_codes_of_the_features_are_multiplied_and_all_else_stays_bit_for_bit(strength: float, left: float):
    cut = choose_features(firings(), NAMED, "red", 1)
    for step in (0, 1):
        expected = activations(step, NAMED).values
        expected[:2, 2, NEURONS["red"][step]] = left
        assert torch.equal(edited(cut, strength, step), expected)


def test_a_code_below_the_mean_over_all_images_is_not_edited():
    cut = choose_features(firings(), NAMED, "red", 1)
    low, floor = activations(0, NAMED).values, cut.floors[0][0]
    assert floor == pytest.approx(3.0 * 2 / (len(NAMED) * TOKENS))
    low[:, 2, 2] = 0.9 * floor
    [steering] = cut.steering_hooks(0.0)
    assert steering.change(low, at(0)) is None


def test_negative_codes_are_neither_counted_nor_edited():
    below = activations(0, NAMED)
    below.values[:2] *= -1
    codes = GenerationCodes(neurons())
    codes.add(below)
    assert float(codes.means()[0, :2].max()) == float(codes.peaks()[0, :2].max()) == 0.0
    [steering] = choose_features(firings(), NAMED, "red", 1).steering_hooks(0.0)
    assert steering.change(below.values, at(0)) is None


def test_a_cut_without_features_has_no_hook():
    none = choose_features(firings(), NAMED, "red", 1).first(0)
    assert none.steering_hooks(0.0) == [] and not none.changes(firings()).any()


def test_changed_images_are_those_in_which_a_feature_fires():
    touched = choose_features(firings(), NAMED, "red", 1).changes(firings(["blue", "red", "green", "red"]))
    assert touched.tolist() == [False, True, False, True]


def test_rates_measure_removal_and_both_retentions():
    before = [verdict(True, shape=True, size=False), verdict(True, shape=True), verdict(False), verdict(True, shape=True)]
    after = [verdict(False, shape=True, size=True), verdict(True, shape=False), verdict(False), verdict(True, shape=True)]
    rates = removal_rates("red", ["red", "red", "red", "blue"], before, after)
    # The third image never was red; the size of the first never was right; red and blue have the same weight.
    assert rates == RemovalRates(ua=0.5, ira=1.0, cra=0.75, own=0.5)


def test_an_edit_that_does_nothing_removes_nothing_and_keeps_everything():
    verdicts = [verdict(True, shape=True), verdict(False, shape=False), verdict(True, style=True)]
    assert removal_rates("red", ["red", "blue", "green"], verdicts, verdicts) == RemovalRates(0.0, 1.0, 1.0, 1.0)


def test_a_concept_that_no_image_shows_cannot_be_removed():
    assert removal_rates("red", ["red", "blue"], [verdict(False)] * 2, [verdict(False)] * 2).ua == 0.0


def test_the_best_trial_is_the_last_good_one_or_else_the_one_with_the_largest_least_rate():
    setting = lambda n, ua, own: RemovalTrial(n, -1.0, RemovalRates(ua, 0.96, 0.97, own))  # noqa: E731
    mild, strong, further = setting(1, 0.8, 1.0), setting(2, 0.96, 0.9), setting(4, 1.0, 0.5)
    assert best_trial([mild, strong, further]) == further
    assert best_trial([mild, strong, setting(4, 0.9, 1.0)]) == strong
    assert best_trial([mild, setting(8, 0.7, 1.0)]) == mild
    assert best_trial([mild, mild._replace(features=8)]) == mild
    with pytest.raises(BadInput, match="at least one"):
        best_trial([])


PROVENANCE = Provenance(fingerprints={"double.1:neurons/neurons-8-k2": "f"}, features={})


def removal_of(ua: float) -> RemovedConcept:
    trials = (RemovalTrial(1, -1.0, RemovalRates(ua, 1.0, 1.0, 1.0)),)
    shared = {
        "concept": "red",
        "group": "colour",
        "features": {"double.1:neurons/neurons-8-k2": ((2,), (5, 1))},
        "strength": -1.0,
    }
    return RemovedConcept(**shared, trials=trials, images=4, shown=1.0, rates=RemovalRates(ua, 0.9, 0.95, 0.8))


def test_removal_results_are_loaded_as_saved_and_a_damaged_file_is_refused(tmp_path: Path):
    concepts = (removal_of(0.95), removal_of(0.85))
    removal = RemovalResults(
        model="m",
        dictionaries=("double.1:neurons/neurons-8-k2",),
        concepts=concepts,
        config=RemovalConfig(images=4, edit_steps=(0, 2)),
        provenance=PROVENANCE,
    )
    assert removal.reaching() == [concepts[0]] and concepts[0].most_features == 2
    path = removal.save(Study.begin(tmp_path, "m").removal([DictionaryRef(SITE, "neurons-8-k2")]))
    assert RemovalResults.load(path) == removal and Study.open(tmp_path).removals() == [path]
    for damage in (
        "{}",
        "[]",
        "no",
        path.read_text().replace('"format": 2', '"format": 7'),
        path.read_text().replace("trials", "x"),
    ):
        path.write_text(damage)
        with pytest.raises(BrokenFile, match="again"):
            RemovalResults.load(path)


def test_every_set_of_dictionaries_has_its_own_file(tmp_path: Path):
    study, (a, b) = Study.begin(tmp_path, "m"), map(Site.parse, SITES)
    chosen = [[(a, "x")], [(a, "x"), (b, "x")], [(a, "x"), (b, "y")], [(a, "x"), (a, "y"), (b, "x")], [(a, "y"), (b, "x")]]
    files = [study.removal([DictionaryRef(*place) for place in places]) for places in chosen]
    assert len(set(files)) == len(chosen) and files[1].name == "x.json" and study.removals() == []


@pytest.mark.parametrize(
    ("names", "concept", "message"),
    [(NAMED, "pink", "0 of 6"), (["red"] * 6, "red", "6 of 6"), (NAMED[:4], "red", "6 images")],
)
def test_features_are_chosen_on_images_with_and_without_the_concept(names: list[str], concept: str, message: str):
    with pytest.raises(BadInput, match=message):
        choose_features(firings(), names, concept, 1)


def test_activations_of_another_site_are_refused():
    with pytest.raises(BadInput, match="the activations are of double"):
        firings().add(replace(activations(0, NAMED), site=Site("double.0")))
    with pytest.raises(BadInput, match="No image"):
        GenerationCodes(neurons()).means()


def removal_images(generated: list[int]) -> RemovalImages:
    """Images that show a concept while its neuron fires at the second step; `generated` records the numbers of edited ones."""

    def edited(numbers: Sequence[int], edits: Sequence[SteeringHook]) -> list[JudgeVerdict]:
        generated.extend(numbers)
        x = activations(1, NAMED).values
        for steering in edits:
            new = steering.change(x, at(1))
            x = x if new is None else new
        return [verdict(bool(x[i, 2, NEURONS[NAMED[i]][1]] > 0), shape=bool(x[i, :, 0].min() > 0)) for i in numbers]

    before = tuple(verdict(True, shape=True) for _ in NAMED)
    return RemovalImages(concepts=tuple(NAMED), before=before, codes={PLACE: firings()}, edited=edited)


def test_planted_features_are_found_and_removed_while_all_else_stays():
    generated: list[int] = []
    images = removal_images(generated)
    for concept in NEURONS:
        assert images.rates(concept, {PLACE: choose_features(firings(), NAMED, concept, 2)}, 0.0) == RemovalRates(
            1.0, 1.0, 1.0, 1.0
        )
    # Only images that name the concept have its features: no other is generated again.
    assert generated == [0, 1, 2, 3, 4, 5]


def test_what_one_would_cut_by_hand_is_tried_beside_important_features_and_those_of_all_dictionaries():
    other, images = DictionaryRef(Site("double.2", "neurons"), "neurons-8-k2"), removal_images([])
    images = replace(images, codes={PLACE: firings(), other: firings()})
    found = {PLACE: MatchedFeatures((2, 5), 0.7), other: MatchedFeatures((5,), 0.9)}
    important, matched, alone = candidate_cuts(images, "red", 1, found)
    assert important[PLACE].features == important[other].features == ((2,), (5,))
    assert {place: cut.features for place, cut in matched.items()} == {PLACE: ((2,), (2,)), other: ((5,), (5,))}
    assert {place: cut.features for place, cut in alone.items()} == {other: ((5,), (5,))}
    [_, single] = candidate_cuts(images, "red", 1, {**found, PLACE: MatchedFeatures()})
    assert single[other].features == ((5,), (5,)) and single[PLACE].features == ((), ())
    assert len(candidate_cuts(images, "red", 1, dict.fromkeys(found, MatchedFeatures()))) == 1


def test_unchanged_images_are_not_generated_again():
    generated: list[int] = []
    nothing = {PLACE: choose_features(firings(), NAMED, "red", 1).first(0)}
    assert removal_images(generated).rates("red", nothing, 0.0) == RemovalRates(0.0, 1.0, 1.0, 1.0) and generated == []


def test_settings_are_tried_from_the_mildest_to_the_next_after_the_first_good_one():
    images = removal_images([])
    cuts = {PLACE: choose_features(firings(), NAMED, "red", 2)}
    trials = list(images.trials("red", cuts, [(2, -1.0), (2, 0.4), (1, 0.0), (1, -2.0), (1, 0.5)]))
    # (2, 0.4) is not stronger: it is milder in strength.
    assert [(trial.features, trial.strength, trial.rates.ua) for trial in trials] == [
        (1, 0.5, 0.0),
        (1, 0.0, 1.0),
        (1, -2.0, 1.0),
    ]


def test_settings_no_milder_than_a_lossy_one_are_skipped():
    def spoiled(numbers: Sequence[int], edits: Sequence[SteeringHook]) -> list[JudgeVerdict]:
        return [verdict(True, shape=False) for _ in numbers]

    images = replace(removal_images([]), edited=spoiled)
    trials = images.trials(
        "red", {PLACE: choose_features(firings(), NAMED, "red", 2)}, [(1, 0.0), (2, 0.5), (1, 0.5), (2, -1.0), (1, -1.0)]
    )
    # All else is lost at once; only a setting that is milder in one of the two could be better.
    assert [(trial.features, trial.strength) for trial in trials] == [(1, 0.5)]


@pytest.mark.parametrize(("concepts", "per_concept"), [(3, 2), (10, 8), (8, 12), (2, 13)])
def test_a_removal_is_judged_on_all_images_of_the_concept_and_a_sixth_of_the_others(concepts: int, per_concept: int):
    named, generated = [str(number) for number in range(concepts) for _ in range(per_concept)], list[int]()
    right = verdict(True, shape=True)
    everywhere = neurons(k=WIDTH)
    firing = GenerationCodes(everywhere)
    values = torch.ones(len(named), TOKENS, WIDTH) + torch.arange(len(named)).view(-1, 1, 1)
    firing.add(replace(activations(0, NAMED), values=values, shots=(activations(0, NAMED).shots[0],) * len(named)))

    def edited(numbers: Sequence[int], edits: Sequence[SteeringHook]) -> list[JudgeVerdict]:
        generated.extend(numbers)
        return [right] * len(numbers)

    images = RemovalImages(concepts=tuple(named), before=(right,) * len(named), codes={PLACE: firing}, edited=edited)
    every = FeatureCut(everywhere, ((0,),), ((0.0,),))
    images.rates(named[0], {PLACE: every}, 0.0)
    assert len(generated) == per_concept + (concepts - 1) * -(-per_concept // 6)


def test_a_concept_that_no_prompt_names_cannot_be_removed():
    with pytest.raises(BadInput, match="No prompt names 'pink'"):
        removal_images([]).rates("pink", {PLACE: choose_features(firings(), NAMED, "red", 1)}, 0.0)


@pytest.mark.parametrize("group", CAPTION_GROUPS)
def test_captions_name_each_concept_of_a_group_equally_often_and_are_unique(group: str):
    captions = captions_by_concept(group, 5)
    assert [several[0].concept for several in captions] == list(CONCEPTS[group])
    assert all(len(several) == 5 and several[0].concept in caption.split() for several in captions for _, caption in several)
    assert len({caption for several in captions for _, caption in several}) == 5 * len(captions)


def test_the_judge_recognises_the_concepts_of_captions_in_their_drawings():
    scenes = draw(torch.arange(40) + HELD_OUT_SEEDS + 8_000_000, SceneMix(1, 0, 0))
    named = [
        ConceptCaption(BACKGROUNDS[int(ground)], text)
        for ground, text in zip(scenes.specs.background, scenes.captions, strict=True)
    ]
    verdicts = DrawnJudge(load_judge()).of_captions("background", named, scenes.images)
    assert sum(verdict.shows for verdict in verdicts) >= 39 and all("background" not in verdict.right for verdict in verdicts)
    wrong = [ConceptCaption("night" if item.concept != "night" else "wood", item.caption) for item in named]
    assert not any(verdict.shows for verdict in DrawnJudge(load_judge()).of_captions("background", wrong, scenes.images)[:8])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of mini-flux with a dictionary at two sites."""
    folder = tmp_path_factory.mktemp("removal") / "study"
    words = ["harvest", "mini-flux", "--prompts", "captions", "--tokens", "4000", "--steps", "4", "--out", str(folder)]
    assert main([*words, "--site", *SITES]) == 0
    words = ["train", str(folder), "--k", "4", "--size", "64", "--tokens", "4000", "--batch", "256"]
    assert main([*words, "--site", *SITES]) == 0
    assert main(["itda", str(folder), "--site", SITES[0], "--k", "4", "--size", "32", "--tokens", "1000"]) == 0
    return folder


def test_removal_writes_results_and_reuses_them(study: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--groups", "size", "--images", "2", "--selection-images", "2", "--tuning-images", "1"]
    flags += ["--features", "1,2", "--strength", "-1", "--edit-steps", "1:3"]
    assert main(["removal", str(study), "--dictionary", f"{SITES[0]}/topk-64-k4,{SITES[1]}/topk-64-k4", *flags]) == 0
    output = capsys.readouterr().out
    assert "of 2 concepts reach 90/90" in output and "UA" in output and "as before" not in output
    [path] = Study.open(study).removals()
    written = path.stat().st_mtime_ns
    assert main(["removal", str(study), "--dictionary", f"{SITES[0]}/topk-64-k4,{SITES[1]}/topk-64-k4", *flags]) == 0
    assert "as before" in capsys.readouterr().out and path.stat().st_mtime_ns == written
    assert path == study / "steering" / "removal" / "double.1,single.0" / "topk-64-k4.json"
    removal = RemovalResults.load(path)
    assert removal.dictionaries == tuple(f"{site}/topk-64-k4" for site in SITES)
    assert [concept.concept for concept in removal.concepts] == ["small", "large"]
    for concept in removal.concepts:
        assert concept.images == 2 and concept.strength == -1.0 and {trial.features for trial in concept.trials} <= {1, 2}
        for steps in concept.features.values():
            assert len(steps) == 4 and steps[0] == steps[3] == () and 1 <= len(steps[1]) <= 2


def run_and_die(command: list[str]) -> None:
    """Run a command in a process that is killed as soon as one concept is finished."""
    save = FinishedRemoval.save

    def dying(self: FinishedRemoval, path: Path | str) -> Path:
        save(self, path)
        os.kill(os.getpid(), signal.SIGKILL)
        return Path(path)

    FinishedRemoval.save = dying
    main(command)


def test_a_killed_removal_continues_after_the_concepts_that_are_finished(study: Path, capsys: pytest.CaptureFixture[str]):
    place = f"{SITES[1]}/topk-64-k4"
    flags = ["--groups", "size", "--images", "1", "--selection-images", "1", "--features", "1", "--strength", "0"]
    command = ["removal", str(study), "--dictionary", place, *flags]
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(command,))
    process.start()
    process.join()
    path = Study.open(study).removal([Study.open(study).find_dictionary(place)])
    assert process.exitcode == -signal.SIGKILL and not path.exists()
    [part] = path.with_suffix(".unfinished").rglob("*.json")
    finished = FinishedRemoval.load(part).removed
    marked = replace(finished, strength=0.125)  # what is not measured again keeps the mark
    FinishedRemoval(removed=marked).save(part)
    assert main(command) == 0
    results = RemovalResults.load(path)
    assert results.concepts[0] == marked and [concept.concept for concept in results.concepts] == ["small", "large"]
    assert not part.exists()
    path.unlink()


def test_removal_without_names_edits_each_label_at_all_its_sites(study: Path):
    flags = ["--groups", "size", "--images", "1", "--selection-images", "1", "--features", "1", "--strength", "0"]
    assert main(["removal", str(study), *flags]) == 0
    removals = [RemovalResults.load(path) for path in Study.open(study).removals()]
    dictionaries = {removal.dictionaries for removal in removals}
    assert tuple(f"{site}/topk-64-k4" for site in SITES) in dictionaries
    [itda] = [removal for removal in removals if "/itda-" in removal.dictionaries[0]]
    # With a single setting there are no trials.
    assert all(concept.trials == () and concept.strength == 0.0 for concept in itda.concepts)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--groups", "colur"), "nearest: colour"),
        (("--strength", "0:1:0.5"), "removes nothing"),
        (("--edit-steps", "2:9"), "of a run of 4 steps"),
        (("--dictionary", "double.2"), "nearest: double.1"),
    ],
)
def test_impossible_removals_are_explained(study: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["removal", str(study), *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ("colur",)}, "nearest: colour"),
        ({"groups": "colour"}, "not a tuple"),
        ({"images": 0}, "leave nothing to remove"),
        ({"images": 2.5}, "whole number"),
        ({"features": ()}, "leave nothing to remove"),
        ({"features": (0,)}, "leave nothing to remove"),
        ({"strengths": ()}, "leave nothing to remove"),
        ({"strengths": (math.nan,)}, "finite number"),
        ({"edit_steps": (2, 1)}, "START below END"),
        ({"images": 10**5}, "images would be generated, and 1,000,000"),
        ({"strengths": tuple(-x / 1000 for x in range(10**5))}, "images would be generated"),
    ],
)
def test_configs_of_impossible_removals_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(DifflexError, match=message):
        RemovalConfig(**changes)  # pyright: ignore[reportArgumentType]
