"""Commands that measure dictionaries (`evaluate`), their features (`concepts`) and the activations of a model (`anatomy`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

import difflex
from difflex.commands.flags import (
    AMOUNT,
    BATCH,
    COUNT,
    RANGE,
    SHARE,
    STEPS,
    TOKENS,
    WHOLE,
    ModelCommand,
    NoiseLevels,
    Pixels,
    StudyImagesCommand,
    StudyModelCommand,
    located,
)
from difflex.commands.inputs import first_and_end, load_study_model, narrowed, open_study, study_pixels
from difflex.dictionary_config import read_config
from difflex.errors import BadInput, OutOfMemory
from difflex.explore.inputs import read_prompts
from difflex.images import check_output
from difflex.records import Activations, Shot, Site
from difflex.study import Study

if TYPE_CHECKING:
    from difflex.evaluation.concepts import ConceptsConfig


@final
@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(StudyModelCommand):
    """Evaluate dictionaries on held-out activations, and their effect on the model; what is up to date is kept."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A folder with the results of `difflex harvest`, `difflex train` and `difflex itda`."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Evaluate all dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Evaluate these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    largest: FlagCreatePairsOff[bool] = False
    """Of these, only the largest of each kind at each site, with the largest k."""
    tokens: Annotated[int, TOKENS] = 1_000_000
    """Number of held-out tokens; all if there are fewer."""
    effect_shots: Annotated[int, WHOLE] = 32
    """Number of held-out shots at which to measure the effect on the model; 0 skips it and loads no model."""
    measure: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: none)")] = ()
    """Image measures in addition to PSNR and SSIM: `lpips`, or `clip:` and the folder or hub name of a CLIP."""
    replace: FlagCreatePairsOff[bool] = False
    """Measure again what was measured on another number of tokens, at fewer shots or with another precision."""

    def __call__(self) -> list[Path]:
        from difflex.evaluation import EditedModel, EvaluationConfig, evaluate_study, evaluation_table

        study = open_study(self.study, self)
        sites, names = narrowed(study, self.site, self.dictionary, self.largest)
        config = EvaluationConfig(
            sites=sites,
            dictionaries=names,
            tokens=self.tokens,
            shots=self.effect_shots,
            measures=self.measure,
            offline=self.offline,
            precision=self.precision and study.settings.precision,
            replace=self.replace,
        )
        load = cache(lambda precision: load_study_model(study.run_in(precision), self))

        def edited_model(site: Site, shots: Sequence[Shot]) -> EditedModel:
            pipe = load(config.precision or shots[0].precision)
            return EditedModel(partial(pipe.predictions, shots, site), partial(pipe.images, shots, site))

        results = evaluate_study(study, config, edited_model)
        for dictionary, result in results.items():
            if result.has_other_settings:
                effect = result.evaluation.effect
                shots = f" and an effect at {effect.shots} shots" if effect else ""
                print(
                    f"{dictionary}: keeps its evaluation on {result.evaluation.overall.tokens:,} tokens{shots}, which has other "
                    "settings. --replace measures it again."
                )
            elif result.up_to_date:
                print(f"{dictionary}: up to date")
        print(evaluation_table(results, self.measure))
        return [study.evaluation(*dictionary) for dictionary in results]


