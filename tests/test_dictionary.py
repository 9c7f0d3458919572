"""Dictionaries: saving, folding and normalisation of every kind, and the exact search for the largest scores."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from difflex.choices import NormalisationMethod, SAEKind
from difflex.dictionaries import SAE, Dictionary, DictionaryOrigin, Neurons, Normalisation, SAEWeights, fingerprint
from difflex.dictionaries.files import FORMAT
from difflex.dictionaries.normalisation import VectorMoments
from difflex.dictionaries.sparse import BLOCK, EncoderSearch
from difflex.errors import BadInput, BrokenFile, DifflexError, NonFinite, UnknownName
from difflex.files import stored_checksum
from difflex.records import Codes, Site
from difflex.tensors import read_tensors, write_tensors

WIDTH, SIZE, K = 24, 96, 5
SITE = Site("double.18", "update")


def activations(count: int, seed: int = 0, width: int = WIDTH) -> Tensor:
    """Return vectors far from the origin, with axes of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator) * torch.linspace(0.1, 8, width)
    return vectors @ torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(99)))[0] + 30


def normalisation(method: NormalisationMethod = "whiten", clip: float | None = None) -> Normalisation:
    moments = VectorMoments(WIDTH, covariance=True)
    moments.add(activations(400))
    return moments.normalisation(method, clip)


def sae(kind: SAEKind = "topk", method: NormalisationMethod = "whiten", clip: float | None = None, relu: bool = True) -> SAE:
    generator = torch.Generator().manual_seed(1)
    decoder = F.normalize(torch.randn(SIZE, WIDTH, generator=generator), dim=1)
    weights = SAEWeights(
        encoder=decoder + 0.1 * torch.randn(SIZE, WIDTH, generator=generator),
        decoder=decoder,
        bias=torch.randn(WIDTH, generator=generator),
        encoder_bias=0.1 * torch.randn(SIZE, generator=generator),
        thresholds=None if kind == "topk" else torch.rand(SIZE, generator=generator) + 1,
    )
    origin = DictionaryOrigin(site=SITE, model="mini-flux", training={"seed": 3})
    return SAE(kind=kind, k=K, origin=origin, normalisation=normalisation(method, clip), weights=weights, relu=relu)


def dense(codes: Codes, size: int = SIZE) -> Tensor:
    return torch.zeros(len(codes.values), size).scatter_add_(1, codes.indices, codes.values)


@pytest.mark.parametrize("method", get_args(NormalisationMethod))
def test_restore_undoes_apply(method: NormalisationMethod):
    x = activations(50, seed=5)
    torch.testing.assert_close(normalisation(method).restore(normalisation(method).apply(x)), x, atol=2e-4, rtol=0)


def test_whitening_makes_the_covariance_one_and_the_mean_zero():
    z = normalisation("whiten").apply(activations(400))
    torch.testing.assert_close(torch.cov(z.T, correction=0), torch.eye(WIDTH), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)


def test_standardising_gives_every_axis_variance_one_and_scaling_gives_the_width_as_squared_length():
    x = activations(400)
    torch.testing.assert_close(normalisation("standardise").apply(x).var(0, correction=0), torch.ones(WIDTH), atol=1e-4, rtol=0)
    assert normalisation("scale").apply(x).square().sum(1).mean().item() == pytest.approx(WIDTH, rel=1e-5)


def test_moments_stay_exact_for_a_mean_a_million_times_the_spread():
    x = 1e6 + torch.randn(1000, 4, dtype=torch.float64)
    moments = VectorMoments(4, covariance=True)
    for part in x.split(100):
        moments.add(part)
    torch.testing.assert_close(moments.covariance, torch.cov(x.T, correction=0), atol=1e-8, rtol=0)
    torch.testing.assert_close(moments.variance, x.var(0, correction=0), atol=1e-8, rtol=0)


def test_too_few_vectors_are_refused():
    moments = VectorMoments(WIDTH, covariance=True)
    moments.add(activations(239))
    with pytest.raises(BadInput, match="needs 240 vectors, but there are 239"):
        moments.normalisation("whiten")


