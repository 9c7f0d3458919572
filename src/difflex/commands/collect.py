"""`difflex collect`: the books of a study's dictionaries, from one pass over images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

from PIL import Image, ImageOps
from tyro.conf import FlagCreatePairsOff, Positional, arg

import difflex
from difflex.commands.drawn_world import FIRST_SEED, drawn_images
from difflex.commands.flags import NoiseLevels, Pixels, Range
from difflex.commands.inputs import load_study_model, read_prompts
from difflex.dictionaries import ITDA, Dictionary, fingerprint
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.features import Book, ImageAlbum
from difflex.features.collecting import AtomLocation, CollectBatch, CollectConfig, CollectTarget, collect
from difflex.files import folder_lock
from difflex.pipeline import open_image
from difflex.records import Shot, Site
from difflex.steering import StudyEditor
from difflex.store import Store
from difflex.study import Command, DictionaryRef, Study

__all__ = ["CollectCommand"]

ENDINGS = (".png", ".webp", ".jpg", ".jpeg")


class CollectInput(NamedTuple):
    """What is shown to dictionaries."""

    told: str
    """Changes with what it is."""
    precision: str | None
    """What the model's weights were held in when it was first shown."""
    runs: Sequence[tuple[Shot, ...]] = ()
    """The shots of each run of the model; empty where it is shown images."""


