"""`difflex anatomy`: how large a model's streams are, and along which directions."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, final

from tyro.conf import arg

from difflex.anatomy import heat_map, measure, spectra
from difflex.commands.flags import Pixels
from difflex.commands.opening import Opening
from difflex.commands.prompts import read_prompts
from difflex.errors import BadInput
from difflex.records import Stream

__all__ = ["Anatomy"]

THE_MODELS_OWN = "(default: the model's own)"


@final
@dataclass(frozen=True, kw_only=True)
class Anatomy(Opening):
    """Measure norms by site and timestep, spectra, outliers and offsets; write anatomy.json and figures."""

    prompts: Annotated[str, arg(metavar="FILE")]
    """A text file with a prompt a line, or `captions`: those of the drawn world."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("anatomy")
    """Where anatomy.json and the figures go."""
    limit: Annotated[int, arg(metavar="N")] = 64
    """How many prompts to take."""
    sites: Annotated[
        tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: every block's residual, both streams)")
    ] = ()
    """Where to measure norms; a star stands for one index."""
    spectra: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: up to six, evenly spaced)")] = ()
    """Where to measure the spectrum, which takes a width x width matrix."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=THE_MODELS_OWN)] = None
    """Denoising steps; all of them are measured."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint=THE_MODELS_OWN)] = None
    """Size of a picture; one number for a square."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint=THE_MODELS_OWN)] = None
    """How strongly the prompt is followed."""
    batch: Annotated[int, arg(metavar="N")] = 16
    """Pictures at once."""

    def __call__(self) -> None:
        if self.limit < 1:
            raise BadInput(f"--limit {self.limit} leaves no prompt. Ask for 1 or more.")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--out {self.out} cannot be made: {error}. Name a folder that you may write.") from error
        texts = islice(read_prompts(self.prompts, None).texts, self.limit)
        pipe = self.load()
        sites = [found.site for found in pipe.engine.sites.expand(self.sites)] or [row.site for row in pipe.sites()]
        images = [site for site in sites if site.stream == "image"] or sites
        chosen = [found.site for found in pipe.engine.sites.expand(self.spectra)] or images[:: -(-len(images) // 6)]
        shots = pipe.shots(texts, steps=self.steps, pixels=self.pixels, guidance=self.guidance)
        anatomy = measure(pipe.harvest(shots, [*dict.fromkeys([*sites, *chosen])], self.batch), chosen)
        anatomy.save(self.out / "anatomy.json")
        figures = {"spectra": spectra(anatomy)}
        streams: set[Stream] = {site.stream for site in anatomy.norms if site.kind == "residual"}
        for stream in streams:
            figures[f"norms-{stream}"] = heat_map(anatomy, stream)
        for name, figure in sorted(figures.items()):
            figure.save(self.out / f"{name}.png")
        print(f"{self.out / 'anatomy.json'} and {', '.join(f'{name}.png' for name in sorted(figures))}")
