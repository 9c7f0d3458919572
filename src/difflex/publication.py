"""Dictionaries of a study as a repository of the hub: their files, and a card written from what was measured."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from difflex.dictionary_config import CONFIG, STATISTICS, TENSORS, DictionaryConfig, fingerprint, read_config
from difflex.errors import BadInput, DifflexError, StaleWork
from difflex.evaluation import Evaluation
from difflex.features import Book, ImageAlbum, overlaid
from difflex.files import replacing, write_file
from difflex.hub import HubDictionary, HubOrigin, check_repository, commit_files, prepare_repository, snapshot, write_hub_origin
from difflex.images import contact_sheet
from difflex.report.figures.gallery import FeatureRanking, RankedFeature
from difflex.report.reading import read_facts
from difflex.study import DictionaryRef, Study

__all__ = ["pull_dictionary", "push", "stage", "write_repository"]

CARD, EVALUATION, SCALES, EXAMPLES = "README.md", "evaluation.json", "scales.safetensors", "features.webp"
FIRST = ".gitattributes"
"""What the hub puts into a new repository."""
FEATURES, IMAGES, SIDE = 8, 5, 128
"""Features in the image of examples, images of each, and their side in pixels."""
SCANNED = 200
"""Features that are looked at for some with different words."""
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")
HUB_MODEL = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
FORMULAS = """\
For activations x and reconstructions y of held-out tokens:

