"""The update that never waits for its device: against the CPU's update, without a GPU where that is possible."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from test_training_update import AUXK, BATCH, CASES, PLAIN, SIZE, WIDTH, batch

from difflex.dictionaries import DictionaryOrigin, Normalisation, SAEWeights
from difflex.errors import NonFinite
from difflex.records import ActivationBatch, Site
from difflex.training import FitConfig, fit
from difflex.training.checkpoint import load_state, save_state
from difflex.training.config import TrainingConfig
from difflex.training.data import TrainingRanks
from difflex.training.gpu import WARM_UPDATES, DeadBound, UpdateEngine
from difflex.training.learner import Learner, initial_weights

DENSE = UpdateEngine(kernels=False, copies=torch.float32)
TOPK = {name: config for name, config in CASES.items() if config.kind == "topk"}


def learner(config: TrainingConfig, engine: UpdateEngine | None, device: str = "cpu") -> Learner:
    weights = initial_weights(config, batch(0).to(device))
    return Learner(config, weights, TrainingRanks(), engine)


@pytest.mark.parametrize("name", TOPK)
def test_the_update_on_a_device_equals_that_of_the_cpu(name: str):
    both = [learner(TOPK[name], None), learner(TOPK[name], DENSE)]
    for number in range(20):
        for each in both:
            each.update(batch(number), 3e-3)
        expected, metrics = (each.metrics for each in both)
        assert expected is not None and metrics is not None
        for field, value in vars(expected).items():
            assert getattr(metrics, field) == pytest.approx(value, rel=1e-4, abs=1e-6)
    for each in both:
        each.parameters.apply_skipped(each.updates)
    for key, matrix in both[0].parameters.matrices.items():
        for part, tensor in matrix.named().items():
            torch.testing.assert_close(both[1].parameters.matrices[key].named()[part], tensor, atol=1e-5, rtol=1e-4)
    assert torch.equal(both[0].silence, both[1].silence)
    assert torch.equal(both[0].firings, both[1].firings)


def test_the_loss_with_bfloat16_copies_stays_close():
    config = replace(PLAIN, size=512, k=8)
    both = [learner(config, None), learner(config, UpdateEngine(kernels=False))]
    for number in range(20):
        for each in both:
            each.update(batch(number, count=512), 1e-3)
        expected, metrics = (each.metrics for each in both)
        assert expected is not None and metrics is not None
        assert metrics.loss == pytest.approx(expected.loss, rel=5e-3)


@pytest.mark.skipif(not UpdateEngine.has_triton(), reason="Triton is not installed")
def test_nothing_on_the_path_of_an_update_waits_for_the_device():
    """Tensors on `meta` have no numbers: whatever would wait for one raises an error."""
    from difflex.training import fused

    config = replace(TOPK["lazy with pre-bias"], size=512, k=4, auxk=AUXK)
    shapes = {name: tensor.shape for name, tensor in initial_weights(config, batch(0)).tensors().items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    on_meta = Learner(config, SAEWeights.from_tensors(tensors), TrainingRanks(), UpdateEngine(kernels=True))
    launches: list[str] = []
    with (
        patch.object(DeadBound, "room", return_value=32),
        patch.object(fused, "launch", lambda kernel, *_, **__: launches.append(kernel.__name__)),
    ):
        on_meta.update(torch.empty(256, WIDTH, device="meta"), 1e-3, measure=False)
        assert {"choose_candidates", "sum_segments", "measure_rows", "update_rows", "update_vector"} <= set(launches)
        with pytest.raises(RuntimeError, match="meta"):
            on_meta.update(torch.empty(256, WIDTH, device="meta"), 1e-3)


def test_a_training_goes_on_where_no_graph_can_be_captured():
    expected, without = learner(PLAIN, DENSE), learner(PLAIN, DENSE)
    assert without._on_device is not None
    without._on_device._warm = 0
    for number in range(6):
        expected.update(batch(number), 1e-3)
        if number == WARM_UPDATES:
            with (
                patch("torch.cuda.CUDAGraph", side_effect=RuntimeError("out of graphs")),
                pytest.warns(UserWarning, match="without a CUDA graph.*out of graphs"),
            ):
                without.update(batch(number), 1e-3)
        else:
            without.update(batch(number), 1e-3)
    assert torch.equal(expected.parameters.weights.encoder, without.parameters.weights.encoder)


def test_graphs_share_the_memory_of_those_in_use_but_not_of_those_that_are_gone():
    """CUDA forgets the memory of graphs with the last of them: naming it again is an error."""
    pools = iter(range(10))

    class Graph:
        number = -1

        def pool(self) -> int:
            return self.number

    def capture(graph: Graph, pool: int | None, **_: str) -> nullcontext[None]:
        graph.number = next(pools) if pool is None else pool
        return nullcontext()

    learners = [learner(PLAIN, DENSE) for _ in range(3)]
    with patch("torch.cuda.CUDAGraph", Graph), patch("torch.cuda.graph", capture):
        graphs = [each._on_device._captured(batch(0), 0) for each in learners[:2] if each._on_device is not None]
        assert [graph.pool() for graph in graphs] == [0, 0]
        del graphs[0]
        graphs += [each._on_device._captured(batch(0), 0) for each in learners[2:] if each._on_device is not None]
        assert [graph.pool() for graph in graphs] == [0, 0]
        graphs.clear()
        last = learners[0]._on_device
        assert last is not None and last._captured(batch(0), 0).pool() == 1


def test_a_captured_update_reads_every_new_batch_number_and_rate():
    """A graph repeats what was launched with the tensors of its capture: here the update with the host's values of that time."""
    expected, replayed = learner(TOPK["lazy auxk"], DENSE), learner(TOPK["lazy auxk"], DENSE)
    on_device = replayed._on_device
    assert on_device is not None
    on_device._warm = 0

    def captured(centred: torch.Tensor, room: int) -> SimpleNamespace:
        return SimpleNamespace(replay=lambda: on_device._run(centred, room))

    with patch.object(on_device, "_captured", captured):
        for number in range(10):
            for each in (expected, replayed):
                each.update(batch(number), 1e-3 / (1 + number))
    assert on_device._graph is not None
    assert torch.equal(expected.parameters.weights.encoder, replayed.parameters.weights.encoder)