def test_statistics_of_nan_are_refused():
    x = activations(10)
    x[3, 2] = torch.nan
    with pytest.raises(NonFinite):
        VectorMoments(WIDTH, covariance=False).add(x)


def test_a_constant_axis_does_not_divide_by_zero():
    x = torch.cat([activations(400), torch.ones(400, 1)], dim=1)
    moments = VectorMoments(WIDTH + 1, covariance=True)
    moments.add(x)
    for method in get_args(NormalisationMethod):
        assert moments.normalisation(method).apply(x).isfinite().all()


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka"])
def test_saving_and_loading_changes_nothing(kind: SAEKind, tmp_path: Path):
    dictionary, x = sae(kind), activations(30)
    loaded = Dictionary.load(dictionary.save(tmp_path / "saved"))
    assert (loaded.name, loaded.origin, loaded.size, loaded.width) == (dictionary.name, dictionary.origin, SIZE, WIDTH)
    assert loaded.name == f"double.18:update/{kind}-{SIZE}-k{K}"
    codes, loaded_codes = dictionary.encode(x), loaded.encode(x)
    assert torch.equal(codes.values, loaded_codes.values) and torch.equal(codes.indices, loaded_codes.indices)
    assert torch.equal(dictionary.decode(codes), loaded.decode(loaded_codes))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "dictionary.safetensors"]


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("method", get_args(NormalisationMethod))
def test_folding_changes_neither_codes_nor_reconstruction(kind: SAEKind, method: NormalisationMethod):
    dictionary, x = sae(kind, method), activations(60, seed=2)
    folded = dictionary.fold()
    assert folded.normalisation.method == "none"
    codes, folded_codes = dictionary.encode(x), folded.encode(x)
    torch.testing.assert_close(dense(folded_codes), dense(codes), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(folded.decode(folded_codes), dictionary.decode(codes), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(folded.decoder, dictionary.decoder, atol=1e-4, rtol=1e-4)


def test_a_clip_is_folded_only_on_request_and_the_values_it_changes_are_measured():
    dictionary, x = sae(clip=1.5), activations(200, seed=2)
    with pytest.raises(BadInput, match=r"clips its normalised input at 1.5, .* `fold\(ignore_clip=True\)`"):
        dictionary.fold()
    folded, inside = dictionary.fold(ignore_clip=True), sae().normalisation.apply(x).abs() <= 1.5
    share = dictionary.normalisation.clipped_share(x)
    assert share == pytest.approx(1 - inside.float().mean().item(), abs=1e-6) and 0.05 < share < 0.5
    assert sae().normalisation.clipped_share(x) == 0
    codes, unclipped = dense(folded.encode(x)), inside.all(1)
    torch.testing.assert_close(codes, dense(sae().encode(x)), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(codes[unclipped], dense(dictionary.encode(x))[unclipped], atol=1e-3, rtol=1e-4)
    assert (codes - dense(dictionary.encode(x)))[~unclipped].abs().max() > 0.01


def test_a_pre_bias_moves_the_scores_and_folds_into_the_bias_of_the_encoder(tmp_path: Path):
    plain, x = sae(), activations(60, seed=2)
    weights = replace(plain.weights, pre_bias=torch.linspace(-1, 1, WIDTH))
    dictionary = SAE(kind="topk", k=K, origin=plain.origin, normalisation=plain.normalisation, weights=weights)
    shifted = plain.normalisation.restore(plain.normalisation.apply(x) + torch.linspace(-1, 1, WIDTH))
    torch.testing.assert_close(dense(dictionary.encode(x)), dense(plain.encode(shifted)), atol=1e-3, rtol=1e-4)
    folded = dictionary.fold()
    assert folded.weights.pre_bias is None
    torch.testing.assert_close(dense(folded.encode(x)), dense(dictionary.encode(x)), atol=1e-3, rtol=1e-4)
    loaded = Dictionary.load(dictionary.save(tmp_path / "saved"))
    assert torch.equal(dense(loaded.encode(x)), dense(dictionary.encode(x)))


def test_decode_is_linear_in_the_codes_plus_a_constant():
    dictionary = sae()
    codes = dictionary.encode(activations(20))
    torch.testing.assert_close(dictionary.delta(codes), dense(codes) @ dictionary.decoder, atol=1e-4, rtol=1e-4)
    empty = codes._replace(values=torch.zeros_like(codes.values))
    torch.testing.assert_close(dictionary.decode(empty), dictionary.constant.expand(20, WIDTH))
    torch.testing.assert_close(dictionary.directions.norm(dim=1), torch.ones(SIZE))


def test_relu_empties_slots_with_negative_scores():
    x = activations(40)
    weights = replace(sae().weights, encoder_bias=torch.full((SIZE,), -100.0))
    for relu in (True, False):
        low = SAE(kind="topk", k=K, origin=sae().origin, normalisation=normalisation(), weights=weights, relu=relu)
        assert bool((low.encode(x).values == 0).all()) == relu
        assert bool((low.encode(x).values < 0).all()) == (not relu)


def test_activations_of_another_width_are_refused():
    with pytest.raises(BadInput, match=r"takes activations \[token, 24\], but got \[3, 25\]"):
        sae().encode(torch.zeros(3, WIDTH + 1))


def test_encoding_no_tokens_gives_no_codes():
    for kind in ("topk", "jumprelu"):
        assert len(sae(kind).encode(torch.zeros(0, WIDTH)).values) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "topkk"}, UnknownName, "nearest: topk"),
        ({"sise": 3}, UnknownName, "nearest: size"),
        ({"format": 1}, BrokenFile, "format 1;.*reads format 3"),
        ({"k": SIZE + 1}, BrokenFile, "k 97 does not fit a dictionary of size 96"),
        ({"k": -1}, BrokenFile, "k: -1"),
        ({"k": "5"}, BrokenFile, "k: '5'"),
        ({"k": True}, BrokenFile, "k: True"),
        ({"width": WIDTH - 1}, BrokenFile, "width 23 and size 96, but the tensors have 24 and 96"),
        ({"size": 10**30}, BrokenFile, "but the tensors have"),
        ({"model": 3}, BrokenFile, "model: 3"),
        ({"site": "double.18:x"}, BrokenFile, "is not a site"),
        ({"settings": {}}, BrokenFile, "The normalisation 'None' is unknown"),
        ({"sha256": "0" * 64}, BrokenFile, "not of the same dictionary"),
    ],
)
def test_a_config_with_a_wrong_entry_is_refused(tmp_path: Path, change: dict[str, object], error: type, message: str):
    rewrite(sae().save(tmp_path), change)
    with pytest.raises(error, match=message):
        Dictionary.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"relu": "yes"}, "The setting relu 'yes' is unknown"),
        ({"normalisation": {"method": "whiten", "clip": -1}}, "clips at -1"),
        ({"normalisation": {"method": "whiten", "clip": 10**400}}, "cannot be read as a dictionary"),
        ({"normalisation": {"method": "whiten", "clip": float("nan")}}, "clips at nan"),
        ({"normalisation": {"method": ["whiten"]}}, "The normalisation .* is unknown"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, object], message: str):
    folder = sae().save(tmp_path)
    before = json.loads((folder / "config.json").read_text())["settings"]
    rewrite(folder, {"settings": {**before, **settings}})
    with pytest.raises(BrokenFile, match=message):
        Dictionary.load(folder)


