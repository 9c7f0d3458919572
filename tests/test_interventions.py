"""Interventions on real classes of every family: exact where nothing changes, additive, and the same again from a record."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import difflex
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Normalisation, SAEWeights
from difflex.errors import BadInput
from difflex.pipeline import Pipeline
from difflex.records import Edit, HookContext, RegionMap, Site
from difflex.steering import EditFeatures, EditRecord, SteeringHook, dictionary_features, steering_hooks
from difflex.steering.features import reconstruction
from difflex.testing import TINY, tiny_folder

STEPS, PROMPT = 2, "a red star"
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
SIZE = 24
CASES = {name: (name, 4.0) for name in TINY} | {"sdxl-turbo": ("sdxl", 0.0)}
"""The family and the guidance of each case."""
QUICK = ("sdxl", "flux")
"""Both halves in one call of the denoiser, and in a call each."""


class Case(NamedTuple):
    """A pipeline at a guidance, and a site in its middle whose block has an update."""

    pipe: Pipeline
    guidance: float
    site: Site
    tokens: int
    dictionary: Dictionary

    def features(self, edit: Edit) -> EditFeatures:
        dictionary = perfect(self.site, self.dictionary.width) if edit.operation == "reconstruct" else self.dictionary
        return (
            reconstruction(dictionary)
            if edit.operation == "reconstruct"
            else dictionary_features(dictionary, edit.features, None)
        )

    def edit(self, operation: str = "add", **changes: object) -> Edit:
        return Edit(**{"operation": operation, "site": self.site, "features": (0,), "unit": "code", "strength": 5.0, **changes})  # pyright: ignore

    def hooks(self, *edits: Edit) -> list[SteeringHook]:
        return steering_hooks(edits, self.features)

    def image(self, *hooks: SteeringHook) -> bytes:
        return self.pipe.generate(PROMPT, steps=STEPS, guidance=self.guidance, edits=hooks)[0].image.tobytes()

    def changes(self, *edits: Edit, site: Site | None = None) -> list[tuple[HookContext, Tensor, Tensor]]:
        """The activations of a site before and after edits, at each call of the denoiser."""
        before, after = list[tuple[HookContext, Tensor]](), list[Tensor]()
        with ExitStack() as stack:
            stack.enter_context(self.pipe.at(site or self.site, lambda x, context: before.append((context, x.clone()))))
            for hook in self.hooks(*edits):
                stack.enter_context(self.pipe.at(*hook))
            stack.enter_context(self.pipe.at(site or self.site, lambda x, _: after.append(x.clone())))
            self.pipe.generate(PROMPT, steps=STEPS, guidance=self.guidance)
        return [(context, x, edited) for (context, x), edited in zip(before, after, strict=True)]


def dictionary_at(site: Site, width: int, model: str | None) -> Dictionary:
    decoder = F.normalize(torch.randn(SIZE, width, generator=torch.Generator().manual_seed(1)), dim=1)
    return sae(site, decoder, decoder, 4, model)


def perfect(site: Site, width: int) -> Dictionary:
    """A dictionary of an orthogonal basis, both ways along each axis; k is the width."""
    axes = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(2))).Q
    both = torch.cat([axes, -axes])
    return sae(site, both, both, width, None)


def sae(site: Site, encoder: Tensor, decoder: Tensor, k: int, model: str | None) -> Dictionary:
    size, width = decoder.shape
    weights = SAEWeights(
        encoder=encoder, decoder=decoder, bias=torch.zeros(width), encoder_bias=torch.zeros(size), thresholds=None
    )
    origin = DictionaryOrigin(site=site, model=model, revision=None)
    return SAE(kind="topk", k=k, origin=origin, normalisation=Normalisation.identity(width), weights=weights, relu=True)


def cases(*quick: str) -> list:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow, id=name) for name in CASES]


@pytest.fixture(scope="module", params=cases(*QUICK))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, guidance = CASES[request.param]
    folder = tiny_folder(family, tmp_path_factory.mktemp("models") / request.param, defaults={"pixels": [[16, 24]]})
    pipe = difflex.load(folder)
    rows = [row for row in pipe.sites() if row.site.stream == "image"]
    row = rows[len(rows) // 2]
    site = replace(row.site, kind="update")
    return Case(pipe, guidance, site, row.tokens, dictionary_at(site, row.width, pipe.name))


def conditional(changes: Sequence[tuple[HookContext, Tensor, Tensor]]) -> Iterator[tuple[HookContext, Tensor, Tensor]]:
    return (change for change in changes if change[0].half != "unconditional")


def test_what_changes_nothing_leaves_the_image_equal_to_the_bit(case: Case):
    plain = case.image()
    nothing = [case.edit(strength=0.0), case.edit("scale", strength=1.0), case.edit(strength=0.0, half="both", region="fires")]
    assert case.image(*case.hooks(*nothing)) == plain
    assert case.image(*case.hooks(case.edit(half="both"))) != plain
    assert case.image() == plain


def test_the_changes_of_two_edits_in_one_run_are_exactly_the_sum_of_the_changes_of_each(case: Case):
    place, rows = replace(case.site, kind="residual"), case.dictionary.decoder
    first, second = case.edit(at=(place,), strength=2.5), case.edit(at=(place,), features=(3, 7), strength=-1.5)
    added = torch.tensor([2.5]) @ rows[[0]] + torch.full((2,), -1.5) @ rows[[3, 7]]
    for edits in ((first, second), (second, first)):
        assert all(torch.equal(edited, x + added) for _, x, edited in conditional(case.changes(*edits, site=place)))


def test_a_feature_is_modulated_by_its_own_map(case: Case):
    features = tuple(range(0, SIZE, 2))
    for _, x, edited in conditional(case.changes(case.edit("scale", features=features, strength=1 + 5.0))):
        codes = dictionary_features(case.dictionary, features, None).codes(x.flatten(0, 1)).view(*x.shape[:2], -1)
        torch.testing.assert_close(edited - x, 5.0 * codes @ case.dictionary.decoder[list(features)], atol=2e-5, rtol=1e-5)
        fires = (codes > 0).any(-1)
        assert torch.equal(edited[~fires], x[~fires]) and bool((edited[fires] != x[fires]).any())


def test_a_block_whose_update_is_zero_returns_its_input_as_a_hook_by_hand_makes_it(case: Case):
    ablated = Edit(operation="zero", site=case.site, half="both")
    module = case.pipe.engine.sites.locate(case.site)

    def by_hand(_: object, args: tuple, kwargs: dict, output: object) -> object:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if isinstance(output, Tensor):  # text tokens, then those of the image
            return torch.cat([output[:, : -case.tokens], hidden[:, -case.tokens :]], 1)
        assert isinstance(output, tuple) and module.block is not None
        index = module.block.outputs["image"] if len(output) > 1 else 0
        return tuple(hidden if i == index else part for i, part in enumerate(output))

    handle = module.module.register_forward_hook(by_hand, with_kwargs=True)
    expected = case.image()
    handle.remove()
    assert case.image(*case.hooks(ablated)) == expected != case.image()
    assert all(not edited.any() for _, _, edited in case.changes(ablated))


def test_a_feature_alone_replaces_the_update_and_adds_to_others_that_do(case: Case):
    icon, other = case.edit("replace", half="both"), case.edit("replace", half="both", features=(1,), strength=2.0)
    rows = case.dictionary.decoder
    for _, x, edited in case.changes(icon, other, Edit(operation="zero", site=case.site, half="both")):
        torch.testing.assert_close(edited, (5 * rows[0] + 2 * rows[1]).expand_as(x), atol=2e-5, rtol=1e-5)


def test_the_reconstruction_by_a_perfect_dictionary_changes_nothing_beyond_rounding(case: Case):
    whole = case.edit("reconstruct", features=(), half="both")
    for _, x, edited in case.changes(whole):
        torch.testing.assert_close(edited, x, atol=2e-5, rtol=1e-5)
    plain, again = (torch.frombuffer(bytearray(case.image(*hooks)), dtype=torch.uint8).int() for hooks in ((), case.hooks(whole)))
    assert int((plain - again).abs().max()) <= 1


@pytest.mark.parametrize("operation", ["add", "reconstruct", "zero"])
def test_a_map_changes_the_tokens_that_it_covers(case: Case, operation: str):
    [(context, x, _), *_] = case.changes(case.edit())
    assert context.grid is not None
    rows, columns = context.grid
    weights = [[float(column < columns / 2) for column in range(columns)] for _ in range(rows)]
    features = () if operation != "add" else (0,)
    change = case.edit(operation, features=features, region=RegionMap.of(weights))
    inside = torch.tensor(weights).flatten() > 0
    for _, x, edited in conditional(case.changes(change)):
        assert torch.equal(edited[:, ~inside], x[:, ~inside])
        assert operation == "reconstruct" or bool((edited[:, inside] != x[:, inside]).any(-1).all())


def test_under_guidance_halves_are_edited_as_asked_and_steps_in_their_order(case: Case):
    if not case.pipe.engine.is_guided(case.guidance):
        assert {context.half for context, _, _ in case.changes(case.edit())} == {None}
        return
    row = 5.0 * case.dictionary.decoder[0]
    for half, sign in (("conditional", 0), ("both", 1), ("opposed", -1)):
        changes = case.changes(case.edit(half=half))
        assert {context.half for context, _, _ in changes} == {"conditional", "unconditional"}
        for context, x, edited in changes:
            expected = row if context.half == "conditional" else sign * row
            torch.testing.assert_close(edited - x, expected.expand_as(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", cases("flux", "sd1"), indirect=True)
def test_each_step_of_a_scheduler_can_be_edited_alone(case: Case):
    [(context, _, _), *_] = case.changes(case.edit(steps=(0, 1)))
    steps = context.steps or 0
    assert steps >= STEPS  # PNDM runs one more
    for step in (1, steps - 1):
        changed = {
            context.step for context, x, edited in case.changes(case.edit(steps=(step, step + 1))) if bool((edited != x).any())
        }
        assert changed == {step}
    with pytest.raises(BadInput, match=f"the run has {steps}, numbered from 0"):
        case.changes(case.edit(steps=(0, steps + 1)))


def test_one_dictionary_edits_several_sites_and_the_record_makes_the_image_again(case: Case, tmp_path: Path):
    rows = [row for row in case.pipe.sites() if row.site.stream == "image" and row.width == case.dictionary.width]
    sites = tuple(replace(row.site, kind="update") for row in rows[-3:])
    several = case.edit(at=sites)
    for site in sites:
        for _, x, edited in conditional(case.changes(several, site=site)):
            torch.testing.assert_close(edited - x, (5 * case.dictionary.decoder[0]).expand_as(x), atol=2e-5, rtol=1e-5)
    edits = (
        several,
        case.edit("zero", features=(), steps=(0, 1)),
        case.edit("reconstruct", features=(), region=RegionMap.of([[1.0, 0.0]])),
    )
    image = case.image(*case.hooks(*edits))
    shot = next(case.pipe.shots(PROMPT, steps=STEPS, guidance=case.guidance))
    record = EditRecord.load(EditRecord(shot=shot, edits=edits, checksums={}).save(tmp_path / "edit.json"))
    assert record.edits == edits
    assert case.image(*case.hooks(*record.edits)) == image != case.image()


def test_after_an_error_no_hook_stays(case: Case):
    def fail(x: Tensor, context: HookContext) -> None:
        if context.step == 1:
            raise ValueError("stop")

    plain = case.image()
    with pytest.raises(ValueError, match="stop"):
        case.image(*case.hooks(case.edit()), SteeringHook(case.site, fail))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.pipe.denoiser.modules())
    assert case.image() == plain
