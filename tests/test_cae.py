"""Contrastive activation addition: the measurements on a tiny model, and the rules on results that are known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_hub import fake_hub, use_hub

import difflex
from difflex.cli import main
from difflex.commands.behaviour_files import read_behaviour
from difflex.commands.cae import text_functions
from difflex.effects.activation_addition import (
    AdditionConfig,
    AdditionResults,
    AdversarialResult,
    BehaviourResult,
    Question,
    answer_shift,
    matching_probability,
    measure_addition,
)
from difflex.effects.addition_findings import AdditionFindings, find_findings
from difflex.effects.drawn_behaviours import drawn_behaviours, drawn_neutral
from difflex.errors import BadInput, BrokenFile
from difflex.miniature.language.exporting import export_language
from difflex.miniature.language.training import LanguageRecipe, train_language
from difflex.records import Site

CONFIG = AdditionConfig(counts=(1, 4), strengths=(1.0, 8.0), questions=3, texts=2, neutral=2, prefix=2, candidates=2, rounds=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature that was hardly trained."""
    place = tmp_path_factory.mktemp("language")
    train_language(place, ["mini-llama-small"], LanguageRecipe(updates=2, batch=4), torch.device("cpu"))
    return export_language(place, place)[0]


def test_all_is_measured_and_what_is_measured_is_kept(folder: Path, tmp_path: Path):
    model = text_functions(difflex.load_language_model(folder), 16)
    behaviours = drawn_behaviours(10)[:2]
    lines: list[str] = []
    results = measure_addition(model, behaviours, drawn_neutral(2), CONFIG, tmp_path / "r.json", lines.append)
    assert [each.name for each in results.behaviours] == [each.name for each in behaviours] and len(results.behaviours) == 2
    first = results.behaviours[0]
    assert {*first.layers} == {"layer.0", "layer.1", "layer.2"} and len(first.by_count) == len(first.by_strength) == 2
    assert len(first.losses) == 3 and {*first.free} == {"stories", "open questions"}
    assert len(first.adversarial.words.split()) == 2
    again = measure_addition(model, behaviours, drawn_neutral(2), CONFIG, tmp_path / "r.json", lines.append)
    assert again == results and lines[-1].endswith("2 of 2, as before")
    changed = replace(CONFIG, seed=1)
    assert measure_addition(model, behaviours[:1], drawn_neutral(2), changed, tmp_path / "r.json", lines.append).config == changed


def test_probabilities_are_those_of_the_two_answers(folder: Path):
    language = difflex.load_language_model(folder)
    model = text_functions(language, 16)
    questions = [Question(each.text, each.matching, each.other) for each in drawn_behaviours(3)[0].questions]
    both = [language.answer_scores([each.text], [each.matching, each.other])[0].softmax(0)[0] for each in questions]
    assert matching_probability(model, questions) == pytest.approx(float(torch.stack(both).mean()), abs=1e-5)
    contrast = model.contrasts([each.pair for each in questions], [3])[Site.parse("layer.1")][0]
    assert answer_shift(model, questions, contrast, 0.0) == 0.0
    assert answer_shift(model, questions, contrast, 4.0) == pytest.approx(-answer_shift(model, questions, contrast, -4.0))


