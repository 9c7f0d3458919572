"""What commands open: prompts, the model of a study, a book, the cached answers of a VLM."""

import random
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from difflex.errors import BadInput
from difflex.files import file_sha256, folder_lock
from difflex.study import Study

if TYPE_CHECKING:
    from difflex.explanation import AnswerCache
    from difflex.pipeline import Pipeline

__all__ = ["CAPTIONS", "UNTRAINED", "PromptSource", "load_study_model", "open_answer_cache", "read_prompts"]

CAPTIONS = "captions"
"""The name of the captions of the drawn world, where a file of prompts is expected."""
UNTRAINED = "untrained-"
"""What the revision of a model with random weights begins with."""


class PromptSource(NamedTuple):
    """Prompts and where they come from."""

    texts: Iterable[str]
    source: str
    """Identifies the prompts: a checksum for a file, else the name."""
    is_endless: bool


def read_prompts(name: str, shuffle: int | None, column: str | None = None, revision: str | None = None) -> PromptSource:
    """Read the prompts of the file, folder or data set `name`, shuffled by a seed if one is given; or `captions`, without end."""
    from difflex import pipeline
    from difflex.miniature.captions import endless

    if name == CAPTIONS and not Path(name).exists():
        if shuffle is not None:
            raise BadInput("--shuffle needs a file of prompts: the captions of the drawn world are random already. Leave it out.")
        return PromptSource(endless(), CAPTIONS, True)
    texts: Iterable[str] = pipeline.read_prompts(name, column, revision)
    content = f"sha256:{file_sha256(Path(name))}" if Path(name).is_file() else name
    if shuffle is not None:
        texts = list(texts)
        random.Random(shuffle).shuffle(texts)
    return PromptSource(texts, ":".join(filter(None, (content, column, revision))), False)


def load_study_model(study: Study, precision: str | None, offload: bool, offline: bool) -> "Pipeline":
    """Load the model that a study is about, in the revision it was begun with."""
    import difflex

    revision = study.revision or ""
    untrained = int(revision.removeprefix(UNTRAINED)) if revision.startswith(UNTRAINED) else None
    return difflex.load(
        study.model,
        precision=precision,
        revision=study.revision if untrained is None else None,
        untrained=untrained,
        offload=offload,
        offline=offline,
    )


@contextmanager
def open_answer_cache(study: Study) -> Iterator["AnswerCache"]:
    """Open the cached VLM answers of a study, and keep other processes from writing there meanwhile."""
    from difflex.explanation import AnswerCache

    folder = study.explanations
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder), closing(AnswerCache(folder / "answers.sqlite")) as answers:
        yield answers
