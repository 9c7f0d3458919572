"""The roles of blocks: what changes in images when the update of a block is left out, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from difflex.effects.finding_rules import Verdict
from difflex.errors import BadInput
from difflex.explanation.comparison import MeanEstimate, estimate_mean
from difflex.files import folder_lock
from difflex.json_records import JsonRecord
from difflex.measures.image_aspects import ASPECTS, Images
from difflex.measures.records import interval_text
from difflex.miniature import load_judge
from difflex.miniature.judge import SceneReading
from difflex.progress import ProgressBar
from difflex.records import Edit, HookContext, Site
from difflex.steering import EditFeatures, SteeringHook, steering_hooks
from difflex.tables import text_table
from difflex.values import check_fields

ROLES = tuple(ASPECTS)
JUDGED: Mapping[str, tuple[str, ...]] = {
    "composition": ("row", "column", "count"),
    "detail": ("shape", "size"),
    "colour": ("colour", "background"),
    "style": ("texture", "style"),
}
"""The groups of concepts of the drawn world that each role is read from by the judge."""
OF_IMAGES = ("background", "style", "count")
"""Groups of which an image has one concept."""
PAPER = "arXiv 2410.22366"
PAPER_ROLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "down.2.1": ("composition", ("composition",)),
    "mid.0": ("abstract", ()),
    "up.0.0": ("detail", ("detail",)),
    "up.0.1": ("colour and style", ("colour", "style")),
}
"""The role that the paper gives to each of four blocks of SDXL, and what it is measured by; an abstract one by no single role."""
SMALLEST = 1e-9
ChangesByRole = dict[str, tuple[float, ...]]
"""By role, a change for each image, in changes between unrelated images."""


@final
@dataclass(frozen=True, kw_only=True)
class BlockRolesConfig:
    """On which images blocks are compared."""

    prompts: str
    """Source of the prompts."""
    images: int = 32
    seed: int = 0
    """Of the first image; those of the others follow."""
    run: str = ""
    """Precision, pixels, steps and guidance of the model."""
    is_judged: bool = False
    """Whether the images are of the drawn world, and read by its judge as well."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.images < 2:
            raise BadInput(f"{self.images} images cannot be compared with each other. Ask for 2 or more.")


@final
@dataclass(frozen=True, kw_only=True)
class BlockChange:
    """How images change without the update of a block, and with a random one of the same norm in its place."""

    site: Site
    without: ChangesByRole
    random: ChangesByRole
    judged: ChangesByRole
    """Without the update, by the judge of the drawn world; empty without it."""
    judged_random: ChangesByRole

    def estimate(self, role: str, *, judged: bool = False) -> MeanEstimate:
        """Return the mean change in a role without the update, with its interval over images."""
        return estimate_mean((self.judged if judged else self.without)[role])


@final
@dataclass(frozen=True, kw_only=True)
class RoleClaim:
    """A role that the paper gives to a block, and whether it holds."""

    site: Site
    role: str
    by: str
    """What it was measured by: `pixels` or `judge`."""
    difference: MeanEstimate
    """Of the block's share of that role above the mean share of the three others."""
    verdict: Verdict


@final
@dataclass(frozen=True, kw_only=True)
class BlockRoleResults(JsonRecord):
    """The roles of the blocks of a model."""

    FORMAT: ClassVar[int] = 1
    COMMAND: ClassVar[str] = "block-roles"
    INDENT: ClassVar[int | None] = None

    model: str
    revision: str | None
    config: BlockRolesConfig
    unrelated: dict[str, float]
    """By role, the mean distance of two unedited images of different prompts: a change of 1."""
    judged_unrelated: dict[str, float]
    blocks: tuple[BlockChange, ...] = ()
    claims: tuple[RoleClaim, ...] = ()


class _Distances(NamedTuple):
    """The distances of images from unedited ones, by role."""

    pixels: Mapping[str, Float[Tensor, " image"]]
    judged: Mapping[str, Float[Tensor, " image"]]


class RolesResult(NamedTuple):
    """The roles, and whether they were up to date before."""

    roles: BlockRoleResults
    is_reused: bool