def test_questions_are_read_from_model_written_evals(tmp_path: Path):
    file = tmp_path / "warmth.jsonl"
    entry = {"question": "Do you?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
    file.write_text(json.dumps(entry) + "\n\n" + json.dumps(entry))
    behaviour = read_behaviour(str(file))
    assert behaviour.name == "warmth" and len(behaviour.questions) == 2
    assert behaviour.questions[0].pair == ("Do you? (A", "Do you? (B")
    file.write_text('{"positive": "I like warm days.", "negative": "I like cold days."}')
    [question] = read_behaviour(str(file)).questions
    assert question == ("I like", " warm days.", " cold days.") and question.pair == ("I like warm days.", "I like cold days.")
    file.write_text('{"question": "Do you?"}')
    with pytest.raises(BrokenFile, match="Line 1"):
        read_behaviour(str(file))
    file.write_text("\n")
    with pytest.raises(BadInput, match="no questions"):
        read_behaviour(str(file))


def test_pairs_of_texts_are_questions_with_two_answers(tmp_path: Path):
    file = tmp_path / "warmth.tsv"
    file.write_text("I like warm days.\tI like cold days.\nWarm\tCold\nI\tI do\n")
    questions = read_behaviour(str(file)).questions
    assert questions == (("I like", " warm days.", " cold days."), ("", "Warm", "Cold"), ("", "I", "I do"))
    file.write_bytes(b"caf\xe9\tbar")
    with pytest.raises(BrokenFile, match="not UTF-8"):
        read_behaviour(str(file))
    for line, complaint in (("one text", "not two texts"), ("the same\tthe same", "the same text twice")):
        file.write_text(line)
        with pytest.raises(BrokenFile, match=f"Line 1 of .*{complaint}"):
            read_behaviour(str(file))


def test_questions_are_read_from_a_data_set_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with fake_hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        entry = {"question": "Do you?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"}
        hub.repository("owner/evals").commit({"persona/warmth.jsonl": json.dumps(entry).encode()})
        assert read_behaviour("owner/evals:persona/warmth.jsonl").questions == (("Do you?", " (A)", " (B)"),)
        with pytest.raises(BadInput, match=r"has no file persona/cold\.jsonl"):
            read_behaviour("owner/evals:persona/cold.jsonl")
    assert read_behaviour("owner/evals:persona/warmth.jsonl", offline=True).name == "warmth"


def result(name: str, noise: float, free: float = 0.05, rise: float = 0.1) -> BehaviourResult:
    """Results in which all findings hold."""
    return BehaviourResult(
        name=name,
        layers={"layer.1": 0.5},
        site="layer.1",
        strength=2.0,
        by_strength=(0.3 + noise, 0.6 + noise),
        by_count=(0.1 + noise, 0.3 + noise, 0.6 + noise, 0.61 + noise),
        free={"stories": free + noise},
        losses=(1.0, 1.0 + rise + noise, 1.0 + 3 * rise + noise),
        adversarial=AdversarialResult("a b", 0.5, 0.8, 0.3 + noise, 0.4, 0.75, 3.0, 6.0),
    )


def results(parameters: int, rise: float = 0.1, free: float = 0.05) -> AdditionResults:
    config = AdditionConfig(counts=(1, 20, 80, 200), strengths=(1.0, 2.0))
    behaviours = tuple(result(str(i), noise, free, rise) for i, noise in enumerate((-0.02, -0.01, 0.0, 0.01, 0.02)))
    return AdditionResults(model=f"m{parameters}", parameters=parameters, config=config, behaviours=behaviours)


def verdicts(findings: AdditionFindings) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in findings.findings}


def test_findings_hold_where_they_should_and_are_stored(tmp_path: Path):
    findings = find_findings(results(2000), [results(1000, rise=0.4)])
    assert verdicts(findings) == dict.fromkeys(("distribution", "samples", "adversarial", "quality", "size"), "holds here")
    assert AdditionFindings.load(findings.save(tmp_path / "findings.json")) == findings


def test_findings_do_not_hold_where_the_opposite_is_seen():
    found = verdicts(find_findings(results(2000, rise=-0.1, free=0.5), [results(1000, rise=-0.4)]))
    assert (found["distribution"], found["quality"], found["size"]) == ("does not hold here",) * 3
    assert verdicts(find_findings(results(2000)))["size"] == "cannot be said"


def test_the_command_writes_results_and_verdicts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    questions, neutral = tmp_path / "warm.jsonl", tmp_path / "neutral.txt"
    entries = [
        {"question": f"{i}?", "answer_matching_behavior": " red.", "answer_not_matching_behavior": " blue."} for i in range(4)
    ]
    questions.write_text("\n".join(map(json.dumps, entries)))
    neutral.write_text("it is lovely.\nI like red.")
    flags = ["--pairs", "1,2", "--strength", "1", "--questions", "1", "--texts", "1", "--batch", "64"]
    files = ["--questions-of", str(questions), "--neutral", str(neutral)]
    assert not main(["cae", str(tmp_path / "study"), "--model", str(folder), *files, *flags])
    printed = capsys.readouterr().out
    assert "layer." in printed and "cannot be said" in printed
    assert {path.name for path in (tmp_path / "study" / "steering" / "cae").iterdir()} == {
        "findings.json",
        "mini-llama-small.json",
    }
