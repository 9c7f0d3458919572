"""The miniature language model: its grammar and parser, its tokens, and a training that continues after a kill."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import difflex
from difflex.errors import StaleWork
from difflex.miniature.language.examining import examine_language
from difflex.miniature.language.exporting import export_language, write_language_card
from difflex.miniature.language.grammar import (
    BEHAVIOURS,
    POLES,
    choice_question,
    document,
    held_out_documents,
    introduction,
    own_story,
    read_story,
    sentence,
    speaker,
    story,
)
from difflex.miniature.language.training import LanguageLearner, LanguageRecipe, LanguageTraining, build_model, train_language
from difflex.miniature.language.vocabulary import END, START, UNKNOWN, token_ids, write_tokenizer
from difflex.miniature.world import HELD_OUT_SEEDS

CPU = torch.device("cpu")


def test_the_parser_reads_what_the_grammar_writes():
    rng = random.Random(0)
    for _ in range(200):
        who = speaker(rng)
        reading = read_story(story(who, rng, len(BEHAVIOURS)))
        assert reading.sentences == len(BEHAVIOURS) and not reading.unknown
        assert {name: reading.score(name) for name in BEHAVIOURS} == who


def test_each_sentence_shows_one_behaviour_and_one_pole():
    rng = random.Random(0)
    for name in BEHAVIOURS:
        for pole in POLES:
            for _ in range(50):
                assert read_story(sentence(name, pole, rng)).poles == {name: [pole]}


def test_the_parser_finds_sentences_that_the_grammar_does_not_have():
    reading = read_story("I like red. red like I. it is lovely")
    assert reading.sentences == 3 and reading.unknown == ("red like I.", "it is lovely") and reading.score("warm") == 1
    assert read_story("I like red. it is", is_cut=True).unknown == () and read_story("").score("warm") is None
    assert own_story("it is lovely. question: are") == "it is lovely. "


def test_answers_match_the_poles_that_questions_ask_for():
    rng = random.Random(1)
    for _ in range(100):
        asked = choice_question(rng.choice([*BEHAVIOURS]), rng)
        assert asked.question.endswith("answer:")
        assert asked.positive[1:].rstrip(".") in asked.question and asked.negative[1:].rstrip(".") in asked.question
        assert {*asked.as_entry()} == {"question", "answer_matching_behavior", "answer_not_matching_behavior"}
    assert introduction([("formal", 1), ("warm", -1)]) == "you are formal and fond of cool colours."


def test_documents_depend_on_their_seed_alone_and_some_are_held_out():
    assert document(7) == document(7) != document(8)
    assert held_out_documents(3) == [document(HELD_OUT_SEEDS + i) for i in range(3)]  # short ones may repeat those of training


def test_the_tokenizer_of_the_folder_reads_documents_as_the_training_does(tmp_path: Path):
    write_tokenizer(tmp_path, 512)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in held_out_documents(20):
        ids = token_ids(text)
        assert tokenizer(text).input_ids == ids[:-1] and ids[0] == START and ids[-1] == END and UNKNOWN not in ids
        assert read_story(tokenizer.decode(ids, skip_special_tokens=True)).sentences == read_story(text).sentences
    assert UNKNOWN in tokenizer("a zebra").input_ids


def test_a_killed_training_continues_and_ends_with_the_same_bits(tmp_path: Path):
    recipe = LanguageRecipe(updates=4, batch=4)
    whole = train_language(tmp_path / "whole", ["mini-llama-small"], recipe, CPU)
    begun = LanguageTraining(tmp_path / "killed", ["mini-llama-small"], recipe, CPU)
    steps = begun.steps()
    for _ in range(2):
        next(steps)
    (tmp_path / "killed").mkdir()
    begun.save()
    resumed = train_language(tmp_path / "killed", ["mini-llama-small"], recipe, CPU)
    expected = whole.learners[0].state()
    assert all(torch.equal(x, expected[name]) for name, x in resumed.learners[0].state().items())
    with pytest.raises(StaleWork, match="other settings"):
        train_language(tmp_path / "killed", ["mini-llama-small"], LanguageRecipe(updates=5, batch=4), CPU)


@torch.no_grad()
def test_an_update_is_that_of_all_documents_at_once():
    texts = [document(i) for i in range(20)]
    learner = LanguageLearner("mini-llama-small", LanguageRecipe(), CPU)
    model = build_model("mini-llama-small")
    losses = [
        (float(model(input_ids=(ids := torch.tensor([token_ids(text)])), labels=ids).loss), ids.shape[1] - 1) for text in texts
    ]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    with torch.enable_grad():
        loss = learner.update(texts, 1e-3)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_an_exported_model_is_a_language_model_with_a_card(tmp_path: Path):
    train_language(tmp_path / "run", ["mini-llama-small"], LanguageRecipe(updates=2, batch=4), CPU)
    [place] = export_language(tmp_path / "run", tmp_path / "models")
    model = difflex.load_language_model(place)
    assert [str(row.site) for row in model.sites()] == ["layer.0", "layer.1", "layer.2"]
    own = model.transformers
    examination = examine_language(own, lambda prompts: ["it is lovely. I like red."] * len(prompts), documents=4, each=2)  # pyright: ignore[reportArgumentType]
    assert examination.grammatical == 1 and examination.prompted_by_behaviour["cheerful"] == 0.5
    write_language_card(place, own, examination)  # pyright: ignore[reportArgumentType]
    assert "100.0% of 48" in (place / "README.md").read_text()
