"""`difflex measure` and `block-roles`: measures of features, and what each block of a model does in images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from tyro.conf import Positional, arg

from difflex.choices import Unit
from difflex.commands.effects import model_functions
from difflex.commands.flags import (
    COUNT,
    SEED,
    FeatureNames,
    StudyImagesCommand,
    memory_to_work,
    number,
    real,
)
from difflex.commands.inputs import load_study_model, named_features, open_study
from difflex.errors import BadInput
from difflex.explore.inputs import PromptSource, read_prompts
from difflex.images import check_output
from difflex.records import Site
from difflex.study import Study

if TYPE_CHECKING:
    from difflex.pipeline import Pipeline

__all__ = ["BlockRolesCommand", "MeasureCommand"]

IMAGES = number(2, 256)
BATCH = 16
DRAWN_PIXELS = (64, 64)
"""The size of the images that the judge of the drawn world reads."""
MeasureChoice = Literal[
    "specificity",
    "known-specificity",
    "sensitivity",
    "causality",
    "known-causality",
    "texture",
    "colour",
    "locality",
]


@final
@dataclass(frozen=True, kw_only=True)
class MeasureCommand(StudyImagesCommand):
    """Measure features by their images: specificity, sensitivity, causality, texture, colour and locality.

    Each measure is a mean over features with its 95 % interval, next to the same measure of a random feature. A killed run
    continues; what is up to date is kept.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with books of features."""
    features: Annotated[Positional[FeatureNames], arg(help_behavior_hint="(default: a random sample)")] = ()
    """Features to measure, by numbers or by words that `difflex search` finds them by."""
    dictionary: Annotated[
        tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: all that have a book)")
    ] = ()
    """SITE/LABEL, or the site alone if it has one dictionary."""
    sample: Annotated[int, COUNT] = 64
    """Features in the random sample."""
    images: Annotated[int, IMAGES] = 8
    """Images for each feature and measure."""
    measure: Annotated[str, arg(metavar="NAME")] = "ssim"
    """Similarity of images: `ssim`, `lpips`, or `clip:` and the folder or hub name of a CLIP."""
    only: Annotated[tuple[MeasureChoice, ...], arg(metavar="MEASURE...", help_behavior_hint="(default: all)")] = ()
    """Measures to make."""
    strength: Annotated[float, real(1e-3, 1e6)] = 1.0
    """Strength of a feature alone on an empty prompt, in --unit."""
    unit: Annotated[Unit | None, arg(help_behavior_hint="(default: mean for an update, else peak)")] = None
    """What a strength of 1 is: the feature's mean code where it fires, its largest code, or another unit of difflex steer."""
    edit_strength: Annotated[float, real(1e-3, 1e6)] = 0.5
    """Strength of edits in the middle of an image, in norms of a mean activation."""
    seed: Annotated[int, SEED] = 0
    """Seed of the sample and of the images."""

    def __call__(self) -> list[Path]:
        from difflex.measures import MeasureConfig, measure_features, measures_table

        study, names, features = open_study(self.study, self), self.dictionary, tuple[int, ...]()
        if self.features:
            if len(names) > 1:
                raise BadInput(f"Features are of one dictionary, but {len(names)} are named. Name one with --dictionary.")
            place, features = named_features(study, self.features, names[0] if names else None)
            names, features = (str(place),), tuple(dict.fromkeys(features))
        config = MeasureConfig(
            features=features,
            sample=self.sample,
            images=self.images,
            similarity=self.measure,
            strength=self.strength,
            unit=self.unit,
            edit_strength=self.edit_strength,
            seed=self.seed,
        )
        model = cache(lambda: model_functions(load_study_model(study, self)))
        results = []
        for result in measure_features(study, names, config, model, self.only, self.offline):
            print(f"{result.measures.dictionary}: {len(result.measures.features)} features{', as before' * result.is_reused}")
            results.append(result)
        print(measures_table([result.measures for result in results]))
        return [result.path for result in results]


