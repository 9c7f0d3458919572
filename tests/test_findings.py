"""Published findings as experiments: each verdict follows from its rule, in a simulated world whose truth is known."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sample_study import new_study, write_dictionary, write_findings, write_matches
from torch import Tensor

from difflex.cli import main
from difflex.effects import Provenance, StrengthCurve, StrengthPoint
from difflex.effects.drawn_world import group_of, kind_task, scenery_pairs
from difflex.effects.experiment_bench import ExperimentBench, detecting_features
from difflex.effects.finding_rules import (
    RuleCondition,
    concepts_needed,
    concepts_of,
    evaluate_conditions,
    rule_half,
    rule_rising,
    t_tail,
)
from difflex.effects.findings import (
    EXPERIMENTS,
    Finding,
    Findings,
    FindingsConfig,
    _is_current,
    _provenance,
    run_experiment,
)
from difflex.effects.inputs import weights_checksum
from difflex.effects.judging import JudgedGenerator, JudgeVerdict, SteeringTask, SteeringTrial
from difflex.errors import BadInput, BrokenFile
from difflex.miniature.captions import parse_caption
from difflex.miniature.world import BACKGROUNDS, OBJECT_GROUPS, STYLES
from difflex.records import Activations, HookContext, Rectangle, Shot, Site
from difflex.report import read_facts
from difflex.steering import EditFeatures, SteeringHook
from difflex.steering.contrast import find_contrasts
from difflex.study import Study

CONFIG = FindingsConfig(
    groups=("colour", "texture"), concepts_per_group=2, trials=3, pairs=(20, 80, 160), strengths=(0.5, 1.0, 2.0, 3.0)
)
SITE = Site("double.1")
PROVENANCE = Provenance(fingerprints={}, features={})


def direction(pairs: int) -> EditFeatures:
    """A direction whose length grows with the number of pairs, up to 80."""
    length = min(pairs, 80) / 80
    return EditFeatures(f"{pairs} pairs", lambda x: x, torch.tensor([[length]]), {"norm": torch.ones(1)})


def always(caption: str) -> float:
    return 1.0


def world(
    needs: Callable[[str], float] = always,
    cost: float = 0.1,
    late: float = 0.0,
    plain: Callable[[str], float] = always,
) -> JudgedGenerator:
    """Images of three numbers: how far they were steered in the first five steps and after them, and the loss of the caption.

    The concept shows from the distance that its caption `needs`; steering adds `cost` to the loss, and `late` more after the
    fifth step."""

    def images(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Tensor:
        shots = tuple(Shot(model="m", prompt=t.prompt, seed=t.seed, pixels=(8, 8), steps=7, guidance=0.0) for t in trials)
        pixels = torch.tensor([[0.0, 0.0, plain(trial.prompt)] for trial in trials])
        for step in range(7):
            still = torch.zeros(len(trials), 1, 1)
            edited = None if not hooks else hooks[0].change(still, HookContext(step, 1.0, None, shots, (1, 1)))
            pixels[:, int(step >= 5)] += 0 if edited is None else edited[:, 0, 0] / 7
        return pixels.view(-1, 3, 1, 1)

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], pixels: Tensor) -> list[JudgeVerdict]:
        far = pixels[:, :2].sum((1, 2, 3)).tolist()
        return [JudgeVerdict(x >= needs(t.prompt) - 1e-4, {"background": True}, 1.0) for x, t in zip(far, trials, strict=True)]

    def losses(pixels: Tensor) -> Tensor:
        early, last, own = pixels[:, :, 0, 0].unbind(1)
        return own + early * cost + last * (cost + late)

    return JudgedGenerator(images, verdicts, losses)


def bench(
    generator: JudgedGenerator, other: Findings | None = None, parameters: int = 10, config: FindingsConfig = CONFIG
) -> ExperimentBench:
    return ExperimentBench(
        site=SITE,
        config=config,
        parameters=parameters,
        generator=lambda steps: generator,
        contrasts=lambda concept: {count: direction(count) for count in config.pairs},
        feature=lambda concept: None,
        other=other,
    )


def make_finding(name: str, generator: JudgedGenerator, **more: Findings | int) -> Finding:
    return run_experiment(name, bench(generator, **more), PROVENANCE)  # pyright: ignore[reportArgumentType]


def test_there_is_a_knee_if_the_gain_rises_up_to_it_and_not_beyond():
    # At 20 pairs the direction is a quarter as long: too short to show the concept.
    finding = make_finding("pairs", world())
    assert finding.verdict == "holds here"
    assert finding.numbers == {"gain of 20 pairs": 0.0, "gain of 80 pairs": 1.0, "gain of 160 pairs": 1.0}
    assert finding.lines[0].x == (20, 80, 160) and finding.lines[0].y == (0.0, 1.0, 1.0) and finding.lines[0].concepts == 4
    assert [line.name for line in finding.lines] == ["all concepts", "colour", "texture"]
    assert make_finding("pairs", world(lambda caption: 0.2)).verdict == "does not hold here"


def test_a_contrast_that_fails_on_other_captions_differs_from_one_that_works_on_all():
    def alike(caption: str) -> float:
        request = parse_caption(caption)
        strange = request.background in BACKGROUNDS[4:] or request.style in STYLES[2:] or len(request.objects) > 1
        return 9.0 if strange else 1.0

    finding = make_finding("distribution", world(alike))
    assert finding.verdict == "holds here"
    assert finding.numbers == {"gain, alike": 1.0, "gain, other scenery": 0.0, "gain, two objects": 0.0}
    assert "0.00 with other scenery, 0.00 with two objects" in finding.reason
    assert make_finding("distribution", world()).verdict == "does not hold here"
    assert make_finding("distribution", world(lambda caption: 9.0)).verdict == "cannot be said"


def test_failing_on_one_other_kind_of_captions_is_not_enough():
    finding = make_finding("distribution", world(lambda caption: 9.0 if len(parse_caption(caption).objects) > 1 else 1.0))
    assert finding.numbers == {"gain, alike": 1.0, "gain, other scenery": 1.0, "gain, two objects": 0.0}
    assert finding.verdict == "does not hold here"


def test_adversarial_captions_undo_an_edit_or_do_not():
    def without_repeats(caption: str) -> float:
        words = caption.split()
        return 9.0 if any(one == two for one, two in pairwise(words)) else 1.0

    assert make_finding("adversarial", world(without_repeats)).verdict == "holds here"
    assert make_finding("adversarial", world()).verdict == "does not hold here"


def test_quality_drops_at_every_strength_or_does_not():
    finding = make_finding("quality", world())
    assert finding.verdict == "holds here"
    assert [round(y, 3) for y in finding.lines[0].y] == [1.05, 1.1, 1.2, 1.3]
    assert make_finding("quality", world(cost=-0.1)).verdict == "does not hold here"
    assert make_finding("quality", world(cost=0.0)).verdict == "cannot be said"


def findings(cost: float, parameters: int) -> Findings:
    finding = make_finding("quality", world(cost=cost))
    return Findings(model="m", revision=None, site="double.1", parameters=parameters, findings=(finding,))


def test_size_needs_the_findings_of_another_model():
    alone = make_finding("size", world())
    assert alone.verdict == "cannot be said" and "There is one model" in alone.reason
    assert make_finding("size", world(), other=findings(0.2, 5)).verdict == "holds here"
    assert make_finding("size", world(), other=findings(0.2, 50)).verdict == "does not hold here"
    assert make_finding("size", world(), other=findings(0.2, 10)).verdict == "cannot be said"


def test_a_prompt_without_an_object_is_unrelated():
    finding = make_finding("related", world(lambda caption: 1.0 if parse_caption(caption).objects else 9.0))
    assert finding.verdict == "holds here" and finding.numbers == {"gain, an object": 1.0, "gain, no object": 0.0}
    assert make_finding("related", world()).verdict == "does not hold here"


@pytest.mark.parametrize("losses", [(0.16, 0.09), (0.09, 0.16)])
def test_all_kinds_of_captions_share_one_loss_threshold(losses: tuple[float, float]):
    """Where the concept shows, the edit adds 0.07: more than half of the lower loss, less than half of the higher."""
    one, other = losses
    empty = world(cost=0.07, plain=lambda caption: one if parse_caption(caption).objects else other)
    assert make_finding("related", empty).numbers == {"gain, an object": 1.0, "gain, no object": 1.0}
    two = world(cost=0.07, plain=lambda caption: one if len(parse_caption(caption).objects) > 1 else other)
    assert set(make_finding("distribution", two).numbers.values()) == {1.0}
    against = world(cost=0.07, plain=lambda caption: one if any(a == b for a, b in pairwise(caption.split())) else other)
    assert set(make_finding("adversarial", against).numbers.values()) == {1.0}


def test_trials_with_and_without_an_object_differ_only_in_the_caption():
    with_object, without_object, alike = (kind_task("cyan", kind, 6).trials for kind in ("an object", "no object", "alike"))
    assert with_object == alike and all(trial.region is not None for trial in with_object)
    assert [(trial.seed, trial.region) for trial in with_object] == [(trial.seed, trial.region) for trial in without_object]


def test_a_gain_is_a_share_of_what_could_be_gained():
    config = replace(CONFIG, trials=12)
    captions = {trial.prompt for c in config.concepts() for trial in kind_task(c, "no object", 12).trials}
    showing = set(sorted(captions)[: 2 * len(captions) // 3])  # these show it from the start, the others when edited
    finding = run_experiment(
        "related", bench(world(lambda caption: -1.0 if caption in showing else 1.0), config=config), PROVENANCE
    )
    assert max(curve.without for curve in finding.curves) > 0.5
    assert finding.numbers == pytest.approx({"gain, an object": 1.0, "gain, no object": 1.0})
    assert (
        make_finding("related", world(lambda caption: 1.0 if parse_caption(caption).objects else -1.0)).reason
        == "nothing was judged."
    )


def test_the_concept_counts_anywhere_if_the_caption_gives_no_place():
    generator, regions = world(), list[Rectangle | None]()

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], images: Tensor) -> Sequence[JudgeVerdict]:
        regions.extend(trial.region for trial in trials)
        return generator.verdicts(task, trials, images)

    make_finding("related", generator._replace(verdicts=verdicts))
    assert set(regions) == {None}
    make_finding("distribution", generator._replace(verdicts=verdicts))
    assert set(regions) != {None}


def test_the_last_steps_add_most_of_the_loss_or_do_not():
    assert make_finding("steps", world(cost=0.05, late=0.9)).verdict == "holds here"
    finding = make_finding("steps", world(cost=0.2))
    assert finding.verdict == "does not hold here"
    assert finding.numbers["excess loss, first 5 of 7"] == pytest.approx(finding.numbers["excess loss, all steps"] * 5 / 7)


def test_an_interval_that_contains_the_threshold_decides_nothing():
    assert (
        evaluate_conditions([RuleCondition([0.3, 0.25, 0.35])]) is True
        and evaluate_conditions([RuleCondition([-0.3, -0.25, -0.35])]) is False
    )
    assert (
        evaluate_conditions([RuleCondition([0.3, 0.1, 0.2])]) is None and evaluate_conditions([RuleCondition([1.0, 1.0])]) is None
    )
    assert evaluate_conditions([RuleCondition([1.0, 1.0, 1.0], 1.0)]) is None
    assert (
        evaluate_conditions([RuleCondition([0.3, 0.2, 0.4])]) is True
        and evaluate_conditions([RuleCondition([0.3, 0.2, 0.4])] * 9) is None
    )


def test_the_number_of_concepts_that_would_decide_is_that_of_the_power():
    # A mean of 0.1 with a deviation of 0.2: (1.960 + 0.842)² x 0.04 / 0.01 = 31.4.
    values = [0.1 + 0.2 * x for x in (-1.0, 0.0, 1.0)]
    assert concepts_needed([RuleCondition(values)]) == 32
    ruling = rule_half("all", [1.0, 1.0, 1.0], {"one": [0.5 - x for x in values]})
    assert ruling.verdict == "cannot be said" and "about 32 concepts would decide it in 80%" in ruling.reason
    assert concepts_needed([RuleCondition([1.0])]) is None and concepts_needed([RuleCondition([-0.1, 0.1])]) is None


def test_tails_are_those_of_students_t():
    # Quantiles from tables, outside of which 5 % (or 1 %) lie.
    for far, freedom, share in ((4.303, 2, 0.05), (3.182, 3, 0.05), (2.365, 7, 0.05), (9.925, 2, 0.01), (3.499, 7, 0.01)):
        assert t_tail(far, freedom) == pytest.approx(share, rel=2e-3)
    assert t_tail(0.0, 4) == 1.0 and t_tail(float("inf"), 4) == 0.0


@pytest.mark.parametrize("concepts", [3, 4, 8])
def test_without_a_difference_few_verdicts_are_decided(concepts: int):
    generator = torch.Generator().manual_seed(concepts)
    normal = lambda: torch.randn(400, concepts, generator=generator).mul(0.1).tolist()  # noqa: E731
    halves, ones, twos = normal(), normal(), normal()
    rulings = [
        rule_half("all", [1 + x for x in full], {"one": [0.5 + x for x in one], "two": [0.5 + x for x in two]})
        for full, one, two in zip(halves, ones, twos, strict=True)
    ]
    assert sum(ruling.verdict != "cannot be said" for ruling in rulings) <= 0.05 * 400 + 9


def test_without_a_change_of_loss_quality_is_rarely_decided():
    generator = torch.Generator().manual_seed(7)
    point = StrengthPoint(strength=1.0, success=0, specificity=1, quality=1, confidence=1)
    curve = StrengthCurve(method="m", description="", concept="red", group="colour", trials=8, without=0, points=())
    decided = 0
    for _ in range(400):
        losses = 1 + 0.1 * torch.randn(8, 5, generator=generator)
        points = [tuple(replace(point, strength=i, quality=x) for i, x in enumerate(row)) for row in losses.tolist()]
        decided += rule_rising([replace(curve, points=several) for several in points]).verdict != "cannot be said"
    assert decided <= 0.05 * 400 + 9


def image_counts(names: Collection[str], config: FindingsConfig) -> dict[int | None, int]:
    """The images that experiments generate, by the steps of a run; what several of them share counts once."""
    everything, objects = len(config.concepts()), len(config.concepts(OBJECT_GROUPS))
    without_shapes = len(config.concepts([group for group in config.groups if group != "shape"]))
    inner, fewer = len(config.inner), len(config.pairs) - 1
    batches = {
        "pairs": everything * (1 + fewer * inner),
        "distribution": 2 * everything * (1 + inner),
        "adversarial": 2 * without_shapes * (1 + inner),
        "related": 2 * objects * (1 + inner),
    }
    base = {"pairs", "distribution", "quality", "size"}
    shared = everything * (1 + len(config.strengths)) if base & set(names) else 0
    own = shared + sum(batches.get(name, 0) for name in names)
    return {None: own * config.trials, 7: everything * (1 + 2 * inner) * config.trials if "steps" in names else 0}


@pytest.mark.parametrize("names", [tuple(EXPERIMENTS), ("size",), ("steps", "related"), ("pairs", "quality"), ("adversarial",)])
@pytest.mark.parametrize("groups", [("colour", "texture"), ("shape", "style")])
def test_experiments_share_the_images_of_the_base_contrast(names: tuple[str, ...], groups: tuple[str, ...]):
    config, made_up, counts = replace(CONFIG, groups=groups), world(), {None: 0, 7: 0}

    def counted(steps: int | None) -> JudgedGenerator:
        def images(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Tensor:
            counts[steps] += len(trials)
            return made_up.images(trials, hooks)

        return made_up._replace(images=images)

    one = ExperimentBench(
        site=SITE,
        config=config,
        parameters=10,
        generator=counted,
        contrasts=lambda concept: {count: direction(count) for count in config.pairs},
        feature=lambda concept: None,
    )
    for name in names:
        run_experiment(name, one, PROVENANCE)
    assert image_counts(names, config) == counts and sum(counts.values()) > 0


def activations(values: Tensor, prompts: Sequence[str]) -> Activations:
    """Activations on a grid of one row."""
    plain = Shot(model="m", pixels=(8, 8), steps=1, guidance=0.0, timestep=1.0)
    shots = tuple(replace(plain, prompt=prompt) for prompt in prompts)
    return Activations(site=SITE, values=values, shots=shots, grid=(1, values.shape[1]))


def test_contrasts_of_the_first_pairs_equal_those_of_these_pairs_alone_and_use_the_region():
    positive, negative = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    sides = [activations(positive, "abc")], [activations(negative, "def")]
    one, three = find_contrasts(*sides, [1, 3])
    assert (one.pairs, one.positive, three.pairs, three.negative) == (1, ("a",), 3, ("d", "e", "f"))
    assert torch.allclose(one.direction, (positive - negative)[0].mean(0), atol=1e-6)
    assert torch.allclose(three.direction, (positive - negative).mean((0, 1)), atol=1e-6)
    [half] = find_contrasts(*sides, [3], region=lambda shot: Rectangle(0.5, 0, 1, 1))
    assert torch.allclose(half.direction, (positive - negative)[:, 2:].mean((0, 1)), atol=1e-6) and half.norm == three.norm
    with pytest.raises(BadInput, match="cannot be found on 4 pairs of 3"):
        find_contrasts(*sides, [4])


def test_pairs_use_one_half_of_the_scenery_and_other_captions_the_other_half():
    for positive, negative in scenery_pairs("cyan", 30):
        one, other = parse_caption(positive), parse_caption(negative)
        assert one.objects[0].colour == "cyan" != other.objects[0].colour and one.objects[0].row is not None
        assert one.background in (None, *BACKGROUNDS[:4]) and one.style in (None, *STYLES[:2])
    for trial in kind_task("cyan", "other scenery", 6).trials:
        assert parse_caption(trial.prompt).background in BACKGROUNDS[4:] and parse_caption(trial.prompt).style in STYLES[2:]
    assert all(len(parse_caption(trial.prompt).objects) == 2 for trial in kind_task("cyan", "two objects", 6).trials)


@pytest.mark.parametrize("concept", ["cyan", "striped", "small", "night", "cartoon"])
def test_captions_omit_a_concept_or_name_another_one_three_times(concept: str):
    originals, unsaid, against = (kind_task(concept, kind, 12).trials for kind in ("alike", "unsaid", "against"))
    for plain, without, often in zip(originals, unsaid, against, strict=True):
        [named] = [word for word in plain.prompt.split() if group_of(word) == group_of(concept)]
        assert named not in without.prompt.split() and often.prompt.split().count(named) == 3
        assert parse_caption(without.prompt).objects[0].shape == parse_caption(plain.prompt).objects[0].shape
        assert (plain.seed, plain.region) == (without.seed, without.region) and "  " not in without.prompt
        words = without.prompt.split()
        assert all((two[0] in "aeiou") == (one == "an") for one, two in pairwise(words) if one in ("a", "an"))
        assert words[-1] not in ("a", "an", "on", "in", "of")
    assert all(not parse_caption(trial.prompt).objects for trial in kind_task(concept, "no object", 12).trials)


def test_findings_are_loaded_as_saved_and_a_damaged_file_is_refused(tmp_path: Path):
    record = findings(0.1, 10)
    path = record.save(tmp_path / "found" / "double.1.json")
    assert Findings.load(path) == record
    content = path.read_text()
    path.write_text(content.replace("verdict", "x"))
    with pytest.raises(BrokenFile, match="does not match its checksum"):
        Findings.load(path)
    path.write_text(content.replace("verdict", "x").replace('"checksum"', '"sum"'))
    with pytest.raises(BrokenFile, match="cannot be read as results of difflex findings"):
        Findings.load(path)
    with pytest.raises(BadInput, match="difflex findings makes it"):
        Findings.load(tmp_path / "none.json")


def test_concepts_are_spread_over_their_group_and_other_groups_are_refused():
    assert concepts_of("texture", 2) == ["striped", "checkered"]
    assert len(concepts_of("colour", 10)) == len(set(concepts_of("colour", 10))) == 10
    with pytest.raises(BadInput, match="no experiment with the group 'row'"):
        concepts_of("row", 1)
    assert concepts_of("style", 5) == list(STYLES)
    with pytest.raises(BadInput, match="leave nothing to try"):
        concepts_of("style", 0)


def test_the_command_makes_missing_findings_and_keeps_current_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    Study.begin(tmp_path / "study", "mini-flux")
    flags = ["--site", "double.1", "--groups", "texture", "--concepts-per-group", "1", "--trials", "2", "--strength", "0.3:0.3:1"]
    words = ["findings", str(tmp_path / "study"), *flags]
    assert main([*words, "--pairs", "1,3", "--finding", "quality"]) == 0
    path = tmp_path / "study" / "steering" / "findings" / "double.1.json"
    first = Findings.load(path)
    assert [finding.name for finding in first.findings] == ["quality"] and first.parameters > 1_000_000
    capsys.readouterr()
    assert main([*words, "--pairs", "1,3", "--finding", "steps", "quality", "pairs"]) == 0
    output = capsys.readouterr().out
    second = Findings.load(path)
    assert [finding.name for finding in second.findings] == [
        name for name in EXPERIMENTS if name in ("pairs", "quality", "steps")
    ]
    assert second.of("quality") == first.of("quality")
    assert output.count("as before") == 1 and output.count("cannot be said") == 3
    assert {curve.concept for finding in second.findings for curve in finding.curves} == {"dotted"}
    assert main([*words, "--pairs", "1,2", "--finding", "quality"]) == 0
    assert "as before" not in capsys.readouterr().out
    monkeypatch.setattr("difflex.effects.inputs.weights_checksum", lambda weights: "other weights")
    assert main([*words, "--pairs", "1,2", "--finding", "quality"]) == 0
    assert "as before" not in capsys.readouterr().out


def test_the_checksum_of_weights_changes_with_any_matrix():
    layer = torch.nn.Linear(50, 60)
    before = weights_checksum(layer.named_parameters())
    assert weights_checksum(layer.named_parameters()) == before
    layer.weight.data.mul_(1.001)
    assert weights_checksum(layer.named_parameters()) != before
    assert weights_checksum(layer.to("meta").named_parameters()) != before


def test_the_best_detecting_feature_is_used_if_its_precision_is_high_enough(tmp_path: Path):
    study = new_study(tmp_path / "study")
    for name, aps in (
        ("double.1/topk-8-k2", (0.6, 0.4)),
        ("double.1/topk-16-k2", (0.9, 0.3)),
        ("double.2/topk-8-k2", (1.0, 1.0)),
    ):
        write_dictionary(study, name)
        write_matches(study, name, [*aps, 0.1, 0.1])
    features = detecting_features(study, SITE, ["red", "blue"])
    assert {concept: str(place) for concept, (place, _) in features.items()} == {"red": "double.1/topk-16-k2"}
    assert detecting_features(study, Site("single.0"), ["red"]) == {}


def test_features_of_a_dictionary_that_has_changed_since_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = new_study(tmp_path / "study")
    write_dictionary(study, "double.1/topk-8-k2")
    write_matches(study, "double.1/topk-8-k2", (0.9, 0.9, 0.1, 0.1))
    assert detecting_features(study, SITE, ["red"]) != {} and capsys.readouterr().out == ""
    write_dictionary(study, "double.1/topk-8-k2", weights=b"trained again")
    assert detecting_features(study, SITE, ["red"]) == {}
    assert "double.1/topk-8-k2 has changed since" in capsys.readouterr().out


def test_a_finding_is_made_again_when_another_feature_detects_the_concept_best(tmp_path: Path):
    study = new_study(tmp_path / "study")
    write_dictionary(study, "double.1/topk-8-k2")
    path = write_matches(study, "double.1/topk-8-k2", (0.9, 0.9, 0.1, 0.1))
    provenance = lambda name: _provenance(study, name, detecting_features(study, SITE, ["red"]), None)  # noqa: E731
    before = {name: provenance(name) for name in ("related", "steps", "quality")}
    entries = json.loads(re.sub(r'"features":\s*\[\s*1\s*\]', '"features": [2]', path.read_text()))
    path.write_text(json.dumps({**entries, "checksum": None}))
    assert provenance("related") != before["related"] and provenance("steps") != before["steps"]
    assert provenance("quality") == before["quality"]


def test_a_finding_by_another_rule_or_config_is_made_again():
    old = make_finding("quality", world())
    assert _is_current(old, "quality", CONFIG, PROVENANCE) and not _is_current(None, "quality", CONFIG, PROVENANCE)
    assert not _is_current(old, "quality", replace(CONFIG, trials=4), PROVENANCE)
    assert not _is_current(replace(old, rule="The loss is higher."), "quality", CONFIG, PROVENANCE)


def test_a_report_leaves_out_findings_of_a_dictionary_that_has_changed(tmp_path: Path):
    study = new_study(tmp_path / "study")
    write_dictionary(study, "double.1/topk-8-k2")
    write_findings(study, "double.1", names=("pairs", "related"), by={"related": "double.1/topk-8-k2"})
    assert [finding.name for at in read_facts(study).findings for finding in at.findings] == ["pairs", "related"]
    write_dictionary(study, "double.1/topk-8-k2", weights=b"trained again")
    facts = read_facts(study)
    assert [finding.name for at in facts.findings for finding in at.findings] == ["pairs"]
    [trouble] = facts.problems
    assert "related" in trouble and "double.1/topk-8-k2" in trouble and "difflex findings" in trouble


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--groups", "row"), "no experiment with the group 'row'"),
        (("--strength", "-1:1:1"), "leave nothing to try"),
        ((), "with --site"),
        (("--site", "double.1", "--other-model", "STUDY"), "no findings"),
    ],
)
def test_impossible_findings_are_explained(
    tmp_path: Path, flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
):
    Study.begin(tmp_path / "study", "mini-flux")
    words = [str(tmp_path / "study") if flag == "STUDY" else flag for flag in flags]
    assert main(["findings", str(tmp_path / "study"), *words]) == 2
    assert message in capsys.readouterr().err
