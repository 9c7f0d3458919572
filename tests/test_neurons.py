"""Neurons: the axes of an MLP's activations as a dictionary."""

from pathlib import Path

import pytest
import torch

from difflex.dictionaries import Dictionary, DictionaryOrigin, Neurons
from difflex.errors import BadInput
from difflex.records import Codes, Site

WIDTH = 40
ORIGIN = DictionaryOrigin(site=Site.parse("double.1:neurons"))
NEURONS = Neurons(width=WIDTH, k=6, origin=ORIGIN)


def activations(count: int = 30) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))


def test_encode_keeps_the_largest_by_absolute_value_with_their_signs_strongest_first():
    x = activations()
    codes = NEURONS.encode(x)
    expected = x.abs().sort(dim=1, descending=True)
    assert torch.equal(codes.indices, expected.indices[:, :6])
    assert torch.equal(codes.values, x.gather(1, expected.indices[:, :6]))
    assert (codes.values < 0).any()


def test_decoding_restores_the_k_largest_and_is_zero_elsewhere():
    x = activations()
    decoded = NEURONS.decode(NEURONS.encode(x))
    nonzero = decoded != 0
    assert torch.equal(decoded[nonzero], x[nonzero])
    assert nonzero.sum(1).eq(6).all()
    whole = Neurons(width=WIDTH, k=WIDTH, origin=ORIGIN)
    assert torch.equal(whole.decode(whole.encode(x)), x)


def test_the_decoder_is_the_identity_and_an_empty_slot_adds_nothing():
    assert torch.equal(NEURONS.decoder, torch.eye(WIDTH))
    assert torch.equal(NEURONS.directions[[3, 7]], NEURONS.decoder_rows(torch.tensor([3, 7])))
    empty = Codes(torch.tensor([[2.0, 0.0]]), torch.tensor([[5, 5]]))
    assert torch.equal(NEURONS.delta(empty)[0], 2 * torch.eye(WIDTH)[5])


def test_saving_and_loading_neurons_changes_nothing(tmp_path: Path):
    loaded = Dictionary.load(NEURONS.save(tmp_path))
    assert isinstance(loaded, Neurons)
    assert loaded.name == "double.1:neurons/neurons-40-k6"
    assert torch.equal(loaded.encode(activations()).values, NEURONS.encode(activations()).values)


def test_an_invalid_site_or_k_is_refused():
    with pytest.raises(BadInput, match=r"double\.1 has no neurons.*double\.1:neurons"):
        Neurons(width=WIDTH, k=6, origin=DictionaryOrigin(site=Site("double.1")))
    with pytest.raises(BadInput, match="k 41 does not fit 40"):
        Neurons(width=WIDTH, k=41, origin=ORIGIN)