@final
@dataclass(frozen=True, kw_only=True)
class BlockRolesCommand(StudyImagesCommand):
    """Leave out the update of one block after another, and measure what changes: composition, detail, colour and style.

    A change of 1 is as large as that between two unrelated images. In parentheses is that of a random update of the same norm.
    """

    study_or_model: Annotated[Positional[str], arg(metavar="STUDY_OR_MODEL")]
    """A study, in which the results are kept; or an embedded model, a folder, or a name on the hub."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all outer blocks)")] = ()
    """Blocks to leave out, with patterns: down.2.1, double.*."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: those of the study)")] = None
    """A text file with a prompt on each line, or `captions` of the drawn world."""
    images: Annotated[int, number(2, 10_000)] = 32
    """Images for each block."""
    seed: Annotated[int, SEED] = 0
    """Seed of the first image."""
    out: Annotated[Path | None, arg(metavar="STUDY", help_behavior_hint="(default: the study, or none)")] = None
    """For a model: a study to keep the results in; it is begun if it does not exist."""

    def __call__(self) -> list[Path] | None:
        from difflex.effects.inputs import to_tensor
        from difflex.measures import BlockRolesConfig, block_roles_table, measure_block_roles

        study = self._study()
        prompts, texts = self._prompts(study)
        pipe = self._load() if study is None else load_study_model(study, self)
        if self.out is not None:
            study = Study.begin(self.out, pipe.name, pipe.revision)
        shot = next(iter(pipe.shots("")))
        run = f"{shot.precision}, {shot.pixels[0]}x{shot.pixels[1]}, {shot.steps} steps, guidance {shot.guidance:g}"
        config = BlockRolesConfig(
            prompts=prompts.source,
            images=self.images,
            seed=self.seed,
            run=run,
            is_judged=prompts.is_endless and shot.pixels == DRAWN_PIXELS,
        )

        def generate(hooks: Sequence):
            generated = pipe.generate(texts, seed=self.seed, batch=BATCH, edits=hooks)
            return to_tensor(each.image for each in generated)

        path, name = (None, pipe.name) if study is None else (study.block_roles, study.model)
        roles, is_reused = measure_block_roles(name, pipe.revision, list(self._sites(pipe)), config, generate, path)
        print(f"{len(roles.blocks)} blocks, {self.images} images each{', as before' * is_reused}")
        print(block_roles_table(roles))
        return None if path is None else [path]

    def _study(self) -> Study | None:
        """Return the study that the first word names; None if that is a model."""
        path = Path(self.study_or_model)
        if not (path / "study.json").is_file() and path.suffix != ".zip":
            if self.out is not None:
                check_output(Study(folder=self.out, model="").block_roles)
            return None
        if self.out is not None:
            raise BadInput("The results of a study are kept in it. Leave --out out.")
        study = open_study(path, self)
        check_output(study.block_roles)
        return study

    def _prompts(self, study: Study | None) -> tuple[PromptSource, list[str]]:
        """Return the source of the prompts, and as many of them as there are images."""
        source = self.prompts or (study.settings.prompts if study else None)
        if source is None:
            raise BadInput("There are no prompts to generate images of. Name a file with --prompts, or captions.")
        prompts = read_prompts(source, None)
        texts = list(islice(prompts.texts, self.images))
        if len(texts) < self.images:
            raise BadInput(f"{source} has {len(texts)} prompts, fewer than {self.images}. Give --images {len(texts)}.")
        return prompts, texts

    def _load(self) -> "Pipeline":
        """Load the model that the first word names."""
        import difflex

        precision, offload = self.precision, self.offload
        if precision == "auto":
            from difflex.pipeline import choose_precision

            wish, reserve = True if offload else None, memory_to_work()
            precision, offload = choose_precision(self.study_or_model, offload=wish, offline=self.offline, reserve=reserve)
        pipe = difflex.load(self.study_or_model, precision=precision, offload=offload, offline=self.offline)
        pipe.engine.set_defaults(self.pixels, self.steps, self.guidance)
        return pipe

    def _sites(self, pipe: "Pipeline") -> Iterator[Site]:
        """Yield the sites of the updates of blocks in the image stream: by default of all that are in no other block."""
        if self.site:
            for site in pipe.expand(self.site):
                yield pipe.site(Site(site.path, "update"))
            return
        names = {row.site.path for row in pipe.sites() if row.site.stream == "image" and "update" in row.kinds}
        for name in dict.fromkeys(row.site.path for row in pipe.sites()):
            parts = name.split(".")
            if name in names and not any(".".join(parts[:length]) in names for length in range(1, len(parts))):
                yield pipe.site(Site(name, "update"))
