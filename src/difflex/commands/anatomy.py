"""`difflex anatomy`: measure norms and spectra of a model's activations."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, final

from tyro.conf import arg

import difflex
from difflex.commands.flags import ModelCommand, Pixels
from difflex.commands.inputs import read_prompts
from difflex.errors import BadInput
from difflex.records import Activations, Site
from difflex.study import Study

__all__ = ["AnatomyCommand"]

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
    max_prompts: Annotated[int, arg(metavar="N")] = 64
    """Number of prompts to use."""
    site: Annotated[
        tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: every block's residual, both streams)")
    ] = ()
    """Measure norms at these sites; a star stands for one index."""
    spectra: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: up to six, evenly spaced)")] = ()
    """Measure the spectrum at these sites, which takes a width x width matrix each."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=MODEL_DEFAULT)] = None
    """Number of denoising steps; all of them are measured."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint=MODEL_DEFAULT)] = None
    """Image size; one number for a square."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint=MODEL_DEFAULT)] = None
    """Guidance scale."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Images per forward pass."""

    def __call__(self) -> list[Path]:
        from difflex.evaluation.anatomy import AnatomyInputs, update_anatomy

        if self.max_prompts < 1:
            raise BadInput(f"--max-prompts {self.max_prompts} leaves no prompt. Ask for 1 or more.")
        prompts = read_prompts(self.prompts, None)
        pipe = self.load()
        study = Study.open_or_plan(self.out, pipe.name, pipe.revision)
        study.prepare()
        sites, spectra = self._sites(pipe)
        shot = next(pipe.shots("", steps=self.steps, pixels=self.pixels, guidance=self.guidance))
        inputs = AnatomyInputs(
            model=shot.model,
            revision=shot.revision,
            precision=shot.precision,
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