- FVU: sum of (x - y)^2 over the sum of (x - mean x)^2, over all tokens and axes; 0 is perfect.
- raw FVU: sum of (x - y)^2 over the sum of x^2, where the mean counts as explained.
- r2: squared correlation of x and y on each axis, averaged over axes ("variance explained" of arXiv 2505.24360).
- EV: 1 - var(x - y) / var(x) on each axis, averaged over axes (arXiv 2410.22366).
- cosine: cosine similarity of x and y, averaged over tokens.
- L0: mean number of non-zero codes of a token. Dead: features that fire at none of the tokens.
- effect: sum of (v' - v)^2 over the sum of v^2, for the prediction v of the denoiser and its prediction v' when the site is
  replaced by the reconstruction; for comparison by the mean activation and by zeros.

`normalised` is the space in which the dictionary was trained, after its normalisation.
"""


class CardEntry(NamedTuple):
    """What a card says about a dictionary."""

    place: str
    """SITE/LABEL, as folders."""
    config: DictionaryConfig
    evaluation: Evaluation | None
    has_examples: bool

    @property
    def label(self) -> str:
        """The label of the dictionary."""
        return self.place.partition("/")[2]


def push(
    study: Study, refs: Sequence[DictionaryRef], name: str, folder: Path, private: bool, revision: str | None, licence: str | None
) -> str:
    """Add dictionaries of `study` to a repository in one commit, update its card, and return the commit.

    `folder` is an empty one for the files that are made for it.
    """
    check_repository(name)
    _check_licence(licence)
    parent = prepare_repository(name, private, revision)
    before = snapshot(name, parent, files=[*(f"*/*/{each}" for each in (CONFIG, EVALUATION, EXAMPLES)), CARD, FIRST])
    files = stage(study, refs, name, folder, before, licence)
    names = ", ".join(map(str, refs))
    return commit_files(name, files, f"Add {names}"[:200], revision, parent)


def stage(
    study: Study, refs: Sequence[DictionaryRef], name: str, folder: Path, before: Path | None = None, licence: str | None = None
) -> dict[str, Path]:
    """Return the files to add to a repository by their place in it; those that do not exist are made in `folder`.

    `before` is a folder with what the card tells of the dictionaries that are there already.
    """
    if licence is not None and not LICENSE.fullmatch(licence):
        raise BadInput(
            f"'{licence[:60]}' is not the identifier of a licence. Write one as on the hub: apache-2.0, mit, cc-by-4.0."
        )
    files: dict[str, Path] = {}
    facts = read_facts(study)
    for ref in refs:
        own, place = study.dictionary(*ref), f"{ref.site.folder}/{ref.label}"
        digest = fingerprint(own)
        files |= {f"{place}/{each}": own / each for each in (CONFIG, TENSORS, STATISTICS) if (own / each).is_file()}
        if (evaluation := _current_evaluation(study, ref, digest)) is not None:
            files[f"{place}/{EVALUATION}"] = evaluation
        if _has_scales(study, ref, digest):
            files[f"{place}/{SCALES}"] = study.scales(*ref)
        if ref in facts.books:
            with Book.open(study.book(*ref)) as book:
                features = _shown_features(FeatureRanking(facts, book, ref))
                if (image := _draw_examples(book, ImageAlbum(study.images), features)) is not None:
                    path = folder / place / EXAMPLES
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path, "WEBP", quality=85)
                    files[f"{place}/{EXAMPLES}"] = path
    entries = _card_entries(before, files)
    write_file(folder / CARD, _card(name, entries, licence or _licence_of(before)).encode())
    return {CARD: folder / CARD, **files}


def write_repository(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files to their places in `folder`."""
    for place, path in files.items():
        _copy(path, folder / place)


def pull_dictionary(study: Study, source: HubDictionary) -> bool:
    """Copy a downloaded dictionary with its evaluation and scales into `study`; return whether it was not there before."""
    from difflex.dictionaries import Dictionary

    ref = DictionaryRef(source.site, source.label)
    target, digest = study.dictionary(*ref), fingerprint(source.folder)
    dictionary = Dictionary.load(source.folder)  # so that nothing that cannot be used is kept
    if dictionary.site.folder != source.folder.parent.name or Path(ref.label).name != ref.label:
        raise BadInput(f"{source.repository} holds {dictionary.name} in the folder {source.folder.parent.name}. Ask its owner.")
    is_new = not (target / CONFIG).is_file()
    if not is_new and fingerprint(target) != digest:
        raise StaleWork(f"{study.folder} has another dictionary {ref}. Name another folder, or move that one away.", target)
    study.write()
    for name in (TENSORS, CONFIG) if is_new else ():
        _copy(source.folder / name, target / name)
    more = ((EVALUATION, study.evaluation(*ref)), (SCALES, study.scales(*ref)), (STATISTICS, target / STATISTICS))
    for name, path in more:
        if (source.folder / name).is_file() and not path.exists():
            _copy(source.folder / name, path)
    write_hub_origin(target, HubOrigin(source.repository, source.commit))
    return is_new


def _current_evaluation(study: Study, ref: DictionaryRef, digest: str) -> Path | None:
    """Return the file with the evaluation of a dictionary as it is now; None without one."""
    path = study.evaluation(*ref)
    return path if path.is_file() and Evaluation.load(path).fingerprint == digest else None


def _has_scales(study: Study, ref: DictionaryRef, digest: str) -> bool:
    from difflex.steering.features import FeatureScales

    return FeatureScales.load(study.scales(*ref), digest) is not None


def _shown_features(ranking: FeatureRanking) -> list[RankedFeature]:
    """Return the best features with different words."""
    chosen: dict[object, RankedFeature] = {}
    for number, feature in enumerate(ranking.features()):
        chosen.setdefault(feature.name or feature.stats.feature, feature)
        if len(chosen) == FEATURES or number == SCANNED:
            break
    return [*chosen.values()]


def _draw_examples(book: Book, album: ImageAlbum, features: Iterable[RankedFeature]) -> Image.Image | None:
    """Draw the images in which each feature is strongest, with a line around the tokens where it fires; None without any."""
    labels, rows = [], []
    for feature in features:
        number = feature.stats.feature
        top = sorted(book.examples(number, "top"), key=lambda example: (example.split != "held-out", example.rank))[:IMAGES]
        shots, row = book.shots(example.shot for example in top), []
        for example in top:
            try:
                image = album.open(shots[example.shot].image.file)
            except DifflexError:  # difflex verify names missing images
                continue
            image.thumbnail((2 * SIDE, 2 * SIDE))
            row.append(overlaid(image, example.map, book.about.grid, example.peak or 1.0, style="outline", side=SIDE))
        if len(row) == IMAGES:
            labels.append(f"{number} {feature.name}".strip())
            rows.append(row)
    return contact_sheet(rows, row_labels=labels, column_labels=[f"#{i + 1}" for i in range(IMAGES)], side=SIDE) if rows else None


def _card(name: str, entries: Sequence[CardEntry], licence: str | None) -> str:
    """Return the card of a repository: its dictionaries in a table, how to load them, and what was measured of each."""
    models = sorted({str(entry.config.model) for entry in entries})
    base = [model for model in models if HUB_MODEL.fullmatch(model)]
    head = ["---", "library_name: difflex", *([f"license: {licence}"] if licence else [])]
    head += ["base_model:", *(f"- {model}" for model in base)] if base else []
    head += ["tags:", "- difflex", "- sparse-autoencoder", "- interpretability", "- text-to-image", "---"]
    first = entries[0]
    parts = [
        "\n".join(head),
        f"# {name.partition('/')[2]}",
        f"Sparse dictionaries of features of the activations of {', '.join(map(_model, models))}, made with difflex.",
        "## Dictionaries\n\n" + _table(entries),
        f"## Load\n\n{_usage(name, first)}",
        *(_section(entry) for entry in entries),
    ]
    parts += ["## Measures\n\n" + FORMULAS.rstrip()] if any(entry.evaluation for entry in entries) else []
    stated = (
        f"The dictionaries are under the licence `{licence}`." if licence else "The owner of this repository states no licence."
    )
    return "\n\n".join([*parts, f"## Licence\n\n{stated} The licence of the model holds for the model."]) + "\n"


def _usage(name: str, entry: CardEntry) -> str:
    site, model = entry.config.site, entry.config.model
    return (
        "```python\nimport difflex\n\n"
        f'dictionary = difflex.Dictionary.from_pretrained("{name}", "{site}", "{entry.label}")\n'
        f'model = difflex.load("{_shown_model(model)}")\n'
        f'acts = model.activations(["a red star on paper"], "{site}")\n'
        "batch = acts.sample(100)\n"
        "codes = dictionary.encode(batch.values)  # the features of each token, strongest first, and their values\n"
        "reconstruction = dictionary.decode(codes)\n```\n\n"
        "`revision=` takes a commit, which pins the weights. All dictionaries as a study, for every command of difflex:\n\n"
        f"```sh\ndifflex pull {name} --out study\n```"
    )


def _table(entries: Sequence[CardEntry]) -> str:
    rows = [["site", "dictionary", "kind", "features", "k", "normalisation", "FVU", "L0", "dead"]]
    for entry in entries:
        config, quality = entry.config, entry.evaluation and entry.evaluation.overall
        measured = (
            ["", "", ""]
            if quality is None or entry.evaluation is None
            else [_number(quality.model_space.fvu), f"{quality.l0:.1f}", f"{entry.evaluation.dead_share:.1%}"]
        )
        shape = [config.kind, f"{config.size:,}", str(config.k), config.normalisation]
        rows.append([f"`{config.site}`", f"[`{entry.label}`](#{_anchor(entry)})", *shape, *measured])
    return _markdown(rows)


def _section(entry: CardEntry) -> str:
    config, evaluation = entry.config, entry.evaluation
    data = config.training.get("data")
    facts = [
        f"- model: {_model(str(config.model))}" + (f", revision `{config.revision}`" if config.revision else ""),
        f"- site: `{config.site}`, width {config.width:,}",
        f"- kind: {config.kind}, {config.size:,} features, k {config.k}; normalisation: {config.normalisation}",
        *([f"- trained on: {_shown_data(data)}"] if isinstance(data, str) and data else []),
        *([f"- imported {_shown_data(config.imported)}"] if config.imported else []),
        f"- checksum of the weights (SHA-256): `{config.sha256}`",
    ]
    parts = [f"## {config.site}/{entry.label}", "\n".join(facts)]
    if evaluation is None:
        parts.append("It was not evaluated.")
    else:
        parts += [f"Measured on {_shown_data(evaluation.data)}:", _measures(evaluation)]
    if entry.has_examples:
        parts.append("Features and the images in which they are strongest; a line surrounds the tokens where they fire:")
        parts.append(f"![features]({entry.place}/{EXAMPLES})")
    return "\n\n".join(parts)


def _measures(evaluation: Evaluation) -> str:
    quality, effect = evaluation.overall, evaluation.effect
    rows = [["space", "FVU", "raw FVU", "r2", "EV", "cosine"]]
    for space, metrics in (("model", quality.model_space), ("normalised", quality.normalised_space)):
        if metrics is not None:
            rows.append([space, *map(_number, (metrics.fvu, metrics.fvu_raw, metrics.r2, metrics.ev, metrics.cosine))])
    text = f"L0 {quality.l0:.1f}; dead features {evaluation.dead:,} of {evaluation.size:,}."
    if effect is not None:
        change = effect.prediction
        text += (
            f" Effect on the prediction at {effect.shots} shots: {change.reconstruction:.4f} (mean activation {change.mean:.4f}, "
            f"zeros {change.zero:.4f})."
        )
    return f"{_markdown(rows)}\n\n{text}"


def _card_entries(before: Path | None, files: Mapping[str, Path]) -> list[CardEntry]:
    """Return what the card says of all dictionaries, old ones and those of `files`, sorted by place."""
    known = {path.relative_to(before).as_posix(): path for path in before.glob("*/*/*")} if before else {}
    whole, entries = {**known, **files}, []
    for place in sorted({path.rpartition("/")[0] for path in whole if path.endswith(f"/{CONFIG}")}):
        try:
            config = read_config(whole[f"{place}/{CONFIG}"].parent)
            path = whole.get(f"{place}/{EVALUATION}")
            evaluation = None if path is None else Evaluation.load(path)
        except DifflexError:
            continue  # a folder of another program, which stays as it is
        entries.append(CardEntry(place, config, evaluation, f"{place}/{EXAMPLES}" in whole))
    return entries


def _check_licence(licence: str | None) -> None:
    if licence is not None and not LICENSE.fullmatch(licence):
        raise BadInput(
            f"'{licence[:60]}' is not the identifier of a licence. Write one as on the hub: apache-2.0, mit, cc-by-4.0."
        )


def _licence_of(before: Path | None) -> str | None:
    """Return the licence that the card of a repository states."""
    path = before and before / CARD
    match = re.search(r"^license: *(\S+)$", path.read_text("utf-8"), re.MULTILINE) if path and path.is_file() else None
    return match[1] if match and LICENSE.fullmatch(match[1]) else None


def _model(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})" if HUB_MODEL.fullmatch(model) else f"`{_shown_model(model)}`"


def _shown_model(model: str | None) -> str:
    """Return the name of a model; of a folder of this machine only its last part."""
    name = str(model)
    return name if HUB_MODEL.fullmatch(name) else Path(name).name


def _shown_data(text: str) -> str:
    """Return a description of data without the folders of this machine."""
    return re.sub(r"(?:~|\.{0,2})/[^\s,]*/", "", text)


def _anchor(entry: CardEntry) -> str:
    return re.sub(r"[^\w-]", "", f"{entry.config.site}{entry.label}".lower())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *body])


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
