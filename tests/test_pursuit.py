"""Pursuits: every fast path equals a plain formula in float64, whatever the data."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from other_device import other_device
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor
from torch.nn import functional as F

from difflex.choices import PursuitName
from difflex.dictionaries.pursuit import (
    EXACT_POOL,
    RULES,
    AtomSet,
    CandidatePool,
    GramMatrix,
    PursuitBackend,
    PursuitPath,
    choose_backend,
    product,
    pursue,
    run_pursuit,
)
from difflex.dictionaries.pursuit.algorithms import PursuitState, run_rounds
from difflex.errors import BadInput, NonFinite

WIDTH, SIZE, COUNT = 24, 96, 24


def planted(seed: int = 0, size: int = SIZE, width: int = WIDTH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Signals that are noisy sums of data-like atoms with both signs, and the atoms."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(width, generator=generator, dtype=torch.float64)
    atoms = F.normalize(torch.randn(size, width, generator=generator, dtype=torch.float64) + 0.5 * shared, dim=1)
    picks = torch.randint(size, (COUNT, 6), generator=generator)
    weights = torch.randn(COUNT, 6, generator=generator, dtype=torch.float64) + 0.5
    noise = torch.randn(COUNT, width, generator=generator, dtype=torch.float64)
    return ((weights[:, :, None] * atoms[picks]).sum(1) + 0.2 * noise).to(dtype), atoms.to(dtype)


def dense(path: PursuitPath, size: int) -> Tensor:
    """The codes as a dense [token, size] matrix."""
    codes = path.codes
    return torch.zeros(len(codes.values), size, dtype=codes.values.dtype).scatter_add_(1, codes.indices, codes.values)


def plain_gradient_pursuit(x: Tensor, atoms: Tensor, k: int, signed: bool) -> Tensor:
    """One signal's weights, written from Blumensath and Davies 2008, sections II (selection) and III (directional update)."""
    weights, support = torch.zeros(len(atoms), dtype=x.dtype), []
    for _ in range(k):
        residual = x - weights @ atoms
        correlations = atoms @ residual
        picked = int((correlations.abs() if signed else correlations).argmax())
        support = sorted({*support, picked})
        direction = torch.zeros_like(weights)
        direction[support] = correlations[support]  # the gradient on the support
        c = direction @ atoms
        step = (residual @ c) / (c @ c)
        weights = weights + step * direction
        if not signed:
            weights = weights.clamp_min(0)
    return weights


def plain_matching_pursuit(x: Tensor, atoms: Tensor, k: int, signed: bool) -> Tensor:
    weights = torch.zeros(len(atoms), dtype=x.dtype)
    for _ in range(k):
        correlations = atoms @ (x - weights @ atoms)
        picked = int((correlations.abs() if signed else correlations).argmax())
        weights[picked] += correlations[picked] if signed else correlations[picked].clamp_min(0)
    return weights


def plain_orthogonal_pursuit(x: Tensor, atoms: Tensor, k: int) -> Tensor:
    weights, support = torch.zeros(len(atoms), dtype=x.dtype), []
    for _ in range(k):
        support.append(int((atoms @ (x - weights @ atoms)).abs().argmax()))
        weights = torch.zeros_like(weights)
        weights[support] = torch.linalg.lstsq(atoms[support].T, x[:, None]).solution[:, 0]
    return weights


PLAIN: dict[PursuitName, Callable[[Tensor, Tensor, int], Tensor]] = {
    "orthogonal": plain_orthogonal_pursuit,
    "gradient": partial(plain_gradient_pursuit, signed=False),
    "signed-gradient": partial(plain_gradient_pursuit, signed=True),
    "matching": partial(plain_matching_pursuit, signed=True),
    "positive-matching": partial(plain_matching_pursuit, signed=False),
}
EVERY_PURSUIT = pytest.mark.parametrize("pursuit", RULES)


