"""How an SAE is trained, as plain data, with the presets, ours and those of two papers; and what memory and disk that takes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, final, get_args

from difflex.choices import NormalisationMethod, SAEKind
from difflex.dictionaries.files import WeightsDtype
from difflex.errors import BadInput, UnknownName
from difflex.files import Json

AuxKTarget = Literal["residual", "reconstruction"]
InitDirections = Literal["random", "orthogonal"]
InitBias = Literal["zero", "mean", "median"]
CheckpointKind = Literal["exact", "compact"]
"""What is saved to resume: everything, or the weights in 16 bits without the state of the optimiser."""
DeviceType = Literal["cpu", "cuda"]

ROWS_IN_WORK = 8
"""Copies of a batch in float32 that an update holds: the input, the errors, and what they are computed from."""
PAIR_BYTES = 64
"""Bytes that an update holds for each token and feature that fires."""
SCORES = {"cpu": 1 << 24, "cuda": 1 << 29}
"""Bytes of scores that are in memory at a time."""
WINDOWS = 2
"""Shuffle windows in memory: one is harvested while the other is trained on."""
PREVIEW = 32_768
"""Vectors of each site that are in memory for the first weights."""
HEADER = 12_000
"""Bytes of the config of a dictionary, the header of its checkpoint and its log."""


def _check_number(name: str, value: float | None, valid: bool) -> None:
    if not valid or (value is not None and not math.isfinite(value)):
        raise BadInput(f"The {name} of a training cannot be {value}: see difflex.training.TrainingConfig for the ranges.")


def _check_name(subject: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        raise UnknownName.among(subject, name, names)


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam on all weights, with the schedule of its learning rate."""

    learning_rate: float = 1e-3
    warmup: int = 100
    """Updates over which the learning rate rises linearly."""
    decay: float = 0.2
    """The last share of the run, over which the learning rate falls linearly to zero."""
    beta1: float = 0.9
    """At 0, a feature that does not fire costs no time: its weights do not move."""
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    """The largest norm of the whole gradient; a longer gradient is scaled down."""
    ema: float | None = None
    """Decay of the moving average of the weights. With it, the dictionary is saved with the averaged weights."""

    def __post_init__(self) -> None:
        _check_number("learning rate", self.learning_rate, self.learning_rate > 0)
        _check_number("warm-up", self.warmup, self.warmup >= 0)
        _check_number("decay", self.decay, 0 <= self.decay <= 1)
        _check_number("beta1", self.beta1, 0 <= self.beta1 < 1)
        _check_number("beta2", self.beta2, 0 <= self.beta2 < 1)
        _check_number("eps", self.eps, self.eps > 0)
        _check_number("gradient clip", self.clip, self.clip is None or self.clip > 0)
        _check_number("moving average", self.ema, self.ema is None or 0 <= self.ema < 1)