def test_json_of_any_depth_is_refused(tmp_path: Path):
    config = sae().save(tmp_path) / "config.json"
    for depth in (500, 900, 5_000, 200_000):
        text = config.read_text().replace('"training": {', f'"training": {{"deep": {"[" * depth}{"]" * depth}, ')
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / "config.json").write_text(text)
        with pytest.raises(BrokenFile):
            Dictionary.load(tmp_path / "deep")


def rewrite(folder: Path, change: Mapping[str, object]) -> None:
    """Change entries of `config.json` as by hand: a file without a checksum is read as it is."""
    path = folder / "config.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name != "checksum"}
    path.write_text(json.dumps({**content, **change}))


@pytest.mark.parametrize("name", ["config.json", "dictionary.safetensors"])
def test_flipped_bits_are_found(tmp_path: Path, name: str):
    path = sae().save(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BrokenFile, match=name):
        Dictionary.load(tmp_path)


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path):
    first, second = (sae().save(tmp_path / name) for name in ("a", "b"))
    assert fingerprint(first) == fingerprint(second)
    assert all((first / path.name).read_bytes() == path.read_bytes() for path in second.iterdir())
    other = sae("jumprelu").save(tmp_path / "c")
    assert fingerprint(other) != fingerprint(first)
    (first / "dictionary.safetensors").write_bytes((other / "dictionary.safetensors").read_bytes())
    with pytest.raises(BrokenFile, match="not of the same dictionary"):
        fingerprint(first)
    with pytest.raises(BrokenFile, match="not of the same dictionary"):
        Dictionary.load(first)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("encoder", lambda x: x.index_fill(0, torch.tensor(3), torch.nan), NonFinite, "the tensor 'encoder' holds NaN or inf"),
        ("bias", lambda x: x.index_fill(0, torch.tensor(3), torch.inf), NonFinite, "the tensor 'bias' holds NaN or infinity"),
        ("thresholds", lambda x: x * torch.nan, NonFinite, "the tensor 'thresholds' holds"),
        ("thresholds", lambda x: -x, BrokenFile, "cannot be negative"),
        ("decoder", lambda x: x.index_fill(0, torch.tensor(3), 0.0), BrokenFile, "1 of the 96 decoder rows are zero"),
        ("decoder", lambda x: x.double(), BrokenFile, "the tensor 'decoder' is torch.float64, expected is torch.float32"),
        ("decoder", lambda x: x[:, 1:].contiguous(), BrokenFile, "decoder do not fit the encoder"),
        ("encoder_bias", lambda x: x[None], BrokenFile, "encoder_bias do not fit the encoder"),
        ("normalisation.scale", lambda x: 0 * x, BrokenFile, "not all above 0"),
        ("normalisation.mean", lambda x: x[1:].clone(), BrokenFile, "of one width"),
    ],
)
def test_tensors_that_no_dictionary_can_have_are_refused(
    tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], error: type, message: str
):
    folder = sae("jumprelu").save(tmp_path)
    file = read_tensors(folder / "dictionary.safetensors", FORMAT, "")
    write_tensors(folder / "dictionary.safetensors", FORMAT, {**file.tensors, name: change(file.tensors[name])})
    rewrite(folder, {"sha256": stored_checksum(folder / "dictionary.safetensors", "")})
    with pytest.raises(error, match=message) as raised:
        Dictionary.load(folder)
    assert str(tmp_path) in str(raised.value)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    good = sae()
    good.weights.encoder[4, 5] = torch.inf
    with pytest.raises(NonFinite, match="the tensor 'encoder'"):
        good.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_or_truncated_file_is_named(tmp_path: Path):
    with pytest.raises(BadInput, match="holds no dictionary"):
        Dictionary.load(tmp_path / "nowhere")
    tensors = sae().save(tmp_path) / "dictionary.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(BrokenFile, match="damaged"):
        Dictionary.load(tmp_path)
    tensors.unlink()
    with pytest.raises(BrokenFile, match=r"dictionary\.safetensors is missing"):
        Dictionary.load(tmp_path)


