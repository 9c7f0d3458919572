"""Pursuits: every fast path equals a plain one in float64, and nothing odd in the data upsets them."""

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.linear_model import orthogonal_mp_gram
from torch import Tensor
from torch.nn import functional as F

from difflex.dictionaries.pursuit import (
    CandidatePool,
    GramMatrix,
    PursuitResult,
    gradient_pursuit,
    matching_pursuit,
    orthogonal_pursuit,
)
from difflex.dictionaries.pursuit.products import product
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


def dense(found: PursuitResult, size: int) -> Tensor:
    """The codes as a dense [token, size] matrix."""
    return torch.zeros(len(found.unexplained), size, dtype=found.codes.values.dtype).scatter_add_(
        1, found.codes.indices, found.codes.values
    )


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


PURSUITS = {
    "gradient": (gradient_pursuit, lambda x, atoms, k: plain_gradient_pursuit(x, atoms, k, signed=False)),
    "signed gradient": (
        lambda *args, **more: gradient_pursuit(*args, signed=True, **more),
        lambda x, atoms, k: plain_gradient_pursuit(x, atoms, k, signed=True),
    ),
    "matching": (matching_pursuit, lambda x, atoms, k: plain_matching_pursuit(x, atoms, k, signed=True)),
    "positive matching": (
        lambda *args, **more: matching_pursuit(*args, signed=False, **more),
        lambda x, atoms, k: plain_matching_pursuit(x, atoms, k, signed=False),
    ),
    "orthogonal": (orthogonal_pursuit, plain_orthogonal_pursuit),
}
ALL = pytest.mark.parametrize("name", PURSUITS)


@ALL
@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_every_pursuit_equals_its_plain_formula_in_float64(name: str, with_gram: bool, k: int):
    fast, plain = PURSUITS[name]
    signals, atoms = planted()
    found = fast(signals, atoms, k, gram=GramMatrix.of(atoms, panel=40) if with_gram else None)
    expected = torch.stack([plain(x, atoms, k) for x in signals])
    torch.testing.assert_close(dense(found, SIZE), expected, atol=1e-9, rtol=1e-9)
    left = (signals - expected @ atoms).square().sum(1) / signals.square().sum(1)
    torch.testing.assert_close(found.unexplained, left, atol=1e-9, rtol=1e-9)


@ALL
def test_single_precision_explains_as_much_as_double(name: str):
    fast, plain = PURSUITS[name]
    signals, atoms = planted()
    found = fast(signals.float(), atoms.float(), 10, gram=GramMatrix.of(atoms.float()))
    expected = torch.stack([plain(x, atoms, 10) for x in signals])
    left = (signals - expected @ atoms).square().sum() / signals.square().sum()
    reached = (signals - dense(found, SIZE).double() @ atoms).square().sum() / signals.square().sum()
    assert float(reached) == pytest.approx(float(left), rel=1e-3)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_orthogonal_pursuit_equals_scikit_learn(k: int):
    signals, atoms = planted(seed=1)
    gram = (atoms @ atoms.T).numpy()
    theirs = orthogonal_mp_gram(gram, (atoms @ signals.T).numpy(), n_nonzero_coefs=k, copy_Gram=True, copy_Xy=True)
    ours = dense(orthogonal_pursuit(signals, atoms, k, gram=GramMatrix.of(atoms)), SIZE)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs).T, atol=1e-8)


@ALL
def test_no_more_than_k_atoms_are_used_and_none_twice(name: str):
    signals, atoms = planted()
    codes = PURSUITS[name][0](signals, atoms, 7).codes
    assert codes.values.shape == codes.indices.shape == (COUNT, 7)
    for values, indices in zip(codes.values, codes.indices, strict=True):
        kept = indices[values != 0].tolist()
        assert len(kept) == len(set(kept))


def test_orthogonal_pursuit_keeps_exactly_k_features():
    signals, atoms = planted()
    assert (orthogonal_pursuit(signals, atoms, 9).codes.values != 0).sum(1).eq(9).all()


@ALL
def test_a_pursuit_stops_at_the_residual_asked_for(name: str):
    signals, atoms = planted()
    fast = PURSUITS[name][0]
    rounds = torch.stack([fast(signals, atoms, k).unexplained for k in range(1, 13)], 1)
    enough = rounds <= 0.3
    first = torch.where(enough.any(1), enough.int().argmax(1), 11)
    found = fast(signals, atoms, 12, until=0.3)
    torch.testing.assert_close(found.unexplained, rounds.gather(1, first[:, None])[:, 0], atol=1e-9, rtol=0)
    assert enough.any(1).sum() > COUNT // 2, "too few signals arrive for the test to mean anything"


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_signal_that_is_an_atom_is_explained_by_it_alone(name: str, dtype: torch.dtype):
    _, atoms = planted(dtype=dtype)
    found = PURSUITS[name][0](3 * atoms[:5], atoms, 8, gram=GramMatrix.of(atoms))
    assert (found.codes.values != 0).sum(1).eq(1).all()
    assert torch.equal(found.codes.indices[:, 0], torch.arange(5))
    assert (found.unexplained < 1e-5).all()


@ALL
def test_zero_signals_stay_empty_and_zero_atoms_are_never_picked(name: str):
    signals, atoms = planted()
    signals[3] = 0
    atoms[::2] = 0
    found = PURSUITS[name][0](signals, atoms, 60, gram=GramMatrix.of(atoms))
    assert torch.isfinite(found.codes.values).all()
    assert found.unexplained[3] == 0
    assert not found.codes.values[3].any()
    assert not dense(found, SIZE)[:, ::2].any()


