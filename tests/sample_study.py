"""A sample study: records with known numbers in the files of its stations, without a model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from difflex.dictionaries import fingerprint
from difflex.dictionaries.files import write_files
from difflex.effects import ImageStrip, Provenance, SteeringConfig, SteeringResults, StrengthCurve, StrengthPoint
from difflex.effects.edit_bench import EditArm, EditBenchConfig, EditBenchResults
from difflex.effects.edit_bench.items import EditItem
from difflex.effects.edit_bench.results import REFERENCES, EditedItem, summarise
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
from difflex.evaluation.effect import ModelEffect, ReplacementEffect
from difflex.evaluation.reconstruction import ReconstructionMetrics, ReconstructionQuality
from difflex.evaluation.transfer import TransferInputs, TransferResults, TransferStep
from difflex.features import Book, BookInfo, BookWriter, ImageAlbum
from difflex.features.entries import Example, FeatureNeighbour, FeatureStats, ImageFile, TokenMap
from difflex.features.explanations import Explanation, ExplanationScore
from difflex.files import file_sha256
from difflex.measures import BlockRoleResults, BlockRolesConfig, FeatureMeasures, MeasureConfig
from difflex.measures.block_roles import PAPER_ROLES, BlockChange, judge_claims
from difflex.measures.image_aspects import ASPECTS
from difflex.measures.records import FeatureValue, MeasureEstimate
from difflex.records import Shot, Site
from difflex.study import DictionaryRef, Study

CONCEPTS = (Concept("red", "colour"), Concept("blue", "colour"), Concept("star", "shape"), Concept("ring", "shape"))
TIMESTEPS = (1000.0, 500.0)


def new_study(folder: Path, model: str = "mini-flux", revision: str | None = None) -> Study:
    return Study.begin(folder, model, revision)


def write_dictionary(
    study: Study, name: str, normalisation: str = "standardise", weights: bytes = b"weights", data: str = ""
) -> DictionaryRef:
    """Write a dictionary named SITE/KIND-SIZE-kK..., with one tensor of the bytes `weights`."""
    site, _, label = name.partition("/")
    kind, size, k, *_ = label.split("-")
    place = DictionaryRef(Site.parse(site), label)
    config = {"kind": kind, "site": site, "model": study.model, "revision": None, "width": 8}
    config |= {"size": int(size), "k": int(k[1:]), "settings": {"normalisation": {"method": normalisation}}}
    config |= {"training": {"data": data}}
    write_files(study.dictionary(*place), config, {"weights": torch.tensor([*weights], dtype=torch.float32)})
    return place


def write_evaluation(
    study: Study,
    name: str,
    fvu: float | None = 0.2,
    dead: int = 0,
    normalisation: str = "standardise",
    share: float | None = 0.1,
    r2: float | None = 0.8,
    data: str = "",
    similarity: Mapping[str, float] | None = None,
) -> Evaluation:
    """Write a dictionary and its evaluation, and return the evaluation.

    `share` is the effect as a share of mean ablation, `similarity` has further measures of finished images.
    """
    place = write_dictionary(study, name, normalisation, data=data)
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
        effect=None if share is None else _effect(share, similarity or {}),
    )
    evaluation.save(study.evaluation(*place))
    return evaluation


def write_matches(
    study: Study,
    name: str,
    aps: Sequence[float],
    inputs: Mapping[str, object] | None = None,
    levels: Sequence[float] = (0.25, 0.5),
    concepts: Sequence[Concept] = CONCEPTS,
    per_concept: int = 4,
    rare: Sequence[Concept] = (),
) -> Path:
    """Write matches whose best features have the average precisions `aps`, and return their path.

    They are of the dictionary of that name if there is one; `per_concept` features match each concept best.
    """
    site, _, label = name.partition("/")
    folder = study.dictionary(Site.parse(site), label)
    match_inputs = MatchInputs(
        model=study.model,
        revision=study.revision,
        images="drawn",
        config=ConceptsConfig(images=9, noise=tuple(levels)),
        fingerprint=fingerprint(folder) if (folder / "config.json").is_file() else None,
    )
    results = tuple(_concept_result(concept, ap) for concept, ap in zip(concepts, aps, strict=True))
    share = sum(ap >= 0.8 for ap in aps) / len(aps)
    coverage = ConfidenceInterval(share, max(share - 0.1, 0.0), min(share + 0.1, 1.0))
    level_results = [
        NoiseLevelResult(noise=noise, results=results, coverage=coverage, coverage_of_findable=coverage)
        for noise in (None, *(levels if len(levels) > 1 else ()))
    ]
    count = len(aps) * per_concept
    matches = ConceptMatches(
        site=Site.parse(site),
        label=label,
        size=8,
        concepts=tuple(concepts),
        rare_concepts=tuple(rare),
        levels=tuple(level_results),
        features=FeatureMatches(
            features=tuple(range(count)),
            concepts=tuple(range(len(aps))) * per_concept,
            ap=tuple(aps) * per_concept,
            iou_concepts=tuple(range(len(aps))) * per_concept,
            iou=tuple(aps) * per_concept,
            unrelated=(0.0,) * count,
            monosemanticity=tuple(aps) * per_concept,
        ),
        inputs=replace(match_inputs, **(inputs or {})),
    )
    path = study.concepts(Site.parse(site), label)
    matches.save(path)
    return path


def write_anatomy(
    study: Study,
    norms: Mapping[str, Mapping[float, float]] | None = None,
    variances: Sequence[float] = (50.0, 10.0, 5.0, *(1.0,) * 17),
    model: str | None = None,
) -> Anatomy:
    """Write the anatomy of two layers in both streams, and return it."""
    usual = {"double.0": {1000.0: 10.0, 500.0: 12.0}, "double.1": {1000.0: 30.0, 500.0: 40.0}}
    usual |= {f"{site}:text": {t: 5 * norm for t, norm in by.items()} for site, by in usual.items()}
    shape = ActivationShape(
        tokens=100, variances=tuple(variances), components_for_90=9, alignments=(0.5,), outliers=((1, 2.0, 3.0),), offset=1.5
    )
    by_site = {Site.parse(site): dict(by) for site, by in (norms or usual).items()}
    anatomy = Anatomy(model=model or study.model, norms=by_site, shapes={Site.parse("double.1"): shape})
    anatomy.save(study.anatomy)
    return anatomy


def write_book(
    study: Study,
    name: str,
    features: int = 12,
    explained: Mapping[int, tuple[str, float]] | None = None,
    coverage: float = 0.25,
    data: str = "made",
    captions: Mapping[int, str] | None = None,
    neighbours: Mapping[int, Sequence[FeatureNeighbour]] | None = None,
    shade: int = 200,
) -> None:
    """Write the book of a dictionary: each feature fires in six images of its colour; some have explanations with an accuracy.

    `captions` are the prompts of the images of a feature, by its number. Books of another `shade` have other images.
    """
    site, _, label = name.partition("/")
    place, album = DictionaryRef(Site.parse(site), label), ImageAlbum(study.images)
    files = [
        album.add(Image.new("RGB", (8, 8), (20 * feature % 256, 90 + 20 * feature // 256, shade)))[0]
        for feature in range(features)
    ]
    shot = Shot(model=study.model, prompt="<b>a star</b>", pixels=(8, 8), steps=1, guidance=0.0, split="held-out")
    prompts = [(captions or {}).get(feature, shot.prompt) for feature in range(features)]
    shots = [(6 * f + i, f, replace(shot, seed=i, prompt=prompts[f])) for f in range(features) for i in range(6)]
    info = BookInfo(
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
    with BookWriter.open(study.book(*place), info) as writer:
        writer.add_images(ImageFile(number, *file) for number, file in enumerate(files))
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
        for feature, entries in (neighbours or {}).items():
            writer.add_neighbours(feature, entries)
    with Book.edit(study.book(*place)) as book:
        for feature, (text, accuracy) in (explained or {}).items():
            for protocol, more in (("heldout", 0.0), ("paper", 0.1)):
                explanation = Explanation(feature=feature, backend="made", protocol=protocol, text=text)
                scores = [ExplanationScore(measure, accuracy + more, None, None, 10) for measure in ("accuracy", "auroc")]
                book.add_explanation(explanation, scores=scores)


def write_steering(
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
    """Write the results of steering with feature 1, the best one for all concepts in `write_matches`.

    Strips are of the first concept of each group. `checksum` is that of a file of concepts; `settings` are those of the config.
    """
    site, _, label = name.partition("/")
    place = DictionaryRef(Site.parse(site), label)
    path, curves, strips = study.steering(*place), [], {}
    for concept in concepts:
        for method, highest in (
            ("feature", success),
            ("neuron", success / 2),
            ("contrast", success),
            ("random", random),
            ("prompt", 1),
        ):
            strengths = (1.0,) if method == "prompt" else (0.5, 1.0, 2.0)
            description = f"{name} 1" if method == "feature" else method
            curves.append(_curve(concept, method, description, [(s, highest * min(s, 1.0), kept, 1 + s / 4) for s in strengths]))
            file = f"{concept.group}-{method}.webp"
            image = path.with_suffix("") / file
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 * (1 + len(strengths)), 8), (200, 90, 20)).save(image)
            strip = ImageStrip(
                method=method,
                concept=concept.name,
                group=concept.group,
                prompt="<i>a star</i>",
                strengths=strengths,
                file=file,
                sha256=file_sha256(image),
            )
            strips.setdefault(file, strip)
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


def _curve(concept: Concept, method: str, description: str, values: Sequence[tuple[float, float, float, float]]) -> StrengthCurve:
    points = [
        StrengthPoint(strength=strength, success=success, specificity=kept, quality=loss, confidence=1.0)
        for strength, success, kept, loss in values
    ]
    return StrengthCurve(
        method=method,
        description=description,
        concept=concept.name,
        group=concept.group,
        trials=4,
        without=0.0,
        points=tuple(points),
    )


def write_removal(
    study: Study,
    name: str,
    cra: float = 0.95,
    groups: Sequence[str] = ("colour", "background"),
    steps: tuple[int, int] | None = None,
) -> None:
    """Write the results of removing four concepts of each group with a dictionary: two are removed, with this CRA."""
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


def write_findings(
    study: Study, site: str, names: Sequence[str] = ("pairs", "out-of-distribution"), by: Mapping[str, str] | None = None
) -> None:
    """Write findings at a site, of which the second does not hold; `by` maps a finding to the dictionary that it used."""
    dictionaries = {finding: {study.find_dictionary(name): {}} for finding, name in (by or {}).items()}
    lines = (
        FindingLine("all concepts", (1.0, 20.0, 200.0), (0.1, 0.3, 0.35), (0.02,) * 3, 4),
        FindingLine("colour", (1.0,), (0.2,), (0.0,), 1),
    )
    findings = [
        Finding(
            name=name,
            claim=f"The claim about <b>{name}</b>",
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
            provenance=Provenance.of(study, dictionaries.get(name, {})),
        )
        for i, name in enumerate(names)
    ]
    record = Findings(model=study.model, revision=study.revision, site=site, parameters=9, findings=tuple(findings))
    record.save(study.findings(Site.parse(site)))


def write_edit_bench(study: Study, name: str = "drawn") -> None:
    """Write results of the editing benchmark with the first dictionary of the study: two items of one type, one edited."""
    ref = study.dictionaries()[0]
    arms = [*REFERENCES, EditArm("features", str(ref), 16, 1.0), EditArm("features", str(ref), 16, 2.0)]
    scores = [(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 0.25)]
    rows = [
        {"success": success, "kept": kept, "score": success * kept, "outside": 0.1 * number, "toward": success}
        for number, (success, kept) in enumerate(scores)
    ]
    items = [
        EditedItem(
            key="",
            item=EditItem(id=f"colour-{number}", type="colour", source="a", target="b", seed=number),
            scores={str(arm): row for arm, row in zip(arms, rows, strict=True)},
            sheet="",
        )
        for number in range(2)
    ]
    EditBenchResults(
        model=study.model,
        world=name,
        items=2,
        cells=summarise(items, arms),
        config=EditBenchConfig(),
        provenance=Provenance.of(study, {ref: {}}),
    ).save(study.edit_bench(name))


def write_measures(study: Study, name: str) -> None:
    """Write measures of three features of a dictionary: of specificity and colour, above random features."""
    values = tuple(FeatureValue(feature, 0.5 + feature / 10, 0.25) for feature in range(3))
    site, _, label = name.partition("/")
    FeatureMeasures(
        model=study.model,
        dictionary=name,
        config=MeasureConfig(),
        provenance=Provenance.of(study, {DictionaryRef(Site.parse(site), label): {}}),
        features=(0, 1, 2),
        values={"specificity": values, "colour": values},
        done={"specificity": 3, "colour": 3},
        estimates=dict.fromkeys(("specificity", "colour"), MeasureEstimate.of(values)),
    ).save(study.measures(Site.parse(site), label))


def write_block_roles(study: Study) -> None:
    """Write the roles of the four blocks that arXiv 2410.22366 describes: all roles change alike."""
    changes = dict.fromkeys(ASPECTS, (0.25, 0.75))
    blocks = tuple(
        BlockChange(site=Site(path, "update"), without=changes, random=changes, judged={}, judged_random={})
        for path in PAPER_ROLES
    )
    BlockRoleResults(
        model=study.model,
        revision=study.revision,
        config=BlockRolesConfig(prompts="made", images=2),
        unrelated=dict.fromkeys(ASPECTS, 1.0),
        judged_unrelated={},
        blocks=blocks,
        claims=tuple(judge_claims(blocks)),
    ).save(study.block_roles)


def write_transfer(study: Study, name: str, model: str, steps: int) -> None:
    """Write results of a dictionary in runs of a model, whose explained variance falls from step to step."""
    interval = lambda value: ConfidenceInterval(value, value - 0.05, value + 0.05)  # noqa: E731
    site, _, label = name.partition("/")
    results = [
        TransferStep(
            timestep=1000.0 - 250 * number,
            tokens=640,
            ev=interval(0.75 - 0.1 * number),
            fvu=0.25 + 0.1 * number,
            l0=16.0,
            overlap=interval(0.5) if number else None,
            chance=0.25 if number else None,
        )
        for number in range(steps)
    ]
    TransferResults(
        dictionary=name,
        fingerprint=fingerprint(study.dictionary(site, label)),
        trained_on=study.model,
        inputs=TransferInputs(run=Shot(model=model, pixels=(64, 64), steps=steps, guidance=0.0), prompts="captions", images=40),
        steps=tuple(results),
    ).save(study.transfer(site, label, f"{model}-{steps}"))


def full_study(folder: Path) -> Study:
    """Return a study with records of every station: two sites, two sizes and k, variants, ITDA, concepts and anatomy."""
    study = new_study(folder)
    for site in ("double.1", "double.2"):
        for size in (512, 1024):
            for k in (8, 16):
                write_evaluation(study, f"{site}/topk-{size}-k{k}", fvu=20 / size + 0.4 / k, dead=5, share=0.2 / k)
                write_evaluation(study, f"{site}/itda-{size - 4}-k{k}-first100", fvu=15 / size + 0.3 / k, share=0.3 / k)
    write_evaluation(study, "double.1/topk-1024-k16-none", fvu=0.3, dead=900, normalisation="none")
    write_evaluation(study, "double.1/topk-1024-k16-whiten", fvu=0.5, dead=9, normalisation="whiten")
    write_matches(study, "double.1/topk-1024-k16", (0.9, 0.8, 0.7, 0.6))
    write_matches(study, "double.2/topk-1024-k16", (0.9, 0.8, 0.7, 0.6))
    write_matches(study, "double.1/itda-1020-k16-first100", (0.8, 0.7, 0.6, 0.4))
    write_matches(study, "double.1:neurons/neurons-k16", (0.4, 0.4, 0.3, 0.1))
    write_matches(study, "double.1/pca-16-k16", (0.3, 0.2, 0.3, 0.1))
    write_matches(study, "double.1/random-1024-k16", (0.1, 0.2, 0.1, 0.1))
    write_anatomy(study, norms={f"double.{i}": {1000.0: 10.0 * i, 500.0: 12.0 * i} for i in (1, 2)})
    write_steering(study, "double.1/topk-1024-k16")
    write_steering(study, "double.1/itda-1020-k16-first100", success=0.6)
    write_removal(study, "double.1/topk-1024-k16")
    write_edit_bench(study)
    write_transfer(study, "double.1/topk-1024-k16", "mini-flux", 4)
    write_transfer(study, "double.1/topk-1024-k16", "mini-flux-base", 2)
    write_measures(study, "double.1/topk-1024-k16")
    write_block_roles(study)
    write_findings(study, "double.1", by={"out-of-distribution": "double.1/topk-1024-k16"})
    write_findings(study, "double.2")
    write_book(study, "double.1/itda-1020-k16-first100")
    write_book(study, "double.1/topk-1024-k16", explained={3: ("red", 0.8), 5: ("stars", 0.6), 8: ("a blue star", 0.5)})
    return study


def control_study(folder: Path) -> Study:
    """Return a study of the same model untrained."""
    study = new_study(folder, revision="untrained-0")
    write_dictionary(study, "double.1/topk-1024-k16", weights=b"untrained")
    write_matches(study, "double.1/topk-1024-k16", (0.2, 0.1, 0.1, 0.1))
    return study


def _quality(fvu: float | None, r2: float | None) -> ReconstructionQuality:
    metrics = ReconstructionMetrics(fvu=fvu, fvu_raw=fvu, r2=r2, ev=r2, cosine=0.9)
    return ReconstructionQuality(tokens=4321, l0=16.0, negative=0.25, model_space=metrics, normalised_space=None)


def _effect(share: float, similarity: Mapping[str, float]) -> ModelEffect:
    replaced = ReplacementEffect(reconstruction=share, mean=1.0, zero=2.0)
    ssim = ReplacementEffect(reconstruction=0.9, mean=0.2, zero=0.1)
    distance = ReplacementEffect(reconstruction=10 * share, mean=30.0, zero=40.0)
    return ModelEffect(
        shots=4,
        prediction=replaced,
        timesteps=dict.fromkeys(TIMESTEPS, replaced),
        images=2,
        image_error=ReplacementEffect(reconstruction=0.001, mean=0.1, zero=0.2),
        medians={"manhattan": distance},
        similarity={
            "ssim": ssim,
            "manhattan": distance,
            **{name: replace(ssim, reconstruction=value) for name, value in similarity.items()},
        },
    )


def _concept_result(concept: Concept, ap: float) -> ConceptResult:
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
