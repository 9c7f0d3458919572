"""`difflex steer-eval`, `removal` and `findings`: the effects of edits, measured on judged images."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Unit
from difflex.commands.flags import SHARE, WHOLE, Numbers, StepRange, Strengths, StudyImagesCommand, number, numbers
from difflex.commands.inputs import first_and_end, load_study_model, open_study
from difflex.commands.judges import ConceptsJudge, check_judged
from difflex.errors import BadInput, UnknownName
from difflex.images import check_output
from difflex.records import Site
from difflex.study import Study

if TYPE_CHECKING:
    from difflex.effects import ModelFunctions
    from difflex.effects.concept_specs import JudgedWorld
    from difflex.effects.edit_bench import ImageScorer
    from difflex.effects.removal_world import RemovalWorld
    from difflex.pipeline import Pipeline

__all__ = ["EditBenchCommand", "FindingsCommand", "RemovalCommand", "SteerEvalCommand"]

BATCH = 32
TRIALS = number(1, 10_000)
"""How many images or captions of each concept."""
TransferMethod = Literal["features", "neurons", "activations", "contrast"]
EditTypeName = Literal["object", "add", "delete", "content", "pose", "colour", "material", "background", "style"]
ExperimentName = Literal["pairs", "distribution", "adversarial", "quality", "size", "related", "steps"]


@final
@dataclass(frozen=True, kw_only=True)
class SteerEvalCommand(ConceptsJudge):
    """Steer towards concepts with the features that detect them, and judge what appears, what else changes and what breaks.

    The baselines are the contrast of pairs of captions, a random direction of the same norm, the neuron that detects the concept
    best, and the prompt edited instead.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with the results of `difflex concepts`, unless --concepts names features."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: all)")] = ()
    """SITE/LABEL, or the site alone if it has one dictionary."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "texture", "background", "shape", "style")
    """Groups of concepts."""
    concepts_per_group: Annotated[int | None, TRIALS, arg(help_behavior_hint="(default: all)")] = None
    """Concepts of each group, evenly spread over it."""
    min_ap: Annotated[float, SHARE, arg(metavar="AP")] = 0.8
    """Least average precision of a feature."""
    trials: Annotated[int, TRIALS] = 24
    """Images of each concept."""
    pairs: Annotated[int, TRIALS] = 20
    """Pairs of captions for each contrast."""
    strength: Strengths = (0.5, 1.0, 1.5, 2.0, 3.0)
    """Strengths: of features in --unit, of contrasts in lengths of their own."""
    unit: Unit = "peak"
    """What a strength of 1 is: the feature's largest code, its mean code, the mean norm of an activation, or a code of 1."""
    edit_steps: Annotated[StepRange, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps to edit; END is not included."""
    automatic: FlagCreatePairsOff[bool] = False
    """Also steer at all sites and in the text, with sites, operation, steps and dose chosen on prompts that are not judged."""
    effect_updates: Annotated[int, WHOLE] = 0
    """Also optimise the strengths of each site and step through the model, in so many updates on prompts that are not judged."""
    effect_directions: FlagCreatePairsOff[bool] = False
    """With --effect-updates: optimise the direction at each site as well, and keep it as a contrast of the study."""
    tuning: Annotated[int | None, TRIALS, arg(help_behavior_hint="(default: 16, with --effect-directions 64)")] = None
    """Prompts of each concept for all of these."""

    def __call__(self) -> list[Path]:
        from difflex import effects

        config = effects.SteeringConfig(
            groups=self.groups,
            concepts_per_group=self.concepts_per_group,
            min_ap=self.min_ap,
            trials=self.trials,
            pairs=self.pairs,
            strengths=self.strength,
            unit=self.unit,
            edit_steps=first_and_end(self.edit_steps),
            automatic=self.automatic,
            effect_updates=self.effect_updates,
            effect_directions=self.effect_directions,
            tuning=self.tuning or (64 if self.effect_directions else 16),
        )
        study, paths = open_study(self.study, self), []
        if not study.dictionaries():
            raise UnknownName(f"{study.folder} has no dictionaries yet. Make some with difflex train or difflex itda.")
        model = cache(lambda: model_functions(load_study_model(study, self)))
        with self._world(study) as world:
            log = partial(print, flush=True)
            evaluations = effects.run_steering_evaluation(study, self.dictionary, config, model, world, log)
            threshold = "" if self.concepts else f" with a feature of AP {self.min_ap:g} or more"
            for place, path, results, concepts, is_reused in evaluations:
                print(f"{place}: {concepts} concepts{threshold}{', as before' if is_reused else ''}")
                print(effects.steering_table(results))
                paths.append(path)
        return paths

    @contextmanager
    def _world(self, study: Study) -> Iterator["JudgedWorld"]:
        from difflex.effects.concept_specs import DRAWN_WORLD, clip_world, vlm_world

        with self.judge(study) as (concepts, clip, client):
            if clip is not None:
                yield clip_world(concepts, clip.name, clip.load, clip.checksum)
            elif client is not None:
                yield vlm_world(concepts, self.model or self.vlm or "", client, self.connections)
            else:
                yield DRAWN_WORLD


@final
@dataclass(frozen=True, kw_only=True)
class RemovalCommand(ConceptsJudge):
    """Remove concepts by their features, and judge on unseen prompts what is gone and what else is lost.

    Features are chosen step by step by the score of SAeUron on one set of prompts, their number and strength on another one (if
    there are several to choose from), and results are measured on a third.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of a model of the drawn world, or of any other with --concepts."""
    dictionary: Annotated[
        tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: each label at all its sites)")
    ] = ()
    """SITE/LABEL, or the site alone if it has one dictionary; several joined by commas are edited together."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "background")
    """Groups of concepts."""
    images: Annotated[int, TRIALS] = 24
    """Prompts for each concept that results are measured on."""
    selection_images: Annotated[int, TRIALS] = 12
    """Prompts for each concept that features are chosen by."""
    tuning_images: Annotated[int, TRIALS] = 12
    """Prompts for each concept that the number of features and the strength are chosen by."""
    features: Numbers = (1, 2, 4, 8)
    """Numbers of features at each step and site."""
    strength: Strengths = (0.5, 0.0, -1.0, -2.0, -4.0)
    """What their codes are multiplied by: 0 removes them, a negative number writes the opposite."""
    edit_steps: Annotated[StepRange, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps to edit; END is not included."""

    def __call__(self) -> list[Path]:
        from difflex.effects import removal

        config = removal.RemovalConfig(
            groups=() if self.concepts else self.groups,
            images=self.images,
            selection_images=self.selection_images,
            tuning_images=self.tuning_images,
            features=self.features,
            strengths=self.strength,
            edit_steps=first_and_end(self.edit_steps),
        )
        study = open_study(self.study, self)
        model = cache(lambda: model_functions(load_study_model(study, self)))
        with self._world(study) as world:
            outcomes = removal.remove_concepts(study, self.dictionary, config, model, partial(print, flush=True), world)
        for _, results, is_reused in outcomes:
            print(f"{', '.join(results.dictionaries)}{': as before' if is_reused else ''}\n{removal.removal_table(results)}")
        return [outcome.path for outcome in outcomes]

    @contextmanager
    def _world(self, study: Study) -> Iterator["RemovalWorld"]:
        from difflex.effects.removal_world import DRAWN_REMOVAL, clip_removal, vlm_removal
        from difflex.explanation import ask_presence

        with self.judge(study) as (concepts, clip, client):
            if clip is not None:
                yield clip_removal(concepts, clip.name, clip.load, clip.checksum)
            elif client is not None:
                ask = partial(ask_presence, client, connections=self.connections)
                yield vlm_removal(concepts, self.model or self.vlm or "", ask)
            else:
                yield DRAWN_REMOVAL


@final
@dataclass(frozen=True, kw_only=True)
class FindingsCommand(StudyImagesCommand):
    """Test published findings about steering on a model of the drawn world, and say whether each holds here.

    Five are of arXiv 2505.03189 on contrasts, two of arXiv 2505.24360 on features. Findings that are up to date are kept.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of a model of the drawn world; it may be empty."""
    site: Annotated[str | None, arg(metavar="SITE", help_behavior_hint="(default: that of the study's dictionaries)")] = None
    """Site to steer at."""
    finding: Annotated[tuple[ExperimentName, ...], arg(metavar="NAME...", help_behavior_hint="(default: all)")] = ()
    """Experiments to make."""
    groups: Annotated[tuple[str, ...], arg(metavar="GROUP...")] = ("colour", "texture", "background", "style")
    """Groups of concepts."""
    concepts_per_group: Annotated[int, TRIALS] = 2
    """Number of concepts of each group, or all of a smaller group."""
    trials: Annotated[int, TRIALS] = 8
    """Images for each concept and condition."""
    pairs: Annotated[tuple[int, ...], numbers(10_000)] = (1, 2, 5, 10, 20, 40, 80, 160)
    """Numbers of pairs for contrasts; experiments on other things use the largest."""
    strength: Strengths = (0.1, 0.2, 0.35, 0.6, 1.0)
    """Strengths in norms of a mean activation; the first and the last are used for the loss of quality alone."""
    other_model: Annotated[Path | None, arg(metavar="STUDY", help_behavior_hint="(default: none)")] = None
    """The study of a larger or smaller model with findings of its own, for the finding on size."""

    def __call__(self) -> list[Path]:
        from difflex.effects import findings

        config = findings.FindingsConfig(
            groups=self.groups,
            concepts_per_group=self.concepts_per_group,
            trials=self.trials,
            pairs=tuple(sorted(set(self.pairs))),
            strengths=tuple(sorted(set(self.strength))),
        )
        study = open_study(self.study, self)
        check_judged(study)
        check_output(study.findings(Site("site")))
        pipe = load_study_model(study, self)
        site = None if self.site is None else pipe.site(self.site)
        log = partial(print, flush=True)
        path, results = findings.run_findings(study, site, config, model_functions(pipe), self.finding, self.other_model, log)
        for finding in results.findings:
            print(f"{finding.verdict:<19}{finding.claim}\n{'':<19}{finding.reason}")
        return [path]


@final
@dataclass(frozen=True, kw_only=True)
class EditBenchCommand(StudyImagesCommand):
    """Edit images by representations of other images, and measure which of them make which of nine edit types.

    The protocol is that of RIEBench (arXiv 2410.22366): features, neurons, whole activations and contrasts of the image that a
    second prompt generates are written into the image of the first. The references are the second prompt, and no edit.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of a model of the drawn world, or with --items of any model."""
    dictionary: Annotated[
        tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: the largest of each kind at each site)")
    ] = ()
    """SITE/LABEL, or the site alone if it has one dictionary; several joined by commas are edited together."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: those of the dictionaries)")] = ()
    """Sites of activations, contrasts and neurons; several joined by commas are edited together."""
    method: Annotated[tuple[TransferMethod, ...], arg(metavar="METHOD...")] = ("features", "neurons", "activations", "contrast")
    """What is transferred."""
    type: Annotated[tuple[EditTypeName, ...], arg(metavar="TYPE...", help_behavior_hint="(default: all nine)")] = ()
    """Types of edits."""
    count: Annotated[int, TRIALS] = 8
    """Items of each type."""
    features: Numbers = (16, 64)
    """Numbers of features that are added, and removed."""
    neurons: Numbers = (64, 256)
    """The same for neurons."""
    strength: Strengths = (0.5, 1.0, 2.0)
    """What is added and removed is multiplied by these."""
    pairs: Annotated[int, TRIALS] = 4
    """Pairs of images for the direction of each contrast."""
    items: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: items of the drawn world)")] = None
    """A file in the form of riebench.json."""
    masks: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """With --items, the masks of a segmenter: ID-source.png and ID-target.png."""
    clip: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """Folder or hub name of a CLIP of transformers that scores images."""
    lpips: FlagCreatePairsOff[bool] = False
    """Measure LPIPS as well."""

    def __call__(self) -> list[Path]:
        from difflex.effects import edit_bench

        config = edit_bench.EditBenchConfig(
            types=self.type or edit_bench.EditBenchConfig().types,
            count=self.count,
            dictionaries=self.dictionary,
            sites=self.site,
            methods=self.method,
            features=self.features,
            neurons=self.neurons,
            strengths=self.strength,
            pairs=self.pairs,
            clip=self.clip,
            lpips=self.lpips,
        )
        study = open_study(self.study, self)
        if self.masks is not None and (self.items is None or not self.masks.is_dir()):
            raise BadInput(f"--masks {self.masks} is a folder of masks for the items of a file. Give both --items and --masks.")
        if self.items is None:
            check_judged(study)
            world = edit_bench.drawn_world(config.types, config.count)
        else:
            world = edit_bench.masked_world(self.items, self.masks)
        files = {} if self.clip is None else {"clip": self._clip_checksum(self.clip)}
        model = cache(lambda: model_functions(load_study_model(study, self)))
        path, results, is_reused = edit_bench.run_edit_benchmark(
            study, config, world, model, self._scorer, files, partial(print, flush=True)
        )
        print(f"{results.items} items{', as before' if is_reused else ''}\n{edit_bench.edit_bench_table(results)}")
        return [path]

    def _clip_checksum(self, clip: str) -> str:
        from difflex.evaluation import ClipModel

        return ClipModel.checksum(clip, offline=self.offline)

    def _scorer(self) -> "ImageScorer":
        from difflex.effects.edit_bench import ImageScorer
        from difflex.evaluation import ClipModel
        from difflex.evaluation.image_similarity import LPIPS, load_measure

        clip = None if self.clip is None else ClipModel(self.clip, offline=self.offline)
        return ImageScorer(clip, load_measure(LPIPS, offline=self.offline) if self.lpips else None)


def model_functions(pipe: "Pipeline") -> "ModelFunctions":
    """Return a pipeline as the functions that judging edits needs."""
    from difflex.effects import ModelFunctions
    from difflex.effects.inputs import weights_checksum

    def finish(shots, sites, hooks: Sequence):
        with ExitStack() as stack:
            for site, change in hooks:
                stack.enter_context(pipe.at(site, change))
            yield from pipe.harvest_with_images(shots, sites, BATCH)

    return ModelFunctions(
        shots=lambda steps: list(pipe.shots("", keep_steps=steps)),
        harvest=pipe.harvest,
        generate=lambda prompts, seed, steps, hooks: [
            generated.image for generated in pipe.generate(prompts, seed=seed, steps=steps, batch=BATCH, edits=hooks)
        ],
        finish=finish,
        losses=pipe.losses,
        differentiable=pipe.differentiable_images,
        differentiable_losses=pipe.differentiable_losses,
        text_sites=lambda: [row.site for row in pipe.sites() if row.site.stream == "text"],
        parameters=sum(weights.numel() for weights in pipe.engine.denoiser.parameters()),
        weights=lambda: weights_checksum(pipe.engine.denoiser.named_parameters()),
    )
