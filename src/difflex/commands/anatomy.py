"""`difflex anatomy`: how large a model's streams are, and along which directions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, final

from tyro.conf import arg

import difflex
from difflex.commands.flags import Pixels
from difflex.commands.opening import ModelCommand
from difflex.commands.prompts import read_prompts
from difflex.errors import BadInput, BrokenFile
from difflex.evaluation.anatomy import Anatomy, measure
from difflex.evaluation.anatomy_figures import heat_map, spectra
from difflex.records import Site, Stream
from difflex.study import Study

__all__ = ["AnatomyCommand"]

THE_MODELS_OWN = "(default: the model's own)"
UP_TO = 6
"""Spectra, if nobody says of which sites."""


@final
@dataclass(frozen=True, kw_only=True)
class AnatomyCommand(ModelCommand):
    """Measure norms by site and timestep, spectra, outliers and offsets; what is up to date is not measured again."""

    prompts: Annotated[str, arg(metavar="FILE")]
    """A text file with a prompt a line, or `captions`: those of the drawn world."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The folder of the study; begun if it is not there."""
    max_prompts: Annotated[int, arg(metavar="N")] = 64
    """How many prompts to take."""
    site: Annotated[
        tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: every block's residual, both streams)")
    ] = ()
    """Where to measure norms; a star stands for one index."""
    spectra: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: up to six, evenly spaced)")] = ()
    """Where to measure the spectrum, which takes a width x width matrix."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=THE_MODELS_OWN)] = None
    """Denoising steps; all of them are measured."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint=THE_MODELS_OWN)] = None
    """Size of an image; one number for a square."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint=THE_MODELS_OWN)] = None
    """How strongly the prompt is followed."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Images at once."""

    def __call__(self) -> list[Path]:
        if self.max_prompts < 1:
            raise BadInput(f"--max-prompts {self.max_prompts} leaves no prompt. Ask for 1 or more.")
        prompts = read_prompts(self.prompts, None)
        pipe = self.load()
        study = Study.planned(self.out, pipe.name, pipe.revision)
        study.prepare()
        sites, chosen = self._sites(pipe)
        made_from = self._made_from(pipe, prompts.source, sites, chosen)
        anatomy = _kept(study.anatomy, made_from)
        if anatomy is None:
            shots = pipe.shots(
                islice(prompts.texts, self.max_prompts), steps=self.steps, pixels=self.pixels, guidance=self.guidance
            )
            measured = measure(pipe.harvest(shots, [*dict.fromkeys([*sites, *chosen])], self.batch), chosen)
            anatomy = replace(measured, made_from=made_from)
            study.write()
            anatomy.save(study.anatomy)
            print(f"{study.anatomy}: {len(sites)} sites, spectra of {len(chosen)}")
        else:
            print(f"{study.anatomy}: up to date")
        return [study.anatomy, *_drawn(anatomy, study.anatomy_figures)]

    def _sites(self, pipe: "difflex.Pipeline") -> tuple[list[Site], list[Site]]:
        """Where norms are measured, and where spectra."""
        sites = [found.site for found in pipe.engine.sites.expand(self.site)] or [row.site for row in pipe.sites()]
        images = [site for site in sites if site.stream == "image"] or sites
        chosen = [found.site for found in pipe.engine.sites.expand(self.spectra)] or images[:: -(-len(images) // UP_TO)]
        return sites, chosen

    def _made_from(self, pipe: "difflex.Pipeline", prompts: str, sites: Iterable[Site], chosen: Iterable[Site]) -> dict[str, str]:
        shot = next(pipe.shots("", steps=self.steps, pixels=self.pixels, guidance=self.guidance))
        how = {name: getattr(shot, name) for name in ("model", "revision", "precision", "pixels", "steps", "guidance")}
        what = {"prompts": prompts, "limit": self.max_prompts, "sites": [*map(str, sites)], "spectra": [*map(str, chosen)]}
        return {name: str(value) for name, value in {**how, **what}.items()}


def _kept(path: Path, made_from: Mapping[str, str]) -> Anatomy | None:
    """The anatomy that is there, if it is whole and made from the same."""
    try:
        kept = Anatomy.load(path) if path.is_file() else None
    except BrokenFile:
        return None
    return kept if kept is not None and kept.made_from == made_from else None


def _drawn(anatomy: Anatomy, folder: Path) -> list[Path]:
    """The figures of `anatomy`, now in `folder`."""
    figures = {"spectra": spectra(anatomy)}
    streams: set[Stream] = {site.stream for site in anatomy.norms if site.kind == "residual"}
    figures |= {f"norms-{stream}": heat_map(anatomy, stream) for stream in streams}
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{name}.png" for name in sorted(figures)]
    for path in paths:
        figures[path.stem].save(path)
        print(path)
    return paths
