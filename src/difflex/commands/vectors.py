"""`difflex export-contrast` and `difflex import-contrast`: contrast directions as control vectors of other tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.commands.steer import check_contrast_name
from difflex.errors import BadInput
from difflex.images import check_output
from difflex.records import Site, is_same_model, model_name
from difflex.study import Command, Study


@final
@dataclass(frozen=True, kw_only=True)
class ExportContrastCommand(Command):
    """Write a contrast direction as a control vector: GGUF for repeng and llama.cpp, or .pt for steering-vectors."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The study of the direction."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """The name of the direction."""
    out: Annotated[Path, arg(metavar="FILE")]
    """The file; the ending decides the format: .gguf or .pt."""

    def __call__(self) -> list[Path]:
        from difflex.control_vectors import layer_of, write_vectors
        from difflex.steering.contrast import Contrast

        check_output(self.out)
        contrast = Contrast.load(Study.open(self.study).contrast(check_contrast_name(self.name)))
        write_vectors(contrast, self.out)
        print(f"{self.out}: layer {layer_of(contrast.site)}, the block of {contrast.site} of {contrast.model}")
        return []


@final
@dataclass(frozen=True, kw_only=True)
class ImportContrastCommand(Command):
    """Read a control vector of another tool as a contrast direction; `difflex steer --contrast NAME` edits along it."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of the model."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name for the direction."""
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """A .gguf file of repeng or llama.cpp, or a .pt file with the layer_activations of a SteeringVector."""
    site: Annotated[str | None, arg(metavar="SITE", help_behavior_hint="(default: that of the export)")] = None
    """The site, whose block number is the layer that is read: double.18."""

    def __call__(self) -> list[Path]:
        from difflex.control_vectors import contrast_of, read_vectors
        from difflex.store import Store

        study = Study.open(self.study)
        path = study.contrast(check_contrast_name(self.name))
        if path.exists():
            raise BadInput(f"{study.folder} has a contrast {self.name} already. Give another name.")
        site = None if self.site is None else Site.parse(self.site)
        norm = Store.open(study.stores()[site]).statistics.mean_norm if site in study.stores() else None
        contrast = contrast_of(read_vectors(self.file), site, study.model, study.revision, norm)
        if not is_same_model(contrast.model, study.model) or contrast.revision != study.revision:
            made, own = model_name(contrast.model, contrast.revision), model_name(study.model, study.revision)
            raise BadInput(f"The direction is of {made}, and {study.folder} studies {own}. Name a study of {made}.")
        contrast.save(path)
        length = float(contrast.direction.norm())
        print(f"{path}: a direction of width {len(contrast.direction)} and norm {length:.3g} at {contrast.site}")
        if contrast.norm == length:
            print("The mean norm of the activations is unknown: a strength of 1 in the unit norm is the direction itself.")
        return [path]
