"""One SAE in training: its initial weights, the pairs that fire in a batch, the loss and its update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries import SAEWeights
from difflex.dictionaries.sparse import CooCodes, EncoderSearch, segment_sums
from difflex.errors import NonFinite
from difflex.training.config import TrainingConfig
from difflex.training.data import TrainingRanks
from difflex.training.gpu import DeviceUpdate, UpdateEngine
from difflex.training.update import JumpGradients, SAEParameters, UpdateInputs

DEAD_AFTER = 1_000_000
"""Tokens without firing after which a feature counts as dead in a training without AuxK."""
THRESHOLD_UPDATE = 0.01
"""Share of the moving average of the inference threshold that an update replaces."""
FIRST_CANDIDATES = 2
"""Times k: scores per token from which the first batch of a batch-wise kind estimates its threshold."""


@dataclass(frozen=True, kw_only=True)
class UpdateMetrics:
    """Metrics of one update, over the whole batch."""

    loss: float
    """Mean squared error of the normalised activations."""
    fvu: float
    """Fraction of the batch's variance unexplained, in normalised space."""
    l0: float
    """Features per token."""
    dead: float
    """Share of features that are dead."""
    gradient: float | None
    """Norm of the gradient before clipping; None if it was not measured."""


class ActivePairs(NamedTuple):
    """The pairs of tokens and features that an update uses, sorted by token."""

    pairs: CooCodes
    jump: JumpGradients | None = None
    threshold: float | None = None
    """The smallest value that a batch-wise kind selected."""


class BatchErrors(NamedTuple):
    """The reconstruction errors of the tokens that this rank encodes."""

    layers: list[Float[Tensor, "token width"]]
    """Derivatives of the loss by the reconstruction of each prefix, and of the dead features if there are any."""
    bias: Float[Tensor, " width"]
    """The derivative by the bias as a part of the reconstructions."""
    square: Float[Tensor, ""]
    """The summed squared error."""


