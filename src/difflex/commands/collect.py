"""`difflex collect`: make the books of a study's dictionaries in one pass over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Precision
from difflex.commands.flags import NoiseLevels, Pixels, Range, Seeds
from difflex.commands.inputs import load_study_model, read_prompts
from difflex.errors import BadInput
from difflex.features import Book
from difflex.study import Command, DictionaryRef, Study

if TYPE_CHECKING:
    from difflex.features.collecting import ImageSource

__all__ = ["CollectCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class CollectCommand(Command):
    """Make the book of each dictionary: statistics, images and maps of its features; continues after a kill."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with dictionaries."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Collect for all dictionaries of these sites, in one pass: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Collect for these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    images: Annotated[int, arg(metavar="N")] = 1000
    """Number of images; about a tenth of them is held out, with examples of its own."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: the shots of the harvest)")] = None
    """Generate images from these prompts: a file, a folder, a data set or `captions`, as for difflex harvest."""
    seeds: Seeds = range(1)
    """Seeds for each of the --prompts; END is excluded."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's own)")] = None
    """Number of denoising steps, with --prompts."""
    keep_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """Steps to take activations from, with --prompts; END is excluded."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint="(default: the model's own)")] = None
    """Image size, with --prompts; with --folder, images are resized and cropped to it."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="(default: the model's own)")] = None
    """Guidance scale, with --prompts."""
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """Use the images in this folder, noised; NAME.txt holds the prompt of NAME.jpg."""
    drawn_world: FlagCreatePairsOff[bool] = False
    """Use scenes of the drawn world with their captions, noised."""
    noise: NoiseLevels = (0.25, 0.5, 0.75)
    """Noise levels, with --folder and --drawn-world."""
    top_examples: Annotated[int, arg(metavar="N")] = 32
    """Top examples for each feature and split: the images in which it fires most strongly."""
    random_examples: Annotated[int, arg(metavar="N")] = 16
    """Random images in which it fires."""
    silent_examples: Annotated[int, arg(metavar="N")] = 8
    """Random images in which it does not fire."""
    no_patches: FlagCreatePairsOff[bool] = False
    """Do not generate the images that ITDA atoms were taken from."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Images per forward pass."""
    precision: Annotated[Precision | None, arg(help_behavior_hint="(default: that of the harvest)")] = None
    """Precision of the model's weights."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the GPU only the part of the model that is running."""
    offline: FlagCreatePairsOff[bool] = False
    """Load models of the hub from the local cache only."""

    def __call__(self) -> list[Path]:
        from difflex.features.collecting import CollectConfig, collect_study
        from difflex.steering import StudyEditor

        if self.images < 1 or self.batch < 1:
            raise BadInput(f"--images {self.images} --batch {self.batch}: both must be at least 1.")
        if sum(map(bool, (self.prompts, self.folder, self.drawn_world))) > 1:
            raise BadInput("--prompts, --folder and --drawn-world are three sources of images. Use one of them.")
        study = Study.open(self.study)
        refs = study.select_dictionaries(self.site, self.dictionary)
        config = CollectConfig(
            top_examples=self.top_examples, random_examples=self.random_examples, silent_examples=self.silent_examples
        )
        editor, stores = StudyEditor(study), study.stores()
        books = collect_study(
            study,
            refs,
            self._source(study, refs),
            config,
            load=editor.dictionary,
            strengths=lambda ref: editor.default_strengths(ref) if ref.site in stores else (),
            draw_patches=not self.no_patches,
        )
        for book in books:
            print(f"{book.path}: {'up to date' if book.up_to_date else 'collected'}")
        print(_table([book.path for book in books]))
        return [book.path for book in books]

    def _source(self, study: Study, refs: Sequence[DictionaryRef]) -> "ImageSource":
        """Return the images to collect from; the model is loaded when it is needed."""
        from difflex.features.collecting import runs_source, stored_shots

        pipe = cache(lambda precision: load_study_model(study, self.precision or precision, self.offload, self.offline))

        def harvest(precision: str | None):
            return lambda shots, sites: pipe(precision).harvest_with_images(shots, sites, batch=self.batch)

        def harvest_images(images, prompts, names, sites, seed):
            arguments = {"seed": seed, "batch": self.batch, "progress": False}
            return pipe(None).harvest_images(images, self.noise, sites, prompts, names, **arguments)

        batch = f"{self.batch} at once"
        if self.drawn_world or self.folder is not None:
            return self._noised(harvest_images, harvest(None), batch)
        if self.prompts is None:
            stored = stored_shots(study, refs, self.images)
            precision = stored.shots[0].precision if stored.shots else None
            return runs_source(f"{stored.description}, {batch}", stored.shots, self.images, harvest(precision))
        prompts = read_prompts(self.prompts, None)
        texts = islice(prompts.texts, -(-self.images // len(self.seeds)))
        shots = pipe(None).shots(texts, self.seeds, self.steps, self.keep_steps, self.pixels, self.guidance)
        names = ("seeds", "steps", "keep_steps", "pixels", "guidance", "precision")
        settings = ", ".join(f"{name} {getattr(self, name)}" for name in names)
        return runs_source(f"{prompts.source}, {settings}, {batch}", shots, self.images, harvest(None))

    def _noised(self, harvest_images, harvest, batch: str) -> "ImageSource":
        """Return images of a folder or of the drawn world, which the model is shown with noise."""
        from difflex.commands.evaluation import FIRST_SEED, drawn_images
        from difflex.features.collecting import ImageFolder, PromptedImage, noised_source
        from difflex.pipeline import open_image

        settings = f"noise {','.join(f'{level:g}' for level in self.noise)}, pixels {self.pixels}, {batch}"
        if self.folder is not None:
            folder = ImageFolder.open(self.folder, self.pixels, open_image)
            description = f"folder of {[path.name for path in folder.paths]}, {settings}"
            load = lambda start: folder.images(start, self.images)  # noqa: E731
            return noised_source(description, self.images, load, harvest_images, harvest, self.batch)

        def draw(start: int):
            scenes = drawn_images(self.images - start, FIRST_SEED + start)
            return (PromptedImage(scene.image, scene.prompt, scene.name) for scene in scenes)

        description = f"drawn world from {FIRST_SEED}, {settings}"
        return noised_source(description, self.images, draw, harvest_images, harvest, self.batch)


def _table(books: Sequence[Path]) -> str:
    """Return how many features fire and how much of their top images they cover, a line for each book."""
    lines = [f"{'':<40}{'features':>10}{'that fire':>11}{'tokens':>12}{'covered':>9}{'median':>8}"]
    for path in books:
        with Book.open(path) as book:
            summary, firing, about = book.coverage_summary(), book.count_firing(), book.about
        mean, median = ("-", "-") if summary is None else (f"{summary.mean:.1%}", f"{summary.quartiles[1]:.1%}")
        lines.append(f"{about.dictionary:<40}{about.size:>10,}{firing:>11,}{about.tokens:>12,}{mean:>9}{median:>8}")
    return "\n".join(lines)
