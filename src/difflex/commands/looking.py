"""What the verbs that ask a seeing model share: who looks, on what terms, and where the answers are kept."""

import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg
from tyro.constructors import PrimitiveConstructorSpec

from difflex.errors import BadInput
from difflex.explanation import AnswerCache, ApiKey, EndpointBackend, LocalBackend, RequestPolicy, TokenPrice, VLMBackend
from difflex.files import folder_lock
from difflex.study import Command, Study

__all__ = ["VLMCommand", "kept_answers"]


def _price(words: list[str]) -> TokenPrice:
    found = re.fullmatch(r"(\d+\.?\d*),(\d+\.?\d*)", words[0])
    if not found:
        raise ValueError(f"'{words[0]}' is not a price. Write IN,OUT, what a million tokens cost each way: 0.1,0.4.")
    return TokenPrice(tokens_in=float(found[1]), tokens_out=float(found[2]))


Prices = Annotated[
    TokenPrice,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="IN,OUT",
        instance_from_str=_price,
        is_instance=lambda value: isinstance(value, TokenPrice),
        str_from_instance=lambda value: [f"{value.tokens_in:g},{value.tokens_out:g}"],
    ),
]


@dataclass(frozen=True, kw_only=True)
class VLMCommand(Command):
    """A verb that asks a model that sees."""

    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """Which model of the endpoint."""
    connections: Annotated[int, arg(metavar="N")] = 16
    """Calls under way at once."""
    requests_per_minute: Annotated[float | None, arg(metavar="N", help_behavior_hint="(default: no limit)")] = None
    """Calls in a minute."""
    timeout: Annotated[float, arg(metavar="SECONDS")] = 120.0
    """What a call may take."""
    price: Annotated[Prices | None, arg(metavar="IN,OUT", help_behavior_hint="(default: none)")] = None
    """What a million tokens cost, for endpoints that do not say what a call cost."""
    image_tokens: Annotated[int, arg(metavar="N")] = 300
    """What an image is taken for beforehand."""
    budget: Annotated[float | None, arg(metavar="AMOUNT", help_behavior_hint="(default: no limit)")] = None
    """Stop before all that was ever spent on this model in the study passes this."""
    key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the environment)")] = None
    """A file that holds the key to the endpoint."""
    key_variable: Annotated[str, arg(metavar="NAME")] = "OPENAI_API_KEY"
    """The variable of the environment that holds it."""
    offline: FlagCreatePairsOff[bool] = False
    """Take a model of the hub from the local cache alone."""

    def check_terms(self, who: str) -> None:
        """Nothing; `who` can be asked on these terms."""
        if self.connections < 1 or self.timeout <= 0:
            raise BadInput(f"--connections {self.connections} --timeout {self.timeout:g} asks nobody. Ask for 1 or more of each.")
        if self.budget is not None and "://" in who and self.price is None:
            raise BadInput(
                f"--budget {self.budget:g} needs to know what calls cost before they are sent. Give --price IN,OUT, what a "
                "million tokens cost each way."
            )

    def backend(self, who: str) -> VLMBackend:
        """The model of an endpoint at the address `who`, or that in the folder or of the hub name `who`."""
        if "://" not in who:
            return LocalBackend(who, offline=self.offline)
        if self.model is None:
            raise BadInput(f"{who} serves more than one model. Name the one that is to look: --model NAME.")
        key = ApiKey.found(self.key_file, self.key_variable)
        return EndpointBackend(who, self.model, key, timeout=self.timeout, connections=self.connections)

    def terms(self) -> RequestPolicy:
        """On what terms it is asked."""
        return RequestPolicy(
            per_minute=self.requests_per_minute,
            price=self.price or TokenPrice(),
            budget=self.budget,
            image_tokens=self.image_tokens,
        )


@contextmanager
def kept_answers(study: Study) -> Iterator[AnswerCache]:
    """The answers of a study, which nobody else adds to meanwhile."""
    folder = study.explanations
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder, shared=False), closing(AnswerCache(folder / "answers.sqlite")) as answers:
        yield answers
