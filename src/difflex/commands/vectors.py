"""Contrast directions: `difflex contrast`, and `export-contrast` and `import-contrast` for control vectors of other tools."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import Positional, arg

from difflex.choices import ContrastMethod
from difflex.commands.flags import BATCH, KeptSteps, Seeds, StudyImagesCommand
from difflex.commands.inputs import load_study_model, open_study
from difflex.errors import BadInput
from difflex.images import check_output
from difflex.records import Site, is_same_model, model_name
from difflex.study import Command, Study


@final
@dataclass(frozen=True, kw_only=True)
class ContrastCommand(StudyImagesCommand):
    """Find the direction between two sets of prompts at a site; `difflex steer --contrast NAME` edits along it."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study of the model; it may be empty."""
    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Name of the direction."""
    site: Annotated[str, arg(metavar="SITE")]
    """Site of the activations: double.18, single.9:update, double.3:text."""
    positive: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ()
    """Prompts that the direction points to."""
    negative: Annotated[tuple[str, ...], arg(metavar="PROMPT...")] = ()
    """Prompts that it points away from; each is paired with the positive one in the same place."""
    pairs: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(instead of the two above)")] = None
    """A text file with a pair on each line: the positive prompt, a tab, the negative one."""
    method: ContrastMethod = "mean"
    """The mean of the differences, or their first principal component."""
    seeds: Seeds = range(1)
    """Seeds for each pair, whose prompts start from the same noise; END is not included."""
    keep_steps: Annotated[KeptSteps, arg(help_behavior_hint="(default: all)")] = None
    """Denoising steps whose activations are compared; END is not included."""
    dictionary: Annotated[str | None, arg(metavar="DICTIONARY", help_behavior_hint="(default: none)")] = None
    """Decompose the direction into features of this dictionary."""
    batch: Annotated[int, BATCH] = 16
    """Images at once."""

    def __call__(self) -> list[Path]:
        from difflex.steering import StudyEditor
        from difflex.steering.contrast import decompose, find_contrast, pair_activations

        check_contrast_name(self.name)
        editor = StudyEditor(open_study(self.study, self))
        check_output(editor.study.contrast(self.name))
        pairs = _read_pairs(self.pairs) if self.pairs is not None else self._pairs()
        place = None if self.dictionary is None else editor.study.find_dictionary(self.dictionary)
        pipe = load_study_model(editor.study, self)
        site = pipe.site(self.site)
        if place is not None and place.site != site:
            raise BadInput(f"{place} is a dictionary of {place.site}, but the contrast is at {site}. Name one of {site}.")
        shots = list(pipe.shots("", keep_steps=self.keep_steps))
        sides = pair_activations(lambda shots: pipe.harvest(shots, site, self.batch), shots, pairs, self.seeds)
        contrast = find_contrast(*sides, self.method)
        path = contrast.save(editor.study.contrast(self.name))
        norm = float(contrast.direction.norm())
        print(f"{path}: {contrast.pairs} pairs, norm {norm:.3g}, {norm / contrast.norm:.1%} of a mean activation at {site}")
        if place is not None:
            print(f"features of {place} in it:")
            for part in decompose(contrast.direction, editor.dictionary(place)):
                print(f"  {part.feature:>6}  code {part.code:9.3g}  cosine {part.cosine:6.3f}  explained {part.explained:6.1%}")
        return [path]

    def _pairs(self) -> list[tuple[str, str]]:
        if not self.positive or len(self.positive) != len(self.negative):
            raise BadInput(
                f"A contrast takes pairs of prompts, but there are {len(self.positive)} positive and {len(self.negative)} "
                "negative ones. Give as many --positive as --negative, or --pairs FILE."
            )
        return list(zip(self.positive, self.negative, strict=True))


def check_contrast_name(name: str) -> str:
    """Return `name` if a file can have it."""
    if not re.fullmatch(r"[\w.-]{1,100}", name, re.ASCII):
        raise BadInput(f"'{name:.100}' cannot be a file name. Use at most 100 letters, digits, '.', '_' and '-'.")
    return name


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(f"--pairs {path} cannot be read: {error}. Name a text file.") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        positive, tab, negative = line.partition("\t")
        if not line.strip():
            continue
        if not tab or "\t" in negative or "\0" in line:
            raise BadInput(f"Line {number} of {path} is not two prompts with one tab between them.")
        pairs.append((positive.strip(), negative.strip()))
    return pairs


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
        from difflex.control_vectors import contrast_of, is_same_contrast, read_vectors
        from difflex.steering.contrast import Contrast
        from difflex.store import Store

        study = Study.open(self.study)
        path = study.contrast(check_contrast_name(self.name))
        site = None if self.site is None else Site.parse(self.site)
        norm = Store.open(study.stores()[site]).statistics.mean_norm if site in study.stores() else None
        contrast = contrast_of(read_vectors(self.file), site, study.model, study.revision, norm)
        if not is_same_model(contrast.model, study.model) or contrast.revision != study.revision:
            made, own = model_name(contrast.model, contrast.revision), model_name(study.model, study.revision)
            raise BadInput(f"The direction is of {made}, and {study.folder} studies {own}. Name a study of {made}.")
        if path.exists() and not is_same_contrast(Contrast.load(path), contrast):
            raise BadInput(f"{study.folder} has another contrast {self.name}. Give another name.")
        contrast.save(path)
        length = float(contrast.direction.norm())
        print(f"{path}: a direction of width {len(contrast.direction)} and norm {length:.3g} at {contrast.site}")
        if contrast.norm == length:
            print("The mean norm of the activations is unknown: a strength of 1 in the unit norm is the direction itself.")
        return [path]