@final
class Learner:
    """The state of one SAE in training."""

    def __init__(
        self, config: TrainingConfig, weights: SAEWeights, ranks: TrainingRanks, engine: UpdateEngine | None = None
    ) -> None:
        """`weights` are those of this rank's features; they are updated in place. The default engine depends on their device."""
        self.config, self.ranks = config, ranks
        self.parameters = SAEParameters(weights, config.optimiser, ranks.by_feature)
        size, device = len(weights.encoder), weights.encoder.device
        self.updates = self.tokens = 0
        self.silence = torch.zeros(size, dtype=torch.long, device=device)
        """Tokens since each feature last fired."""
        self.firings = torch.zeros(size, dtype=torch.long, device=device)
        """Tokens at which each feature has fired."""
        self.batch_threshold: float | None = None
        """The smallest value selected from the last batch, for a batch-wise kind."""
        self.inference_threshold: float | None = None
        """The moving average of `batch_threshold`: the threshold at inference."""
        self.metrics: UpdateMetrics | None = None
        self._prefixes = torch.tensor(config.prefixes, dtype=torch.long, device=device)
        self._first_feature = ranks.features(config.size).start
        self._on_device: DeviceUpdate | None = None
        if engine is not None or (device.type != "cpu" and config.kind == "topk" and ranks.world_size == 1):
            engine, counts = engine or UpdateEngine.of(device), (self.silence, self.firings)
            self._on_device = DeviceUpdate(config, self.parameters, counts, self._dead_after, engine)

    def update(self, z: Float[Tensor, "token width"], learning_rate: float, *, measure: bool = True) -> None:
        """Train on a batch, of which `z` is this rank's share; with `measure`, `metrics` are then of this batch.

        Without it, a GPU is not waited for: a loss that is not finite is raised by the next update that measures, with `updates`
        set back to those that were made.
        """
        if self._on_device is not None:
            self._on_device.update(z, learning_rate, number=self.updates + 1, tokens=self.tokens)
            self.updates, self.tokens = self.updates + 1, self.tokens + len(z)
            if measure:
                self.metrics = self._read(self._on_device, z.shape)
            return
        z = self.ranks.by_feature.gather(z)
        sums_of_z = self.ranks.by_token.sum(torch.cat([z.new_tensor([len(z)]), _square(z)[None], z.sum(0)]).double())
        count, variance = int(sums_of_z[0]), float(sums_of_z[1] - _square(sums_of_z[2:]) / sums_of_z[0])
        weights = self.parameters.weights
        centred = z - weights.bias
        encoder_input = centred if weights.pre_bias is None else centred + weights.pre_bias
        selection = self._select(encoder_input)
        errors, auxk = self._errors(selection.pairs, centred, encoder_input, count)
        square = float(self.ranks.by_token.sum(errors.square))
        if not math.isfinite(square):
            raise NonFinite(f"The loss became {square}; the weights were not updated.")
        gradient = self.parameters.update(
            self._inputs(selection, auxk, errors, encoder_input),
            number=self.updates + 1,
            learning_rate=learning_rate,
            measure_gradient=measure,
        )
        fired = self._count_firings(selection, count)
        self.metrics = UpdateMetrics(
            loss=square / count / z.shape[1],
            fvu=square / max(variance, 1e-30),
            l0=fired / count,
            dead=float(self.ranks.by_feature.sum(self._dead().sum())) / self.config.size,
            gradient=gradient,
        )

    def _read(self, on_device: DeviceUpdate, shape: torch.Size) -> UpdateMetrics:
        """Return the metrics of the last update on a device."""
        metrics, failed = on_device.read()
        if failed:
            self.updates = failed - 1
            raise NonFinite("The loss became NaN or infinite; the weights were not updated.")
        return UpdateMetrics(
            loss=metrics.square / shape.numel(),
            fvu=metrics.square / max(metrics.variance, 1e-30),
            l0=metrics.fired / shape[0],
            dead=metrics.dead / self.config.size,
            gradient=metrics.gradient,
        )

    def is_finite(self) -> bool:
        """Return whether no weight on any rank is NaN or infinite, nor any loss since the last measured one."""
        if self._on_device is not None and self._on_device.read()[1]:
            return False
        wrong = [(~torch.isfinite(tensor)).sum() for tensor in self.parameters.weights.tensors().values()]
        return not bool(self.ranks.sum(torch.stack(wrong)).any())

    def _select(self, z: Float[Tensor, "token width"]) -> ActivePairs:
        """Return the pairs that fire, and for `jumprelu` those that are close to it."""
        config, scores = self.config, self.parameters.scores
        if config.kind == "jumprelu":
            return self._above_thresholds(z)
        if config.kind == "topk":
            return ActivePairs(_top_k(scores, z, config.k, config.relu, self.ranks))
        return self._top_k_of_batch(z)

    def _top_k_of_batch(self, z: Float[Tensor, "token width"]) -> ActivePairs:
        """Return the largest positive scores of the batch, as many as there are tokens times k."""
        scores, ranks, k = self.parameters.scores, self.ranks, self.config.k
        count = int(ranks.by_token.sum(torch.tensor(len(z) * k, device=z.device)))
        threshold = self.batch_threshold
        if threshold is None:
            first = scores.top_k(z, min(FIRST_CANDIDATES * k, len(scores.rows))).values.flatten()
            threshold = _smallest_of_largest(ranks.gather(first), count)
        guess = max(0.0, threshold) * 0.95
        while True:
            pairs = scores.above(z, torch.full_like(scores.rows[:, 0], guess))
            values = ranks.gather(pairs.values)
            if len(values) >= count or guess == 0:
                break
            guess = guess / 2 if guess > 1e-6 else 0.0
        smallest = _smallest_of_largest(values, count) if len(values) else 0.0
        selected = pairs.values >= smallest
        return ActivePairs(CooCodes(*(column[selected] for column in pairs)), threshold=smallest)

    def _above_thresholds(self, z: Float[Tensor, "token width"]) -> ActivePairs:
        """Return the pairs above their threshold or close to it: the derivative of the jump is a rectangle."""
        thresholds, options, k = self.parameters.weights.thresholds, self.config.jumprelu, self.config.k
        assert thresholds is not None
        pairs = self.parameters.scores.above(z, thresholds - options.bandwidth / 2)
        excess = pairs.values - thresholds[pairs.features]
        active, near = excess > 0, (excess < options.bandwidth / 2).float() / options.bandwidth
        counts = torch.tensor([float(active.sum()), float(len(z))], device=z.device)
        count, tokens = self.ranks.sum(counts).tolist()
        tokens /= self.ranks.by_feature.world_size
        # d/d threshold of coefficient * (features per token / k - 1)^2, and of the jump in value = score * [score > threshold]
        loss = -options.coefficient * 2 * (count / tokens / k - 1) / k / tokens
        return ActivePairs(
            pairs._replace(values=pairs.values * active), JumpGradients(active, -thresholds[pairs.features] * near, loss * near)
        )

    def _errors(
        self, pairs: CooCodes, centred: Float[Tensor, "token width"], encoder_input: Float[Tensor, "token width"], count: int
    ) -> tuple[BatchErrors, CooCodes | None]:
        """Return the errors in the batch of `count` tokens on all ranks, and the pairs of the AuxK loss if features are dead."""
        decoder, layer_of = self.parameters.weights.decoder, self._layer_of(pairs)
        y, layers = torch.zeros_like(centred), []
        for layer in range(len(self._prefixes) + 1):
            inside = CooCodes(*(column[layer_of == layer] for column in pairs)) if len(self._prefixes) else pairs
            y += self.ranks.by_feature.sum(_decode(inside, decoder, len(centred)))
            layers.append(y - centred)
        square = _square(layers[-1])
        auxk, auxk_error = self._auxk(encoder_input, y, layers[-1], square, count)
        # A feature is part of its own prefix and of every longer one, so it gets the sum of their errors.
        scale = 2 / (count * centred.shape[1] * len(layers))
        bias = torch.stack([layer.sum(0) for layer in layers]).sum(0) * scale
        for layer in layers:
            layer.mul_(scale)
        for layer in reversed(range(len(layers) - 1)):
            layers[layer] += layers[layer + 1]
        if auxk_error is not None:
            layers.append(auxk_error)
            if self.config.auxk is not None and self.config.auxk.target == "reconstruction":
                for layer in layers[:-1]:  # the gradient flows into the target, which is made of all features
                    layer -= auxk_error
        return BatchErrors(layers, bias, square), auxk

    def _auxk(
        self, z: Float[Tensor, "token width"], y: Tensor, error: Tensor, square: Tensor, count: int
    ) -> tuple[CooCodes | None, Float[Tensor, "token width"] | None]:
        """Return the pairs of dead features and the derivative of the AuxK loss; None if no feature is dead."""
        auxk, ranks = self.config.auxk, self.ranks
        dead = self._dead().nonzero()[:, 0]
        if auxk is None or int(total := ranks.by_feature.sum(torch.tensor(len(dead), device=dead.device))) == 0:
            return None, None
        pairs = self._top_k_of_dead(dead, z, min(auxk.k, int(total)))
        output = ranks.by_feature.sum(_decode(pairs, self.parameters.weights.decoder, len(z)))
        if auxk.target == "reconstruction":
            return pairs, (output - y).mul_(auxk.coefficient * 2 / (count * z.shape[1]))
        # (output - residual)^2 / residual^2, and the residual is minus the error
        residual_square = float(ranks.by_token.sum(square))
        return pairs, (output + error).mul_(auxk.coefficient * 2 / max(residual_square, 1e-30))

    def _top_k_of_dead(self, dead: Int[Tensor, " dead"], z: Float[Tensor, "token width"], k: int) -> CooCodes:
        """Return the k largest scores among the dead features for every token."""
        scores = self.parameters.scores
        search = EncoderSearch(scores.rows[dead], None if scores.bias is None else scores.bias[dead])
        pairs = _top_k(search, z, k, self.config.relu, self.ranks)
        return pairs._replace(features=dead[pairs.features])

    def _inputs(
        self, selection: ActivePairs, auxk: CooCodes | None, errors: BatchErrors, z: Float[Tensor, "token width"]
    ) -> UpdateInputs:
        """Return the inputs of the update, gathered from the ranks that encode other tokens, sorted by feature."""
        pairs, layers, jump = selection.pairs, self._layer_of(selection.pairs), selection.jump
        if auxk is not None:
            pairs = CooCodes(*(torch.cat(columns) for columns in zip(pairs, auxk, strict=True)))
            layers = torch.cat([layers, torch.full_like(auxk.features, len(errors.layers) - 1)])
            if jump is not None:
                zeros = torch.zeros_like(auxk.values)
                auxk_jump = JumpGradients(zeros == 0, zeros, zeros)
                jump = JumpGradients(*(torch.cat(columns) for columns in zip(jump, auxk_jump, strict=True)))
        ranks = self.ranks.by_token
        gather, first_token = ranks.gather, sum(ranks.gather_counts(len(z))[: ranks.rank])
        tokens = gather(pairs.tokens + first_token)
        features, order = torch.sort(gather(pairs.features), stable=True)
        stacked = errors.layers[0] if len(errors.layers) == 1 else torch.stack(errors.layers, dim=1).flatten(0, 1)
        return UpdateInputs(
            features=features,
            tokens=tokens[order],
            rows=(tokens * len(errors.layers) + gather(layers))[order],
            values=gather(pairs.values)[order],
            jump=None if jump is None else JumpGradients(*(gather(column)[order] for column in jump)),
            z=gather(z),
            errors=gather(stacked),
            bias=ranks.sum(errors.bias),
        )

    def _count_firings(self, selection: ActivePairs, count: int) -> float:
        """Count the update and the features that fired; return the number of pairs that fired."""
        pairs = selection.pairs
        fired = self.ranks.by_token.sum(torch.bincount(pairs.features[pairs.values > 0], minlength=len(self.silence)))
        self.silence = torch.where(fired > 0, 0, self.silence + count)
        self.firings += fired
        self.updates, self.tokens = self.updates + 1, self.tokens + count
        if (threshold := selection.threshold) is not None:
            self.batch_threshold = threshold
            average = threshold if self.inference_threshold is None else self.inference_threshold
            self.inference_threshold = average + THRESHOLD_UPDATE * (threshold - average)
        return float(self.ranks.by_feature.sum(fired.sum()))

    def _dead(self) -> Bool[Tensor, " size"]:
        """Return which features of this rank are dead."""
        return self.silence > self._dead_after

    @property
    def _dead_after(self) -> int:
        """Tokens without firing after which a feature is dead."""
        return DEAD_AFTER if self.config.auxk is None else self.config.auxk.dead_after

    def _layer_of(self, pairs: CooCodes) -> Int[Tensor, " pair"]:
        """Return the shortest prefix that contains the feature of each pair."""
        if not len(self._prefixes):
            return torch.zeros_like(pairs.features)
        return torch.bucketize(pairs.features + self._first_feature, self._prefixes, right=True)


