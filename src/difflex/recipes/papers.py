"""Recipes of two papers: arXiv 2505.24360 on FLUX.1, and arXiv 2410.22366 on SDXL Turbo and on mini-sdxl."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from difflex.commands.evaluation import AnatomyCommand, ConceptsCommand, EvaluateCommand, TransferCommand
from difflex.commands.explain import ExplainCommand
from difflex.commands.features import CollectCommand
from difflex.commands.flags import PrecisionChoice
from difflex.commands.harvest import HarvestCommand
from difflex.commands.measures import BlockRolesCommand, MeasureCommand
from difflex.commands.study import ReportCommand
from difflex.commands.training import ItdaCommand, TrainCommand
from difflex.recipes.drawn import LATE, neurons_of
from difflex.study import Command, Study

CC12M = "opendiffusionai/cc12m-cleaned:caption_llava_short"
"""The prompts of arXiv 2505.24360."""
AESTHETIC = "guangyil/laion-coco-aesthetic:caption"
"""The prompts of arXiv 2410.22366."""
DRAWN = "captions"
"""The captions of the drawn world."""
KNOWN = "known"
"""The name of what answers from known concepts, where that of a VLM is expected."""
SDXL_TURBO, SDXL_BASE = "stabilityai/sdxl-turbo", "stabilityai/stable-diffusion-xl-base-1.0"
UNBOX_SITES = ("down.2.1:update", "mid.0:update", "up.0.0:update", "up.0.1:update")
UNBOX_K = (5, 10, 20, 40, 80, 160)
"""The sites and the k of arXiv 2410.22366."""
STORED = 400_000
"""Tokens of each site of a large model that are stored: for ITDA, normalisations and evaluation."""
NOISY = 0.9
"""A noise level at which something of an image is left, for a model whose only step begins at pure noise."""


def flux_schnell(
    folder: Path,
    *,
    model: str = "black-forest-labs/FLUX.1-schnell",
    precision: PrecisionChoice | None = None,
    prompts: str = CC12M,
    pixels: tuple[int, int] = (256, 256),
    tokens: int = 30_720_000,
    vlm: str = KNOWN,
) -> Study:
    """Return arXiv 2505.24360 on FLUX.1 schnell with all its figures: SAEs and ITDA at four sites, k and size at one, neurons.

    The SAEs are trained while the model runs. A `vlm` explains features; without one they are compared with known concepts, which
    explain them if the prompts are the captions of the drawn world. The model reads 256 text tokens, as its authors' code does;
    the published code reads 512.
    """
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return _flux(folder, {**loading, "steps": 1, "guidance": 0.0}, tokens, vlm)


def flux_dev(
    folder: Path,
    *,
    model: str = "black-forest-labs/FLUX.1-dev",
    precision: PrecisionChoice | None = None,
    prompts: str = CC12M,
    pixels: tuple[int, int] = (256, 256),
    tokens: int = 30_720_000,
    vlm: str = KNOWN,
) -> Study:
    """Return the same study of FLUX.1 dev, at all of its 28 steps and with its default guidance."""
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    return _flux(folder, {**loading, "steps": 28, "guidance": 3.5}, tokens, vlm)


def _flux(folder: Path, loading: Mapping[str, Any], tokens: int, vlm: str) -> Study:
    """Return a study of FLUX.1; `loading` are the flags that its commands which load it by name share."""
    middle, elsewhere = "double.18", ("double.9", "single.9", "single.18")
    inner, stored = f"{middle}:neurons", min(tokens, STORED)
    # An ITDA grows from several times as many tokens as it has atoms, and SAEs are compared with an ITDA of their size.
    sizes = tuple(max(16, size * stored // STORED) for size in (16_384, 32_768, 65_536))
    k = min(64, sizes[0] // 16)
    harvest = HarvestCommand(**loading, site=(middle, *elsewhere), tokens=stored, dtype="int8", batch=32)
    # Few tokens must be of many prompts, of which a tenth is held out: of a run of many steps, four are stored.
    few = harvest if loading["steps"] < 8 else replace(harvest, keep_steps=range(0, loading["steps"], loading["steps"] // 4))
    train = TrainCommand(
        study=folder,
        site=(middle,),
        preset="paper",
        k=tuple(dict.fromkeys((-(-k // 2), -(-3 * k // 4), k))),
        size=sizes,
        tokens=tokens,
        weights="bf16",
    )
    bare = replace(train, k=(k,), size=sizes[:1], tokens=min(tokens, 10 * STORED), checkpoints="compact")
    itda = ItdaCommand(study=folder, site=(middle,), k=k, pursuit="gradient")
    return Study(
        folder=folder,
        model=loading["model"],
        commands=(
            AnatomyCommand(**{**loading, "steps": max(loading["steps"], 4)}, max_prompts=min(64, max(4, tokens // 256))),
            # Before the harvest whose steps training repeats.
            *neurons_of(few, middle, (k,), tokens=max(min(stored, 1024), stored // 8)),
            harvest,
            replace(train, also=elsewhere, live=True, harvest_batch=32),
            *(replace(bare, normalisation=normalisation) for normalisation in ("none", "standardise", "whiten")),
            *(replace(itda, size=(size,)) for size in sizes),
            replace(itda, site=elsewhere, size=sizes[-1:]),
            EvaluateCommand(study=folder, effect_shots=0),
            EvaluateCommand(study=folder, site=(middle,), largest=True),
            *_interpreted(folder, {"site": (middle, inner), "largest": True}, loading, tokens, vlm),
            ReportCommand(study=folder),
        ),
    )


def _interpreted(
    folder: Path, chosen: Mapping[str, Any], loading: Mapping[str, Any], tokens: int, vlm: str
) -> tuple[Command, ...]:
    """Return the commands that show what dictionaries stand for, `chosen` by flags; less than `tokens` limit the images."""
    images = min(8000 if loading["steps"] == 1 else 1000, max(50, tokens // 256))
    noise, drawn = (NOISY,) if loading["steps"] == 1 else (LATE,), vlm == KNOWN and loading["prompts"] == DRAWN
    height, width = loading["pixels"]
    world: dict[str, Any] = {"noise": noise}
    if height != width or height % 64:  # the drawn world has none of these
        world["pixels"] = (max(64, min(height, width) // 64 * 64),) * 2
    run = {name: loading[name] for name in ("prompts", "steps", "pixels", "guidance")}
    given: dict[str, Any] = {"drawn_world": True, **world} if drawn else run
    explain = ExplainCommand(studies=(folder,), vlm=vlm)
    return (
        ConceptsCommand(studies=(folder,), **chosen, images=min(500, max(200, images)), **world),
        CollectCommand(study=folder, **chosen, images=images, patches=0, **given),
        *((explain, replace(explain, protocol="paper")) if drawn or vlm != KNOWN else ()),
    )


def sdxl_turbo(
    folder: Path,
    *,
    model: str = SDXL_TURBO,
    precision: PrecisionChoice | None = None,
    prompts: str = AESTHETIC,
    pixels: tuple[int, int] = (512, 512),
    tokens: int = 38_400_000,
    vlm: str = KNOWN,
) -> Study:
    """Return arXiv 2410.22366 on SDXL Turbo: the updates of four blocks at one step, six k at one and four times the width.

    A tenth of its 384 M vectors for each block, trained on while the model runs; 400,000 are stored. Features are shown of the
    dictionaries of 5,120 features with k 10, as in the paper.
    """
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    loading |= {"steps": 1, "guidance": 0.0}
    shown = tuple(f"{site}/topk-5120-k10" for site in UNBOX_SITES)
    transfer = TransferCommand(study=folder, dictionary=shown, steps=4)
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**loading),
            HarvestCommand(**loading, site=UNBOX_SITES, tokens=min(tokens, STORED), dtype="int8"),
            TrainCommand(study=folder, site=UNBOX_SITES, preset="unbox", k=UNBOX_K, size=(1280, 5120), tokens=tokens, live=True),
            EvaluateCommand(study=folder),
            BlockRolesCommand(study_or_model=model, prompts=prompts, pixels=pixels, steps=1, guidance=0.0, out=folder),
            *_interpreted(folder, {"dictionary": shown}, loading, tokens, vlm),
            MeasureCommand(study=folder, dictionary=shown),
            transfer,
            # The base model that SDXL Turbo was made from.
            *([replace(transfer, model=SDXL_BASE, steps=20, guidance=5.0)] if model == SDXL_TURBO else []),
            ReportCommand(study=folder),
        ),
    )


def mini_sdxl(
    folder: Path,
    *,
    model: str = "mini-sdxl",
    precision: PrecisionChoice | None = None,
    prompts: str = DRAWN,
    pixels: tuple[int, int] | None = None,
    tokens: int = 200_000,
) -> Study:
    """Return the same study on mini-sdxl, whose concepts are known, in minutes; it is 96 wide at the four sites.

    With the default preset: that of the paper trains 1,500 times as long.
    """
    loading: dict[str, Any] = {"model": model, "precision": precision, "prompts": prompts, "pixels": pixels, "out": folder}
    loading |= {"steps": 1, "guidance": 0.0}
    shown = tuple(f"{site}/topk-384-k10" for site in UNBOX_SITES)
    train = TrainCommand(study=folder, site=UNBOX_SITES, k=UNBOX_K[:-1], size=(384,), tokens=2 * tokens)
    explain = ExplainCommand(studies=(folder,), dictionary=shown, random_features=64)
    transfer = TransferCommand(study=folder, dictionary=shown, steps=4)
    return Study(
        folder=folder,
        model=model,
        commands=(
            AnatomyCommand(**{**loading, "steps": 4}, max_prompts=16),
            HarvestCommand(**loading, site=UNBOX_SITES, tokens=tokens),
            train,
            replace(train, size=(96,), k=UNBOX_K[:-2]),
            EvaluateCommand(study=folder, effect_shots=16),
            BlockRolesCommand(study_or_model=model, prompts=prompts, pixels=pixels, steps=4, guidance=0.0, out=folder),
            ConceptsCommand(studies=(folder,), dictionary=shown, images=480, noise=(NOISY,), no_baselines=True),
            CollectCommand(study=folder, dictionary=shown, drawn_world=True, images=320, noise=(NOISY,), patches=0),
            *(explain, replace(explain, protocol="paper")),
            MeasureCommand(study=folder, dictionary=shown, sample=32),
            transfer,
            *([replace(transfer, model="mini-sdxl-base", steps=20, images=50)] if model == "mini-sdxl" else []),
            ReportCommand(study=folder),
        ),
    )
