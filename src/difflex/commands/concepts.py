"""`difflex concepts`: match the features of a study's dictionaries to known concepts."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import Precision
from difflex.commands.flags import NoiseLevels, Pixels
from difflex.commands.inputs import load_study_model
from difflex.records import Site
from difflex.study import Command, Study

__all__ = ["ConceptsCommand"]


@final
@dataclass(frozen=True, kw_only=True)
class ConceptsCommand(Command):
    """Match features to known concepts: what each feature detects, and how well compared with a linear probe."""

    studies: Annotated[Positional[tuple[Path, ...]], arg(metavar="STUDY...")]
    """Studies with dictionaries; several are compared in one table, such as a trained model and an untrained control."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all of the study)")] = ()
    """Match all dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Match these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    images: Annotated[int, arg(metavar="N")] = 1000
    """Number of labelled images; a tenth of them is held out for the measurements."""
    noise: NoiseLevels = (0.25, 0.5, 0.75)
    """Noise levels of the images at the model's input."""
    folder: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: the drawn world)")] = None
    """Your own images with label maps: FOLDER/images, FOLDER/labels and FOLDER/labels.json."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint="(default: as they are)")] = None
    """Resize and crop the images of a folder to this size."""
    empty_prompts: FlagCreatePairsOff[bool] = False
    """Use empty prompts instead of those of the images."""
    present_above: Annotated[float, arg(metavar="SHARE")] = 0.5
    """A token shows a concept if at least this share of its area does."""
    absent_below: Annotated[float, arg(metavar="SHARE")] = 0.0
    """A token does not show a concept if at most this share of its area does; between the two it is ignored."""
    batch: Annotated[int, arg(metavar="N")] = 32
    """Images per forward pass."""
    precision: Annotated[Precision | None, arg(help_behavior_hint="(default: fp32 on a CPU, bf16 on a GPU)")] = None
    """Precision of the model's weights."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep on the GPU only the part of the model that is running."""
    offline: FlagCreatePairsOff[bool] = False
    """Load models of the hub from the local cache only."""

    def __call__(self) -> list[Path]:
        from difflex.commands.drawn_world import drawn_source
        from difflex.evaluation.concepts import ConceptsConfig, LabelFolder, match_studies
        from difflex.evaluation.concepts.results import matches_table

        config = ConceptsConfig(
            images=self.images,
            noise=self.noise,
            pixels=self.pixels,
            empty_prompts=self.empty_prompts,
            present_above=self.present_above,
            absent_below=self.absent_below,
        )
        studies = [Study.open(folder) for folder in self.studies]

        def open_model(study: Study):
            pipe = cache(lambda: load_study_model(study, self.precision, self.offload, self.offline))

            def harvest_at(site: Site):
                if site.kind == "neurons" and "neurons" not in pipe().kinds(site):
                    return None
                return lambda images, prompts, names: pipe().harvest_images(
                    images, self.noise, site, prompts, names, batch=self.batch
                )

            return harvest_at

        folder = LabelFolder.open(self.folder) if self.folder else None
        images = folder.source(self.images, self.pixels) if folder else drawn_source(self.images)
        stored = match_studies(studies, images, open_model, config, self.site, self.dictionary)
        for matches in stored:
            print(f"{matches.path}: {'up to date' if matches.up_to_date else 'matched'}")
        print(matches_table([each.matches for each in stored]))
        return [matches.path for matches in stored]
