"""The table of foreign formats, and what is done with one: recognise, read and write dictionaries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from difflex.dictionaries import CodeStatistics, Dictionary, DictionaryOrigin
from difflex.errors import BadInput, BrokenFile, NonFinite, UnknownName
from difflex.files import Json, write_together
from difflex.interchange.base import FittedDictionary, ForeignDictionary, ForeignFormat, WritableFormat
from difflex.interchange.dictionary_learning import DictionaryLearningFormat
from difflex.interchange.fae import FaeFormat
from difflex.interchange.itda import FluxITDAFormat, LeaskITDAFormat
from difflex.interchange.overcomplete import OvercompleteFormat
from difflex.interchange.saelens import SAELensFormat
from difflex.interchange.sdxl_unbox import SDXLUnboxFormat
from difflex.interchange.source import ForeignSource
from difflex.interchange.sparsify import SAeUronFormat, SparsifyFormat
from difflex.records import ActivationBatch, Site

FORMATS: tuple[ForeignFormat, ...] = (
    SAELensFormat(),
    SparsifyFormat(),
    SAeUronFormat(),
    DictionaryLearningFormat(),
    SDXLUnboxFormat(),
    FaeFormat(),
    FluxITDAFormat(),
    LeaskITDAFormat(),
    OvercompleteFormat(),
)
"""All formats, in the order in which files are compared with them."""
LABEL = re.compile(r"[A-Za-z0-9][\w.-]{0,60}")
Batches = Callable[[], Iterator[ActivationBatch]]
"""Activations of the site of a dictionary, in batches."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written of a dictionary."""

    files: list[Path]
    approximations: tuple[str, ...]
    """What was left out, as sentences."""
    written: Dictionary
    """The dictionary as the files hold it."""


class ReconstructionDifference(NamedTuple):
    """How two dictionaries reconstruct the same activations; all but `tokens` are shares of their variance."""

    tokens: int
    fvu_before: float
    """Of the first, unexplained."""
    fvu_after: float
    """Of the second, unexplained."""
    difference: float
    """The mean squared difference of the two reconstructions."""


@torch.no_grad()
def compare_reconstructions(
    before: Dictionary, after: Dictionary, batches: Iterable[ActivationBatch]
) -> ReconstructionDifference:
    """Compare the reconstructions of two dictionaries on activations."""
    parts = [batch.values.float() for batch in batches]
    x = torch.cat(parts)
    first, second = (torch.cat([each.decode(each.encode(part)) for part in parts]) for each in (before, after))
    total = (x - x.mean(0)).square().sum()
    shares = [float(difference.square().sum() / total) for difference in (x - first, x - second, first - second)]
    return ReconstructionDifference(len(x), *shares)


def find_format(name: str) -> ForeignFormat:
    """Return the format of this name."""
    by_name = {format.name: format for format in FORMATS}
    if name not in by_name:
        raise UnknownName.among("The format", name, by_name)
    return by_name[name]


def detect_format(path: Path | str) -> ForeignFormat:
    """Return the format of the files at `path`, by their names and entries."""
    source = ForeignSource(path)
    for format in FORMATS:
        if format.matches(source):
            return format
    inside = sorted({place.name for place in source.folder.iterdir() if place.is_dir()}) if source.file is None else []
    advice = f"It has the folders {', '.join(inside[:8])}: name one of them." if inside else "Name the format with --format."
    names = ", ".join(format.name for format in FORMATS)
    raise BadInput(f"{path} holds no dictionary of a known format ({names}). {advice}")