def encoder(size: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, width, generator=generator) * (0.3 + torch.rand(size, 1, generator=generator)) / width**0.5
    return rows, 0.1 * torch.randn(size, generator=generator)


@pytest.mark.parametrize("stretch", [1.0, 30.0])
@pytest.mark.parametrize(("size", "k"), [(2048, 16), (4096, 32), (4096, 31), (1000, 16), (64, 64)])
def test_the_largest_scores_are_found_exactly(size: int, k: int, stretch: float):
    rows, bias = encoder(size, 128)
    z = torch.randn(300, 128, generator=torch.Generator().manual_seed(7))
    z[:, :4] *= stretch  # outlier axes, which 8 bits resolve badly
    z[5] = 0
    search = EncoderSearch(rows, bias)
    top, expected = search.top_k(z, k), (z.double() @ rows.double().T + bias.double()).topk(k)
    torch.testing.assert_close(top.values.double(), expected.values, atol=1e-4, rtol=0)
    assert torch.equal(top.indices.sort(1).values, expected.indices.sort(1).values)


def test_all_scores_above_their_thresholds_are_found():
    rows, bias = encoder(2048, 64)
    z = torch.randn(300, 64, generator=torch.Generator().manual_seed(7))
    thresholds = torch.rand(2048, generator=torch.Generator().manual_seed(8)) + 1
    expected = z @ rows.T + bias
    pairs = EncoderSearch(rows, bias).above(z, thresholds)
    assert torch.equal(torch.stack((expected > thresholds).nonzero(as_tuple=True)), torch.stack((pairs.tokens, pairs.features)))
    torch.testing.assert_close(pairs.values, expected[pairs.tokens, pairs.features], atol=1e-4, rtol=0)


