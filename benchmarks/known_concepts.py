"""Which dictionaries find the concepts that are linearly there? A leaderboard on fixed activations of mini-flux.

All methods get the same stored tokens (images generated from captions of the drawn world, at all four steps) and are scored on
the same labelled images at one noise level. A concept is findable at a site if a linear probe on the activations has AP 0.9 on
held-out images, and found if one feature has AP 0.8 there; the feature is chosen on the other images, and in the union over sites
the site too. Sites are also read `:smooth`, averaged with the tokens around: the probe stays that of the tokens themselves.

By default one site and few tokens; `--full` is the leaderboard of docs/known-concepts.md, hours of one core. Results are kept in
`--folder` line by line, and what is there is not made again. `--peer PYTHON` is the interpreter with the peers.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers.clients import PEERS, start_learners
from safetensors.torch import load_file, save_file
from torch import Tensor

import difflex
from difflex.choices import PursuitName
from difflex.cli import main as command
from difflex.dictionaries import DictionaryOrigin, Neurons
from difflex.dictionaries.itda import GrowthConfig
from difflex.evaluation.concepts import drawn_concepts, drawn_images, label
from difflex.evaluation.concepts.detection import FeatureFirings, FiringRecorder, average_precision, detection_scores
from difflex.evaluation.concepts.labels import LabelledActivations
from difflex.evaluation.concepts.matching import FeatureMethod, principal_axes, random_directions
from difflex.evaluation.concepts.probe import LinearProbe, probe_tokens
from difflex.evaluation.concepts.results import DETECTED, FINDABLE
from difflex.pipeline import Pipeline
from difflex.pipeline.profile import config_site_rows
from difflex.records import ActivationBatch, Codes, Site
from difflex.store import Store
from difflex.training import FitConfig, TrainingConfig, default, fit
from difflex.training.itda import GrowthData, grow

torch.set_num_threads(1)
PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
NOISE, STEPS, BATCH, RIDGE = 0.5, 4, 1024, 1e-3
PART = 8192
"""Tokens encoded at once."""
WANTED, BEST_SITE, LEAD = 0.8, 0.6, 0.1
"""Bars: share of findable concepts found over all sites, and at the best site; lead over the best peer's default."""
OURS = "topk, three passes, smooth"
"""What we recommend where the tokens are few; with one pass, as the libraries have, it is compared with them."""
VIEWS = {"plain": "", "smooth": ":smooth"}
"""How a site is read, and what its name ends with."""
SECONDS = 20.0
"""Maximum time to score all pairs of 4,096 features and 60 concepts at 131,072 tokens with 32 firings each, on one core."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all methods have in common."""

    model: str = "mini-flux"
    sites: tuple[str, ...] = ("double.2",)
    tokens: int = 200_000
    """Stored at each site."""
    epochs: int = 3
    images: int = 400
    size: int = 2048
    k: int = 32


FULL = Recipe(sites=("double.1", "double.2", "single.0", "single.1"), tokens=2_000_000, epochs=1, images=1000)


class Task(NamedTuple):
    """One dictionary to make and score."""

    store: Store
    labelled: LabelledActivations
    recipe: Recipe
    seed: int

    @property
    def updates(self) -> int:
        return self.recipe.tokens * self.recipe.epochs // BATCH


class Score(NamedTuple):
    """The AP of the best feature for each concept, chosen on training images."""

    method: str
    site: str
    """As it is read, maybe smooth."""
    seed: int
    train: list[float]
    test: list[float]
    seconds: float


Make = Callable[[Task], FeatureMethod]


def trained(passes: int = 1, **changes: Any) -> Make:
    """Return the method of an SAE of our default preset with some settings changed; `passes` multiplies those of the recipe."""

    def make(task: Task) -> FeatureMethod:
        task = task._replace(recipe=replace(task.recipe, epochs=passes * task.recipe.epochs))
        preset = default(width=task.store.width, size=task.recipe.size, k=task.recipe.k, updates=task.updates)
        training = replace(preset, **changes, initialisation=replace(preset.initialisation, seed=task.seed))
        return FeatureMethod.of(_fitted(task, training))

    return make