def read_dictionary(
    path: Path | str,
    *,
    site: Site | str,
    model: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    k: int | None = None,
    label: str | None = None,
    activations: Batches | None = None,
    source: str | None = None,
    exclude: Sequence[int] = (),
    keep_halves: bool = False,
) -> Dictionary:
    """Read a dictionary that another tool wrote; the files do not name the `site`, so it has to be given.

    The `format` is recognised if it is left out. `k` is needed where the files do not say how many features fire, unless
    `activations` tell it. `label` is added to the name of the dictionary, by default that of the format. `source` is where
    the files are from, if not from `path`. `exclude` are features that their publisher leaves out of lists. With
    `keep_halves`, weights of 16 bits stay as they are: such a dictionary can be saved, and has to be loaded again to be used.
    """
    if label is not None and not LABEL.fullmatch(label):
        raise BadInput(f"'{label[:80]}' cannot be a part of a name. Use letters, digits, points and hyphens.")
    chosen = detect_format(path) if format is None else find_format(format)
    files = ForeignSource(path)
    found = chosen.read(files)
    imported = _origin(chosen, files, found, source) | ({"excluded": sorted({*exclude})} if exclude else {})
    training = {"imported": imported, "variant": f"-{label or chosen.name}"}
    origin = DictionaryOrigin(site=Site.parse(site), model=model, revision=revision, training=training)
    k = _choose_k(found, files, origin, k, activations)
    try:
        dictionary = found.make(origin, k)
    except BadInput as error:
        raise BrokenFile(f"{path} cannot be used as a dictionary: {error}") from error
    if outside := [feature for feature in exclude if not 0 <= feature < dictionary.size]:
        raise UnknownName(f"{path} has no feature {outside[0]} to exclude: its features are 0 to {dictionary.size - 1}.")
    for name, tensor in dictionary.state().tensors.items():
        # A sum of finite numbers may overflow, but one with NaN or infinity is never finite.
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise NonFinite(f"{path}: {name} holds NaN or infinity: no dictionary can be used so. Copy it again.")
    return dictionary if keep_halves else _in_float32(dictionary)


def read_code_statistics(path: Path | str, size: int, format: str | None = None) -> CodeStatistics | None:
    """Read what the tool measured of the codes of a dictionary with `size` features; None if that is not among its files."""
    chosen = detect_format(path) if format is None else find_format(format)
    return chosen.read_statistics(ForeignSource(path), size)


def write_dictionary(dictionary: Dictionary, format: str, folder: Path | str, *, approximate: bool = False) -> ExportResult:
    """Write a dictionary to `folder` for another tool; raise with the reason if its format cannot hold it exactly.

    With `approximate` what cannot be expressed is left out. `folder` is new, empty, or holds files of the same export, which is
    completed if it was stopped.
    """
    chosen, folder = find_format(format), Path(folder)
    if not isinstance(chosen, WritableFormat):
        written = ", ".join(other.name for other in FORMATS if isinstance(other, WritableFormat))
        raise BadInput(f"Files of {chosen.name} are read, not written. Export to one of: {written}.")
    fitted: FittedDictionary = chosen.fit(dictionary, approximate)
    files = write_together(folder, partial(chosen.write, fitted.dictionary))  # the configuration comes last
    return ExportResult(files=files, approximations=fitted.approximations, written=fitted.dictionary)


def _origin(format: ForeignFormat, files: ForeignSource, found: ForeignDictionary, source: str | None) -> dict[str, Json]:
    """Return where a dictionary comes from, as plain JSON."""
    return {
        "format": format.name,
        "tool": format.tool,
        "class": found.model_class,
        "version": found.version,
        "source": source or str(files.path),
        "sha256": files.checksums(),
        "config": dict(found.config),
    }


def _in_float32(dictionary: Dictionary) -> Dictionary:
    """Return the dictionary with all weights in float32, which codes are computed in."""
    state = dictionary.state()
    if all(tensor.dtype not in (torch.bfloat16, torch.float16) for tensor in state.tensors.values()):
        return dictionary
    return dictionary.from_state(state)


def _choose_k(
    found: ForeignDictionary, files: ForeignSource, origin: DictionaryOrigin, k: int | None, activations: Batches | None
) -> int:
    """Return the k of the files, the one that is given, or the average that fires on `activations`."""
    if found.k is not None and k not in (None, found.k):
        raise BadInput(f"{files.path} says k {found.k}, not {k}. Leave --k out.")
    if (known := found.k or k) is not None:
        return known
    if not found.fires_over_thresholds:
        raise BadInput(f"{files.path} does not say how many features fire for each token. Name the number with --k.")
    if activations is None:
        raise BadInput(
            f"{files.path} does not say how many features fire for a token, and no activations of {origin.site} are stored to "
            "count them on. Harvest some first, or name the average with --k."
        )
    dictionary, fires, tokens = _in_float32(found.make(origin, 1)), 0, 0
    with torch.no_grad():
        for batch in activations():
            fires += int((dictionary.encode(batch.values).values != 0).sum())
            tokens += len(batch.values)
    return min(dictionary.size, max(1, round(fires / max(1, tokens))))