def test_a_loss_that_is_not_finite_stops_the_updates_and_is_raised_when_measured():
    stopped, expected = learner(PLAIN, DENSE), learner(PLAIN, DENSE)
    for number in range(4):
        z = batch(number)
        if number < 2:
            expected.update(z, 1e-3)
        else:
            z[3] = math.nan if number == 2 else z[3]
        stopped.update(z, 1e-3, measure=False)
    assert not stopped.is_finite()
    with pytest.raises(NonFinite):
        stopped.update(batch(4), 1e-3)
    assert stopped.updates == 2
    for name, tensor in expected.parameters.weights.tensors().items():
        assert torch.equal(tensor, stopped.parameters.weights.tensors()[name])


def test_rows_that_fail_every_sae_on_a_device_are_named(tmp_path: Path):
    def poisoned(start: int) -> Iterator[ActivationBatch]:
        for number in count(start):
            values = batch(number)
            values[5, 3] = math.nan if number == 12 else values[5, 3]
            yield ActivationBatch(values, torch.arange(len(values)) + 100, torch.zeros(len(values), dtype=torch.long))

    def with_engine(*arguments: object) -> Learner:
        return Learner(*arguments, engine=DENSE)  # pyright: ignore[reportArgumentType]

    config = FitConfig(tokens=20 * BATCH, log_every=5, checkpoint_every=5, progress=False)
    places = {tmp_path / name: replace(PLAIN, normalisation="none") for name in ("first", "second")}
    with patch("difflex.training.fitting.Learner", with_engine), pytest.raises(NonFinite, match=r"Batch 12 holds NaN.*shot 105"):
        fit(places, poisoned, origin=DictionaryOrigin(site=Site("double.1")), config=config)


def test_a_resumed_training_equals_one_that_was_never_stopped(tmp_path: Path):
    config, path = replace(TOPK["lazy auxk"], auxk=replace(AUXK, dead_after=2 * BATCH)), tmp_path / "state.safetensors"
    whole, first = learner(config, DENSE), learner(config, DENSE)
    for number in range(6):
        whole.update(batch(number), 3e-3)
        if number < 3:
            first.update(batch(number), 3e-3)
    save_state(path, first, Normalisation.identity(WIDTH), "data")

    def with_engine(*arguments: object) -> Learner:
        return Learner(*arguments, engine=DENSE)  # pyright: ignore[reportArgumentType]

    with patch("difflex.training.checkpoint.Learner", with_engine):
        state = load_state(path, config, "data", TrainingRanks(), torch.device("cpu"))
    assert state is not None
    for number in range(3, 6):
        state[0].update(batch(number), 3e-3)
    for name, tensor in whole.parameters.weights.tensors().items():
        torch.testing.assert_close(state[0].parameters.weights.tensors()[name], tensor, atol=1e-6, rtol=1e-6)
    assert torch.equal(state[0].silence, whole.silence)


def test_the_bound_of_dead_features_is_never_too_small():
    silence, generator = torch.zeros(200, dtype=torch.long), torch.Generator().manual_seed(0)
    bound, rooms = DeadBound(replace(AUXK, dead_after=1000), silence), []
    for number in range(300):
        rooms.append((bound.room(number * 30, 60), int((silence > 1000).sum())))
        silence.add_(30).mul_(torch.rand(200, generator=generator) > torch.linspace(0, 0.2, 200))
    assert all(room >= dead for room, dead in rooms)
    assert rooms[0][0] == 0 < rooms[-1][1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lazy with pre-bias", "topk auxk", "lazy auxk"])
def test_kernels_and_graphs_equal_the_dense_update_without_waiting(name: str):
    config = replace(TOPK[name], size=32 * SIZE, k=16)
    fused, dense = learner(config, UpdateEngine(True), "cuda"), learner(config, UpdateEngine(False), "cuda")
    batches = [batch(number, count=256).cuda() for number in range(12)]
    for number, z in enumerate(batches):
        dense.update(z, 3e-3)
        torch.cuda.set_sync_debug_mode("error" if number > 5 else "default")  # the first compile, the fourth captures
        fused.update(z, 3e-3, measure=False)
        torch.cuda.set_sync_debug_mode("default")
    fused.update(batches[0], 3e-3)
    dense.update(batches[0], 3e-3)
    assert fused.metrics is not None and dense.metrics is not None
    assert fused.metrics.loss == pytest.approx(dense.metrics.loss, rel=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_every_kind_trains_on_a_gpu_as_on_the_cpu(name: str):
    config = replace(CASES[name], auxk=CASES[name].auxk and replace(AUXK, dead_after=4 * BATCH))
    both = [learner(config, None, device) for device in ("cpu", "cuda")]
    for number in range(20):
        losses = []
        for each, device in zip(both, ("cpu", "cuda"), strict=True):
            each.update(batch(number).to(device), 1e-3)
            assert each.metrics is not None
            losses.append(each.metrics.loss)
        assert losses[1] == pytest.approx(losses[0], rel=1e-2)