@EVERY_PURSUIT
@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_every_pursuit_equals_its_plain_formula_in_float64(pursuit: PursuitName, with_gram: bool, k: int):
    signals, atoms = planted()
    path = pursue(signals, atoms, k, pursuit, gram=GramMatrix.of(atoms, panel=40) if with_gram else None)
    expected = torch.stack([PLAIN[pursuit](x, atoms, k) for x in signals])
    torch.testing.assert_close(dense(path, SIZE), expected, atol=1e-9, rtol=1e-9)
    unexplained = (signals - expected @ atoms).square().sum(1) / signals.square().sum(1)
    torch.testing.assert_close(path.unexplained, unexplained, atol=1e-9, rtol=1e-9)


@EVERY_PURSUIT
def test_single_precision_explains_as_much_as_double(pursuit: PursuitName):
    signals, atoms = planted()
    path = pursue(signals.float(), atoms.float(), 10, pursuit, gram=GramMatrix.of(atoms.float()))
    expected = torch.stack([PLAIN[pursuit](x, atoms, 10) for x in signals])
    unexplained = (signals - expected @ atoms).square().sum() / signals.square().sum()
    in_single = (signals - dense(path, SIZE).double() @ atoms).square().sum() / signals.square().sum()
    assert float(in_single) == pytest.approx(float(unexplained), rel=1e-3)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_orthogonal_pursuit_equals_scikit_learn(k: int):
    signals, atoms = planted(seed=1)
    gram = (atoms @ atoms.T).numpy()
    expected = orthogonal_mp_gram(gram, (atoms @ signals.T).numpy(), n_nonzero_coefs=k, copy_Gram=True, copy_Xy=True)
    weights = dense(pursue(signals, atoms, k, "orthogonal", gram=GramMatrix.of(atoms)), SIZE)
    np.testing.assert_allclose(weights.numpy(), np.asarray(expected).T, atol=1e-8)


@EVERY_PURSUIT
def test_no_more_than_k_atoms_are_used_and_none_twice(pursuit: PursuitName):
    signals, atoms = planted()
    codes = pursue(signals, atoms, 7, pursuit).codes
    assert codes.values.shape == codes.indices.shape == (COUNT, 7)
    for values, indices in zip(codes.values, codes.indices, strict=True):
        used = indices[values != 0].tolist()
        assert len(used) == len(set(used))


def test_orthogonal_pursuit_keeps_exactly_k_features():
    signals, atoms = planted()
    assert (pursue(signals, atoms, 9, "orthogonal").codes.values != 0).sum(1).eq(9).all()


@EVERY_PURSUIT
def test_a_pursuit_stops_at_the_tolerance(pursuit: PursuitName):
    signals, atoms = planted()
    by_round = torch.stack([pursue(signals, atoms, k, pursuit).unexplained for k in range(1, 13)], 1)
    enough = by_round <= 0.3
    first = torch.where(enough.any(1), enough.int().argmax(1), 11)
    path = pursue(signals, atoms, 12, pursuit, tolerance=0.3)
    torch.testing.assert_close(path.unexplained, by_round.gather(1, first[:, None])[:, 0], atol=1e-9, rtol=0)
    assert enough.any(1).sum() > COUNT // 2, "too few signals reach the tolerance for the test to mean anything"


@EVERY_PURSUIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_signal_that_is_an_atom_is_explained_by_it_alone(pursuit: PursuitName, dtype: torch.dtype):
    _, atoms = planted(dtype=dtype)
    path = pursue(3 * atoms[:5], atoms, 8, pursuit, gram=GramMatrix.of(atoms))
    assert (path.codes.values != 0).sum(1).eq(1).all()
    assert torch.equal(path.codes.indices[:, 0], torch.arange(5))
    assert (path.unexplained < 1e-5).all()