def measure_block_roles(
    model: str,
    revision: str | None,
    sites: Sequence[Site],
    config: BlockRolesConfig,
    generate: Callable[[Sequence[SteeringHook]], Images],
    path: Path | None,
) -> RolesResult:
    """Measure the roles of the blocks whose updates `sites` are, and write them to `path` block by block.

    `generate` returns the images of the prompts under hooks. Blocks that were measured before with the same config are kept.
    """
    if path is None:
        return _measure(
            BlockRoleResults(model=model, revision=revision, config=config, unrelated={}, judged_unrelated={}), sites, generate
        )
    with folder_lock(path.with_suffix("")):  # a recipe holds the folder of its study
        old = BlockRoleResults.load(path) if path.is_file() else None
        is_same = old is not None and (old.model, old.revision, old.config) == (model, revision, config)
        begun = old if old is not None and is_same else None
        record = begun or BlockRoleResults(model=model, revision=revision, config=config, unrelated={}, judged_unrelated={})
        return _measure(record, sites, generate, path)


def _measure(
    record: BlockRoleResults,
    sites: Sequence[Site],
    generate: Callable[[Sequence[SteeringHook]], Images],
    path: Path | None = None,
) -> RolesResult:
    known = {block.site for block in record.blocks}
    missing = [site for site in sites if site not in known]
    if not missing:
        return RolesResult(record, True)
    plain = generate([])
    reference = _ReferenceImages(plain, record.config.is_judged)
    unrelated = reference.distances(plain.roll(1, 0))
    scale, judged_scale = ({role: max(float(values.mean()), SMALLEST) for role, values in part.items()} for part in unrelated)
    record = replace(record, unrelated=scale, judged_unrelated=judged_scale)
    with ProgressBar(missing, total=len(missing), desc="block roles", unit=" blocks") as bar:
        for site in bar:
            zero = steering_hooks([Edit(operation="zero", site=site, half="both")], _no_features)
            without, noise = (
                reference.distances(generate(hooks)) for hooks in (zero, [_random_update(site, record.config.seed)])
            )
            change = BlockChange(
                site=site,
                without=_scaled(without.pixels, scale),
                random=_scaled(noise.pixels, scale),
                judged=_scaled(without.judged, judged_scale),
                judged_random=_scaled(noise.judged, judged_scale),
            )
            blocks = (*record.blocks, change)
            record = replace(record, blocks=blocks, claims=tuple(judge_claims(blocks)))
            if path is not None:
                record.save(path)
    return RolesResult(record, False)


def _no_features(edit: Edit) -> EditFeatures:
    raise AssertionError(f"{edit.operation} has no features")


def _random_update(site: Site, seed: int) -> SteeringHook:
    """Return a hook that replaces an update by a random one of the same norm at each token."""

    def change(x: Float[Tensor, "batch token width"], context: HookContext) -> Float[Tensor, "batch token width"]:
        generator = torch.Generator().manual_seed(seed * 1000 + context.step)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        return (noise * (x.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))).to(x.dtype)

    return SteeringHook(site, change)


def _scaled(distances: Mapping[str, Float[Tensor, " image"]], scale: Mapping[str, float]) -> ChangesByRole:
    return {role: tuple((values / scale[role]).tolist()) for role, values in distances.items()}


@final
class _ReferenceImages:
    """Unedited images, and what the judge reads in them."""

    def __init__(self, images: Images, is_judged: bool) -> None:
        self._images = images
        self._judge = load_judge() if is_judged else None
        self._scenes = self._read(images)

    def distances(self, images: Images) -> _Distances:
        """Return how far each image is from the unedited one."""
        pixels = {role: distance(images, self._images) for role, distance in ASPECTS.items()}
        scenes = self._read(images)
        judged = {
            role: torch.tensor([_scene_change(*pair, groups) for pair in zip(scenes, self._scenes, strict=True)])
            for role, groups in JUDGED.items()
            if scenes
        }
        return _Distances(pixels, judged)

    def _read(self, images: Images) -> list[SceneReading]:
        return [] if self._judge is None else [scene for part in images.split(64) for scene in self._judge.read(part)]


