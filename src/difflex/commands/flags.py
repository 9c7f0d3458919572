"""Types of flags, and the flags that several commands share.

Every number is checked where flags are parsed: it is finite and in the range of its flag. A list is counted before it is made.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from difflex.choices import Precision
from difflex.errors import BadInput
from difflex.study import Command, Study

if TYPE_CHECKING:
    from difflex.explanation import RequestPolicy
    from difflex.explanation.backends import VLMBackend
    from difflex.pipeline import Pipeline

SIZES = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
MOST_SEEDS, MOST_NUMBERS = 1_000_000, 1000
"""Numbers in a range, and in a list."""
LARGEST_SEED = 2**63 - 1
LEFT_FREE = 0.25
"""The share of a GPU that a precision which is chosen for a study leaves free: for images, activations and trainings."""
LARGEST, MOST_PIXELS = 10_000_000, 8192
"""The largest size of a dictionary, number of a feature or number in a list; the longest side of an image."""
Number = TypeVar("Number", int, float)
Values = TypeVar("Values", bound=Sequence[Any])
THE_STUDYS = "(default: that of the study)"
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"


def _range(words: list[str]) -> range:
    match = re.fullmatch(r"(\d{1,19})(?::(\d{1,19}))?", words[0])
    if not match or (match[2] is not None and int(match[1]) >= int(match[2])):
        raise ValueError(
            f"{_quoted(words)} is not a range. Write START:END with START below END, or one number: 0:4 is 0 1 2 3, 7 is 7 alone."
        )
    first, end = int(match[1]), int(match[1]) + 1 if match[2] is None else int(match[2])
    if end - 1 > LARGEST_SEED or end - first > MOST_SEEDS:
        raise ValueError(
            f"'{words[0]}' is a range of {end - first:,} numbers up to {end - 1}. Write at most {MOST_SEEDS:,} of at most "
            f"{LARGEST_SEED}."
        )
    return range(first, end)


def _every_nth(words: list[str]) -> range:
    match = re.fullmatch(r"(.+:.+):([1-9]\d{0,3})", words[0])
    return _range([match[1]])[:: int(match[2])] if match else _range(words)


def _pixels(words: list[str]) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", words[0])
    if not match:
        raise ValueError(f"{_quoted(words)} is not a size. Write HEIGHTxWIDTH or one number for a square: 64x96 or 64.")
    height, width = (_limited(int, text, 1, MOST_PIXELS) for text in (match[1], match[2] or match[1]))
    return height, width


def _numbers(words: list[str], most: int = LARGEST, least: int = 1) -> tuple[int, ...]:
    parts = _parts(words)
    if not all(re.fullmatch(r"[1-9]\d*" if least else r"\d+", part) for part in parts):
        raise ValueError(
            f"{_quoted(words)} is not a list of numbers above 0{'' if least else ', or 0'}. Write them with commas: 16,32."
        )
    return tuple(_limited(int, part, least, most) for part in parts)


def _feature_names(words: list[str]) -> tuple[str, ...]:
    parts = _counted([part.strip() for word in words for part in word.split(",") if part.strip()], words)
    return tuple(str(_limited(int, part, 0, LARGEST)) if re.fullmatch(r"[-+.\d]+", part) else part for part in parts)


def _strengths(words: list[str]) -> tuple[float, ...]:
    strengths = [strength for part in words[0].split(",") for strength in _spread(part, words)]
    return tuple(_counted(strengths, words))


def _spread(part: str, words: list[str]) -> Sequence[float]:
    match = re.fullmatch(rf"({NUMBER})(?::({NUMBER}):({NUMBER}))?", part)
    if match and match[2] is None:
        return (_limited(float, part, -1e6, 1e6),)
    if not match or float(match[3]) <= 0 or float(match[2]) < float(match[1]):
        raise ValueError(
            f"{_quoted(words)} is not a strength. Write a number, several with commas, or FIRST:LAST:STEP, both included: "
            "-2:2:0.5."
        )
    first, last = (_limited(float, match[number], -1e6, 1e6) for number in (1, 2))
    step = float(match[3])
    steps = _counted(range(math.floor(min((last - first) / step + 1e-6, 1e15)) + 1), words)
    return [round(first + i * step, 6) for i in steps]


def _noise_levels(words: list[str]) -> tuple[float, ...]:
    parts = _parts(words)
    if not all(re.fullmatch(r"(0(\.\d*)?|\.\d+|1(\.0*)?)", part) for part in parts):
        raise ValueError(f"{_quoted(words)} is not a list of noise levels. Write numbers from 0 to 1: 0.25,0.5.")
    return tuple(sorted(set(map(float, parts))))


def _bytes(words: list[str], what: str = "a size on disk", example: str = "100GB") -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|MB|GB|TB)?", words[0])
    if not match:
        raise ValueError(f"{_quoted(words)} is not {what}. Write a number and kB, MB, GB or TB: {example}.")
    return int(_limited(float, match[1], 0, 1e18) * SIZES[match[2] or ""])


def _prices(words: list[str]) -> tuple[float, float]:
    match = re.fullmatch(r"(\d+\.?\d*),(\d+\.?\d*)", words[0])
    if not match:
        raise ValueError(f"{_quoted(words)} is not a price. Write IN,OUT, the price of a million tokens each way: 0.1,0.4.")
    return _limited(float, match[1], 0, 1e6), _limited(float, match[2], 0, 1e6)


def _parts(words: list[str]) -> list[str]:
    """Return the parts of a list that is written with commas, spaces or both."""
    parts = [part for word in words for part in word.split(",") if part]
    if not parts:
        raise ValueError(f"{_quoted(words)} is no list of numbers. Write one number or more, with commas or spaces: 16,32,64.")
    return _counted(parts, words)


def _counted(values: Values, words: list[str]) -> Values:
    """Return `values`, which `words` stand for, unless they are too many."""
    if len(values) > MOST_NUMBERS:
        raise ValueError(f"{_quoted(words)} stands for {len(values):,} numbers. Write at most {MOST_NUMBERS:,}.")
    return values


def _limited(kind: type[Number], word: str, least: float, most: float) -> Number:
    """Return the number that `word` writes, which must be finite and in the range."""
    noun = "a whole number" if kind is int else "a number"
    try:
        value = kind(word)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:  # NaN is in no range
        problem = f"is not {noun}" if value is None or value != value else "is out of range"
        limits = (f"{limit:,}".removesuffix(".0") for limit in (least, most))
        raise ValueError(f"{_quoted([word])} {problem}. Write {noun} from {' to '.join(limits)}.")
    return value


def _quoted(words: list[str]) -> str:
    text = " ".join(words)
    return f"'{text}'" if len(text) <= 60 else f"'{text[:60]}...'"


def _flag(parse: Callable[[list[str]], Any], metavar: str, text: Callable[[Any], str], many: bool = False) -> Any:
    """Describe a flag to tyro: how its words are parsed, and how a value is written; None is a flag that is left out."""
    return PrimitiveConstructorSpec(
        nargs="*" if many else 1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [] if value == () else [str(value) if value is None else text(value)],
    )


def _written(value: float) -> str:
    """Return a number as the command line reads it, short if that loses nothing."""
    if isinstance(value, int):
        return str(value)
    return f"{value:g}" if float(f"{value:g}") == value else str(value)


def _with_commas(values: tuple[float, ...]) -> str:
    return ",".join(map(_written, values))


def number(least: int, most: int, metavar: str = "N") -> Any:
    """Describe a flag for whole numbers in a range."""
    return _flag(lambda words: _limited(int, words[0], least, most), metavar, str)


def real(least: float, most: float, metavar: str = "X") -> Any:
    """Describe a flag for finite numbers in a range."""
    return _flag(lambda words: _limited(float, words[0], least, most), metavar, _written)


def numbers(most: int, least: int = 1) -> Any:
    """Describe a flag for whole numbers from `least` to `most`, with commas or spaces between them."""
    return _flag(lambda words: _numbers(words, most, least), "N,...", _with_commas, many=True)


# Each describes a flag: `trials: Annotated[int, COUNT] = 24`.
COUNT = number(1, 1_000_000)
"""How many of what there is at least one of."""
WHOLE = number(0, LARGEST)
TOKENS = number(1, 10**12)
SIZE = number(1, LARGEST)
"""The size of a dictionary."""
BATCH = number(1, 4096)
"""Images at a time."""
STEPS = number(1, 1000)
"""Denoising steps."""
SEED = number(0, LARGEST_SEED, "SEED")
POSITIVE = real(1e-8, 1e6)
AMOUNT = real(0.0, 1e6)
SHARE = real(0.0, 1.0)
RANGE = _flag(_range, "START:END", lambda value: f"{value.start}:{value.stop}")
STRENGTHS = _flag(_strengths, "FIRST:LAST:STEP", _with_commas)

PrecisionChoice = Literal[Precision, "auto"]
"""A precision, or `auto`: what fits into the memory of the GPU, or fp32 on a CPU."""
Seeds = Annotated[range, RANGE, arg(aliases=["--seed"])]
"""Whole numbers from START up to but not END, as in Python; one number, also as `--seed N`, is that number alone."""
StepRange = Annotated[range | None, RANGE]
"""Denoising steps from START up to but not END."""
KeptSteps = Annotated[
    range | None, _flag(_every_nth, "START:END:EVERY", lambda value: f"{value.start}:{value.stop}:{value.step}")
]
"""Denoising steps from START up to but not END, all or each EVERY-th."""
Pixels = Annotated[tuple[int, int] | None, _flag(_pixels, "HEIGHTxWIDTH", lambda value: f"{value[0]}x{value[1]}")]
"""Height and width of an image."""
Numbers = Annotated[tuple[int, ...], numbers(LARGEST)]
"""Whole numbers above 0, with commas or spaces between them."""
FeatureName = Annotated[str, _flag(lambda words: (_feature_names(words) or ("",))[0], "FEATURE", str)]
"""The number of a feature, or words that `difflex search` finds it by."""
FeatureNames = Annotated[tuple[str, ...], _flag(_feature_names, "FEATURE...", ",".join, many=True)]
"""Numbers of features, or words that `difflex search` finds each by."""
_shares = lambda words: tuple(_limited(float, part, 0, 1) for part in _parts(words))  # noqa: E731
Shares = Annotated[tuple[float, ...], _flag(_shares, "SHARE...", _with_commas, many=True)]
Strengths = Annotated[tuple[float, ...], STRENGTHS]
"""One number, several with commas, or several at even distances, both ends included."""
NoiseLevels = Annotated[tuple[float, ...], _flag(_noise_levels, "LEVEL,...", _with_commas, many=True)]
"""Noise levels between 0 (the image) and 1 (pure noise)."""
Bytes = Annotated[int | None, _flag(_bytes, "SIZE", str)]
"""A size on disk."""
GPUMemory = Annotated[int | None, _flag(lambda words: _bytes(words, "an amount of GPU memory", "24GB"), "SIZE", str)]
Prices = Annotated[tuple[float, float] | None, _flag(_prices, "IN,OUT", _with_commas)]
"""The price of a million tokens, in and out."""


def located(name: str) -> str:
    """Return the absolute path of a file or folder, so that it is found from anywhere, and any other name as it is."""
    if not os.path.exists(name):
        return name
    from difflex.pipeline import embedded

    return name if name in embedded() else os.path.abspath(name)


def memory_to_work() -> int:
    """Return the bytes that a precision which is chosen for a study leaves free."""
    from difflex.devices import find_device, free_memory

    return round(LEFT_FREE * free_memory(find_device()))


@dataclass(frozen=True, kw_only=True)
class ModelCommand(Command):
    """A command that loads a model by name."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """An embedded model, a folder, or a name on the hub."""
    precision: Annotated[PrecisionChoice | None, arg(help_behavior_hint="(default: fp32 on a CPU, bf16 on a GPU)")] = None
    """How the model's weights are held; nf4 is four bits; auto is what fits into memory."""
    revision: Annotated[str | None, arg(metavar="REVISION", help_behavior_hint="(default: the newest)")] = None
    """The revision of a model on the hub."""
    untrained: Annotated[int | None, SEED, arg(help_behavior_hint="(default: the trained weights)")] = None
    """Use a denoiser with random weights of this seed; of a model on the hub all parts are random, and nothing is downloaded."""
    text_length: Annotated[int | None, number(1, 512), arg(help_behavior_hint="(default: the model's own)")] = None
    """Tokens of a prompt that the model reads, padding included; 256 for FLUX.1 schnell, 512 in arXiv 2505.24360."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep only the part that is computing on the GPU."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""

    def load(self, out: Path | None = None) -> "Pipeline":
        """Load the model, if it is for the study in `out`, with the precision that was chosen for that by memory."""
        import difflex

        precision, offload = self.precision, self.offload
        if precision == "auto" and out is not None:
            precision, offload = self._fit(out)
        return difflex.load(
            self.model,
            precision=precision,
            revision=self.revision,
            untrained=self.untrained,
            offload=offload,
            offline=self.offline,
            text_length=self.text_length,
        )

    def _fit(self, out: Path) -> tuple[Precision, bool]:
        """Return the precision that the study in `out` has, or that leaves a new one memory to work, and whether to offload."""
        from difflex.pipeline import choose_precision

        kept = Study.open(out).settings if (out / "study.json").is_file() else None
        if kept is not None and kept.precision is not None:
            return kept.precision, self.offload or kept.offload
        return choose_precision(
            self.model,
            revision=self.revision,
            offload=True if self.offload else None,
            untrained=self.untrained,
            offline=self.offline,
            reserve=memory_to_work(),
        )


@dataclass(frozen=True, kw_only=True)
class StudyModelCommand(Command):
    """A command that loads the model of a study, held as the study says unless its flags say otherwise."""

    precision: Annotated[PrecisionChoice | None, arg(help_behavior_hint=THE_STUDYS)] = None
    """How the model's weights are held; auto is what fits into memory."""
    offload: FlagCreatePairsOff[bool] = False
    """Keep only the part that is computing on the GPU, also if the study did not."""
    no_offload: FlagCreatePairsOff[bool] = False
    """Keep the whole model on the GPU, also if the study did not."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""


@dataclass(frozen=True, kw_only=True)
class StudyImagesCommand(StudyModelCommand):
    """A command that generates images with the model of a study, as the study did unless its flags say otherwise."""

    pixels: Annotated[Pixels, arg(help_behavior_hint=THE_STUDYS)] = None
    """Image size; one number for a square."""
    steps: Annotated[int | None, STEPS, arg(help_behavior_hint=THE_STUDYS)] = None
    """Number of denoising steps."""
    guidance: Annotated[float | None, AMOUNT, arg(metavar="SCALE", help_behavior_hint=THE_STUDYS)] = None
    """Guidance scale."""


@dataclass(frozen=True, kw_only=True)
class VLMCommand(Command):
    """A command that may ask a vision-language model (VLM)."""

    model: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """The model that the endpoint should use."""
    connections: Annotated[int, number(1, 1000)] = 16
    """Requests at the same time."""
    requests_per_minute: Annotated[float | None, POSITIVE, arg(metavar="N", help_behavior_hint="(default: no limit)")] = None
    """Requests per minute at most."""
    timeout: Annotated[float, real(0.001, 86_400.0, "SECONDS")] = 120.0
    """How long a request may take."""
    price: Annotated[Prices, arg(help_behavior_hint="(default: none)")] = None
    """The price of a million tokens, for endpoints that do not report what a request cost."""
    image_tokens: Annotated[int, WHOLE] = 300
    """Tokens that an image is expected to take."""
    budget: Annotated[float | None, AMOUNT, arg(metavar="AMOUNT", help_behavior_hint="(default: no limit)")] = None
    """Stop before everything ever spent on this model in the study exceeds this."""
    key_file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: the environment)")] = None
    """A file with the API key of the endpoint."""
    key_variable: Annotated[str, arg(metavar="NAME")] = "OPENAI_API_KEY"
    """The environment variable with the API key."""
    offline: FlagCreatePairsOff[bool] = False
    """Use only the local cache of the hub."""

    def __post_init__(self) -> None:
        # Before anything runs: the log of a recipe names the flags of its commands.
        if re.match(r"[^/]*://([^/?#]*@|.*[?#])", str(getattr(self, "vlm", None) or "")):
            raise BadInput(
                "The address of --vlm contains a user name, a password or a query, which logs and errors would show. Put the key "
                "into the environment or a key file."
            )

    def check_endpoint(self, vlm: str) -> None:
        """Raise an error if the flags do not allow to ask `vlm`."""
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
            raise BadInput("An endpoint serves more than one model. Name the one to use: --model NAME.")
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