@final
@dataclass(frozen=True, kw_only=True)
class TransferCommand(StudyImagesCommand):
    """Measure dictionaries at each step of a run, of their own model or another: explained variance, and overlap of codes."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with dictionaries."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Measure all dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Measure these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    largest: FlagCreatePairsOff[bool] = False
    """Of these, only the largest of each kind at each site, with the largest k."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: that of the study)")] = None
    """Another model with the same sites: an embedded model, a folder, or a name on the hub."""
    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """The revision of another model on the hub."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: those held out by the harvest)")] = None
    """A text file with one prompt per line, or `captions`: those of the drawn world."""
    seeds: Annotated[range | None, RANGE, arg(aliases=["--seed"], help_behavior_hint="(default: those of the harvest)")] = None
    """Seeds of the noise: the first for the first prompt, and so on, again from the first after the last."""
    images: Annotated[int, COUNT] = 100
    """Number of prompts, with an image each."""
    batch: Annotated[int, BATCH] = 8
    """Images per forward pass."""

    def __call__(self) -> list[Path]:
        from difflex.evaluation.transfer import TransferInputs, transfer_table, update_transfer

        if self.revision is not None and self.model is None:
            raise BadInput("--revision is that of another model. Name it with --model.")
        study = open_study(self.study, self)
        refs = study.select_dictionaries(*narrowed(study, self.site, self.dictionary, self.largest))
        prompts, source = self._prompts(study)
        pipe = load_study_model(study, self) if self.model is None else self._other_model(study)
        steps = list(pipe.shots(""))
        run = replace(steps[0], prompt="", timestep=None, split="train")
        shots = [replace(step, prompt=prompt, seed=seed) for prompt, seed in prompts for step in steps]
        inputs = TransferInputs(run=run, prompts=source, images=len(prompts), seeds=first_and_end(self.seeds))
        results = update_transfer(study, refs, inputs, lambda sites: pipe.harvest(shots, sites, self.batch))
        for path, (_, up_to_date) in results.items():
            print(f"{path}: {'up to date' if up_to_date else 'measured'}")
        print(transfer_table(record for record, _ in results.values()))
        return list(results)

    def _prompts(self, study: Study) -> tuple[list[tuple[str, int]], str]:
        """Return prompts with their seeds, and what identifies the prompts."""
        if self.prompts is None:
            source, pairs = "held out of the harvest", list(islice(self._held_out(study), self.images))
        else:
            prompts, harvested = read_prompts(self.prompts, None), study.settings.seeds
            seeds = count() if harvested is None else cycle(range(*harvested))
            source, pairs = prompts.source, list(zip(islice(prompts.texts, self.images), seeds, strict=False))
        if self.seeds is not None:
            pairs = [(prompt, seed) for (prompt, _), seed in zip(pairs, cycle(self.seeds), strict=False)]
        return pairs, source

    def _held_out(self, study: Study) -> Iterator[tuple[str, int]]:
        """Yield the held-out prompts of a study with their seeds."""
        from difflex.store import Store

        stores = [Store.open(folder) for folder in study.stores().values()]
        if not stores:
            raise BadInput(f"{study.folder} has no activations, so it holds no prompts out. Give some with --prompts.")
        seen = set[str]()
        for rows in stores[0].batches(1024, seed=None, split="held-out"):
            for shot in map(stores[0].shot, rows.shots.unique().tolist()):
                if shot.image is None and shot.prompt not in seen:
                    seen.add(shot.prompt)
                    yield shot.prompt, shot.seed

    def _other_model(self, study: Study) -> "difflex.Pipeline":
        precision = self.precision if self.precision != "auto" else study.settings.precision
        pipe = difflex.load(
            located(self.model or ""),
            precision=precision or study.settings.precision,
            revision=self.revision,
            offload=self.offload,
            offline=self.offline,
        )
        pipe.engine.set_defaults(self.pixels, self.steps, self.guidance)
        return pipe


@final
@dataclass(frozen=True, kw_only=True)
class ConceptsCommand(StudyModelCommand):
    """Match features to known concepts: what each feature detects, and how well compared with a linear probe."""

    studies: Annotated[Positional[tuple[Path, ...]], arg(metavar="STUDY...")]
    """Studies with dictionaries; several are compared in one table, such as a trained model and an untrained control."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Match all dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Match these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    largest: FlagCreatePairsOff[bool] = False
    """Of these, only the largest of each kind at each site, with the largest k."""
    no_baselines: FlagCreatePairsOff[bool] = False
    """Leave out principal axes, random directions and neurons."""
    images: Annotated[int, COUNT] = 1000
    """Number of labelled images."""
    held_out: Annotated[float, SHARE, arg(metavar="SHARE")] = 0.1
    """Share of the images that concepts are measured on; features are chosen on the others. With few images, take half."""
    noise: NoiseLevels = (0.25, 0.5, 0.75)
    """Noise levels of the images at the model's input."""
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: the drawn world)")] = None
    """Your own images with label maps: FOLDER/images, FOLDER/labels and FOLDER/labels.json."""
    pixels: Annotated[Pixels, arg(help_behavior_hint="(default: those of the folder, or of the study)")] = None
    """Size of the images: those of a folder are resized and cropped, the drawn world is drawn so large."""
    empty_prompts: FlagCreatePairsOff[bool] = False
    """Use empty prompts instead of those of the images."""
    present_above: Annotated[float, SHARE, arg(metavar="SHARE")] = 0.5
    """A token shows a concept if at least this share of its area does."""
    absent_below: Annotated[float, SHARE, arg(metavar="SHARE")] = 0.0
    """A token does not show a concept if at most this share of its area does; between the two it is ignored."""
    batch: Annotated[int, BATCH] = 32
    """Images per forward pass."""

    def __call__(self) -> list[Path]:
        from difflex.evaluation.concepts import ConceptsConfig, LabelFolder, drawn_source, match_studies
        from difflex.evaluation.concepts.results import matches_table

        config = ConceptsConfig(
            images=self.images,
            held_out=self.held_out,
            noise=self.noise,
            pixels=self.pixels,
            empty_prompts=self.empty_prompts,
            present_above=self.present_above,
            absent_below=self.absent_below,
        )
        if not self.studies:
            raise BadInput("No study was named. Name one or more: difflex concepts STUDY.")
        studies = [open_study(folder, self) for folder in self.studies]

        def open_model(study: Study):
            pipe = cache(lambda: load_study_model(study, self))

            def harvest_at(site: Site):
                if site.kind == "neurons" and "neurons" not in pipe().kinds(site):
                    return None
                if pixels is not None:
                    ks = [read_config(study.dictionary(*ref)).k for ref in study.dictionaries()]
                    _check_memory(pipe(), site, replace(config, pixels=pixels), len(images.concepts), ks)
                return lambda images, prompts, names: pipe().harvest_images(
                    images, self.noise, site, prompts, names, batch=self.batch, held_out=self.held_out
                )

            return harvest_at

        folder = LabelFolder.open(self.folder) if self.folder else None
        pixels = self.pixels if folder else self.pixels or study_pixels(studies[0])
        others = [study for study in studies if folder is None and self.pixels is None and study_pixels(study) != pixels]
        if others:
            raise BadInput(f"The images of {studies[0]} and {others[0]} have several sizes. Name one for both with --pixels.")
        images = folder.source(self.images, self.pixels) if folder else drawn_source(self.images, pixels or (0, 0))
        sites, names = narrowed(studies[0], self.site, self.dictionary, self.largest)
        stored = match_studies(studies, images, open_model, config, sites, names, baselines=not self.no_baselines)
        for method in stored:
            print(f"{method.path}: {'up to date' if method.up_to_date else 'matched'}")
        print(matches_table([method.matches for method in stored]))
        return [method.path for method in stored]


