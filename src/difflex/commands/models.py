"""`difflex models`, `difflex generate` and `difflex sites`: explore a model."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, final

from tyro.conf import Positional, arg

from difflex.commands.flags import AMOUNT, STEPS, ModelCommand, Pixels, Seeds
from difflex.errors import BadInput
from difflex.files import parsing
from difflex.images import check_image_path, check_sheet, contact_sheet, write_image
from difflex.study import Command
from difflex.tables import text_table

MODEL_DEFAULT = "(default: the model's own)"


@final
@dataclass(frozen=True, kw_only=True)
class ModelsCommand(Command):
    """List the models inside the package: image sizes (the default first), default steps and guidance, words, size."""

    def __call__(self) -> None:
        print(models_table(Path(str(files("difflex") / "models"))))


def models_table(root: Path) -> str:
    """Return a table with a line for each pipeline folder under `root`."""
    rows = [_model_row(index.parent) for index in sorted(root.glob("*/model_index.json"))]
    if not rows:
        return f"No model is inside the package ({root})."
    return text_table([("model", "pixels", "steps", "guidance", "words", "MB", "description"), *rows])


def _model_row(folder: Path) -> tuple[str, ...]:
    defaults = _read_defaults(folder / "difflex.json")
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    sizes = " ".join(f"{height}x{width}" for height, width in defaults.get("pixels", []))
    steps, guidance = defaults.get("steps", "-"), defaults.get("guidance", "-")
    words = len(defaults.get("words", [])) or "-"
    description = str(defaults.get("description", "-"))
    return folder.name, sizes or "-", str(steps), str(guidance), str(words), f"{megabytes:.1f}", description


def _read_defaults(path: Path) -> dict[str, Any]:
    """Return the entries of the optional `difflex.json`."""
    if not path.is_file():
        return {}
    with parsing(path, "default settings of a model", "Install difflex again."):
        return dict(json.loads(path.read_bytes()))


@final
@dataclass(frozen=True, kw_only=True)
class GenerateCommand(ModelCommand):
    """Generate images from prompts and save them as one labelled grid: a row for each prompt, a column for each seed."""

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="PROMPT...", help_behavior_hint="(one or more)")] = ()
    """Prompts; an empty one is allowed."""
    seeds: Seeds = range(1)
    """Seeds of the initial noise; END is not included."""
    steps: Annotated[int | None, STEPS, arg(help_behavior_hint=MODEL_DEFAULT)] = None
    """Number of denoising steps."""
    pixels: Annotated[Pixels, arg(help_behavior_hint=MODEL_DEFAULT)] = None
    """Image size; one number for a square."""
    guidance: Annotated[float | None, AMOUNT, arg(metavar="SCALE", help_behavior_hint=MODEL_DEFAULT)] = None
    """Guidance scale."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("grid.png")
    """File to write the grid to: .png, .webp or .jpg."""

    def __call__(self) -> None:
        if not self.prompts:
            raise BadInput('No prompt was given. Write at least one, as in: difflex generate mini-flux "a red star on grass"')
        check_image_path(self.out)
        pipe, settings = self.load(), {"steps": self.steps, "pixels": self.pixels, "guidance": self.guidance}
        # Prompt i of a call gets the seed `seed + i`: repeating a prompt gives it all seeds.
        pixels = self.pixels or next(iter(pipe.shots(""))).pixels
        check_sheet(self.out, len(self.prompts), len(self.seeds), pixels)
        rows = [
            pipe.generate([prompt] * len(self.seeds), seed=self.seeds.start, **settings)  # pyright: ignore[reportArgumentType]
            for prompt in self.prompts
        ]
        sheet = contact_sheet(
            [[generated.image for generated in row] for row in rows],
            row_labels=[prompt or "(empty prompt)" for prompt in self.prompts],
            column_labels=[f"seed {seed}" for seed in self.seeds],
        )
        write_image(sheet, self.out)
        print(f"{len(self.prompts) * len(self.seeds)} images in {self.out.resolve()}")


@final
@dataclass(frozen=True, kw_only=True)
class SitesCommand(ModelCommand):
    """List the sites of a model, a line for each block and stream: name, module path, width, tokens, kinds.

    Only the configs of the model are read. One of a family that difflex does not know, and a language model, is loaded.
    """

    pattern: Annotated[str, arg(metavar="PATTERN")] = "*"
    """List only sites with this name; a star stands for one index, as in double.*"""
    pixels: Annotated[Pixels, arg(help_behavior_hint=MODEL_DEFAULT)] = None
    """Image size, which determines the number of tokens."""

    def __call__(self) -> None:
        import difflex
        from difflex.pipeline.language import is_language_model
        from difflex.pipeline.profile import config_site_rows

        rows = [("site", "module", "width", "tokens", "kinds")]
        if is_language_model(self.model, self.revision, self.offline):
            sites = difflex.load_language_model(self.model, revision=self.revision, offline=self.offline).sites(self.pattern)
        else:
            sites = config_site_rows(self.model, self.revision, self.pixels, self.pattern, self.offline, self.text_length)
        for row in sites or self.load().sites(self.pattern, self.pixels):
            kinds = " ".join(f"{kind} ({row.neurons})" if kind == "neurons" else kind for kind in row.kinds)
            rows.append((str(row.site), row.path, str(row.width), str(row.tokens), kinds))
        print(text_table(rows))