@EVERY_PURSUIT
def test_zero_signals_get_no_codes_and_zero_atoms_are_never_picked(pursuit: PursuitName):
    signals, atoms = planted()
    signals[3] = 0
    atoms[::2] = 0
    path = pursue(signals, atoms, 60, pursuit, gram=GramMatrix.of(atoms))
    assert torch.isfinite(path.codes.values).all()
    assert path.unexplained[3] == 0
    assert not path.codes.values[3].any()
    assert not dense(path, SIZE)[:, ::2].any()


@EVERY_PURSUIT
def test_duplicate_atoms_share_the_weight_of_the_single_atom(pursuit: PursuitName):
    signals, atoms = planted()
    once = dense(pursue(signals, atoms, 10, pursuit), SIZE)
    twice = dense(pursue(signals, torch.cat([atoms, atoms]), 10, pursuit), 2 * SIZE)
    torch.testing.assert_close(twice[:, :SIZE] + twice[:, SIZE:], once, atol=1e-7, rtol=1e-7)


@EVERY_PURSUIT
def test_more_rounds_than_atoms_do_no_harm(pursuit: PursuitName):
    signals, atoms = planted()
    path = pursue(signals, atoms[:3], 8, pursuit, gram=GramMatrix.of(atoms[:3]))
    assert torch.isfinite(path.codes.values).all()
    assert (path.unexplained <= 1 + 1e-9).all()


@EVERY_PURSUIT
def test_without_signals_codes_are_empty_and_without_atoms_nothing_is_explained(pursuit: PursuitName):
    signals, atoms = planted()
    assert pursue(signals[:0], atoms, 4, pursuit).codes.values.shape == (0, 4)
    assert pursue(signals, atoms[:0], 4, pursuit).unexplained.eq(1).all()


def test_positive_pursuits_have_no_negative_weight_and_signed_ones_do():
    signals, atoms = planted()
    assert (pursue(signals, atoms, 12, "gradient").codes.values >= 0).all()
    assert (pursue(signals, atoms, 12, "positive-matching").codes.values >= 0).all()
    assert (pursue(signals, atoms, 12, "signed-gradient").codes.values < 0).any()
    assert (pursue(signals, atoms, 12, "matching").codes.values < 0).any()


@EVERY_PURSUIT
def test_a_gram_matrix_in_half_precision_explains_nearly_as_much(pursuit: PursuitName):
    signals, atoms = planted(size=512, width=128, dtype=torch.float32)
    whole, half = (
        pursue(signals, atoms, 10, pursuit, gram=GramMatrix.of(atoms, dtype)) for dtype in (torch.float32, torch.float16)
    )
    residuals = [(signals - dense(path, 512) @ atoms).square().sum() for path in (whole, half)]
    assert float(residuals[1] / residuals[0]) == pytest.approx(1, abs=0.005)


def test_a_pool_of_all_atoms_or_of_one_round_is_exact_and_a_small_one_nearly():
    signals, atoms = planted(size=512, width=128)
    exact = pursue(signals, atoms, 8)
    for pool in (CandidatePool(rounds=1, atoms=4), CandidatePool(rounds=4, atoms=512)):
        torch.testing.assert_close(pursue(signals, atoms, 8, pool=pool).unexplained, exact.unexplained)
    small = pursue(signals, atoms, 8, pool=CandidatePool(rounds=4, atoms=32))
    assert 1 < float(small.unexplained.mean() / exact.unexplained.mean()) < 1.05


def half_atoms(atoms: Tensor, pool: CandidatePool) -> AtomSet:
    """The atoms as a GPU has them."""
    return AtomSet(atoms, pool=pool, half=AtomSet.half_rows(atoms))