def initial_weights(config: TrainingConfig, z: Float[Tensor, "token width"]) -> SAEWeights:
    """Return the weights before the first update; `z`, some normalised tokens, determines the bias and the thresholds."""
    decoder = _initial_directions(config, z.shape[1]).to(z.device)
    encoder = decoder * config.initialisation.gain
    bias = _initial_bias(config, z)
    zeros = torch.zeros(config.size, device=z.device)
    thresholds = None
    if config.kind == "jumprelu":
        # The threshold at which k features fire on average with these weights.
        largest = EncoderSearch(encoder).top_k(z - bias, min(2 * config.k, config.size)).values.flatten()
        thresholds = torch.full_like(zeros, max(0.0, _smallest_of_largest(largest, len(z) * config.k)))
    return SAEWeights(
        encoder=encoder,
        decoder=decoder,
        bias=bias,
        pre_bias=torch.zeros_like(bias) if config.pre_bias else None,
        encoder_bias=zeros if config.encoder_bias else None,
        thresholds=thresholds,
    )


def geometric_median(z: Float[Tensor, "token width"], rounds: int = 100) -> Float[Tensor, " width"]:
    """Return the point with the smallest summed distance to the rows of `z` (Weiszfeld's iteration, in float64)."""
    z = z.double()
    median = z.mean(0)
    for _ in range(rounds):
        weights = 1 / torch.linalg.vector_norm(z - median, dim=1).clamp_min(1e-12)
        moved = weights @ z / weights.sum()
        if torch.linalg.vector_norm(moved - median) <= 1e-9 * torch.linalg.vector_norm(moved):
            break
        median = moved
    return median.float()


