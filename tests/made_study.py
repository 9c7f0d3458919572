"""A study made by hand: records with known numbers where its stations would have put them, without any model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from difflex.dictionaries import fingerprint
from difflex.effects import ImageStrip, Provenance, SteeringConfig, SteeringResults, StrengthCurve, StrengthPoint
from difflex.effects.findings import Finding, FindingLine, Findings, FindingsConfig
from difflex.effects.removal import RemovalConfig, RemovalRates, RemovalResults, RemovedConcept
from difflex.evaluation import Evaluation
from difflex.evaluation.anatomy import ActivationShape, Anatomy
from difflex.evaluation.concepts import Concept, ConceptsConfig
from difflex.evaluation.concepts.results import (
    ConceptDetector,
    ConceptMatches,
    ConceptResult,
    ConfidenceInterval,
    FeatureMatches,
    MatchInputs,
    NoiseLevelResult,
)
from difflex.evaluation.record import ModelEffect, ReconstructionMetrics, ReconstructionQuality, ReplacementEffect, to_json
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, FeatureStats, ImageFile, TokenMap
from difflex.features.explanations import Explanation, ExplanationScore
from difflex.records import Shot, Site
from difflex.study import DictionaryRef, Study

CONCEPTS = (Concept("red", "colour"), Concept("blue", "colour"), Concept("star", "shape"), Concept("ring", "shape"))
TIMESTEPS = (1000.0, 500.0)


def begun(folder: Path, model: str = "mini-flux", revision: str | None = None) -> Study:
    return Study.begin(folder, model, revision)


def dictionary(
    study: Study, name: str, normalisation: str = "standardise", weights: bytes = b"weights", data: str = ""
) -> DictionaryRef:
    """A dictionary called SITE/KIND-SIZE-kK..., with bytes in the place of its tensors."""
    site, _, label = name.partition("/")
    kind, size, k, *_ = label.split("-")
    place = DictionaryRef(Site.parse(site), label)
    folder = study.dictionary(*place)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dictionary.safetensors").write_bytes(weights)
    config = {"format": 2, "difflex": "0", "kind": kind, "site": site, "model": study.model, "revision": None, "width": 8}
    config |= {"size": int(size), "k": int(k[1:]), "settings": {"normalisation": {"method": normalisation}}}
    config |= {"training": {"data": data}}
    (folder / "config.json").write_text(json.dumps(config))
    return place


def evaluated(
    study: Study,
    name: str,
    fvu: float | None = 0.2,
    dead: int = 0,
    normalisation: str = "standardise",
    share: float | None = 0.1,
    r2: float | None = 0.8,
    data: str = "",
    alike: Mapping[str, float] | None = None,
) -> Evaluation:
    """The evaluation of a dictionary that is made along with it; `share` is the effect as a share of mean ablation, `alike` what
    finished images were compared by besides."""
    place = dictionary(study, name, normalisation, data=data)
    folder, size = study.dictionary(*place), int(place.label.split("-")[1])
    quality = _quality(fvu, r2)
    density = [0] * (len(Evaluation.edges) - 1)
    density[20], density[24] = size - dead - 1, 1
    evaluation = Evaluation(
        dictionary=str(place),
        fingerprint=fingerprint(folder),
        data="made",
        size=size,
        overall=quality,
        timesteps={t: _quality(fvu and fvu * t / 1000, r2) for t in TIMESTEPS},
        dead=dead,
        density=tuple(density),
        effect=None if share is None else _effect(share, alike or {}),
    )
    path = study.evaluation(*place)
    path.parent.mkdir(parents=True, exist_ok=True)
    _written(path, evaluation)
    return evaluation


def matched(
    study: Study,
    name: str,
    aps: Sequence[float],
    inputs: Mapping[str, object] | None = None,
    levels: Sequence[float] = (0.25, 0.5),
    concepts: Sequence[Concept] = CONCEPTS,
    each: int = 4,
    left_out: Sequence[Concept] = (),
) -> Path:
    """Matches whose best features have the average precisions `aps`; of a dictionary where there is one of that name. So many
    features match `each` concept best."""
    site, _, label = name.partition("/")
    folder = study.dictionary(Site.parse(site), label)
    match_inputs = MatchInputs(
        model=study.model,
        revision=study.revision,
        images="drawn",
        config=ConceptsConfig(images=9, noise=tuple(levels)),
        fingerprint=fingerprint(folder) if (folder / "config.json").is_file() else None,
    )
    findings = tuple(_finding(concept, ap) for concept, ap in zip(concepts, aps, strict=True))
    found = sum(ap >= 0.8 for ap in aps) / len(aps)
    coverage = ConfidenceInterval(found, max(found - 0.1, 0.0), min(found + 0.1, 1.0))
    made = [
        NoiseLevelResult(noise=noise, results=findings, coverage=coverage, coverage_of_findable=coverage)
        for noise in (None, *(levels if len(levels) > 1 else ()))
    ]
    count = len(aps) * each
    matches = ConceptMatches(
        site=Site.parse(site),
        label=label,
        size=8,
        concepts=tuple(concepts),
        rare_concepts=tuple(left_out),
        levels=tuple(made),
        features=FeatureMatches(
            features=tuple(range(count)),
            concepts=tuple(range(len(aps))) * each,
            ap=tuple(aps) * each,
            iou_concepts=tuple(range(len(aps))) * each,
            iou=tuple(aps) * each,
            unrelated=(0.0,) * count,
            monosemanticity=tuple(aps) * each,
        ),
        inputs=replace(match_inputs, **(inputs or {})),
    )
    path = study.concepts(Site.parse(site), label)
    matches.save(path)
    return path


def anatomised(
    study: Study,
    norms: Mapping[str, Mapping[float, float]] | None = None,
    variances: Sequence[float] = (50.0, 10.0, 5.0, *(1.0,) * 17),
    model: str | None = None,
) -> Anatomy:
    """An anatomy of two layers in both streams, whose norms double from one to the next."""
    usual = {"double.0": {1000.0: 10.0, 500.0: 12.0}, "double.1": {1000.0: 30.0, 500.0: 40.0}}
    usual |= {f"{site}:text": {t: 5 * norm for t, norm in by.items()} for site, by in usual.items()}
    shape = ActivationShape(
        tokens=100, variances=tuple(variances), components_for_90=9, alignments=(0.5,), outliers=((1, 2.0, 3.0),), offset=1.5
    )
    told = {Site.parse(site): dict(by) for site, by in (norms or usual).items()}
    anatomy = Anatomy(model=model or study.model, norms=told, shapes={Site.parse("double.1"): shape})
    anatomy.save(study.anatomy)
    return anatomy


def imaged(
    study: Study,
    name: str,
    features: int = 12,
    explained: Mapping[int, tuple[str, float]] | None = None,
    coverage: float = 0.25,
    data: str = "made",
) -> None:
    """The book of a dictionary: each feature fires in six images of its own colour; some are explained, with an accuracy."""
    site, _, label = name.partition("/")
    place, album = DictionaryRef(Site.parse(site), label), ImageAlbum(study.images)
    filed = [album.add(Image.new("RGB", (8, 8), (20 * feature, 90, 200)))[0] for feature in range(features)]
    shot = Shot(model=study.model, prompt="<b>a star</b>", pixels=(8, 8), steps=1, guidance=0.0, split="held-out")
    shots = [(6 * feature + i, feature, replace(shot, seed=i)) for feature in range(features) for i in range(6)]
    about = BookInfo(
        dictionary=name,
        kind=label.split("-")[0],
        size=features,
        k=1,
        fingerprint=fingerprint(study.dictionary(*place)),
        model=study.model,
        data=data,
        grid=(2, 2),
        tokens=24 * features,
        shots={"held-out": 6 * features},
        images=features,
    )
    with BookWriter.open(study.book(*place), about) as writer:
        writer.add_images(ImageFile(number, *each) for number, each in enumerate(filed))
        writer.add_shots(shots)
        writer.add_features(
            FeatureStats(feature=f, firings=8, shots=8, density=0.25, peak=1.0 + f, mean=1.0, area=0.25, coverage=coverage)
            for f in range(features)
        )
        writer.add_examples(
            Example(
                feature=f, kind="top", split="held-out", rank=i, shot=6 * f + i, peak=1.0 + f, map=TokenMap((i % 4,), (1.0 + f,))
            )
            for f in range(features)
            for i in range(6)
        )
    with Book.edit(study.book(*place)) as book:
        for feature, (text, accuracy) in (explained or {}).items():
            for protocol, more in (("heldout", 0.0), ("paper", 0.1)):
                explanation = Explanation(feature=feature, backend="made", protocol=protocol, text=text)
                scores = [ExplanationScore(measure, accuracy + more, None, None, 10) for measure in ("accuracy", "auroc")]
                book.add_explanation(explanation, scores=scores)


def steered(
    study: Study,
    name: str,
    success: float = 0.9,
    random: float = 0.0,
    kept: float = 0.95,
    concepts: Sequence[Concept] = CONCEPTS,
    checksum: str = "",
    judge: str = "",
    **settings: object,
) -> None:
    """What came of steering towards concepts with feature 1, which `matched` makes the best for all; strips of the first of each
    group. `checksum` is that of a file of concepts; `settings` are those of the config."""
    site, _, label = name.partition("/")
    place = DictionaryRef(Site.parse(site), label)
    path, curves, strips = study.steering(*place), [], {}
    for concept in concepts:
        for method, most in (
            ("feature", success),
            ("neuron", success / 2),
            ("contrast", success),
            ("random", random),
            ("prompt", 1),
        ):
            strengths = (1.0,) if method == "prompt" else (0.5, 1.0, 2.0)
            told = f"{name} 1" if method == "feature" else method
            curves.append(_steered(concept, method, told, [(s, most * min(s, 1.0), kept, 1 + s / 4) for s in strengths]))
            file = f"{concept.group}-{method}.webp"
            strip = ImageStrip(
                method=method, concept=concept.name, group=concept.group, prompt="<i>a star</i>", strengths=strengths, file=file
            )
            strips.setdefault(file, strip)
    path.with_suffix("").mkdir(parents=True, exist_ok=True)
    for strip in strips.values():
        Image.new("RGB", (8 * (1 + len(strip.strengths)), 8), (200, 90, 20)).save(path.with_suffix("") / strip.file)
    config = SteeringConfig(**{"groups": tuple(dict.fromkeys(c.group for c in concepts)), **settings})  # pyright: ignore
    files = {"concepts": checksum} if checksum else {}
    SteeringResults(
        model=study.model,
        site=site,
        curves=tuple(curves),
        config=config,
        provenance=Provenance.of(study, {place: {}}, judge, files),
        strips=tuple(strips.values()),
    ).save(path)


def _steered(concept: Concept, method: str, told: str, points: Sequence[tuple[float, float, float, float]]) -> StrengthCurve:
    made = [
        StrengthPoint(strength=strength, success=success, specificity=kept, quality=loss, confidence=1.0)
        for strength, success, kept, loss in points
    ]
    return StrengthCurve(
        method=method, description=told, concept=concept.name, group=concept.group, trials=4, without=0.0, points=tuple(made)
    )


def removed(
    study: Study,
    name: str,
    cra: float = 0.95,
    groups: Sequence[str] = ("colour", "background"),
    steps: tuple[int, int] | None = None,
) -> None:
    """What came of taking away four concepts of each group with a dictionary: two of them gone, and `cra` kept."""
    site, _, label = name.partition("/")
    place = DictionaryRef(Site.parse(site), label)
    concepts = tuple(
        RemovedConcept(
            concept=f"{group} {i}",
            group=group,
            features={name: ((1, 2),)},
            strength=-1.0,
            trials=(),
            images=12,
            shown=1.0,
            rates=RemovalRates(0.95, 0.95, cra, 1.0) if i < 2 else RemovalRates(0.0, 1.0, 1.0, 1.0),
        )
        for group in groups
        for i in range(4)
    )
    RemovalResults(
        model=study.model,
        dictionaries=(name,),
        concepts=concepts,
        config=RemovalConfig(edit_steps=steps),
        provenance=Provenance.of(study, {place: {}}),
    ).save(study.removal([place]))


def found(
    study: Study, site: str, names: Sequence[str] = ("pairs", "out-of-distribution"), by: Mapping[str, str] | None = None
) -> None:
    """Findings of experiments at a site, the second of which does not hold; `by` says with which dictionary one was made."""
    used = {each: {study.find_dictionary(name): {}} for each, name in (by or {}).items()}
    lines = (
        FindingLine("all concepts", (1.0, 20.0, 200.0), (0.1, 0.3, 0.35), (0.02,) * 3, 4),
        FindingLine("colour", (1.0,), (0.2,), (0.0,), 1),
    )
    made = [
        Finding(
            name=name,
            claim=f"What is said of <b>{name}</b>",
            paper="arXiv 2505.03189",
            rule="The gain rises.",
            verdict="does not hold here" if i else "holds here",
            reason="It rises by 0.25.",
            numbers={"rise": 0.25},
            x="pairs",
            y="gain",
            lines=lines,
            curves=(),
            config=FindingsConfig(groups=("colour",)),
            provenance=Provenance.of(study, used.get(name, {})),
        )
        for i, name in enumerate(names)
    ]
    at = Findings(model=study.model, revision=study.revision, site=site, parameters=9, findings=tuple(made))
    at.save(study.findings(Site.parse(site)))


def whole(folder: Path) -> Study:
    """A study in which every station has been: two sites, two sizes and k, variants, ITDA, concepts and anatomy."""
    study = begun(folder)
    for site in ("double.1", "double.2"):
        for size in (512, 1024):
            for k in (8, 16):
                evaluated(study, f"{site}/topk-{size}-k{k}", fvu=20 / size + 0.4 / k, dead=5, share=0.2 / k)
                evaluated(study, f"{site}/itda-{size - 4}-k{k}-first100", fvu=15 / size + 0.3 / k, share=0.3 / k)
    evaluated(study, "double.1/topk-1024-k16-none", fvu=0.3, dead=900, normalisation="none")
    evaluated(study, "double.1/topk-1024-k16-whiten", fvu=0.5, dead=9, normalisation="whiten")
    matched(study, "double.1/topk-1024-k16", (0.9, 0.8, 0.7, 0.6))
    matched(study, "double.1/itda-1020-k16-first100", (0.8, 0.7, 0.6, 0.4))
    matched(study, "double.1:neurons/neurons-k16", (0.4, 0.4, 0.3, 0.1))
    matched(study, "double.1/pca-16-k16", (0.3, 0.2, 0.3, 0.1))
    matched(study, "double.1/random-1024-k16", (0.1, 0.2, 0.1, 0.1))
    anatomised(study)
    steered(study, "double.1/topk-1024-k16")
    steered(study, "double.1/itda-1020-k16-first100", success=0.6)
    removed(study, "double.1/topk-1024-k16")
    found(study, "double.1", by={"out-of-distribution": "double.1/topk-1024-k16"})
    found(study, "double.2")
    imaged(study, "double.1/itda-1020-k16-first100")
    imaged(study, "double.1/topk-1024-k16", explained={3: ("red", 0.8), 5: ("stars", 0.6), 8: ("a blue star", 0.5)})
    return study


def control(folder: Path) -> Study:
    """The study of the same model untrained."""
    study = begun(folder, revision="untrained-0")
    dictionary(study, "double.1/topk-1024-k16", weights=b"untrained")
    matched(study, "double.1/topk-1024-k16", (0.2, 0.1, 0.1, 0.1))
    return study


def _quality(fvu: float | None, r2: float | None) -> ReconstructionQuality:
    figures = ReconstructionMetrics(fvu=fvu, fvu_raw=fvu, r2=r2, ev=r2, cosine=0.9)
    return ReconstructionQuality(tokens=4321, l0=16.0, negative=0.25, model_space=figures, normalised_space=None)


def _effect(share: float, alike: Mapping[str, float]) -> ModelEffect:
    replaced = ReplacementEffect(reconstruction=share, mean=1.0, zero=2.0)
    same = ReplacementEffect(reconstruction=0.9, mean=0.2, zero=0.1)
    return ModelEffect(
        shots=4,
        prediction=replaced,
        timesteps=dict.fromkeys(TIMESTEPS, replaced),
        images=2,
        image_error=ReplacementEffect(reconstruction=0.001, mean=0.1, zero=0.2),
        similarity={"ssim": same, **{name: replace(same, reconstruction=value) for name, value in alike.items()}},
    )


def _written(path: Path, evaluation: Evaluation) -> None:
    """Also what `save` would refuse, as a file may hold anything: NaN and infinity."""
    try:
        evaluation.save(path)
    except ValueError:
        path.write_text(json.dumps({"format": 2, "difflex": "0", **to_json(evaluation)}))


def _finding(concept: Concept, ap: float) -> ConceptResult:
    detector = ConceptDetector(features=(1,), ap=ConfidenceInterval(ap, ap - 0.05, ap + 0.05), iou=ap, precision=ap, recall=ap)
    return ConceptResult(
        concept=concept,
        tokens=50,
        chance=0.05,
        probe=ConfidenceInterval(0.95, 0.9, 1.0),
        best=detector,
        segmenting=detector,
        combined=detector,
        unrelated=None,
        monosemanticity=0.5,
        split_features=(),
        absorbing_features=(),
    )
