"""The flags of commands that judge images, and the judges that they name."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

from tyro.conf import arg

from difflex.commands.flags import StudyImagesCommand, VLMCommand
from difflex.errors import BadInput
from difflex.study import Study

if TYPE_CHECKING:
    from difflex.effects.concept_specs import ConceptFile
    from difflex.evaluation import ClipModel
    from difflex.explanation import CachedClient


class NamedClip(NamedTuple):
    """A CLIP by name, opened when it is needed."""

    name: str
    load: Callable[[], "ClipModel"]
    checksum: Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class ConceptsJudge(StudyImagesCommand, VLMCommand):
    """The flags of commands that judge images: of the drawn world, or of concepts in words by CLIP or a VLM."""

    concepts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the drawn world)")] = None
    """A TOML file of concepts in words, for models of any world; needs --clip or --vlm."""
    clip: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """With --concepts, the judge: folder or hub name of a CLIP of transformers."""
    vlm: Annotated[str | None, arg(metavar="VLM", help_behavior_hint="(default: none)")] = None
    """With --concepts, the judge: a VLM, as for difflex explain."""

    @contextmanager
    def judge(self, study: Study) -> Iterator[tuple["ConceptFile", NamedClip | None, "CachedClient | None"]]:
        """Open the concepts and their judge: a CLIP, a VLM, or neither in the drawn world."""
        from difflex.effects.concept_specs import DRAWN_WORLD, read_concepts

        if self.concepts is None:
            if self.clip or self.vlm:
                raise BadInput("The drawn world has its own judge. --clip and --vlm judge the concepts of --concepts FILE.")
            check_judged(study)
            yield DRAWN_WORLD.concepts, None, None
            return
        concepts = read_concepts(self.concepts)
        if self.clip is not None and self.vlm is None:
            from difflex.evaluation import ClipModel

            load = partial(ClipModel, self.clip, offline=self.offline)
            yield concepts, NamedClip(self.clip, load, partial(ClipModel.checksum, self.clip, offline=self.offline)), None
        elif self.vlm is not None and self.clip is None:
            from difflex.explanation import open_client

            self.check_endpoint(self.vlm)
            with (
                closing(self.backend(self.vlm)) as backend,
                open_client(backend, study.explanations, self.request_policy()) as client,
            ):
                yield concepts, None, client
                spent = client.spending
                tokens = f"{spent.tokens_in:,} tokens in, {spent.tokens_out:,} tokens out"
                print(f"{spent.calls:,} calls, {tokens}, cost {spent.cost:.4g}")
        else:
            raise BadInput("Concepts in words need a judge of the images: name one of --clip and --vlm.")


def check_judged(study: Study) -> None:
    """Raise an error if the judge of the drawn world does not read images of the size at which the model of a study runs."""
    from difflex.miniature.world import PIXELS

    height, width = study.settings.pixels or (PIXELS, PIXELS)
    if (height, width) != (PIXELS, PIXELS):
        raise BadInput(
            f"The judge of the drawn world reads images of {PIXELS}x{PIXELS} pixels, and here they are of {height}x{width}. Give "
            f"--pixels {PIXELS}."
        )