def _fitted(task: Task, training: TrainingConfig) -> Any:
    config = FitConfig(tokens=task.updates * BATCH, progress=False, checkpoint_every=10**9)
    with tempfile.TemporaryDirectory() as folder:
        batches = partial(_batches, task)
        return fit({Path(folder): training}, batches, origin=DictionaryOrigin(site=task.store.site), config=config)[Path(folder)]


def _batches(task: Task, start: int) -> Iterator[ActivationBatch]:
    return task.store.batches(BATCH, start=start, epochs=None, seed=task.seed)


def grown(pursuit: PursuitName) -> Make:
    """Return the method of an ITDA dictionary."""

    def make(task: Task) -> FeatureMethod:
        growth = GrowthConfig(k=task.recipe.k, size=task.recipe.size, pursuit=pursuit)
        batches = lambda start: task.store.batches(2048, start=start, seed=task.seed)  # noqa: E731
        data = GrowthData(batches=batches, tokens=task.recipe.tokens // 10, data="mini-flux", shot=task.store.shot)
        with tempfile.TemporaryDirectory() as folder:
            origin = DictionaryOrigin(site=task.store.site)
            return FeatureMethod.of(grow({Path(folder): growth}, data, origin=origin, device="cpu")[Path(folder)])

    return make


def peer(name: str, python: Path, *, predicts: bool = False) -> Make:
    """Return the method of a library's own SAE, trained in a process of its own on standardised batches of the same tokens.

    One that predicts the next site gets the tokens of that beside its own.
    """

    def make(task: Task) -> FeatureMethod:
        stores, tokens = [task.store.folder], task.labelled.values
        if predicts:
            stores.append(task.store.folder.parent / following(task.recipe.model, task.store.site).folder)
            tokens = torch.cat([tokens, torch.zeros_like(tokens)], dim=1)
        world = {"stores": list(map(str, stores))}
        begin = {"world": world, "width": task.store.width, "batch": BATCH, "standardise": True}
        with tempfile.TemporaryDirectory() as folder, start_learners([name], python) as learners:
            save_file({"x": tokens.contiguous()}, f"{folder}/tokens")
            learners[name].begin(**begin, size=task.recipe.size, k=task.recipe.k, updates=task.updates)
            learners[name].update(count=task.updates)
            learners[name].codes(tokens=f"{folder}/tokens", path=f"{folder}/codes")
            codes = load_file(f"{folder}/codes")
        return _of_codes(task, name, codes["values"], codes["indices"])

    return make


def _of_codes(task: Task, name: str, values: Tensor, indices: Tensor) -> FeatureMethod:
    """Return a method with known codes of the labelled tokens, which it is asked for in order."""
    parts = iter(zip(values.split(PART), indices.split(PART), strict=True))
    return FeatureMethod(site=task.store.site, label=name, size=task.recipe.size, encode=lambda x: Codes(*next(parts)))


@cache
def following(model: str, site: Site) -> Site:
    """Return the site after a block's, read in the same way."""
    paths = [row.site.path for row in config_site_rows(model) if row.site.stream == "image"]
    return replace(site, path=paths[paths.index(site.path) + 1])


def methods(python: Path, full: bool) -> dict[str, Make]:
    """Return how each method is made, by name."""
    floors: dict[str, Make] = {
        "principal axes": lambda task: principal_axes(task.labelled, task.recipe.k),
        "random directions": lambda task: random_directions(task.labelled, task.recipe.size, task.recipe.k, task.seed),
    }
    ours = {"topk": trained()}
    if full:
        ours |= {
            "topk, three passes": trained(passes=3),
            "batchtopk": trained(kind="batchtopk"),
            "batchtopk, three passes": trained(passes=3, kind="batchtopk"),
            "jumprelu": trained(kind="jumprelu"),
            "matryoshka": trained(kind="matryoshka", prefixes=tuple(FULL.size // part for part in (64, 32, 16, 8, 4))),
            "topk, whitened": trained(normalisation="whiten"),
            "topk, not normalised": trained(normalisation="none"),
            "topk, no AuxK": trained(auxk=None),
            "itda, gradient": grown("gradient"),
            "itda, matching": grown("matching"),
        }
    others = {name: peer(name, python) for name in (PEERS if full else PEERS[:1])}
    if full:
        others["transcoder (sparsify)"] = peer("transcoder", python, predicts=True)
    return ours | (others if python.exists() else {}) | floors


def scored(task: Task, name: str, make: Make) -> Score:
    """Make a method and score it."""
    began, labelled = time.perf_counter(), task.labelled
    method = make(task)
    recorder = FiringRecorder(method.encode, method.size)
    for part in labelled.values.split(PART):
        recorder.add(part)
    firings = recorder.firings()
    train, test = (
        detection_scores(firings.select(mask), labelled.truth[:, mask]).ap for mask in (~labelled.held_out, labelled.held_out)
    )
    best, concepts = train.argmax(0), torch.arange(train.shape[1])
    chosen = [ap[best, concepts].nan_to_num().tolist() for ap in (train, test)]
    return Score(name, str(labelled.site), task.seed, chosen[0], chosen[1], time.perf_counter() - began)


def probe_scores(labelled: LabelledActivations) -> list[float]:
    """Return the AP of a linear probe for each concept on held-out images."""
    tokens = probe_tokens((~labelled.held_out).nonzero()[:, 0], 0)
    probe = LinearProbe.fit(labelled.values[tokens], labelled.truth[:, tokens], RIDGE)
    logits, places = probe.logits(labelled.values[labelled.held_out]), torch.arange(int(labelled.held_out.sum()))
    truth, one = labelled.truth[:, labelled.held_out], torch.ones(1, 1)
    by_concept = zip(logits.T, truth, strict=True)
    return [float(average_precision(places, x, known, torch.zeros_like(places), one)) for x, known in by_concept]


class Activations:
    """The stored tokens and the labelled images of a recipe, made once in a folder."""

    def __init__(self, recipe: Recipe, folder: Path, ahead: bool = False) -> None:
        """Store the tokens; `ahead` also those of the following sites, which transcoders predict."""
        self._recipe, self._folder = recipe, folder
        self.sites = [name + view for name in recipe.sites for view in VIEWS.values()]
        read = dict.fromkeys(self.sites)
        if ahead:
            read |= dict.fromkeys(str(following(recipe.model, Site.parse(site))) for site in self.sites)
        words = ["harvest", recipe.model, "--site", *read, "--prompts", "captions", "--steps", str(STEPS), "--batch", "32"]
        assert command([*words, "--tokens", str(recipe.tokens), "--out", str(folder / "study")]) == 0
        file = folder / f"labelled-{recipe.images}.pt"
        if not file.exists():
            torch.save(self._label(difflex.load(recipe.model)), file)
        self.labelled: dict[Site, LabelledActivations] = torch.load(file, weights_only=False)

    def _label(self, pipe: Pipeline) -> dict[Site, LabelledActivations]:
        sites = [*self.sites, *(f"{name}:neurons" for name in self._recipe.sites)]

        def harvest(images, prompts, names):
            return pipe.harvest_images(images, [NOISE], sites, prompts, names, batch=32, progress=False)

        return label(drawn_images(self._recipe.images), harvest, drawn_concepts())

    def task(self, site: str, seed: int) -> Task:
        """Return the task of a method at a site, maybe smooth."""
        place = Site.parse(site)
        return Task(Store.open(self._folder / "study" / "activations" / place.folder), self.labelled[place], self._recipe, seed)

    def neurons(self, site: str) -> Score:
        """Return the score of the neurons of a block, the k most active ones at each token."""
        labelled = self.labelled[Site.parse(f"{site}:neurons")]
        make = lambda task: FeatureMethod.of(  # noqa: E731
            Neurons(width=labelled.width, k=task.recipe.k, origin=DictionaryOrigin(site=labelled.site))
        )
        return scored(self.task(site, 0)._replace(labelled=labelled), "neurons", make)._replace(site=site)


def run(
    activations: Activations, made: dict[str, Make], views: Sequence[str], recipe: Recipe, seeds: int, folder: Path
) -> list[Score]:
    """Score all methods at all sites that the folder has no score of, and return all scores."""
    file = folder / f"scores-{recipe.size}-k{recipe.k}-{recipe.tokens * recipe.epochs}.jsonl"
    scores = [Score(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(score.method, score.site, score.seed) for score in scores}
    sites = [site + VIEWS[view] for site in recipe.sites for view in views]
    wanted = [(name, site, seed) for seed in range(seeds) for name in made for site in sites]
    wanted += [("neurons", site, 0) for site in recipe.sites]
    with file.open("a") as log:
        for name, site, seed in wanted:
            if (name, site, seed) not in done and not (seed and name == "principal axes"):
                task = activations.task(site, seed)
                score = activations.neurons(site) if name == "neurons" else scored(task, name, made[name])
                scores.append(score)
                log.write(json.dumps(score._asdict()) + "\n")
                log.flush()
                print(f"  {name} at {site}, seed {seed}: {score.seconds:.0f} s", flush=True)
    return scores


class Row(NamedTuple):
    """The mean result of a method over seeds."""

    name: str
    found: dict[str, tuple[int, int]]
    """At each site: how many of how many findable concepts, of the first seed."""
    best: float
    union: list[float]
    """Of each seed."""
    by_group: dict[str, float]
    """Mean AP over the concepts of a group that are findable somewhere, at the site chosen for each."""


def leaderboard(scores: Sequence[Score], probes: dict[str, list[float]], groups: Sequence[str]) -> list[Row]:
    """Return the results by method and view, the best first, of what is scored at every site."""
    by_row: defaultdict[str, dict[int, dict[str, Score]]] = defaultdict(lambda: defaultdict(dict))
    for score in scores:
        site, _, view = score.site.partition(":")
        by_row[", ".join(filter(None, (score.method, view)))][score.seed][site] = score
    whole = {name: {seed: by for seed, by in seeds.items() if by.keys() >= probes.keys()} for name, seeds in by_row.items()}
    return sorted(
        (_row(name, seeds, probes, groups) for name, seeds in whole.items() if seeds),
        key=lambda row: -sum(row.union) / len(row.union),
    )


def _row(name: str, seeds: dict[int, dict[str, Score]], probes: dict[str, list[float]], groups: Sequence[str]) -> Row:
    sites, findable = list(probes), torch.tensor([*probes.values()]) >= FINDABLE
    somewhere = findable.any(0)
    train, test = (
        torch.tensor([[getattr(by_site[site], part) for site in sites] for by_site in seeds.values()])
        for part in ("train", "test")
    )
    chosen = test.gather(1, train.argmax(1, keepdim=True))[:, 0]  # seed, concept
    hits = ((test >= DETECTED) & findable).sum(2)  # seed, site
    by_group: defaultdict[str, list[float]] = defaultdict(list)
    for group, known, ap in zip(groups, somewhere.tolist(), chosen.mean(0).tolist(), strict=True):
        by_group[group] += [ap] if known else []
    return Row(
        name,
        dict(zip(sites, zip(hits[0].tolist(), findable.sum(1).tolist(), strict=True), strict=True)),
        float((hits / findable.sum(1).clamp_min(1)).mean(0).max()),
        (chosen[:, somewhere] >= DETECTED).float().mean(1).tolist(),
        {group: sum(aps) / len(aps) for group, aps in by_group.items() if aps},
    )


def table(rows: Sequence[Row]) -> str:
    """Return the leaderboard as a Markdown table."""
    sites, groups = list(rows[0].found), list(rows[0].by_group)
    lines = [
        f"| method | {' | '.join(sites)} | best site | all sites | {' | '.join(groups)} |",
        "|---" * (3 + len(sites) + len(groups)) + "|",
    ]
    for row in rows:
        mean = sum(row.union) / len(row.union)
        span = f" ({min(row.union):.0%} to {max(row.union):.0%})" if len(row.union) > 1 else ""
        found = " | ".join(f"{hits} of {total}" for hits, total in row.found.values())
        aps = " | ".join(f"{row.by_group[group]:.2f}" for group in groups)
        lines.append(f"| {row.name} | {found} | {row.best:.0%} | {mean:.0%}{span} | {aps} |")
    return "\n".join(lines)


def scoring_seconds() -> float:
    """Return the time to score random firings of the target size."""
    generator = torch.Generator().manual_seed(0)
    tokens, size, concepts, k = 131_072, 4096, 60, 32
    features = torch.randint(size, (tokens * k,), generator=generator)
    values = torch.rand(tokens * k, generator=generator)
    truth = (torch.rand(concepts, tokens, generator=generator) < 0.05).to(torch.int8)
    start = time.process_time()
    firings = FeatureFirings.from_pairs(torch.arange(tokens).repeat_interleave(k), features, values, size, tokens)
    detection_scores(firings, truth)
    return time.process_time() - start


def bars(rows: Sequence[Row], full: bool) -> list[tuple[str, float, str, bool]]:
    """Return name, value, bar and whether it is met. The shares are those of the whole recipe."""
    by_name = {row.name: row for row in rows}
    plain, smooth = by_name["topk"], by_name["topk, smooth"]
    ours = by_name[OURS] if full else smooth
    mean = lambda row: sum(row.union) / len(row.union)  # noqa: E731
    lines = [("found with neighbours over found without", mean(smooth) - mean(plain), "above 0", mean(smooth) > mean(plain))]
    if full:
        if others := [mean(row) for name, row in by_name.items() if name in PEERS]:
            lead = mean(smooth) - max(others)
            lines.append(("found over the best peer's default", lead, f"at least {LEAD}", lead >= LEAD))
        lines.append(("found over all sites", mean(ours), f"at least {WANTED}", mean(ours) >= WANTED))
        lines.append(("found at the best site", ours.best, f"at least {BEST_SITE}", ours.best >= BEST_SITE))
    seconds = scoring_seconds()
    return [*lines, ("seconds to score all pairs", seconds, f"at most {SECONDS:.0f}", seconds <= SECONDS)]


def main() -> int:
    """Return 0 if no bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--folder", type=Path, help="where activations and results are kept; a temporary folder by default")
    parser.add_argument("--model", default="mini-flux")
    parser.add_argument("--site", nargs="+")
    parser.add_argument("--only", nargs="+", help="methods; all by default")
    parser.add_argument("--view", nargs="+", choices=VIEWS, default=list(VIEWS), help="how the sites are read")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--epochs", type=int, help="how often the stored tokens are trained on")
    parser.add_argument("--size", type=int)
    parser.add_argument("--k", type=int)
    parser.add_argument("--peer", type=Path, default=PYTHON)
    asked = parser.parse_args()
    if not asked.peer.exists():
        print(f"  the peers are left out: there is no {asked.peer} (make peers)")
    given = {name: getattr(asked, name) for name in ("model", "tokens", "epochs", "size", "k") if getattr(asked, name)}
    recipe = replace(FULL if asked.full else Recipe(), **given, **({"sites": tuple(asked.site)} if asked.site else {}))
    made = {name: make for name, make in methods(asked.peer, asked.full).items() if not asked.only or name in asked.only}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        activations = Activations(recipe, folder, ahead=any(name.startswith("transcoder") for name in made))
        probes = {site: probe_scores(activations.labelled[Site.parse(site)]) for site in recipe.sites}
        scores = run(activations, made, asked.view, recipe, asked.seeds, folder)
        groups = [concept.group for concept in drawn_concepts()]
    rows = leaderboard(scores, probes, groups)
    print(table(rows))
    needed = {"topk", "topk, smooth", *([OURS] if asked.full else [])}
    lines = bars(rows, asked.full) if needed <= {row.name for row in rows} else []
    for name, value, bar, met in lines:
        print(f"  {name}: {value:.2f} ({bar}) {'met' if met else 'MISSED'}")
    met = sum(met for *_, met in lines)
    print(f"known_concepts: {met} of {len(lines)} bars: {'met' if met == len(lines) else 'MISSED'}")
    return met != len(lines)


if __name__ == "__main__":
    sys.exit(main())