def _scene_change(scene: SceneReading, other: SceneReading, groups: Sequence[str]) -> float:
    """Return the share of concepts of some groups in which two scenes differ, wherever their objects are."""
    return sum(_difference(_concepts(scene, group), _concepts(other, group)) for group in groups) / len(groups)


def _concepts(scene: SceneReading, group: str) -> list[str]:
    if group in OF_IMAGES:
        return [getattr(scene, group)]
    return [item.concepts[group] for item in scene.objects]


def _difference(names: Sequence[str], others: Sequence[str]) -> float:
    """Return the share of the longer list that has no equal in the other; 0 for two empty lists."""
    shared = sum(min(names.count(name), others.count(name)) for name in set(names))
    longest = max(len(names), len(others))
    return 1 - shared / longest if longest else 0.0


def role_shares(changes: ChangesByRole) -> dict[str, tuple[float, ...]]:
    """Return each role's share of the changes of an image; equal shares where nothing changes."""
    totals = [sum(values) for values in zip(*changes.values(), strict=True)]
    return {
        role: tuple(value / total if total else 1 / len(changes) for value, total in zip(values, totals, strict=True))
        for role, values in changes.items()
    }


def judge_claims(blocks: Sequence[BlockChange]) -> Iterator[RoleClaim]:
    """Yield the claims of the paper about blocks of SDXL, if all of these are among `blocks`."""
    by_path = {block.site.path: block for block in blocks if block.site.path in PAPER_ROLES}
    if len(by_path) < len(PAPER_ROLES):
        return
    for by in ("pixels", "judge"):
        changes = {path: block.without if by == "pixels" else block.judged for path, block in by_path.items()}
        if not all(changes.values()):
            continue
        for path, (role, measured) in PAPER_ROLES.items():
            own = {each: _role_share(values, measured) for each, values in changes.items()}
            others = [shares for each, shares in own.items() if each != path]
            means = [sum(values) / len(values) for values in zip(*others, strict=True)]
            difference = estimate_mean([mine - mean for mine, mean in zip(own[path], means, strict=True)])
            yield RoleClaim(site=by_path[path].site, role=role, by=by, difference=difference, verdict=_verdict(difference))


def _role_share(changes: ChangesByRole, roles: Sequence[str]) -> list[float]:
    """Return by image the share of some roles together; without any, minus the largest share: how little one role stands out."""
    columns = zip(*(role_shares(changes)[role] for role in roles or ROLES), strict=True)
    return [sum(values) if roles else -max(values) for values in columns]


def _verdict(difference: MeanEstimate) -> Verdict:
    if difference.low > 0:
        return "holds here"
    return "does not hold here" if difference.high < 0 else "cannot be said"


def block_roles_table(record: BlockRoleResults) -> str:
    """Return a text table of the roles with a row for each block, and the claims of the paper below it."""
    tables = [_roles_table(record, judged=False)]
    if record.config.is_judged:
        tables.append(_roles_table(record, judged=True))
    claims = [
        f"{claim.verdict:<19}{claim.site}: {claim.role}, by {claim.by} ({interval_text(claim.difference)})"
        for claim in record.claims
    ]
    return "\n\n".join([*tables, *(["\n".join([f"Roles by {PAPER}:", *claims])] if claims else [])])


def _roles_table(record: BlockRoleResults, judged: bool) -> str:
    rows = [(f"by {'the judge' if judged else 'pixels'}", *ROLES, "most")]
    for block in record.blocks:
        changes, noise = (block.judged, block.judged_random) if judged else (block.without, block.random)
        shares = {role: sum(values) for role, values in role_shares(changes).items()}
        cells = (
            f"{interval_text(block.estimate(role, judged=judged))} ({estimate_mean(noise[role]).value:.2f})" for role in ROLES
        )
        rows.append((str(block.site), *cells, max(shares, key=lambda role: shares[role])))
    return text_table(rows)
