"""`load` and `open_study`: a model that harvests, generates and is steered in a line each, and a study that holds the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, final, overload

from difflex.errors import BadInput, UnknownName
from difflex.evaluation.concepts import ConceptsConfig
from difflex.explore.activations import SiteActivations
from difflex.explore.dictionary import FeatureDictionary, Features, found_features
from difflex.explore.display import caption, facts, heading, scrolled, table
from difflex.explore.edits import Edits, read_edits
from difflex.explore.images import ComparedImages, Images
from difflex.explore.inputs import (
    CAPTIONS,
    harvest_settings,
    harvested_settings,
    load_model,
    name_prompts,
    read_prompts,
    study_shots,
)
from difflex.explore.search import search
from difflex.explore.tables import ConceptTable, Evaluations
from difflex.explore.workspace import Workspace, temporary_folder
from difflex.pipeline import Pipeline
from difflex.pipeline import load as load_pipeline
from difflex.records import Site
from difflex.store import RecordingConfig, record
from difflex.study import Study, StudySettings
from difflex.values import fits, shown

__all__ = ["Model", "OpenStudy", "load", "open_study"]

BLOCKS = 8
"""Blocks that are named one by one."""
Parameters = ParamSpec("Parameters")


@final
class Model(Pipeline):
    """A pipeline that stores activations, and whose images are edited by features."""

    def __init__(self, pipe: Pipeline) -> None:
        """Use the model of `pipe`."""
        super().__init__(pipe.engine, pipe.name, pipe.revision, pipe.precision)

    @overload
    def activations(
        self,
        prompts: str | Path | Sequence[str],
        site: Site | str,
        *,
        tokens: int | None = None,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
        out: Path | str | None = None,
        progress: bool = True,
    ) -> SiteActivations: ...
    @overload
    def activations(
        self,
        prompts: str | Path | Sequence[str],
        site: list[Site | str] | tuple[Site | str, ...],
        *,
        tokens: int | None = None,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
        out: Path | str | None = None,
        progress: bool = True,
    ) -> dict[str, SiteActivations]: ...
    def activations(
        self,
        prompts: str | Path | Sequence[str],
        site: Site | str | list[Site | str] | tuple[Site | str, ...],
        *,
        tokens: int | None = None,
        steps: int | None = None,
        seeds: Sequence[int] | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
        out: Path | str | None = None,
        progress: bool = True,
    ) -> SiteActivations | dict[str, SiteActivations]:
        """Generate images from prompts and store the activations of a site; of a list of sites, return them by site.

        `prompts` is a list, a file (a prompt on each line, .csv, .json, .jsonl, .parquet), a data set on the hub
        (OWNER/NAME:COLUMN) or `captions`, the endless captions of the drawn world. `tokens` is the number of rows to store, by
        default those of all prompts. Prompt number i has the seed i, or all of `seeds`, which follow one another. `steps`,
        `pixels` and `guidance` are by default the model's own. The activations are in a study: in the folder `out`, where a
        harvest that was stopped continues, or in a temporary one.
        """
        several = isinstance(site, list | tuple)
        sites = self.expand(site)
        if not sites or (not several and len(sites) > 1):
            names = ", ".join(map(str, sites)) or "no site"
            raise BadInput(f"'{site}' stands for {names}. Name one site, or give a list for several: ['{site}'].")
        wishes = StudySettings(steps=steps, pixels=pixels, guidance=guidance, seeds=None if seeds is None else _read_seeds(seeds))
        folder = temporary_folder() if out is None else Path(out)
        workspace = Workspace(Study.open_or_plan(folder, self.name, self.revision), lambda: self, is_temporary=out is None)
        study = workspace.study
        settings = harvest_settings(self, replace(wishes, prompts=name_prompts(prompts, folder)))
        source = read_prompts(settings.prompts or CAPTIONS, None)
        if source.is_endless and tokens is None:
            raise BadInput(f"The {CAPTIONS} are endless: say how many tokens to store, as in tokens=200_000.")
        begun = [folder for place, folder in study.stores().items() if place in sites]
        shots, identity = study_shots(self, settings, source, begun)
        config = RecordingConfig(tokens=tokens, batch=batch, source=identity, progress=progress)
        begin = partial(study.keep_settings, settings)
        record(study.activations, shots, sites, partial(self.harvest, progress=False), config, before_writing=begin)
        stored = {str(each): SiteActivations(workspace, each) for each in sites}
        return stored if several else stored[str(sites[0])]

    def generate(
        self,
        prompts: str | Sequence[str],
        seed: int = 0,
        steps: int | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
        edits: Edits = (),
    ) -> Images:
        """Generate an image for each prompt; prompt i gets the seed `seed + i`. None stands for the model's default.

        `edits` are features, times a strength or at their default strength, sums and lists of them, and functions of the
        activations of sites as in `at`. Edited images show themselves beside the unedited ones.
        """
        hooks, description = read_edits(edits, self.name, self.revision)
        generate = partial(super().generate, prompts, seed, steps, pixels, guidance, batch)
        return Images(generate(hooks), description, (lambda: Images(generate())) if description else None)

    def compare(
        self,
        prompts: str | Sequence[str],
        edits: Mapping[str, Edits] | Iterable[Edits],
        seed: int = 0,
        steps: int | None = None,
        pixels: tuple[int, int] | None = None,
        guidance: float | None = None,
        batch: int = 16,
    ) -> ComparedImages:
        """Generate the images of the same seeds under each of several `edits`, to see them side by side.

        `model.compare("a ring", [s * red for s in (0.5, 1, 2)])` shows a feature at growing strength. A dict names the edits.
        """
        several = edits.values() if isinstance(edits, Mapping) else edits
        columns = [self.generate(prompts, seed, steps, pixels, guidance, batch, each) for each in several]
        return ComparedImages(columns, [str(name) for name in edits] if isinstance(edits, Mapping) else ())

    def _facts(self) -> dict[str, object]:
        engine, run = self.engine, next(self.shots(""))
        parameters = sum(weights.numel() for weights in self.denoiser.parameters())
        names = list(engine.sites.blocks)
        return {
            "pipeline": type(self.diffusers).__name__,
            "denoiser": f"{type(self.denoiser).__name__}, {parameters / 1e6:,.1f} M parameters in {self.precision}",
            "device": f"{engine.device}{', offloaded' if engine.offloaded else ''}",
            "blocks": f"{len(names)}: {', '.join(names if len(names) <= BLOCKS else [*names[:2], '…', *names[-2:]])}",
            "images": f"{run.pixels[0]} x {run.pixels[1]} pixels, {run.steps} steps, guidance {run.guidance:g}",
        }

    def __repr__(self) -> str:
        return f"<model {self.name}: {len(self.engine.sites.blocks)} blocks, {self.precision} on {self.engine.device}>"

    def _repr_html_(self) -> str:
        return heading(self.name, "a model; model.sites() lists its sites") + facts(self._facts())


@final
class OpenStudy:
    """A study: its model, activations and dictionaries, with their features."""

    def __init__(self, workspace: Workspace) -> None:
        """Use the study of `workspace`."""
        self.workspace = workspace

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return self.workspace.study.folder

    @property
    def model(self) -> Model:
        """The model, loaded when it is first needed, as the harvest of the study loaded it."""
        model = self.workspace.pipeline
        assert isinstance(model, Model)
        return model

    @property
    def dictionaries(self) -> list[FeatureDictionary]:
        """All dictionaries, sorted by name."""
        return [FeatureDictionary(self.workspace, ref) for ref in self.workspace.study.dictionaries()]

    def dictionary(self, name: str | None = None) -> FeatureDictionary:
        """Return the dictionary SITE/LABEL, that of a site with a single one, or without a name the only one."""
        return FeatureDictionary(self.workspace, self.workspace.study.find_dictionary(name))

    def activations(self, site: Site | str) -> SiteActivations:
        """Return the stored activations of a site."""
        stores = self.workspace.study.stores()
        if Site.parse(site) not in stores:
            raise UnknownName.among("The site", str(site), map(str, stores), "Model.activations(..., out=FOLDER) stores others.")
        return SiteActivations(self.workspace, Site.parse(site))

    def search(self, words: str, limit: int = 10) -> Features:
        """Return the features of all dictionaries that fit `words`, best first; dictionaries without a book are left out."""
        return found_features(self.workspace, search(self.workspace.study, words, None, limit), words)

    def collect(self, images: int | None = None) -> None:
        """Make the books of all dictionaries in one pass over the first `images`; by default those that are missing."""
        refs = self.workspace.study.dictionaries()
        missing = [ref for ref in refs if images is not None or not self.workspace.has_book(ref)]
        if missing:
            self.workspace.collect(missing, images)

    def evaluate(self, tokens: int = 1_000_000, shots: int = 32) -> Evaluations:
        """Evaluate all dictionaries on held-out tokens and, at `shots`, their effect on the model (0 for none)."""
        refs = self.workspace.study.dictionaries()
        return Evaluations({str(ref): each for ref, each in self.workspace.evaluate(refs, tokens, shots).items()})

    def match_concepts(
        self, images: int = 600, noise: Sequence[float] = (0.5,), held_out: float = 0.5, folder: Path | str | None = None
    ) -> ConceptTable:
        """Match all dictionaries to known concepts, in scenes of the drawn world or in a `folder` of labelled images.

        Features are chosen on a part of the images and measured on the share that is `held_out`, at `noise` levels from 0 (the
        image) to 1 (pure noise). Searches and labels use the matches from then on.
        """
        config = ConceptsConfig(images=images, noise=tuple(noise), held_out=held_out)
        dictionaries = {each.ref: each for each in self.dictionaries}
        matches = self.workspace.match_concepts([*dictionaries], config, None if folder is None else Path(folder))
        return ConceptTable({dictionary: matches[ref] for ref, dictionary in dictionaries.items()})

    def __repr__(self) -> str:
        names = "".join(f"\n  {ref}" for ref in self.workspace.study.dictionaries())
        return f"<study of {self.workspace.study.model} in {self.folder}>{names}"

    def _repr_html_(self) -> str:
        study = self.workspace.study
        head = heading(str(self.folder), f"a study of {study.model}")
        sites = caption(f"activations: {', '.join(map(str, study.stores())) or 'none'}")
        rows = [
            (
                str(ref),
                *("yes" if path.is_file() else "" for path in (study.book(*ref), study.concepts(*ref), study.evaluation(*ref))),
            )
            for ref in study.dictionaries()
        ]
        return head + sites + (scrolled(table(("dictionary", "book", "concepts", "evaluation"), rows)) if rows else "")


def _loading(load: Callable[Parameters, Pipeline]) -> Callable[Parameters, Model]:
    @wraps(load)
    def load_model_of(*arguments: Parameters.args, **options: Parameters.kwargs) -> Model:
        return Model(load(*arguments, **options))

    load_model_of.__module__ = __name__
    return load_model_of


load = _loading(load_pipeline)


def open_study(folder: Path | str, offline: bool = False) -> OpenStudy:
    """Open the study in a folder, made by commands or by `Model.activations(..., out=FOLDER)`; its model is loaded when needed.

    `offline` takes a hub model from the local cache only.
    """
    study = Study.open(folder)
    study = replace(study, settings=harvested_settings(study))
    return OpenStudy(Workspace(study, lambda: load_model(load, study, offline=offline)))


def _read_seeds(seeds: Sequence[int]) -> tuple[int, int]:
    """Return the first seed, and the one after the last."""
    numbers = list(seeds) if isinstance(seeds, Sequence) else []
    if not numbers or not all(fits(int, seed) for seed in numbers) or numbers != [*range(numbers[0], numbers[0] + len(numbers))]:
        raise BadInput(f"The seeds {shown(seeds)} do not follow one another. Give some that do: range(4), or [7] for one.")
    return numbers[0], numbers[-1] + 1
