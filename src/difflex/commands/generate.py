"""`difflex generate`: images from prompts, as one labelled grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from PIL import Image
from tyro.conf import Positional, arg

from difflex.commands.flags import ModelCommand, Pixels, Range
from difflex.errors import BadInput
from difflex.images import contact_sheet

__all__ = ["FORMATS", "GenerateCommand", "write_image"]

FORMATS = (".png", ".webp", ".jpg", ".jpeg")
THE_MODELS_OWN = "(default: the model's own)"


@final
@dataclass(frozen=True, kw_only=True)
class GenerateCommand(ModelCommand):
    """Draw images from prompts and save them as one labelled grid: a row for each prompt, a column for each seed."""

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT...", help_behavior_hint="(one or more)")] = ()
    """What to draw; an empty prompt is allowed."""
    seeds: Range = range(1)
    """Seeds of the noise that an image begins with; END is left out."""
    steps: Annotated[int | None, arg(metavar="N", help_behavior_hint=THE_MODELS_OWN)] = None
    """Denoising steps."""
    pixels: Annotated[Pixels | None, arg(metavar="HEIGHTxWIDTH", help_behavior_hint=THE_MODELS_OWN)] = None
    """Size of an image; one number for a square."""
    guidance: Annotated[float | None, arg(metavar="SCALE", help_behavior_hint=THE_MODELS_OWN)] = None
    """How strongly the prompt is followed."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("grid.png")
    """Where the grid goes: .png, .webp or .jpg."""

    def __call__(self) -> None:
        if not self.prompts:
            raise BadInput('No prompt was given. Write at least one, as in: difflex generate mini-flux "a red star on grass"')
        if self.out.suffix.lower() not in FORMATS:
            raise BadInput(f"--out {self.out} does not name an image file. End it with one of: {' '.join(FORMATS)}")
        pipe = self.load()
        # Prompt i of a call gets the seed s + i, so one prompt repeated walks through the seeds.
        rows = [
            pipe.generate(
                [prompt] * len(self.seeds),
                seed=self.seeds.start,
                steps=self.steps,
                pixels=self.pixels,
                guidance=self.guidance,
            )
            for prompt in self.prompts
        ]
        sheet = contact_sheet(
            [[generated.image for generated in row] for row in rows],
            row_labels=[prompt or "(empty prompt)" for prompt in self.prompts],
            column_labels=[f"seed {seed}" for seed in self.seeds],
        )
        write_image(sheet, self.out)
        print(f"{len(self.prompts) * len(self.seeds)} images in {self.out.resolve()}")


def write_image(image: Image.Image, path: Path) -> None:
    """Nothing; the image is in `path`, its folder made where it was missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise BadInput(f"--out {path} cannot be written: {error}. Name a file that you may write.") from error
