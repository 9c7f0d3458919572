"""`difflex block-roles`: what changes in images without the update of a block, on tiny models and in a made world."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from difflex.cli import main
from difflex.measures import BlockRoleResults, BlockRolesConfig, block_roles_table, measure_block_roles
from difflex.measures.block_roles import BlockChange, judge_claims, role_shares
from difflex.miniature import draw
from difflex.records import HookContext, Site
from difflex.steering import SteeringHook
from difflex.study import Study
from difflex.testing import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
IMAGES = 6
CONFIG = BlockRolesConfig(prompts="made", images=IMAGES, is_judged=True)
SITES = [Site(path, "update") for path in ("down.2.1", "mid.0", "up.0.0", "up.0.1")]


class LayeredWorld:
    """A model of two blocks: one writes the scene, the other its colours; a block without its update is left out."""

    def __init__(self, calls: float = float("inf")) -> None:
        self.scenes, self.calls = draw(range(IMAGES)).images, calls

    def __call__(self, hooks: Sequence[SteeringHook]) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        updates = {site: torch.ones(IMAGES, 4, 8) for site in SITES[:2]}
        for hook in hooks:
            edited = hook.change(updates[hook.site], HookContext(0, 1.0, None, None, (2, 2)))
            updates[hook.site] = updates[hook.site] if edited is None else edited
        has_layout, has_colour = (bool(update.any()) for update in updates.values())
        images = self.scenes if has_layout else self.scenes.flip(2)
        return images if has_colour else images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def measured(path: Path | None, world: LayeredWorld | None = None) -> BlockRoleResults:
    return measure_block_roles("made", None, SITES[:2], CONFIG, world or LayeredWorld(), path).roles


def test_a_block_of_layout_changes_composition_and_one_of_colour_changes_colour():
    layout, grey = measured(None).blocks
    assert layout.estimate("composition").value > 3 * layout.estimate("colour").value
    assert grey.estimate("colour").value > 0.2 and grey.estimate("composition").value < 0.1
    assert grey.estimate("colour", judged=True).value > grey.estimate("composition", judged=True).value
    assert all(abs(value) < 1e-9 for values in grey.random.values() for value in values)  # that update is not zero


def test_a_killed_run_continues_block_by_block(tmp_path: Path):
    whole = measured(tmp_path / "whole" / "block-roles.json")
    path = tmp_path / "block-roles.json"
    with pytest.raises(KeyboardInterrupt):
        measured(path, LayeredWorld(calls=4))
    assert len(BlockRoleResults.load(path).blocks) == 1
    assert measured(path) == whole and path.read_bytes() == (tmp_path / "whole" / "block-roles.json").read_bytes()
    assert measured(path, LayeredWorld(calls=0)) == whole


def change(site: Site, *values: float) -> BlockChange:
    noise = torch.linspace(0, 0.01, IMAGES).tolist()
    changes = {
        role: tuple(value + more for more in noise)
        for role, value in zip(("composition", "detail", "colour", "style"), values, strict=True)
    }
    return BlockChange(site=site, without=changes, random=changes, judged={}, judged_random={})


def test_the_claims_of_the_paper_hold_where_the_shares_say_so():
    blocks = [
        change(SITES[0], 0.9, 0.1, 0.1, 0.1),
        change(SITES[1], 0.2, 0.2, 0.2, 0.2),
        change(SITES[2], 0.8, 0.1, 0.1, 0.1),
        change(SITES[3], 0.1, 0.1, 0.5, 0.5),
    ]
    claims = {claim.role: claim.verdict for claim in judge_claims(blocks)}
    assert claims == {
        "composition": "holds here",
        "abstract": "holds here",
        "detail": "does not hold here",
        "colour and style": "holds here",
    }
    assert list(judge_claims(blocks[:3])) == []
    record = BlockRoleResults(
        model="m", revision=None, config=CONFIG, unrelated={}, judged_unrelated={}, blocks=tuple(blocks[:1])
    )
    assert "0.905 [" in block_roles_table(BlockRoleResults(**{**vars(record), "config": BlockRolesConfig(prompts="made")}))


def test_the_shares_of_an_image_that_does_not_change_are_equal():
    assert role_shares({"composition": (0.0, 1.0), "detail": (0.0, 3.0)}) == {"composition": (0.5, 0.25), "detail": (0.5, 0.75)}


def test_the_blocks_of_sdxl_and_flux_get_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "prompts.txt").write_text("a star\na ring\na red dot\n")
    prompts = ["--prompts", str(tmp_path / "prompts.txt"), "--images", "3"]
    sdxl, flux = (str(tiny_folder(family, tmp_path / family)) for family in ("sdxl", "flux"))
    sites = ["--site", *(site.path for site in SITES)]
    assert main(["block-roles", sdxl, *prompts, *sites, "--guidance", "4", "--out", str(tmp_path / "study")]) == 0
    output = capsys.readouterr().out
    assert "Roles by arXiv 2410.22366:" in output and "up.0.1:update: colour and style, by pixels" in output
    record = BlockRoleResults.load(Study.open(tmp_path / "study").block_roles)
    assert [block.site for block in record.blocks] == SITES and len(record.claims) == 4
    assert all(sum(block.without["detail"]) > 0 for block in record.blocks)
    assert main(["block-roles", flux, *prompts]) == 0
    output = capsys.readouterr().out
    assert all(f"{name}:update" in output for name in ("double.0", "double.1", "single.2")) and "Roles by" not in output
    assert main(["block-roles", flux, "--images", "3"]) == 2
    assert "Name a file with --prompts" in capsys.readouterr().err
    assert main(["block-roles", flux, *prompts[:2], "--images", "4"]) == 2
    assert "has 3 prompts, fewer than 4" in capsys.readouterr().err
