"""`difflex explain`: explain features in words with a VLM, and measure how true the explanations are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import ProtocolName
from difflex.commands.flags import COUNT, SEED, FeatureNames, VLMCommand
from difflex.commands.inputs import named_features, open_book
from difflex.errors import BadInput
from difflex.study import DictionaryRef, Study

if TYPE_CHECKING:
    from difflex.explanation.backends import VLMBackend

__all__ = ["ExplainCommand"]

KNOWN = "known"


@final
@dataclass(frozen=True, kw_only=True)
class ExplainCommand(VLMCommand):
    """Explain features in words and measure how true the explanations are; answers are cached and never asked, or paid, twice."""

    studies: Annotated[Positional[tuple[Path, ...]], arg(metavar="STUDY...")]
    """Studies with books; several are compared, such as one of a trained and one of an untrained model."""
    site: Annotated[tuple[str, ...], arg(metavar="SITE...", help_behavior_hint="(default: all that have books)")] = ()
    """Explain the dictionaries of these sites: double.18, single.9:update."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="(default: all of the sites)")] = ()
    """Explain these dictionaries, written SITE/LABEL: double.18/topk-8192-k32."""
    vlm: Annotated[str, arg(metavar="NAME")] = KNOWN
    """The address of an OpenAI-compatible endpoint, the folder or hub name of a VLM for transformers, or `known`."""
    protocol: ProtocolName = "heldout"
    """Images to judge: ones that the explainer never saw, and near misses; or those of arXiv 2505.24360."""
    random_features: Annotated[int, COUNT] = 100
    """Number of random features of each dictionary."""
    feature: Annotated[FeatureNames, arg(help_behavior_hint="(default: random ones)")] = ()
    """Explain these features instead: numbers, or words that `difflex search` finds each by."""
    judged_images: Annotated[int, COUNT] = 10
    """Images to judge for each feature; half of them are of other features."""
    negatives: Literal["uniform", "frequency"] = "uniform"
    """How the other features are drawn: all alike, or, as the code of arXiv 2505.24360 does, by how many shots they fire in."""
    min_patches: Annotated[int, COUNT] = 1
    """Highlighted patches that an image needs to be shown; 6 in the code of arXiv 2505.24360."""
    style: Literal["blue", "outline"] = "blue"
    """How images show where a feature fires: a blue overlay, as published, or an outline."""
    seed: Annotated[int, SEED] = 0
    """Seed of the choice of features and of images of other features."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Only show the instructions, and say how many calls and tokens would be needed, and what they would cost."""

    def __call__(self) -> list[Path]:
        from difflex import explanation

        if not self.studies:
            raise BadInput("No study was named. Name one or more: difflex explain STUDY.")
        studies, policy = [Study.open(folder) for folder in self.studies], self.request_policy()
        dictionaries, features = self._named(studies)
        config = explanation.ExplainConfig(
            sites=() if dictionaries else self.site,
            dictionaries=dictionaries or self.dictionary,
            features=features,
            random_features=self.random_features,
            protocol=explanation.ExplanationProtocol(
                name=self.protocol,
                judged=self.judged_images,
                negatives=self.negatives,
                min_patches=self.min_patches,
                style=self.style,
                seed=self.seed,
            ),
            connections=self.connections,
        )
        self.check_endpoint(self.vlm)
        if self.dry_run:
            explanation.dry_run_studies(studies, config, self._backend, policy, print)
            return []
        comparison = explanation.explain_studies(studies, config, self._backend, policy, print)
        print(comparison.table)
        if dictionaries:
            _print_texts(studies[0], studies[0].find_dictionary(dictionaries[0]), features)
        paths = [study.explanations / "scores.json" for study in studies]
        for path in paths:
            comparison.save(path)
        return paths

    def _named(self, studies: Sequence[Study]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the numbers of the features, and the dictionary in which words name them; none where they are all numbers."""
        if all(name.isdecimal() for name in self.feature):
            return (), tuple(map(int, self.feature))
        if len(studies) > 1:
            raise BadInput("Words name features of one study. Name one study, or give the numbers of the features.")
        chosen = studies[0].select_dictionaries(self.site, self.dictionary) if self.site or self.dictionary else ()
        if len(chosen) > 1:
            raise BadInput(
                f"{', '.join(self.feature)} may be other features in each of {len(chosen)} dictionaries. Name one of them with "
                f"--dictionary: {', '.join(map(str, chosen))}."
            )
        place, features = named_features(studies[0], self.feature, str(chosen[0]) if chosen else None)
        return (str(place),), features

    def _backend(self) -> "VLMBackend":
        from difflex.explanation.backends import KnownConceptsBackend

        return KnownConceptsBackend.of_drawn_world() if self.vlm == KNOWN else self.backend(self.vlm)


def _print_texts(study: Study, place: DictionaryRef, features: Sequence[int]) -> None:
    """Print the last explanation of each feature."""
    with open_book(study, place) as book:
        for feature in features:
            texts = [explanation.text for explanation in book.explanations(feature) if explanation.state == "done"]
            print(f"feature {feature} of {place}: {texts[-1] if texts else 'not explained'}")
