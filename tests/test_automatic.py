"""Plans of edits: the least sufficient dose by bisection, the sites of a concept, and the choice on prompts of their own."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sample_study import new_study
from torch import Tensor

from difflex.dictionaries import SAE, DictionaryOrigin, Normalisation, SAEWeights
from difflex.effects.automatic import KEPT, MOST, Placement, SitedFeature, find_dose, plan_edits, sited_features
from difflex.effects.judging import JudgedGenerator, JudgedTask, JudgeVerdict, SteeringTask, SteeringTrial, StrengthPoint
from difflex.records import Edit, HookContext, Shot, Site
from difflex.steering import EditFeatures, SteeringHook, StudyEditor
from difflex.study import DictionaryRef

TRIALS = tuple(SteeringTrial(f"image {number}", number, None) for number in range(4))
TASK = SteeringTask(concept="red", group="colour", trials=TRIALS)
SITES = ("double.0", "single.0")
UNIT = EditFeatures("a feature", lambda x: x[..., :1], torch.ones(1, 1), {"peak": torch.ones(1)})


def point(dose: float, needed: float, lost_from: float = 9.0, broken_from: float = 9.0) -> StrengthPoint:
    return StrengthPoint(
        strength=dose,
        success=min(1.0, dose / needed),
        specificity=1.0 if dose < lost_from else KEPT - 0.1,
        quality=1.0 if dose < broken_from else 2.0,
        confidence=1.0,
    )


@pytest.mark.parametrize("needed", [0.3, 1.0, 2.0])
def test_the_dose_is_the_least_that_suffices(needed: float):
    found = find_dose(lambda dose: point(dose, needed))
    assert found.success >= 0.95 and 0.95 * needed <= found.strength <= needed + MOST / 2**4


def test_a_dose_that_loses_or_breaks_is_never_taken_if_a_smaller_one_is_whole():
    assert find_dose(lambda dose: point(dose, 2.0, lost_from=1.0)).strength < 1.0
    assert find_dose(lambda dose: point(dose, 2.0, broken_from=0.5)).strength < 0.5
    assert find_dose(lambda dose: point(dose, 2.0, lost_from=0.0)).strength == MOST / 2**5


def planned(needs_both: bool, late_breaks: bool) -> tuple[str, tuple[Edit, ...]]:
    """The plan in a world of three steps: red needs an edit at one site or at both; edits of the last step break the image."""

    def images(trials: Sequence[SteeringTrial], hooks: Sequence[SteeringHook]) -> Tensor:
        shots = tuple(Shot(model="m", prompt=t.prompt, seed=t.seed, pixels=(8, 8), steps=3, guidance=0.0) for t in trials)
        added = torch.zeros(len(trials), 3)
        for hook in hooks:
            for step in range(3):
                still = torch.zeros(len(trials), 1, 1)
                edited = hook.change(still, HookContext(step, 1.0, None, shots, (1, 1), 3))
                if edited is not None:
                    added[:, SITES.index(str(hook.site))] += edited[:, 0, 0]
                    added[:, 2] += edited[:, 0, 0] * (step == 2)
        return added.view(-1, 3, 1, 1)

    def verdicts(task: SteeringTask, trials: Sequence[SteeringTrial], pixels: Tensor) -> list[JudgeVerdict]:
        both = pixels[:, :2, 0, 0].min(1).values if needs_both else pixels[:, 0, 0, 0]
        return [JudgeVerdict(bool(x > 0.2), {"rest": True}, 1.0) for x in both]

    generator = JudgedGenerator(images, verdicts, lambda pixels: 1 + late_breaks * 9 * pixels[:, 2, 0, 0])
    edits = tuple(Edit(operation="add", site=Site.parse(site), dictionary="d", features=(0,), strength=1.0) for site in SITES)
    placements = [Placement("a site", edits[:1], True), Placement("2 sites", edits, True)]
    plan = plan_edits(JudgedTask(TASK, generator), placements, lambda _: UNIT, 3)
    assert plan.point.success == 1.0
    return plan.name, plan.edits


def test_one_site_is_taken_where_it_suffices_and_all_where_it_does_not():
    assert len(planned(needs_both=False, late_breaks=False)[1]) == 1
    name, edits = planned(needs_both=True, late_breaks=False)
    assert "2 sites" in name and {str(edit.site) for edit in edits} == set(SITES)


def test_steps_that_cost_quality_are_left_out():
    name, edits = planned(needs_both=False, late_breaks=True)
    assert "steps 0:1" in name and all(edit.steps == (0, 1) for edit in edits)


def test_the_feature_of_another_site_is_the_one_with_the_same_direction(tmp_path: Path):
    study = new_study(tmp_path / "study")
    rows = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    for site, order in (("double.1", [0, 1, 2, 3, 4, 5]), ("double.2", [3, 1, 5, 0, 2, 4])):
        weights = SAEWeights(encoder=rows[order], decoder=rows[order], bias=torch.zeros(16))
        origin = DictionaryOrigin(site=Site(site), model=study.model)
        sae = SAE(kind="topk", k=2, origin=origin, normalisation=Normalisation.identity(16), weights=weights)
        sae.save(study.dictionary(sae.site, "topk-6-k2"))
    place = DictionaryRef(Site("double.1"), "topk-6-k2")
    anchor, found = sited_features(StudyEditor(study), "red", place, 5, 0.8)
    assert anchor == SitedFeature(place, 5, 1.0)
    assert (str(found.place), found.feature, round(found.presence, 3)) == ("double.2/topk-6-k2", 2, 1.0)