@EVERY_PURSUIT
@pytest.mark.parametrize("size", [SIZE, 4 * SIZE + 64])
def test_a_pursuit_with_products_in_half_precision_equals_its_plain_formula_in_float64(pursuit: PursuitName, size: int):
    signals, atoms = planted(size=size)
    path = run_pursuit(half_atoms(atoms, EXACT_POOL), RULES[pursuit], signals, 12)
    expected = torch.stack([PLAIN[pursuit](x, atoms, 12) for x in signals])
    torch.testing.assert_close(dense(path, size), expected, atol=1e-9, rtol=1e-9)
    unexplained = (signals - expected @ atoms).square().sum(1) / signals.square().sum(1)
    torch.testing.assert_close(path.unexplained, unexplained, atol=1e-9, rtol=1e-9)


@EVERY_PURSUIT
def test_the_pool_of_a_gpu_explains_nearly_as_much_as_exact_picks_and_says_how_much(pursuit: PursuitName):
    signals, atoms = planted(size=4096, width=256)
    exact = pursue(signals, atoms, 12, pursuit)
    pool = choose_backend(pursuit, 65_536, 3072, 64, "cuda").pool
    assert pool is not None
    path = run_pursuit(half_atoms(atoms, pool), RULES[pursuit], signals, 12)
    residual = signals - dense(path, 4096) @ atoms
    torch.testing.assert_close(path.unexplained, residual.square().sum(1) / signals.square().sum(1), atol=1e-9, rtol=0)
    assert float(path.residual_energy.sum() / exact.residual_energy.sum()) == pytest.approx(1, abs=0.03)


@EVERY_PURSUIT
@pytest.mark.parametrize("pool", [EXACT_POOL, CandidatePool()])
def test_excluded_atoms_and_padding_are_never_picked_from_a_pool(pursuit: PursuitName, pool: CandidatePool):
    signals, atoms = planted(size=201)
    excluded = torch.rand(COUNT, 150, generator=torch.Generator().manual_seed(3)) < 0.9
    excluded[5] = True
    path = run_pursuit(half_atoms(atoms, pool), RULES[pursuit], signals, 20, excluded=excluded)
    used = dense(path, 201) != 0
    assert not (used[:, 51:] & excluded).any() and used[:, 51:].any() and int(path.support.max()) < 201
    alone = run_pursuit(half_atoms(atoms[:51], pool), RULES[pursuit], signals[5:6], 20)
    torch.testing.assert_close(dense(path, 201)[5, :51], dense(alone, 51)[0])


@EVERY_PURSUIT
def test_signals_that_finish_early_leave_a_pool_and_the_others_stay_the_same(pursuit: PursuitName):
    signals, atoms = planted(size=512)
    together = run_pursuit(half_atoms(atoms, CandidatePool()), RULES[pursuit], signals, 16, tolerance=0.12)
    assert int((together.unexplained <= 0.12).sum()) > COUNT // 4
    for row in (0, 11, 17):
        alone = run_pursuit(half_atoms(atoms, CandidatePool()), RULES[pursuit], signals[row : row + 1], 16, tolerance=0.12)
        torch.testing.assert_close(dense(alone, 512)[0], dense(together, 512)[row], atol=1e-9, rtol=0)


@EVERY_PURSUIT
@pytest.mark.parametrize("size", [16, 512])
def test_a_pursuit_on_another_device_mixes_no_devices_and_finds_the_same(pursuit: PursuitName, size: int):
    signals, atoms = planted(size=size)
    backend = choose_backend(pursuit, 65_536, 3072, 64, "cuda")
    expected = run_pursuit(half_atoms(atoms, backend.pool), RULES[pursuit], signals, 8, tolerance=0.05)  # pyright: ignore
    with other_device() as device:
        there = half_atoms(atoms.to(device), backend.pool)  # pyright: ignore
        path = run_pursuit(there, RULES[pursuit], signals.to(device), 8, tolerance=0.05)
        assert all(part.device == device for part in path)
        codes = dense(PursuitPath(*(part.cpu() for part in path)), size)
    torch.testing.assert_close(codes, dense(expected, size), atol=1e-9, rtol=0)