@dataclass(frozen=True, kw_only=True)
class AuxKLoss:
    """The AuxK loss, which revives dead features: they learn to reconstruct what the other features leave out."""

    target: AuxKTarget = "residual"
    """`residual`: the reconstruction error, without its gradient (Gao et al. 2024). `reconstruction`: the reconstruction itself,
    as in the code of arXiv 2505.24360."""
    k: int = 64
    """Dead features per token."""
    coefficient: float = 1 / 32
    """Weight of the loss, which is divided by the mean square of a residual target."""
    dead_after: int = 1_000_000
    """Tokens without firing after which a feature is dead."""

    def __post_init__(self) -> None:
        _check_name("The target of the AuxK loss", self.target, get_args(AuxKTarget))
        _check_number("number of dead features", self.k, self.k > 0)
        _check_number("coefficient", self.coefficient, self.coefficient >= 0)
        _check_number("number of tokens", self.dead_after, self.dead_after > 0)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """The weights before the first update: decoder rows of length one, and the encoder equal to the decoder but for `gain`."""

    seed: int = 0
    directions: InitDirections = "random"
    """`orthogonal`: as close to orthogonal as `size` rows can be."""
    gain: float = 1.0
    """Norm of the encoder's rows."""
    bias: InitBias = "mean"
    """The first bias of the decoder: zero, the mean, or the geometric median of the first tokens."""

    def __post_init__(self) -> None:
        _check_number("seed", self.seed, 0 <= self.seed < 2**64)
        _check_name("The initial directions", self.directions, get_args(InitDirections))
        _check_name("The initial bias", self.bias, get_args(InitBias))
        _check_number("gain", self.gain, self.gain > 0)


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    """Options that only `jumprelu` uses (Rajamanoharan et al. 2024)."""

    bandwidth: float = 0.5
    """Width of the rectangle through which thresholds get a gradient, in units of the scores."""
    coefficient: float = 1e-1
    """Weight of the sparsity loss `(features per token / k - 1)^2`."""

    def __post_init__(self) -> None:
        _check_number("bandwidth", self.bandwidth, self.bandwidth > 0)
        _check_number("coefficient", self.coefficient, self.coefficient >= 0)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One SAE and how it is trained."""

    kind: SAEKind = "topk"
    size: int
    k: int
    """Features per token: exact for `topk`, a mean over the batch for `batchtopk` and `matryoshka`, a target for `jumprelu`."""
    relu: bool = True
    """Whether `topk` drops negative scores that are among the k largest."""
    prefixes: tuple[int, ...] = ()
    """For `matryoshka`: increasing sizes, each of which is trained as a dictionary of its own. `size` is the last one."""
    encoder_bias: bool = True
    pre_bias: bool = False
    """Whether a vector that is learned is added to the input of the encoder, beside the subtracted bias of the decoder."""
    normalisation: NormalisationMethod = "standardise"
    clip: float | None = None
    """The largest absolute value of a normalised input."""
    initialisation: InitConfig = InitConfig()
    optimiser: AdamConfig = AdamConfig()
    auxk: AuxKLoss | None = AuxKLoss()
    jumprelu: JumpReLUConfig = JumpReLUConfig()

    def __post_init__(self) -> None:
        _check_name("The kind of SAE", self.kind, get_args(SAEKind))
        _check_name("The normalisation", self.normalisation, get_args(NormalisationMethod))
        _check_number("clip", self.clip, self.clip is None or self.clip > 0)
        if not 0 < self.k <= self.size:
            raise BadInput(f"k {self.k} does not fit a dictionary of size {self.size}: choose k between 1 and the size.")
        if (self.kind == "matryoshka") != bool(self.prefixes):
            raise BadInput(f"Kind {self.kind} has prefixes {self.prefixes}: `matryoshka` needs some, other kinds take none.")
        if list(self.prefixes) != sorted({size for size in self.prefixes if 0 < size < self.size}):
            raise BadInput(f"Prefixes {self.prefixes} must increase and be smaller than the size {self.size}.")

    @property
    def label(self) -> str:
        """`<kind>-<size>-k<k>`."""
        return f"{self.kind}-{self.size}-k{self.k}"

    def memory(self, width: int, parts: int = 1, device: DeviceType = "cpu") -> int:
        """Return the bytes that a rank needs for the weights and the optimiser, of which it holds one of `parts`."""
        copies = 2 + (self.optimiser.beta1 > 0) + (self.optimiser.ema is not None)
        # Encoder and decoder in float32, and for the products the encoder in 8 bits, on a GPU both in 16 bits.
        held = -(-self.size // parts) * width * (8 * copies + (4 if device == "cuda" else 1))
        return max(held, 12 * self.size * width)  # every rank draws all initial weights

    def as_json(self) -> dict[str, Json]:
        """Return the settings as plain JSON, as versions without a `pre_bias` did: what these trained counts as trained."""
        entries = asdict(self)
        if not self.pre_bias:
            del entries["pre_bias"]
        return json.loads(json.dumps(entries))


def default(*, width: int, size: int, k: int, updates: int | None = None) -> TrainingConfig:
    """Return our preset: TopK on standardised activations, Adam without first moment, AuxK.

    Without a first moment, features that do not fire cost no time, and rare features learn faster. The first updates turn a row
    by about 0.02, whatever its width, and the learning rate decays to zero over the whole run, so that features that died in
    the first updates come back. A run of fewer than 2,000 `updates` gets a larger learning rate, up to four times as large. Where
    k is small for the size many features stay dead in a short run: after 2 M tokens of mini-flux (double.2), on held-out tokens,
    0 % at k 16 and 32 of 2,048, but 41 % at k 8, and 12 % at k 16 of 4,096. Half of the learning rate makes that worse.
    """
    factor = 1.0 if updates is None else min(4.0, max(1.0, 2000 / max(1, updates)))
    return TrainingConfig(
        size=size,
        k=k,
        normalisation="standardise",
        optimiser=AdamConfig(learning_rate=0.02 * factor / width**0.5, decay=1.0, beta1=0.0, beta2=0.99),
        auxk=AuxKLoss(k=64, dead_after=max(10_000, 2 * size)),
    )


def paper(*, size: int = 65_536, k: int = 64, auxk: Literal["none", "reconstruction"] = "none") -> TrainingConfig:
    """Return the settings of the FLUX.1 SAEs of arXiv 2505.24360: 30.7 M tokens in batches of 1,024, whitened, clipped at 10.

    The paper's text and code differ. The default follows the text: no AuxK. `auxk="reconstruction"` follows the code: dead
    features reconstruct the reconstruction, through which the gradient flows. Both have a learned `pre_bias` beside the bias of
    the decoder, so that scores are `(z - bias + pre_bias) encoder^T`; it starts at zero. As in the code, TopK has no ReLU, and
    features have no bias of their own (the published files hold one, `b_mid`, that nothing reads). Deliberate differences:
    statistics come from at least 10 x width vectors and stay fixed (paper: principal axes of one batch that is smaller than
    the width, mean and scale updated to the end), the k largest scores are exact (paper: approximate), a feature is alive if
    it fires at all (paper: above 1), and the moving average starts at the weights (paper: at zero).
    """
    code = AuxKLoss(target="reconstruction", k=64, coefficient=1 / 32, dead_after=16 * size)
    return TrainingConfig(
        size=size,
        k=k,
        relu=False,
        encoder_bias=False,
        pre_bias=True,
        normalisation="whiten",
        clip=10.0,
        initialisation=InitConfig(directions="orthogonal", gain=3**-0.5, bias="mean"),
        optimiser=AdamConfig(learning_rate=2e-4, warmup=50, decay=0.0, beta1=0.0, beta2=0.99, eps=1e-10, clip=10.0, ema=0.995),
        auxk=code if auxk == "reconstruction" else None,
    )


def unbox(*, size: int = 5_120, k: int = 10) -> TrainingConfig:
    """Return the settings of the SDXL Turbo SAEs of arXiv 2410.22366: batches of 4,096, ReLU after TopK, AuxK on the residual.

    The paper does not normalise the data and divides the loss by their variance, which changes only the effect of Adam's
    epsilon; here the data are divided by one factor, so that epsilon has the same effect. Difference: decoder rows are
    normalised after each update (paper: before it).
    """
    return TrainingConfig(
        size=size,
        k=k,
        normalisation="scale",
        initialisation=InitConfig(gain=3**-0.5, bias="median"),
        optimiser=AdamConfig(learning_rate=1e-4, warmup=1, decay=0.0, eps=6.25e-10),
        auxk=AuxKLoss(k=256, coefficient=1 / 32, dead_after=10_000_000),
    )


@final
@dataclass(frozen=True, kw_only=True)
class SweepCost:
    """Bytes that the training of several SAEs takes."""

    states: tuple[int, ...]
    """On the device, for each SAE: its weights and the state of its optimiser."""
    working: int
    """On the device besides: an update, and a dictionary that is saved."""
    host: int
    """In the memory of the CPU: the windows of a live training, and the checkpoint that is being written."""
    checkpoints: int
    """On disk during the training; compact ones are removed at its end."""
    dictionaries: int
    """On disk at the end, without checkpoints."""

    @property
    def device(self) -> int:
        """On the device, if all SAEs are trained at once."""
        return sum(self.states) + self.working

    @property
    def least(self) -> int:
        """On the device, if they are trained one after another."""
        return max(self.states, default=0) + self.working

    def groups(self, free: int) -> list[list[int]] | None:
        """Divide the SAEs, by their index, into as few groups as fit `free` bytes; None if the largest one alone does not."""
        largest_first = sorted(range(len(self.states)), key=lambda index: -self.states[index])
        for count in range(1, len(self.states) + 1):
            groups: list[list[int]] = [[] for _ in range(count)]
            sizes = [self.working] * count
            for index in largest_first:
                smallest = sizes.index(min(sizes))
                groups[smallest].append(index)
                sizes[smallest] += self.states[index]
            if max(sizes) <= free:
                return [sorted(group) for group in groups]
        return None


def training_cost(
    trainings: Sequence[tuple[TrainingConfig, int]],
    *,
    batch: int,
    device: DeviceType = "cpu",
    parts: int = 1,
    window: int = 0,
    sites: Sequence[int] = (),
    checkpoints: CheckpointKind = "exact",
    weights: WeightsDtype = "fp32",
) -> SweepCost:
    """Return what SAEs take, each with its width, if each rank holds one of `parts` of their features.

    `sites` are the widths of the sites, where a live training shuffles `window` rows.
    """
    states = tuple(training.memory(width, parts, device) for training, width in trainings)
    updates = [4 * ROWS_IN_WORK * batch * width + PAIR_BYTES * batch * training.k for training, width in trainings]
    saved = max((8 * training.size * width for training, width in trainings), default=0)
    statistics = 4 * sum(min(PREVIEW, 10 * width) * width for width in (*sites, *([max(sites)] if sites else [])))
    checkpoint = [checkpoint_bytes(training, width, checkpoints) for training, width in trainings]
    # A checkpoint is gathered in the memory of the CPU, and once more as the bytes of its file.
    written = (1 + (device != "cpu")) * max(checkpoint, default=0)
    return SweepCost(
        states=states,
        working=max(max(updates, default=0) + SCORES[device], saved, statistics, written if device == "cpu" else 0),
        host=2 * WINDOWS * window * sum(sites) + (written if device != "cpu" else 0),
        checkpoints=sum(checkpoint),
        dictionaries=sum(dictionary_bytes(training, width, weights) for training, width in trainings),
    )


def checkpoint_bytes(training: TrainingConfig, width: int, kind: CheckpointKind) -> int:
    """Return the bytes of a checkpoint on disk."""
    matrices, vectors = 2 * training.size * width, 2 * training.size + 2 * width
    if kind == "compact":  # weights in 16 bits, one second moment for each row and each column
        tensors = 2 * matrices + 4 * (vectors + 2 * training.size + 2 * width)
    else:
        tensors = 4 * _copies(training) * (matrices + vectors)
    return tensors + 24 * training.size + _normalisation_bytes(training, width) + HEADER


def dictionary_bytes(training: TrainingConfig, width: int, weights: WeightsDtype) -> int:
    """Return the bytes of a dictionary on disk."""
    matrices = 2 * training.size * width * (4 if weights == "fp32" else 2)
    return matrices + 4 * (training.size + width) + _normalisation_bytes(training, width) + HEADER


def _copies(training: TrainingConfig) -> int:
    """Return how many tensors of the shape of a weight are saved: it, its moments, its average."""
    return 2 + (training.optimiser.beta1 > 0) + (training.optimiser.ema is not None)


def _normalisation_bytes(training: TrainingConfig, width: int) -> int:
    return 4 * (2 * width + width**2 * (training.normalisation == "whiten"))