@final
@dataclass(frozen=True, kw_only=True)
class CollectCommand(Command):
    """Write the book of every dictionary: where each feature fires, with images and figures; killed, it goes on."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with dictionaries."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all that have dictionaries)")] = ()
    """All dictionaries of these sites, which are collected from in one pass: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """These dictionaries, each by SITE/LABEL: double.18/topk-8192-k32."""
    images: Annotated[int, arg(metavar="N")] = 1000
    """How many images to look at; about a tenth is held out, and kept apart."""
    prompts: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="(default: the shots of the harvest)")] = None
    """Draw from these prompts, as for difflex harvest: a file, a folder, a data set, or `captions`."""
    seeds: Range = range(1)
    """Seeds for each of the prompts; END is left out."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: the model's own)")] = None
    """Denoising steps, with --prompts."""
    keep_steps: Annotated[Range | None, arg(help_behavior_hint="(default: all)")] = None
    """Which of the steps to look at, with --prompts; END is left out."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint="(default: the model's own)")] = None
    """Size of an image, with --prompts; what those of --folder are scaled and cut to."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint="(default: the model's own)")] = None
    """How strongly a prompt is followed, with --prompts."""
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """Show the model the images in this folder, noised; NAME.txt beside NAME.jpg is what it is told."""
    drawn_world: FlagCreatePairsOff[bool] = False
    """Show it scenes of the drawn world, noised, and tell it their captions."""
    noise: NoiseLevels = (0.25, 0.5, 0.75)
    """How noisy images that are shown are."""
    top_examples: Annotated[int, arg(metavar="N")] = 32
    """How many images to keep for each feature, of each split: those in which it is strongest."""
    random_examples: Annotated[int, arg(metavar="N")] = 16
    """How many random ones in which it fires."""
    silent_examples: Annotated[int, arg(metavar="N")] = 8
    """How many random ones in which it does not."""
    no_patches: FlagCreatePairsOff[bool] = False
    """Do not draw the images that ITDA atoms are patches of, where the pass does not show them anyway."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Images at once."""
    precision: Annotated[
        Literal["bf16", "fp16", "fp32", "nf4"] | None, arg(help_behavior_hint="(default: that of the harvest)")
    ] = None
    """What the model's weights are held in."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the card only the part at work."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def __call__(self) -> list[Path]:
        if self.images < 1 or self.batch < 1:
            raise BadInput(f"--images {self.images} --batch {self.batch} shows nothing. Ask for 1 or more of each.")
        if sum(map(bool, (self.prompts, self.folder, self.drawn_world))) > 1:
            raise BadInput("--prompts, --folder and --drawn-world are three sources of images. Name one of them.")
        study = Study.open(self.study)
        places = self._places(study)
        settings = CollectConfig(
            top_examples=self.top_examples, random_examples=self.random_examples, silent_examples=self.silent_examples
        )
        pipe = _LazyPipeline(study, self)
        shown = self._shown(study, places, pipe)
        data = f"{shown.told}, {self.images} images, {self.batch} at once, {_told(settings)}{', no patches' * self.no_patches}"
        missing = [place for place in places if not _is_there(study, place, data)]
        if missing:
            books = study.folder / "books"
            books.mkdir(parents=True, exist_ok=True)
            with folder_lock(books, shared=False):
                self._collect(study, missing, pipe, shown, settings, data)
        for place in places:
            print(f"{study.book(*place)}: {'made' if place in missing else 'is there already'}")
        print(_table(study, places))
        return [study.book(*place) for place in places]

    def _collect(
        self,
        study: Study,
        places: Sequence[DictionaryRef],
        pipe: "_LazyPipeline",
        shown: CollectInput,
        settings: CollectConfig,
        data: str,
    ) -> None:
        """Nothing; the books of these dictionaries are there."""
        sites = list(dict.fromkeys(place.site for place in places))
        pipe.precision = self.precision or shown.precision

        def source(start: int) -> Iterator[CollectBatch]:
            if not shown.runs:
                return self._met_images(pipe.opened, sites, start)
            shots = [shot for run in shown.runs[start:] for shot in run]
            return (CollectBatch(*batch) for batch in pipe.opened.harvest_with_images(shots, sites, batch=self.batch))

        def draw(shots: Sequence[Shot]) -> list:
            finished = pipe.opened.harvest_with_images(shots, sites[:1], batch=self.batch)
            return [image for batch in finished for image in batch.images]

        collect(
            self._subjects(study, places),
            source,
            ImageAlbum(study.images),
            data=data,
            checkpoint=study.folder / "books" / "collecting.safetensors",
            config=settings,
            draw=None if self.no_patches else draw,
            images=len(shown.runs) or self.images,
        )

    def _subjects(self, study: Study, places: Sequence[DictionaryRef]) -> list[CollectTarget]:
        """The dictionaries with all that their books say beside what the pass shows."""
        toolbox, stores = StudyEditor(study), study.stores()
        return [
            CollectTarget(
                dictionary=toolbox.dictionary(place),
                name=str(place),
                fingerprint=fingerprint(study.dictionary(*place)),
                book=study.book(*place),
                patches=_patches(toolbox.dictionary(place)),
                strengths=toolbox.default_strengths(place) if place.site in stores else (),
            )
            for place in places
        ]

    def _places(self, study: Study) -> list[DictionaryRef]:
        """The dictionaries asked for."""
        known = study.dictionaries()
        if not known:
            raise UnknownName(f"{self.study} has no dictionaries yet. difflex train and difflex itda make them.")
        asked = {str(Site.parse(site)) for site in self.site}
        for what, wanted, there in (
            ("The site", sorted(asked), list(dict.fromkeys(str(place.site) for place in known))),
            ("The dictionary", self.dictionary, [*map(str, known)]),
        ):
            for name in wanted:
                if name not in there:
                    raise UnknownName.among(what, name, there, "difflex train and difflex itda make dictionaries.")
        everything = not asked and not self.dictionary
        return [place for place in known if everything or str(place.site) in asked or str(place) in self.dictionary]

    def _shown(self, study: Study, places: Sequence[DictionaryRef], pipe: "_LazyPipeline") -> CollectInput:
        """What is shown to the dictionaries."""
        if self.drawn_world or self.folder is not None:
            files = "" if self.folder is None else f"folder of {[path.name for path in self._files()]}"
            levels = ",".join(f"{level:g}" for level in self.noise)
            return CollectInput(f"{files or f'drawn world from {FIRST_SEED}'}, noise {levels}, pixels {self.pixels}", None)
        if self.prompts is None:
            stores = study.stores()
            at = next((place.site for place in places if place.site in stores), next(iter(stores), None))
            if at is None:
                raise UnknownName(
                    f"{study.folder} has no activations, so no shots to draw again. Name --prompts or --drawn-world."
                )
            store = Store.open(stores[at])
            runs = _runs(store, self.images)
            return CollectInput(f"harvest of {at} {store.fingerprint}", runs[0][0].precision if runs else None, runs)
        prompts = read_prompts(self.prompts, None)
        texts = islice(prompts.texts, -(-self.images // len(self.seeds)))
        shots = pipe.opened.shots(texts, self.seeds, self.steps, self.keep_steps, self.pixels, self.guidance)
        runs = list(islice(_grouped(shots), self.images))
        if not runs:
            raise BadInput(f"{self.prompts} holds no prompt. Name a file with one a line.")
        first = [replace(shot, prompt="") for shot in runs[0]]
        return CollectInput(f"{prompts.source}, seeds {self.seeds.start}:{self.seeds.stop}, {first}", None, runs)

    def _met_images(self, pipe: "difflex.Pipeline", sites: Sequence[Site], start: int) -> Iterator[CollectBatch]:
        """Images that are shown to the model, noised, from the place `start` on."""
        given = self._given(start)
        while group := list(islice(given, self.batch)):
            images = [each[0] for each in group]
            if len({image.size for image in images}) > 1:
                raise BadInput(f"The images of {self.folder} are not of one size. Scale and cut them by --pixels.")
            seen = pipe.harvest_images(
                images,
                self.noise,
                sites,
                [each[1] for each in group],
                [each[2] for each in group],
                seed=start,
                batch=self.batch,
                progress=False,
            )
            yield CollectBatch(images, list(seen))
            start += len(group)

    def _given(self, start: int) -> Iterator[tuple[Image.Image, str, str]]:
        """Images, their prompts and their names, from the place `start` on."""
        if self.folder is None:
            drawn = drawn_images(self.images - start, FIRST_SEED + start)
            yield from ((each.image, each.prompt, each.name) for each in drawn)
            return
        for path in self._files()[start : self.images]:
            words = path.with_suffix(".txt")
            prompt = words.read_text(encoding="utf-8").strip() if words.is_file() else ""
            image = open_image(path)
            yield ImageOps.fit(image, (self.pixels[1], self.pixels[0])) if self.pixels else image, prompt, path.name

    def _files(self) -> list[Path]:
        assert self.folder is not None
        if not self.folder.is_dir():
            raise UnknownName(f"There is no folder {self.folder}. Name one with images.")
        found = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in ENDINGS)
        if not found:
            raise BadInput(f"{self.folder} holds no image. Put {', '.join(ENDINGS)} files into it.")
        return found


@final
class _LazyPipeline:
    """The model of a study, loaded when it is first needed."""

    def __init__(self, study: Study, command: CollectCommand) -> None:
        self._study, self._command = study, command
        self.precision: str | None = command.precision

    @cached_property
    def opened(self) -> "difflex.Pipeline":
        """The model."""
        return load_study_model(self._study, self.precision, self._command.offload, self._command.offline)


def _told(settings: CollectConfig) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(settings).items())


def _grouped(shots: Iterable[Shot]) -> Iterator[tuple[Shot, ...]]:
    """The shots of each run together."""
    for _, run in groupby(shots, key=lambda shot: replace(shot, timestep=None)):
        yield tuple(run)


def _runs(store: Store, most: int) -> list[tuple[Shot, ...]]:
    """The first runs of a store, in the order of its harvest, which takes batches of them step by step."""
    total, runs = (store.count() + store.count("held-out")) // store.tokens, dict[Shot, list[Shot]]()
    for shot in map(store.shot, range(total)):
        run = replace(shot, timestep=None)
        if run in runs or len(runs) < most:
            runs.setdefault(run, []).append(shot)
    return [tuple(shots) for shots in runs.values()]


def _is_there(study: Study, place: DictionaryRef, data: str) -> bool:
    """Whether the book of a dictionary is there, whole, of what the dictionary now is, and from the same images."""
    path = study.book(*place)
    if not path.is_file():
        return False
    try:
        with Book.open(path) as book:
            return book.about.data == data and book.about.fingerprint == fingerprint(study.dictionary(*place))
    except BrokenFile as error:
        print(f"{error} It is made anew.")
        return False


def _patches(dictionary: Dictionary) -> Mapping[int, AtomLocation]:
    """What the atoms of an ITDA dictionary are, as far as it knows."""
    if not isinstance(dictionary, ITDA):
        return {}
    known = ((feature, dictionary.patch(feature)) for feature in range(dictionary.size))
    return {feature: AtomLocation(patch.shot, patch.token) for feature, patch in known if patch and patch.shot}


def _table(study: Study, places: Sequence[DictionaryRef]) -> str:
    """How many features fire, and how much of their top images they cover: a line for each dictionary."""
    lines = [f"{'':<40}{'features':>10}{'that fire':>11}{'tokens':>12}{'covered':>9}{'median':>8}"]
    for place in places:
        with Book.open(study.book(*place)) as book:
            covering, fire = book.coverage_summary(), book.count_firing()
            covered = ("-", "-") if covering is None else (f"{covering.mean:.1%}", f"{covering.quartiles[1]:.1%}")
            size, tokens = f"{book.about.size:>10,}", f"{book.about.tokens:>12,}"
            lines.append(f"{place!s:<40}{size}{fire:>11,}{tokens}{covered[0]:>9}{covered[1]:>8}")
    return "\n".join(lines)
