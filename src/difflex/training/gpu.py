"""An update of a TopK SAE on a device, without waiting for it: shapes are fixed, and numbers stay there until they are read.

The host gives the learning rate and the number of the update; on CUDA the rest is captured in a graph once the same shapes have
come a few times. Whether features are dead, for AuxK, is known on the device alone. The host knows a bound of their number from
before, and the update makes room for so many: none, or a power of 2.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, final
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from difflex.training.config import AuxKLoss, TrainingConfig
from difflex.training.operations import DenseOperations, DeviceState, SortedPairs, TokenPairs, UpdateOperations
from difflex.training.update import SAEParameters

WARM_UPDATES = 3
"""Updates of the same shapes before a graph is captured: by then all kernels are compiled."""
HORIZON = 64
"""Updates for which a bound of the number of dead features is computed, at most."""
_GRAPHS: dict[torch.device, WeakSet[Any]] = defaultdict(WeakSet)
"""The graphs in use on each device. They share their memory: one runs at a time, and none leaves anything there."""


class DeviceMetrics(NamedTuple):
    """What was measured on the device, over a batch."""

    square: float
    """The summed squared error."""
    variance: float
    """The summed squared distance from the mean."""
    fired: float
    """The number of pairs that fired."""
    dead: float
    """The number of dead features."""
    gradient: float
    """The norm of the gradient before clipping."""


class ErrorLayer(NamedTuple):
    """Pairs that share a loss."""

    pairs: TokenPairs
    scale: float | Tensor
    """The factor of their errors."""


class UpdateEngine(NamedTuple):
    """How an update is computed on a device."""

    kernels: bool
    """In Triton kernels; otherwise in dense products."""
    copies: torch.dtype = torch.bfloat16
    """The type of the copies that products and gathers read."""

    @classmethod
    def of(cls, device: torch.device) -> UpdateEngine:
        """Return the fastest engine for a device."""
        return cls(kernels=device.type == "cuda" and cls.has_triton())

    @staticmethod
    def has_triton() -> bool:
        """Return whether Triton is installed."""
        return find_spec("triton") is not None

    def operations(self, state: DeviceState) -> UpdateOperations[Any]:
        """Return its operations; Triton is imported only if it is used."""
        return import_module("difflex.training.fused").FusedOperations(state) if self.kernels else DenseOperations(state)


@final
class DeviceUpdate:
    """The updates of one SAE on a device, with what they keep there."""

    def __init__(
        self,
        config: TrainingConfig,
        parameters: SAEParameters,
        counts: tuple[Int[Tensor, " size"], Int[Tensor, " size"]],
        dead_after: int,
        engine: UpdateEngine,
    ) -> None:
        """`counts` are the silence and the firings of each feature, updated in place."""
        device = parameters.weights.encoder.device
        self._config, self._parameters, self._dead_after = config, parameters, dead_after
        self._silence, self._firings = counts
        self._state = DeviceState.of(config, parameters, engine.copies)
        self._operations = engine.operations(self._state)
        self._wide = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(3, dtype=self._wide, device=device)
        self._bound = DeadBound(config.auxk, self._silence)
        self._centred: Tensor | None = None
        self._places: dict[tuple[torch.Size, ...], PairPlaces] = {}
        self._graph: Any = None
        self._shapes: tuple[int, int] | None = None
        self._warm = 0 if device.type == "cuda" else -(1 << 62)

    def update(self, z: Float[Tensor, "token width"], learning_rate: float, *, number: int, tokens: int) -> None:
        """Make update `number`, from 1, after `tokens` tokens."""
        adam, state = self._config.optimiser, self._state
        state.number.fill_(number)
        state.controls[0].fill_(learning_rate / (1 - adam.beta1**number))
        state.controls[1].fill_((1 - adam.beta2**number) ** -0.5)
        with _device_of(z):
            room = self._bound.room(tokens, len(z))
            if self._centred is None or self._centred.shape != z.shape:
                self._centred, self._graph = torch.empty_like(z), None
            torch.sub(z, self._parameters.weights.bias, out=self._centred)
            if self._shapes != (len(z), room):
                self._shapes, self._graph, self._warm = (len(z), room), None, min(self._warm, 0)
            if self._graph is None and self._warm >= WARM_UPDATES:
                self._graph = self._captured(self._centred, room)
            if self._graph is not None:
                self._graph.replay()
            else:
                self._run(self._centred, room)
                self._warm += 1

    def read(self) -> tuple[DeviceMetrics, int]:
        """Return the metrics of the last update, and the first update whose loss was not finite, or 0: this waits."""
        z, (square, fired, square_of_vectors) = self._centred, self._sums.unbind()
        if z is None:
            return DeviceMetrics(0, 0, 0, 0, 0), 0
        variance = (z.square().sum() - z.sum(0).square().sum() / len(z)).to(self._wide)
        gradient = (self._state.squares.sum() + square_of_vectors).sqrt()
        dead = (self._silence > self._dead_after).sum()
        numbers = (square, variance, fired, dead, gradient, self._state.failed)
        *metrics, failed = torch.stack([number.to(self._wide) for number in numbers]).tolist()
        return DeviceMetrics(*metrics), int(failed)

    def _captured(self, centred: Tensor, room: int) -> Any:
        """Return a graph of the update; None if it cannot be captured."""
        try:
            graph, graphs = torch.cuda.CUDAGraph(), _GRAPHS[centred.device]
            other = next(iter(graphs), None)  # memory whose last graph is gone cannot be named any more
            pool = None if other is None else other.pool()
            # Other threads may use the GPU meanwhile, for example to harvest.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._run(centred, room)
        except RuntimeError as error:
            warnings.warn(f"Training goes on without a CUDA graph, somewhat slower: {error}", stacklevel=2)
            self._warm = -(1 << 62)
            return None
        graphs.add(graph)
        return graph

    def _run(self, centred: Float[Tensor, "token width"], room: int) -> None:
        """Update all weights from a batch, with room for so many dead features."""
        config, state, operations, weights = self._config, self._state, self._operations, self._parameters.weights
        z = centred if weights.pre_bias is None else centred + weights.pre_bias
        copy = z.to(state.encoder.dtype)
        pairs = self._selected(operations.top_k(z, copy, config.k))
        errors, square = operations.decode(pairs, centred, -1.0)
        scale = 2 / centred.numel()
        bias = errors.sum(0, dtype=torch.float32) * scale
        layers = [ErrorLayer(pairs, scale)]
        if room and config.auxk is not None:
            layer, output = self._auxk(config.auxk, room, z, copy, centred, errors, square)
            if config.auxk.target == "reconstruction":  # the gradient flows into the target, which is made of all features
                any_dead = (self._silence > self._dead_after).any()
                errors = errors - output * (any_dead * config.auxk.coefficient)
            layers, errors = [*layers, layer], torch.cat([errors, output])
        not_finite = (state.failed == 0) & (square * 0 != 0)
        state.failed.copy_(torch.where(not_finite, state.number, state.failed))
        sorted_pairs, fired, pulls = self._sort(layers, errors)
        by_scores = operations.weighted_rows(pulls)
        vectors = {"bias": bias - by_scores} | ({} if weights.pre_bias is None else {"pre_bias": by_scores})
        if weights.encoder_bias is not None:
            vectors["encoder_bias"] = pulls
        square_of_vectors = torch.stack([gradient.square().sum() for gradient in vectors.values()]).sum()
        source = operations.source(sorted_pairs, copy, errors)
        self._clip(sorted_pairs, copy, errors, square_of_vectors, source)
        state.squares.zero_()
        for name, gradient in vectors.items():
            operations.update_vector(name, gradient, sorted_pairs.starts if name == "encoder_bias" and state.is_lazy else None)
        operations.update_rows(source)
        self._silence.add_(len(centred)).mul_(fired == 0)
        self._firings.add_(fired)
        self._sums.copy_(torch.stack([square.to(self._wide), fired.sum().to(self._wide), square_of_vectors.to(self._wide)]))

    def _selected(self, top: TokenPairs) -> TokenPairs:
        """Empty the slots whose feature does not fire."""
        active = top.values > (0 if self._config.relu else -torch.inf)
        return TokenPairs(torch.where(active, top.features, self._state.size), torch.where(active, top.values, 0.0))

    def _auxk(
        self, auxk: AuxKLoss, room: int, z: Tensor, copy: Tensor, centred: Tensor, errors: Tensor, square: Tensor
    ) -> tuple[ErrorLayer, Float[Tensor, "token width"]]:
        """Return the pairs of dead features with the scale of their errors, and the errors."""
        pairs = self._selected(self._top_of_dead(min(auxk.k, room), room, z, copy))
        if auxk.target == "reconstruction":
            output, _ = self._operations.decode(pairs, errors.float() + centred, -1.0)
            return ErrorLayer(pairs, auxk.coefficient * 2 / centred.numel()), output
        output, _ = self._operations.decode(pairs, errors, 1.0)
        return ErrorLayer(pairs, auxk.coefficient * 2 / square.clamp_min(1e-30)), output

    def _top_of_dead(self, k: int, room: int, z: Float[Tensor, "token width"], copy: Float[Tensor, "token width"]) -> TokenPairs:
        """Return the k dead features with the largest rounded scores, and their scores."""
        state, bias, size = self._state, self._parameters.weights.encoder_bias, self._state.size
        dead = self._silence > self._dead_after
        place = torch.where(dead, dead.cumsum(0) - 1, room).clamp_max(room)
        features = torch.arange(size, dtype=torch.int32, device=z.device)
        listed = features.new_full((room + 1,), size).scatter_(0, place, features)[:room]
        rows = listed.clamp_max(size - 1)
        offset = torch.where(listed < size, 0.0 if bias is None else bias[rows], -torch.inf).to(copy.dtype)
        encoder = state.encoder[rows]
        slots = torch.cat([torch.addmm(offset, copy[chunk], encoder.T).topk(k).indices for chunk in state.chunks(len(z), room)])
        chosen = listed[slots]
        return TokenPairs(chosen, self._operations.scores(chosen, z))

    def _sort(
        self, layers: list[ErrorLayer], errors: Float[Tensor, "row width"]
    ) -> tuple[SortedPairs, Int[Tensor, " size"], Float[Tensor, " size"]]:
        """Return all pairs sorted by feature, and the firings and the summed score gradients of each feature."""
        shapes = tuple(layer.pairs.features.shape for layer in layers)
        if shapes not in self._places:
            self._places = {shapes: _places(shapes, self._state.size, errors.device)}
        places, parts = self._places[shapes], errors.split([count for count, _ in shapes])
        of_layers = [
            self._operations.pulls(pairs.features, part) * scale for (pairs, scale), part in zip(layers, parts, strict=True)
        ]
        features, order = torch.sort(_join([pairs.features for pairs, _ in layers]), stable=True)
        pulls, fires = _join(of_layers)[order], _join([pairs.values for pairs, _ in layers[:1]]) > 0
        values = _join([pairs.values * scale for pairs, scale in layers])[order]
        fires = F.pad(fires, (0, len(order) - len(fires)))[order]  # the pairs of AuxK are not counted
        tokens, starts = places.tokens[order], torch.searchsorted(features, places.edges, out_int32=True)
        rows = places.rows[order] if len(layers) > 1 else tokens
        sums = torch.stack([pulls.to(self._wide), fires.to(self._wide)]).cumsum(1)
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)[:, starts]
        of_pulls, fired = (before[:, 1:] - before[:, :-1]).unbind()
        return SortedPairs(features, starts, tokens, rows, values, pulls), fired.long(), of_pulls.float()

    def _clip(self, pairs: SortedPairs, z: Tensor, errors: Tensor, square_of_vectors: Float[Tensor, ""], source: object) -> None:
        """Write the factor that clips the gradient. Its norm is measured only if a bound is above the clip, on the device too."""
        clip, state = self._config.optimiser.clip, self._state
        if clip is None:
            return
        # Rows of a feature's gradient are of different tokens, so that Cauchy-Schwarz bounds them by sums over all tokens.
        decoder = pairs.values.square().sum() * errors.float().square().sum()
        encoder = pairs.pulls.square().sum() * z.float().square().sum() * (len(errors) // len(z))
        needed = (decoder + encoder + square_of_vectors > clip**2).int()
        state.squares.zero_()
        self._operations.measure_rows(source, needed)
        norm = (state.squares.sum() + square_of_vectors).sqrt()
        state.controls[2].copy_(torch.where(needed > 0, (clip / norm.clamp_min(1e-30)).clamp_max(1.0), 1.0))


class PairPlaces(NamedTuple):
    """What depends on the shapes of the pairs alone."""

    tokens: Int[Tensor, " pair"]
    rows: Int[Tensor, " pair"]
    edges: Int[Tensor, " edge"]
    """All features, and the number of them."""


def _places(shapes: tuple[torch.Size, ...], size: int, device: torch.device) -> PairPlaces:
    """Return the places of pairs, slot by slot and layer by layer."""
    tokens = [torch.arange(shape.numel(), dtype=torch.int32, device=device) // shape[1] for shape in shapes]
    rows = torch.cat([tokens[number] + number * shape[0] for number, shape in enumerate(shapes)])
    return PairPlaces(torch.cat(tokens), rows, torch.arange(size + 1, dtype=torch.int32, device=device))


def _join(parts: list[Tensor]) -> Tensor:
    """Return all entries as one vector."""
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


@final
class DeadBound:
    """An upper bound of the number of dead features, known on the host without waiting for the device.

    Features that die within the next tokens have been silent for long already. Counted together with the dead ones, they bound
    the number of dead features until then. The next count is copied to the host while the last one still holds.
    """

    def __init__(self, auxk: AuxKLoss | None, silence: Int[Tensor, " size"]) -> None:
        """Without AuxK, no bound is needed."""
        self._auxk, self._silence = auxk, silence
        self._room, self._until = 0, -1
        self._coming: tuple[Tensor, Any, int] | None = None

    def room(self, tokens: int, count: int) -> int:
        """Return a power of 2 that is no less than the number of dead features in the update after `tokens` tokens, or 0."""
        if self._auxk is None:
            return 0
        horizon = max(count, min(HORIZON * count, self._auxk.dead_after // 2))
        if self._coming is None and tokens + horizon // 2 >= self._until:
            self._request(tokens, horizon)
        if self._coming is not None and (tokens > self._until or self._coming[1] is None or self._coming[1].query()):
            bound, event, self._until = self._coming
            if event is not None:
                event.synchronize()
            self._coming, number = None, int(bound)
            self._room = min(len(self._silence), max(32, 1 << (number - 1).bit_length())) if number else 0
        return self._room

    def _request(self, tokens: int, horizon: int) -> None:
        """Count on the device the features that may be dead until `horizon` more tokens have come, and copy the count."""
        assert self._auxk is not None
        number, event = (self._silence + horizon > self._auxk.dead_after).sum(), None
        if number.device.type == "cuda":
            number = torch.empty((), dtype=torch.long, pin_memory=True).copy_(number, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._coming = (number, event, tokens + horizon)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return the context in which kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
