"""The input of judging edits: the model as functions, features with known concepts, and the provenance of results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from difflex.dictionary_config import fingerprint
from difflex.errors import BadInput, StaleWork
from difflex.evaluation.concepts.results import ConceptMatches
from difflex.records import Activations, Rectangle, Shot, Site
from difflex.steering import SteeringHook, StudyEditor
from difflex.steering.contrast import Contrast, find_contrasts, pair_activations
from difflex.study import DictionaryRef, Study

Images = Float[Tensor, "image channel row column"]
MOST_IMAGES = 10**6
"""Images that a command may generate."""
SAMPLED = 1024
"""Numbers of each of the weights that are read for a checksum, or a few more."""


@final
@dataclass(frozen=True, kw_only=True)
class ModelFunctions:
    """The functions of a pipeline that judging edits needs."""

    shots: Callable[[range | None], Sequence[Shot]]
    """The shots of an empty prompt at steps of a run; None for all steps."""
    harvest: Callable[[Iterable[Shot], Site, int], Iterator[Activations]]
    """The activations of shots at a site, in batches of a size."""
    generate: Callable[[Sequence[str], int, int | None, Sequence[SteeringHook]], Iterable[Image.Image]]
    """The images of prompts with seeds from a first one on, in a number of steps (None: the model's own), with hooks."""
    finish: Callable[
        [Sequence[Shot], Sequence[Site], Sequence[SteeringHook]], Iterable[tuple[Sequence[Image.Image], Iterable[Activations]]]
    ]
    """The images that runs end in, with hooks, and the activations of sites, batch by batch."""
    losses: Callable[[Iterable[Image.Image], Sequence[float]], Float[Tensor, "image level"]]
    """The losses of the unedited model on images with noise of several levels."""
    differentiable: Callable[[Sequence[Shot], Sequence[SteeringHook]], Images]
    """The images of shots with hooks, with gradients with respect to what these add."""
    differentiable_losses: Callable[[Images, float], Float[Tensor, " image"]]
    """The losses of the unedited model on images at a level of noise, with gradients with respect to these."""
    text_sites: Callable[[], Sequence[Site]]
    """The text streams of the blocks, in their order."""
    parameters: int
    """Of the denoiser."""
    weights: Callable[[], str] = str
    """The checksum of the denoiser by `weights_checksum`; empty if it is unknown."""

    def contrasts(
        self,
        site: Site,
        pairs: Sequence[tuple[str, str]],
        counts: Iterable[int | None] = (None,),
        steps: range | None = None,
        batch: int = 16,
        region: Callable[[Shot], Rectangle | None] | None = None,
    ) -> list[Contrast]:
        """Return the contrasts of the first so many `pairs` of prompts for each of `counts` (None: all)."""
        sides = pair_activations(lambda shots: self.harvest(shots, site, batch), self.shots(steps), pairs)
        return find_contrasts(*sides, counts, region=region)


def weights_checksum(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 of named `weights`: of the names, the shapes, and SAMPLED numbers of each, evenly spread.

    Other weights under the same model name have another one, and the largest models take a second. Weights that are not in
    memory (on the device `meta`) count by name and shape.
    """
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // SAMPLED)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_images(count: int) -> None:
    """Refuse to generate too many images; call this before any work."""
    if count > MOST_IMAGES:
        raise BadInput(
            f"{count:,} images would be generated, and {MOST_IMAGES:,} are allowed at once. Ask for fewer images, strengths, "
            "pairs or groups."
        )


def check_steps(steps: tuple[int, int] | None) -> None:
    """Refuse a range of steps to edit that is empty."""
    if steps is not None and not 0 <= steps[0] < steps[1]:
        raise BadInput(f"Steps {steps[0]}:{steps[1]} are empty. Write START:END with START below END, from 0 on.")


@final
@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The inputs that results depend on besides a config; results are up to date while both are unchanged."""

    fingerprints: dict[str, str]
    """Of the dictionaries, by SITE/LABEL."""
    features: dict[str, dict[str, int]]
    """The features that were used, by dictionary and concept."""
    judge: str = ""
    """The CLIP or VLM that judged; empty for the judge of the drawn world."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of other files: of `concepts`, of `other findings`."""
    run: str = ""
    """Precision, pixels, steps and guidance of the model, as far as the study or flags set them."""
    weights: str = ""
    """The checksum of the denoiser, where results notice other weights under the same model name."""

    @classmethod
    def of(
        cls,
        study: Study,
        features: Mapping[DictionaryRef, Mapping[str, int]],
        judge: str = "",
        files: Mapping[str, str] | None = None,
    ) -> Provenance:
        """Return the provenance of present results with features of dictionaries, by concept."""
        return cls(
            fingerprints={str(place): fingerprint(study.dictionary(*place)) for place in features},
            features={str(place): dict(by_concept) for place, by_concept in features.items()},
            judge=judge,
            files=dict(files or {}),
            run=str(study.settings),
        )


def concept_matches(study: Study, place: DictionaryRef) -> ConceptMatches | None:
    """Return the results of `difflex concepts` for a dictionary; None if it was not run."""
    path, folder = study.concepts(*place), study.dictionary(*place)
    if not os.path.lexists(path):
        return None
    matches = ConceptMatches.load(path)
    if matches.fingerprint is None or not (folder / "config.json").is_file():
        return matches
    if matches.fingerprint != fingerprint(folder):
        raise StaleWork(f"{place} has changed since {path} was written. Run difflex concepts again.")
    return matches


class NeuronBaseline(NamedTuple):
    """The neurons of a block as a dictionary, and the neuron that detects each concept best."""

    place: DictionaryRef
    best: Mapping[str, int]


def neuron_baseline(editor: StudyEditor, place: DictionaryRef) -> NeuronBaseline | None:
    """Return the neurons of the block of a dictionary, if the study has them and their concepts.

    The concepts are in a file of the neurons, or in one that `difflex concepts` wrote with those of the dictionary.
    """
    study, site, k = editor.study, Site(place.site.path, "neurons", place.site.stream), editor.dictionary(place).k
    neurons = sorted((ref for ref in study.dictionaries() if ref.site == site), key=lambda ref: editor.dictionary(ref).k != k)
    for candidate in (*neurons, DictionaryRef(site, f"neurons-k{k}")) if neurons else ():
        matches = concept_matches(study, candidate)
        if matches is not None:
            best = {result.concept.name: result.best.features[0] for result in matches.clearest_level.results}
            return NeuronBaseline(neurons[0], best)
    return None


def to_tensor(images: Iterable[Image.Image]) -> Images:
    """Return the pixels of `images`, between 0 and 1."""
    rows = [
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        for image in images
    ]
    return torch.stack(rows).movedim(3, 1).float() / 255


def to_images(pixels: Images) -> Iterator[Image.Image]:
    """Yield the images of `pixels`."""
    for rows in (pixels * 255).round().to(torch.uint8).movedim(1, 3):
        yield Image.frombytes("RGB", (rows.shape[1], rows.shape[0]), rows.contiguous().numpy().tobytes())