@ALL
def test_duplicates_change_nothing_but_who_is_picked(name: str):
    signals, atoms = planted()
    fast = PURSUITS[name][0]
    once = dense(fast(signals, atoms, 10), SIZE)
    twice = dense(fast(signals, torch.cat([atoms, atoms]), 10), 2 * SIZE)
    torch.testing.assert_close(twice[:, :SIZE] + twice[:, SIZE:], once, atol=1e-7, rtol=1e-7)


@ALL
def test_more_rounds_than_atoms_do_no_harm(name: str):
    signals, atoms = planted()
    found = PURSUITS[name][0](signals, atoms[:3], 8, gram=GramMatrix.of(atoms[:3]))
    assert torch.isfinite(found.codes.values).all()
    assert (found.unexplained <= 1 + 1e-9).all()


@ALL
def test_without_signals_or_atoms_there_is_nothing(name: str):
    signals, atoms = planted()
    fast = PURSUITS[name][0]
    assert fast(signals[:0], atoms, 4).codes.values.shape == (0, 4)
    assert fast(signals, atoms[:0], 4).unexplained.eq(1).all()


def test_positive_pursuits_have_no_negative_weight_and_signed_ones_do():
    signals, atoms = planted()
    assert (gradient_pursuit(signals, atoms, 12).codes.values >= 0).all()
    assert (matching_pursuit(signals, atoms, 12, signed=False).codes.values >= 0).all()
    assert (gradient_pursuit(signals, atoms, 12, signed=True).codes.values < 0).any()
    assert (matching_pursuit(signals, atoms, 12).codes.values < 0).any()


@ALL
def test_half_precision_of_the_gram_matrix_costs_next_to_nothing(name: str):
    signals, atoms = planted(size=512, width=128, dtype=torch.float32)
    whole, half = (
        PURSUITS[name][0](signals, atoms, 10, gram=GramMatrix.of(atoms, dtype)) for dtype in (torch.float32, torch.float16)
    )
    left = [(signals - dense(found, 512) @ atoms).square().sum() for found in (whole, half)]
    assert float(left[1] / left[0]) == pytest.approx(1, abs=0.005)


def test_a_pool_of_all_atoms_or_of_one_round_is_exact_and_a_small_one_nearly():
    signals, atoms = planted(size=512, width=128)
    exact = orthogonal_pursuit(signals, atoms, 8)
    for pool in (CandidatePool(rounds=1, atoms=4), CandidatePool(rounds=4, atoms=512)):
        torch.testing.assert_close(orthogonal_pursuit(signals, atoms, 8, pool=pool).unexplained, exact.unexplained)
    small = orthogonal_pursuit(signals, atoms, 8, pool=CandidatePool(rounds=4, atoms=32))
    assert 1 < float(small.unexplained.mean() / exact.unexplained.mean()) < 1.05


def test_results_do_not_depend_on_the_company():
    signals, atoms = planted()
    gram = GramMatrix.of(atoms)
    together = orthogonal_pursuit(signals, atoms, 10, gram=gram, until=0.1)
    for row in (0, 17):
        alone = orthogonal_pursuit(signals[row : row + 1], atoms, 10, gram=gram, until=0.1)
        torch.testing.assert_close(dense(alone, SIZE)[0], dense(together, SIZE)[row], atol=1e-9, rtol=0)


@pytest.mark.parametrize("panel", [1, 7, 32, 200])
def test_a_grown_gram_matrix_is_the_one_computed_at_once(panel: int):
    _, atoms = planted()
    gram = GramMatrix(SIZE, dtype=torch.float64, panel=panel)
    for start, stop in ((0, 1), (1, 40), (40, 41), (41, SIZE)):
        new = atoms[start:stop]
        gram.append(new @ atoms[:start].T, new @ new.T)
    torch.testing.assert_close(gram.rows(torch.arange(SIZE)), atoms @ atoms.T)
    with pytest.raises(BadInput, match="96 atoms has 96; 1 more"):
        gram.append(atoms[:1] @ atoms.T, atoms[:1] @ atoms[:1].T)


def test_the_fast_product_is_as_exact_as_float32_and_leaves_no_setting_behind():
    before = torch.get_float32_matmul_precision()
    left, right = torch.randn(2, 50, 700, generator=torch.Generator().manual_seed(3))
    error = (product(left, right) - left.double() @ right.double().T).abs().max()
    assert float(error) < 1e-4
    assert torch.get_float32_matmul_precision() == before


def test_wishes_that_cannot_be_met_are_refused():
    signals, atoms = planted()
    with pytest.raises(BadInput, match="atom 2 has 3"):
        orthogonal_pursuit(signals, torch.cat([atoms[:2], 3 * atoms[2:]]), 4)
    with pytest.raises(BadInput, match="k is 0"):
        orthogonal_pursuit(signals, atoms, 0)
    with pytest.raises((BadInput, TypeCheckError), match=r"\[24, ?24\](.|\n)*\[96, ?20\]"):
        orthogonal_pursuit(signals, atoms[:, :20], 4)
    with pytest.raises(BadInput, match="of 50 atoms, but 96"):
        orthogonal_pursuit(signals, atoms, 4, gram=GramMatrix.of(atoms[:50]))
    with pytest.raises(BadInput, match="atom 2 has nan"):
        orthogonal_pursuit(signals, torch.cat([atoms[:2], torch.nan * atoms[2:]]), 4)
    with pytest.raises(BadInput, match=r"float64 and atoms of torch\.float32"):
        orthogonal_pursuit(signals, atoms.float(), 4)
    signals[7, 3] = torch.nan
    with pytest.raises(NonFinite, match="row 7"):
        orthogonal_pursuit(signals, atoms, 4)