def test_refresh_updates_the_search_for_changed_rows():
    rows, bias = encoder(2048, 64)
    search, z = EncoderSearch(rows, bias), torch.randn(50, 64, generator=torch.Generator().manual_seed(7))
    rows[32:64] *= 50
    search.refresh(slice(32, 64))
    assert torch.equal(search.top_k(z, 8).indices, (z @ rows.T + bias).topk(8).indices)


def test_scores_that_break_the_error_bound_are_searched_without_integers():
    rows, bias = encoder(2048, 64)
    search, z = EncoderSearch(rows, bias), torch.randn(50, 64, generator=torch.Generator().manual_seed(7))
    rows[:] = rows.flip(0)  # without refresh: the 8-bit copy is wrong everywhere
    assert torch.equal(search.top_k(z, 8).indices, (z @ rows.T + bias).topk(8).indices)
    assert 2048 % BLOCK == 0


@pytest.mark.parametrize("outlier", [0.0, 30.0, 300.0])
def test_the_largest_scores_are_exact_if_one_axis_dominates(outlier: float):
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(4096, 256, generator=generator), dim=1)
    z = 4 * rows[torch.randint(4096, (256,), generator=generator)] + 0.1 * torch.randn(256, 256, generator=generator)
    z[:, 7] += outlier
    rows[:8, 3] += outlier
    top, scores = EncoderSearch(rows).top_k(z, 16), z @ rows.T
    assert torch.allclose(top.values, scores.topk(16).values, atol=1e-4 * (1 + outlier))
    assert torch.allclose(scores.gather(1, top.indices), top.values, atol=1e-4 * (1 + outlier))


def test_a_folder_whose_config_does_not_fit_its_tensors_is_refused(tmp_path: Path):
    dictionary = SAE(
        kind="topk",
        k=2,
        origin=DictionaryOrigin(site=Site("double.1")),
        normalisation=Normalisation.identity(8),
        weights=SAEWeights(encoder=torch.eye(8), decoder=torch.eye(8), bias=torch.zeros(8)),
    )
    folder = dictionary.save(tmp_path)
    for change in ({"size": 9}, {"k": "2"}, {"settings": None}, {"settings": {"normalisation": {"method": "whiten"}}}):
        rewrite(dictionary.save(tmp_path), change)
        with pytest.raises(BrokenFile):
            Dictionary.load(tmp_path)
    rewrite(dictionary.save(folder), {"kind": "jumprelu"})
    with pytest.raises(DifflexError, match="thresholds"):
        Dictionary.load(tmp_path)


def test_nan_activations_are_refused():
    neurons = Neurons(width=4, k=2, origin=DictionaryOrigin(site=Site("double.1", kind="neurons")))
    with pytest.raises(NonFinite):
        neurons.encode(torch.tensor([[1.0, float("nan"), 0.0, 2.0]]))
