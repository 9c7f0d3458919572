"""Language models: the same sites and hooks, batches with padding, text that is written again, dictionaries and contrasts."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import difflex
from difflex import LanguageModel
from difflex.cli import main
from difflex.errors import BadInput, BrokenFile, StaleWork, UnknownName
from difflex.records import Edit, HookContext, Rectangle, Shot, Site
from difflex.steering import steering_hooks
from difflex.steering.contrast import contrast_features
from difflex.study import Study
from difflex.testing import LANGUAGE, tiny_folder, tiny_language_folder

TEXTS = ["a red star on sand", "blue", "two small rings", "a"]
PAIRS = [(f"{noun} is good", f"{noun} is bad") for noun in ("a star", "the ring", "a heart on wood", "it")]


@pytest.fixture(scope="module", params=LANGUAGE)
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return difflex.load_language_model(tiny_language_folder(request.param, tmp_path_factory.mktemp("models") / request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return difflex.load_language_model(tiny_language_folder("llama", tmp_path_factory.mktemp("models") / "tiny"))


def logits(model: LanguageModel, texts: list[str] = TEXTS) -> Tensor:
    """The logits after the last token of each text, in one batch."""
    shots = list(model.shots(texts))
    return model.engine.read(shots, [model.engine.encode(text) for text in texts], keep=1)[:, 0]


def all_sites(model: LanguageModel) -> list[Site]:
    return [Site(row.site.path, kind) for row in model.sites() for kind in row.kinds]


def test_a_language_model_has_its_layers_as_sites(any_model: LanguageModel):
    rows = any_model.sites()
    assert [str(row.site) for row in rows] == ["layer.0", "layer.1", "layer.2"]
    assert all(row.kinds == ("residual", "update", "neurons") and row.width == 32 and row.tokens == 256 for row in rows)
    assert any_model.site(rows[1].path + ":update") == Site.parse("layer.1:update") == Site("layer.1", "update", "text")
    assert [str(site) for site in any_model.expand("layer.*:neurons")] == [f"layer.{i}:neurons" for i in range(3)]
    with pytest.raises(UnknownName, match=r"Did you mean.*layer\.2|layer\.2"):
        any_model.site("layer.7")


def test_writing_back_what_was_read_changes_no_bit_and_writing_changes_the_prediction(any_model: LanguageModel):
    plain = logits(any_model)
    for site in all_sites(any_model):
        with any_model.at(site, lambda x, context: x.clone()):
            assert torch.equal(logits(any_model), plain), site
        with any_model.at(site, lambda x, context: x + 1 + torch.arange(x.shape[-1]) / 8):
            assert not torch.allclose(logits(any_model), plain), site


def test_a_text_has_the_same_activations_alone_and_in_a_padded_batch(any_model: LanguageModel):
    sites = ["layer.0", "layer.2:update", "layer.1:neurons"]
    shots = list(any_model.shots(TEXTS))
    together = {
        (x.site, shot.prompt): row
        for x in any_model.harvest(shots, sites, progress=False)
        for shot, row in zip(x.shots, x.values, strict=True)
    }
    for shot in shots:
        for alone in any_model.harvest([shot], sites, progress=False):
            row = together[alone.site, shot.prompt]
            assert alone.grid is None and row.shape == (len(any_model.pieces(shot)), row.shape[-1])
            torch.testing.assert_close(row, alone.values[0], rtol=1e-4, atol=1e-5)


def test_functions_see_no_padding_and_their_own_shots(llama: LanguageModel):
    calls: list[tuple[tuple[int, ...], HookContext]] = []
    with llama.at("layer.1", lambda x, context: calls.append((tuple(x.shape), context))):
        llama.generate(["abc", "d", "efg"], tokens=2)
    assert [(shape, context.step) for shape, context in calls] == [((2, 4, 32), 0), ((1, 2, 32), 0), ((3, 1, 32), 1)]
    prompts = [[shot.prompt for shot in context.shots or ()] for _, context in calls]
    assert prompts == [["abc", "efg"], ["d"], ["abc", "d", "efg"]]


def test_the_shape_of_what_a_function_returns_is_checked(llama: LanguageModel):
    with (
        pytest.raises(BadInput, match=r"at the site 'layer.1' returned a tensor of shape"),
        llama.at("layer.1", lambda x, _: x[:, :1]),
    ):
        logits(llama)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_depends_on_its_prompt_and_seed_alone(any_model: LanguageModel, temperature: float):
    together = any_model.generate(TEXTS, tokens=6, temperature=temperature, seed=5)
    alone = any_model.generate(TEXTS[2], tokens=6, temperature=temperature, seed=7)
    assert together[2] == alone[0] and alone[0].shot.seed == 7 and alone[0].shot.steps == 6
    other = any_model.generate(TEXTS[2], tokens=6, temperature=temperature, seed=8)
    assert (other[0].text == alone[0].text) == (temperature == 0)


def test_greedy_text_equals_that_of_transformers(any_model: LanguageModel):
    ids = torch.tensor([any_model.engine.encode(TEXTS[0])])
    expected = cast(Any, any_model.transformers).generate(
        ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids)
    )
    [written] = any_model.generate(TEXTS[0], tokens=6)
    assert list(written.tokens) == [token for token in expected[0, ids.shape[1] :].tolist() if token != 1]


def test_edits_are_a_no_op_at_strength_0_add_up_and_can_be_made_again(llama: LanguageModel):
    contrast = llama.contrast(PAIRS, "layer.1", last=3)
    other = llama.contrast([("star", "ring"), ("red", "blue")], "layer.1")
    plain = llama.generate(TEXTS, tokens=8)
    assert llama.generate(TEXTS, tokens=8, edits=llama.along(contrast, 0.0)) == plain
    edited = llama.generate(TEXTS, tokens=8, edits=llama.along(contrast, 8.0))
    assert edited != plain and llama.generate(TEXTS, tokens=8, edits=llama.along(contrast, 8.0)) == edited
    written = llama.generate(TEXTS, tokens=8, edits=llama.along(contrast, 8.0, steps=(1, 8)))
    assert [text.tokens[0] for text in written] == [text.tokens[0] for text in plain]
    directions = {"one": contrast, "two": other}
    edits = [Edit(operation="add", site="layer.1", contrast=name, strength=2.0, unit="code") for name in directions]  # pyright: ignore[reportArgumentType]
    hooks = steering_hooks(edits, lambda edit: contrast_features(directions[edit.contrast or ""]))
    both = replace(contrast, direction=contrast.direction + other.direction)
    changes: list[Tensor] = []
    for hook in (hooks, llama.along(both, 2.0)):
        with llama.at("layer.2", lambda x, context: changes.append(x)), llama.at(*hook[0]):
            logits(llama, TEXTS[:1])
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-5, atol=1e-5)


def test_a_contrast_is_the_mean_difference_of_the_last_tokens(llama: LanguageModel):
    contrast = llama.contrast(PAIRS, "layer.1", last=1)
    differences = []
    for pair in PAIRS:
        ends = [next(llama.harvest(llama.shots(text), "layer.1", progress=False)).values[0, -1] for text in pair]
        differences.append(ends[0] - ends[1])
    torch.testing.assert_close(contrast.direction, torch.stack(differences).mean(0), rtol=1e-4, atol=1e-5)
    assert contrast.pairs == len(PAIRS) and contrast.positive == tuple(pair[0] for pair in PAIRS)


def test_a_contrast_of_another_layer_or_model_is_refused(llama: LanguageModel, tmp_path: Path):
    contrast = llama.contrast(PAIRS, "layer.1")
    other = difflex.load_language_model(tiny_language_folder("gpt2", tmp_path / "other"))
    with pytest.raises(StaleWork, match=r"was made for .*tiny"):
        other.generate("a", tokens=1, edits=other.along(contrast))


def test_losses_and_answer_scores_are_those_of_a_pass_without_padding(any_model: LanguageModel):
    losses = any_model.losses(TEXTS[:3])
    for text, loss in zip(TEXTS[:3], losses, strict=True):
        ids = torch.tensor([any_model.engine.encode(text)])
        output = any_model.transformers(input_ids=ids, labels=ids)
        torch.testing.assert_close(loss, output.loss, rtol=1e-4, atol=1e-5)
    scores = any_model.answer_scores(TEXTS[:2], ["yes", "n"])
    torch.testing.assert_close(
        any_model.answer_scores(TEXTS[:2], [["yes", "n"], ["n", "yes"]]), torch.stack([scores[0], scores[1].flip(0)])
    )
    before = any_model.losses(TEXTS[:1])[0] * (len(any_model.engine.encode(TEXTS[0])) - 1)
    after = any_model.losses([TEXTS[0] + "yes"])[0] * (len(any_model.engine.encode(TEXTS[0])) + 2)
    torch.testing.assert_close(scores[0, 0], before - after, rtol=1e-4, atol=1e-4)
    [alone] = any_model.answer_scores([""], ["good"])  # where a tokenizer adds no start, nothing predicts the first token
    count = len(any_model.engine.encode("good")) - 1
    torch.testing.assert_close(alone[0], -any_model.losses(["good"])[0] * count, rtol=1e-4, atol=1e-4)


def test_windows_cut_texts_exactly_and_each_can_be_read_again(any_model: LanguageModel):
    texts = [f"{text} number {i}" for i, text in enumerate(TEXTS * 3)]
    shots = list(any_model.windows(texts, 16))
    assert all(len(any_model.engine.encode(shot.prompt, shot.text_length)) == 16 for shot in shots)
    joined = "".join(piece for shot in shots for piece in any_model.pieces(shot))
    assert "</s>".join(texts).startswith(joined) and len(joined) > 0.9 * len("".join(texts))


def test_dictionaries_train_on_its_activations_unchanged(llama: LanguageModel, tmp_path: Path):
    texts = [f"{number} {text}" for number in range(60) for text in TEXTS]
    stored = llama.activations(texts, "layer.1", text_length=16, out=tmp_path / "study", progress=False)
    assert stored.width == 32 and stored.grid is None and stored.store.tokens == 15 and len(stored) > 2000
    again = llama.activations(texts, "layer.1", text_length=16, out=tmp_path / "study", progress=False)
    assert len(again) == len(stored)
    sae = difflex.train_sae(stored, size=64, k=4, tokens=8000, batch=256)
    itda = difflex.grow_itda(stored, size=32, k=4)
    assert sae.dictionary.size == 64 and itda.dictionary.width == 32
    strong = llama.generate(TEXTS, tokens=6, edits=40 * sae.feature(3))
    assert strong != llama.generate(TEXTS, tokens=6) == llama.generate(TEXTS, tokens=6, edits=0 * sae.feature(3))
    with pytest.raises(BadInput, match="is a language model"):
        sae.collect()


def test_steps_for_images_refuse_it_and_say_what_to_do(llama: LanguageModel, tmp_path: Path):
    for name in ("harvest_images", "harvest_with_images", "denoiser"):
        with pytest.raises(BadInput, match=r"difflex\.load_language_model opens it"):
            getattr(llama, name)
    with pytest.raises(BadInput, match=r"is a language model, and this needs an image model.*load_language_model"):
        difflex.load(llama.name)
    contrast = llama.contrast(PAIRS, "layer.1")
    edit = Edit(operation="add", site=contrast.site, contrast="c", unit="code", region=Rectangle(0.0, 0.0, 0.5, 0.5))
    with pytest.raises(BadInput, match="have no place in the image"):
        llama.generate("a", tokens=1, edits=steering_hooks([edit], lambda _: contrast_features(contrast)))
    folder = tiny_folder("flux", tmp_path / "flux")
    with pytest.raises(BadInput, match="not a language model of transformers"):
        difflex.load_language_model(folder)


def test_bad_input_is_refused(llama: LanguageModel):
    for call, match in (
        (lambda: llama.generate("a", tokens=0), "0 tokens"),
        (lambda: llama.generate("a", temperature=-1.0), "temperature of -1"),
        (lambda: llama.generate("", tokens=1), "has no tokens"),
        (lambda: llama.generate("a" * 300, tokens=1), "reads at most 256"),
        (lambda: llama.losses([""]), "has no tokens"),
        (lambda: llama.answer_scores(["a"], [""]), "nothing to score"),
        (lambda: list(llama.harvest(llama.shots("a"), [])), "No site"),
        (lambda: llama.chat("a"), "no chat template"),
        (lambda: list(llama.shots("a", text_length=0)), "text length of 0"),
    ):
        with pytest.raises(BadInput, match=match):
            call()


def test_models_that_are_not_there_or_damaged_are_refused(tmp_path: Path):
    with pytest.raises(UnknownName, match="could not be read from the local cache"):
        difflex.load_language_model("nobody/nothing", offline=True)
    folder = tiny_language_folder("llama", tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(BrokenFile, match="cannot be read"):
        difflex.load_language_model(folder)


def test_random_weights_depend_on_their_seed_alone(llama: LanguageModel):
    models = [difflex.load_language_model(llama.name, untrained=seed) for seed in (1, 1, 2)]
    first, again, other = (logits(model) for model in models)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert models[0].revision == "untrained-1"


def test_precisions_are_those_of_pipelines(llama: LanguageModel):
    model = difflex.load_language_model(llama.name, precision="bf16")
    assert model.transformers.dtype == torch.bfloat16 and model.precision == "bf16"
    assert torch.isfinite(model.losses(TEXTS[:2])).all()
    with pytest.raises(UnknownName, match="precision"):
        difflex.load_language_model(llama.name, precision="fp8")


def test_nf4_quantises_the_blocks(llama: LanguageModel):
    pytest.importorskip("bitsandbytes")
    model = difflex.load_language_model(llama.name, precision="nf4")
    kinds = {type(module).__name__ for module in model.transformers.modules()}
    assert "Linear4bit" in kinds and torch.isfinite(model.losses(TEXTS[:2])).all()


def test_a_shot_of_text_is_stored_with_its_temperature(llama: LanguageModel):
    [written] = llama.generate("a", tokens=2, temperature=0.5)
    entries = written.shot.as_json()
    assert entries["temperature"] == 0.5 and "temperature" not in Shot(model="m", pixels=(8, 8), steps=1, guidance=0.0).as_json()


def test_commands_store_and_train_on_its_activations(llama: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert not main(["sites", llama.name, "--pattern", "layer.1"])
    assert "model.layers.1" in capsys.readouterr().out
    texts, study = tmp_path / "texts.txt", tmp_path / "study"
    texts.write_text("".join(f"{number} {text}\n" for number in range(40) for text in TEXTS))
    harvest = ["harvest", llama.name, "--site", "layer.1", "layer.2:update", "--prompts", str(texts), "--out", str(study)]
    assert not main([*harvest, "--text-length", "16", "--dtype", "int8"])
    main(["train", str(study), "--site", "layer.1", "--size", "32", "--k", "4", "--tokens", "2000", "--batch", "256"])
    assert [ref.site.path for ref in Study.open(study).dictionaries()] == ["layer.1"]
    main(["evaluate", str(study), "--effect-shots", "0"])
    for flags in (["--steps", "2"], ["--shuffle", "1"]):
        assert main([*harvest, *flags]) == 2 and "language model" in capsys.readouterr().err
    for verb in (["generate", llama.name, "a"], ["collect", str(study)]):
        assert main(verb) == 2 and "is a language model" in capsys.readouterr().err