def _initial_directions(config: TrainingConfig, width: int) -> Float[Tensor, "size width"]:
    generator = torch.Generator().manual_seed(config.initialisation.seed)
    rows = torch.randn(config.size, width, generator=generator)
    if config.initialisation.directions == "orthogonal":
        rows = torch.linalg.qr(rows).Q if config.size >= width else torch.linalg.qr(rows.T).Q.T
    return F.normalize(rows, dim=1).contiguous()


def _initial_bias(config: TrainingConfig, z: Float[Tensor, "token width"]) -> Float[Tensor, " width"]:
    if config.initialisation.bias == "median":
        return geometric_median(z)
    return z.mean(0) if config.initialisation.bias == "mean" else torch.zeros_like(z[0])


def _top_k(scores: EncoderSearch, z: Float[Tensor, "token width"], k: int, relu: bool, ranks: TrainingRanks) -> CooCodes:
    """Return the k largest scores of every token, on the rank that holds their features."""
    size = len(scores.rows)
    top = scores.top_k(z, min(k, size))
    values, features = top.values, top.indices
    if ranks.by_feature.world_size > 1 and values.shape[1] < k:  # all ranks bring k slots; an empty slot is never selected
        missing = k - values.shape[1]
        values = F.pad(values, (0, missing), value=-torch.inf)
        features = F.pad(features, (0, missing))
    selected = ranks.among_largest(values, k) & (values > (0 if relu else -torch.inf))
    tokens, slots = selected.nonzero(as_tuple=True)
    return CooCodes(tokens, features[tokens, slots], values[tokens, slots])


def _smallest_of_largest(values: Float[Tensor, " value"], count: int) -> float:
    """Return the smallest of the `count` largest values."""
    return float(values.kthvalue(max(1, len(values) - count + 1)).values)


def _decode(pairs: CooCodes, decoder: Float[Tensor, "size width"], count: int) -> Float[Tensor, "token width"]:
    """Return `sum value * decoder[feature]` of each of `count` tokens; pairs are sorted by token."""
    starts = torch.searchsorted(pairs.tokens, torch.arange(count, device=decoder.device))
    return segment_sums(decoder, pairs.features, pairs.values, starts)


def _square(x: Tensor) -> Float[Tensor, ""]:
    """Return the summed squares."""
    return torch.linalg.vector_norm(x).square()