@EVERY_PURSUIT
def test_a_pursuit_of_real_size_has_fixed_shapes_and_never_waits_for_a_gpu(pursuit: PursuitName):
    """On `meta` anything that needs a value, so waits for a GPU, raises an error."""
    backend, k = choose_backend(pursuit, 65_536, 3072, 64, "cuda"), 8
    atoms, signals = torch.empty(65_536, 3072, device="meta"), torch.empty(1024, 3072, device="meta")
    state = PursuitState.of(signals.square().sum(1), k, RULES[pursuit], with_history=True)
    correlations = AtomSet(atoms, pool=backend.pool, half=AtomSet.half_rows(atoms)).correlations(signals, k)
    run_rounds(state, RULES[pursuit], correlations, k, 0.0)


def test_no_pursuit_on_a_gpu_needs_more_memory_than_a_copy_of_the_atoms_in_half_precision():
    for pursuit in RULES:
        for size in (512, 65_536):
            backend = choose_backend(pursuit, size, 3072, 64, "cuda")
            assert backend.gram is None and backend.memory(size, 3072) == 2 * size * 3072
            assert PursuitBackend.from_json(backend.as_json()) == backend


def test_codes_do_not_depend_on_the_other_signals():
    signals, atoms = planted()
    gram = GramMatrix.of(atoms)
    together = pursue(signals, atoms, 10, gram=gram, tolerance=0.1)
    for row in (0, 17):
        alone = pursue(signals[row : row + 1], atoms, 10, gram=gram, tolerance=0.1)
        torch.testing.assert_close(dense(alone, SIZE)[0], dense(together, SIZE)[row], atol=1e-9, rtol=0)


@pytest.mark.parametrize("panel", [1, 7, 32, 200])
def test_a_grown_gram_matrix_equals_one_computed_at_once(panel: int):
    _, atoms = planted()
    gram = GramMatrix(SIZE, dtype=torch.float64, panel=panel)
    for start, stop in ((0, 1), (1, 40), (40, 41), (41, SIZE)):
        new = atoms[start:stop]
        gram.append(new @ atoms[:start].T, new @ new.T)
    torch.testing.assert_close(gram.rows(torch.arange(SIZE)), atoms @ atoms.T)
    with pytest.raises(BadInput, match="96 atoms has 96; 1 more"):
        gram.append(atoms[:1] @ atoms.T, atoms[:1] @ atoms[:1].T)


def test_the_fast_product_is_as_exact_as_float32_and_restores_the_precision_setting():
    before = torch.get_float32_matmul_precision()
    left, right = torch.randn(2, 50, 700, generator=torch.Generator().manual_seed(3))
    error = (product(left, right) - left.double() @ right.double().T).abs().max()
    assert float(error) < 1e-4
    assert torch.get_float32_matmul_precision() == before


def test_invalid_input_is_refused():
    signals, atoms = planted()
    with pytest.raises(BadInput, match="atom 2 has 3"):
        pursue(signals, torch.cat([atoms[:2], 3 * atoms[2:]]), 4)
    with pytest.raises(BadInput, match="k is 0"):
        pursue(signals, atoms, 0)
    with pytest.raises((BadInput, TypeCheckError), match=r"\[24, ?24\](.|\n)*\[96, ?20\]"):
        pursue(signals, atoms[:, :20], 4)
    with pytest.raises(BadInput, match="of 50 atoms, but there are 96"):
        pursue(signals, atoms, 4, gram=GramMatrix.of(atoms[:50]))
    with pytest.raises(BadInput, match="atom 2 has nan"):
        pursue(signals, torch.cat([atoms[:2], torch.nan * atoms[2:]]), 4)
    with pytest.raises(BadInput, match=r"signals \(torch\.float64\), atoms \(torch\.float32\)"):
        pursue(signals, atoms.float(), 4)
    signals[7, 3] = torch.nan
    with pytest.raises(NonFinite, match="row 7"):
        pursue(signals, atoms, 4)
