"""`difflex explain`: explain features in words with a VLM, and measure how true the explanations are."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.choices import ProtocolName
from difflex.commands.flags import COUNT, SEED, Features, VLMCommand
from difflex.errors import BadInput
from difflex.study import Study

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
    feature: Annotated[Features, arg(help_behavior_hint="(default: random ones)")] = ()
    """Explain these features instead."""
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

        config = explanation.ExplainConfig(
            sites=self.site,
            dictionaries=self.dictionary,
            features=self.feature,
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
        if not self.studies:
            raise BadInput("No study was named. Name one or more: difflex explain STUDY.")
        self.check_endpoint(self.vlm)
        studies, policy = [Study.open(folder) for folder in self.studies], self.request_policy()
        if self.dry_run:
            explanation.dry_run_studies(studies, config, self._backend, policy, print)
            return []
        comparison = explanation.explain_studies(studies, config, self._backend, policy, print)
        print(comparison.table)
        paths = [study.explanations / "scores.json" for study in studies]
        for path in paths:
            comparison.save(path)
        return paths

    def _backend(self) -> "VLMBackend":
        from difflex.explanation.backends import KnownConceptsBackend

        return KnownConceptsBackend.of_drawn_world() if self.vlm == KNOWN else self.backend(self.vlm)