def _check_memory(pipe: "difflex.Pipeline", site: Site, config: "ConceptsConfig", concepts: int, ks: Sequence[int]) -> None:
    """Raise an error if matching at a site does not fit into memory, before an image is drawn."""
    from difflex.devices import free_memory

    [row, *_] = pipe.sites(str(replace(site, kind="residual")), config.pixels)
    width = (row.neurons or row.width) if site.kind == "neurons" else row.width
    need, free = config.streaming_bytes(row.tokens, width, concepts, ks), free_memory("cpu")
    if need > free:
        raise OutOfMemory(
            f"The labels and codes of {config.images:,} images at {len(config.noise)} noise levels at {site} take "
            f"{need / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free. Ask for fewer --images or --noise levels."
        )


MODEL_DEFAULT = "(default: the model's own)"
SPECTRA = 6
"""Number of spectra by default."""


@final
@dataclass(frozen=True, kw_only=True)
class AnatomyCommand(ModelCommand):
    """Measure norms by site and timestep, spectra, outliers and offsets; what is up to date is kept."""

    prompts: Annotated[str, arg(metavar="FILE")]
    """A text file with one prompt per line, or `captions`: those of the drawn world."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The folder of the study; created if it does not exist."""
    max_prompts: Annotated[int, COUNT] = 64
    """Number of prompts to use."""
    site: Annotated[
        tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: every block's residual, both streams)")
    ] = ()
    """Measure norms at these sites; a star stands for one index."""
    spectra: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: up to six, evenly spaced)")] = ()
    """Measure the spectrum at these sites, which takes a width x width matrix each."""
    steps: Annotated[int | None, STEPS, arg(help_behavior_hint=MODEL_DEFAULT)] = None
    """Number of denoising steps; all of them are measured."""
    pixels: Annotated[Pixels, arg(help_behavior_hint=MODEL_DEFAULT)] = None
    """Image size; one number for a square."""
    guidance: Annotated[float | None, AMOUNT, arg(metavar="SCALE", help_behavior_hint=MODEL_DEFAULT)] = None
    """Guidance scale."""
    batch: Annotated[int, BATCH] = 16
    """Images per forward pass."""

    def __call__(self) -> list[Path]:
        from difflex.evaluation.anatomy import AnatomyInputs, update_anatomy

        check_output(self.out / "study.json")
        prompts = read_prompts(self.prompts, None)
        pipe = self.load(self.out)
        study = Study.open_or_plan(self.out, pipe.name, pipe.revision)
        study.prepare()
        sites, spectra = self._sites(pipe)
        shot = next(pipe.shots("", steps=self.steps, pixels=self.pixels, guidance=self.guidance))
        inputs = AnatomyInputs(
            model=shot.model,
            revision=shot.revision,
            precision=shot.precision,
            text_length=shot.text_length,
            pixels=shot.pixels,
            steps=shot.steps,
            guidance=shot.guidance,
            prompts=prompts.source,
            max_prompts=self.max_prompts,
            sites=tuple(sites),
            spectra=tuple(spectra),
        )

        def harvest() -> Iterator[Activations]:
            texts = islice(prompts.texts, self.max_prompts)
            shots = pipe.shots(texts, steps=self.steps, pixels=self.pixels, guidance=self.guidance)
            return pipe.harvest(shots, [*dict.fromkeys([*sites, *spectra])], self.batch)

        result = update_anatomy(study, inputs, harvest)
        state = "up to date" if result.up_to_date else f"{len(sites)} sites, spectra of {len(spectra)}"
        print(f"{study.anatomy}: {state}", *result.paths[1:], sep="\n")
        return result.paths

    def _sites(self, pipe: "difflex.Pipeline") -> tuple[list[Site], list[Site]]:
        """Return the sites of the norms, and those of the spectra."""
        sites = pipe.expand(self.site) or [row.site for row in pipe.sites()]
        image_sites = [site for site in sites if site.stream == "image"] or sites
        return sites, pipe.expand(self.spectra) or image_sites[:: -(-len(image_sites) // SPECTRA)]
