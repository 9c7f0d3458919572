"""Types of flags, and the flags that several commands share."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from difflex.choices import Precision
from difflex.errors import BadInput
from difflex.study import Command

if TYPE_CHECKING:
    from difflex.explanation import RequestPolicy
    from difflex.explanation.backends import VLMBackend
    from difflex.pipeline import Pipeline

SIZES = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _range(words: list[str]) -> range:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", words[0])
    if not match or (match[2] is not None and int(match[1]) >= int(match[2])):
        raise ValueError(
            f"'{words[0]}' is not a range. Write START:END with START below END, or one number: 0:4 is 0 1 2 3, 7 is 7 alone."
        )
    return range(int(match[1]), int(match[1]) + 1 if match[2] is None else int(match[2]))


def _pixels(words: list[str]) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", words[0])
    if not match:
        raise ValueError(f"'{words[0]}' is not a size. Write HEIGHTxWIDTH or one number for a square: 64x96 or 64.")
    return int(match[1]), int(match[2] or match[1])


def _numbers(words: list[str]) -> tuple[int, ...]:
    parts = [part for word in words for part in word.split(",") if part]
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise ValueError(f"'{' '.join(words)}' is not a list of numbers. Write them with commas or spaces: 16,32,64.")
    return tuple(map(int, parts))


def _strengths(words: list[str]) -> tuple[float, ...]:
    return tuple(strength for part in words[0].split(",") for strength in _spread(part, words[0]))


def _spread(part: str, text: str) -> tuple[float, ...]:
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)"
    match = re.fullmatch(rf"({number})(?::({number}):({number}))?", part)
    if match and match[2] is None:
        return (float(match[1]),)
    if not match or float(match[3]) <= 0 or float(match[2]) < float(match[1]):
        raise ValueError(
            f"'{text}' is not a strength. Write a number, several with commas, or FIRST:LAST:STEP, both included: -2:2:0.5."
        )
    first, last, step = map(float, match.groups())
    return tuple(round(first + i * step, 6) for i in range(math.floor((last - first) / step + 1e-6) + 1))


def _noise_levels(words: list[str]) -> tuple[float, ...]:
    parts = [part for word in words for part in word.split(",") if part]
    if not parts or not all(re.fullmatch(r"(0(\.\d*)?|\.\d+|1(\.0*)?)", part) for part in parts):
        raise ValueError(f"'{' '.join(words)}' is not a list of noise levels. Write numbers from 0 to 1: 0.25,0.5.")
    return tuple(sorted(set(map(float, parts))))


def _bytes(words: list[str]) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|MB|GB|TB)?", words[0])
    if not match:
        raise ValueError(f"'{words[0]}' is not a size on disk. Write a number and kB, MB, GB or TB: 100GB.")
    return int(float(match[1]) * SIZES[match[2] or ""])


def _prices(words: list[str]) -> tuple[float, float]:
    match = re.fullmatch(r"(\d+\.?\d*),(\d+\.?\d*)", words[0])
    if not match:
        raise ValueError(f"'{words[0]}' is not a price. Write IN,OUT, the price of a million tokens each way: 0.1,0.4.")
    return float(match[1]), float(match[2])


def _flag(parse: Callable[[list[str]], Any], metavar: str, kind: type, text: Callable[[Any], str], many: bool = False) -> Any:
    """Describe a flag to tyro: how its words are parsed, and how a value is written."""
    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [text(value)],
    )


def _with_commas(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


Range = Annotated[range, _flag(_range, "START:END", range, lambda value: f"{value.start}:{value.stop}")]
"""Whole numbers from START up to but not END, as in Python; one number is that number alone."""
Seeds = Annotated[Range, arg(aliases=["--seed"])]
"""Seeds, also as `--seed N` for a single one."""
Pixels = Annotated[tuple[int, int], _flag(_pixels, "HEIGHTxWIDTH", tuple, lambda value: f"{value[0]}x{value[1]}")]
"""Height and width of an image."""
Numbers = Annotated[tuple[int, ...], _flag(_numbers, "N,...", tuple, _with_commas, many=True)]
"""Whole numbers above 0, with commas or spaces between them."""
Strengths = Annotated[tuple[float, ...], _flag(_strengths, "FIRST:LAST:STEP", tuple, _with_commas)]
"""One number, several with commas, or several at even distances, both ends included."""
NoiseLevels = Annotated[tuple[float, ...], _flag(_noise_levels, "LEVEL,...", tuple, _with_commas, many=True)]
"""Noise levels between 0 (the image) and 1 (pure noise)."""
Bytes = Annotated[int, _flag(_bytes, "SIZE", int, str)]
"""A size on disk."""
Prices = Annotated[tuple[float, float], _flag(_prices, "IN,OUT", tuple, _with_commas)]
"""The price of a million tokens, in and out."""


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """A command that loads a model by name."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """An embedded model, a folder, or a name on the hub."""
    precision: Annotated[Precision | None, arg(help_behavior_hint="(default: fp32 on a CPU, bf16 on a GPU)")] = None
    """How the model's weights are held; nf4 is four bits."""
    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """The revision of a model on the hub."""
    untrained: Annotated[int | None, arg(metavar="SEED", help_behavior_hint="(default: the trained weights)")] = None
    """Use a denoiser with random weights of this seed; of a model on the hub all parts are random, and nothing is downloaded."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep only the part that is computing on the GPU."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""

    def load(self) -> "Pipeline":
        """Load the model."""
        import difflex

        return difflex.load(
            self.model,
            precision=self.precision,
            revision=self.revision,
            untrained=self.untrained,
            offload=self.offload,
            offline=self.offline,
        )


@dataclass(frozen=True, kw_only=True)
class VLMCommand(Command):
    """A command that may ask a vision-language model (VLM)."""

    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """The model that the endpoint should use."""
    connections: Annotated[int, arg(metavar="N")] = 16
    """Requests at the same time."""
    requests_per_minute: Annotated[float | None, arg(metavar="N", help_behavior_hint="(default: no limit)")] = None
    """Requests per minute at most."""
    timeout: Annotated[float, arg(metavar="SECONDS")] = 120.0
    """How long a request may take."""
    price: Annotated[Prices | None, arg(metavar="IN,OUT", help_behavior_hint="(default: none)")] = None
    """The price of a million tokens, for endpoints that do not report what a request cost."""
    image_tokens: Annotated[int, arg(metavar="N")] = 300
    """Tokens that an image is expected to take."""
    budget: Annotated[float | None, arg(metavar="AMOUNT", help_behavior_hint="(default: no limit)")] = None
    """Stop before everything ever spent on this model in the study exceeds this."""
    key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the environment)")] = None
    """A file with the API key of the endpoint."""
    key_variable: Annotated[str, arg(metavar="NAME")] = "OPENAI_API_KEY"
    """The environment variable with the API key."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""

    def check_endpoint(self, vlm: str) -> None:
        """Raise an error if the flags do not allow to ask `vlm`."""
        if self.connections < 1 or self.timeout <= 0:
            raise BadInput(
                f"--connections {self.connections} --timeout {self.timeout:g} allows no request. Give at least 1 connection and "
                "a timeout above 0."
            )
        if self.budget is not None and "://" in vlm and self.price is None:
            raise BadInput(
                f"--budget {self.budget:g} needs the cost of requests before they are sent. Give --price IN,OUT, the price of a "
                "million tokens each way."
            )

    def backend(self, vlm: str) -> "VLMBackend":
        """Return the model of the endpoint at the address `vlm`, or the local model in the folder or of the hub name `vlm`."""
        from difflex.explanation.backends import LocalBackend
        from difflex.explanation.endpoint import ApiKey, EndpointBackend

        if "://" not in vlm:
            return LocalBackend(vlm, offline=self.offline)
        if self.model is None:
            raise BadInput(f"{vlm} serves more than one model. Name the one to use: --model NAME.")
        key = ApiKey.read(self.key_file, self.key_variable)
        return EndpointBackend(vlm, self.model, key, timeout=self.timeout, connections=self.connections)

    def request_policy(self) -> "RequestPolicy":
        """Return the limits on requests, their price and the budget."""
        from difflex.explanation import RequestPolicy

        return RequestPolicy(
            per_minute=self.requests_per_minute,
            price=self.price or (0.0, 0.0),
            budget=self.budget,
            image_tokens=self.image_tokens,
        )
