"""Searching features by words: concept matches, explanations and captions, each with its reason."""

from pathlib import Path

import pytest
from sample_study import CONCEPTS, new_study, write_book, write_dictionary, write_matches

from difflex.cli import main
from difflex.commands.evaluation import ConceptsCommand
from difflex.errors import BadInput, UnknownName
from difflex.evaluation.concepts import Concept, ConceptsConfig
from difflex.explore.search import USUAL, rarity, resolve_features, search
from difflex.study import Study

NAME, OTHER = "double.1/topk-12-k4", "double.2/topk-12-k4"
RARE = Concept("orange", "colour")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two dictionaries: one with matches, explanations and captions, one with matches alone."""
    study = new_study(tmp_path_factory.mktemp("search"))
    for name in (NAME, OTHER):
        write_dictionary(study, name)
    write_matches(study, NAME, (0.93, 0.3, 0.7, 0.6), rare=(RARE,), per_concept=1)
    write_matches(study, OTHER, (0.81, 0.95, 0.2, 0.1), rare=(RARE,), per_concept=1)
    captions = {4: "two RED Rings", 5: "a small ring", 6: "grass and rings, red"}
    write_book(study, NAME, explained={8: ("a dark red area", 0.9), 9: ("credits of a film", 0.9)}, captions=captions)
    return study


def reasons(study: Study, words: str, **options: object) -> list[tuple[int, str]]:
    return [(found.feature, found.reason) for found in search(study, words, **options)]  # pyright: ignore[reportArgumentType]


def test_a_concept_of_the_exact_name_comes_first_then_explanations_and_captions(study: Study):
    found = search(study, "red", study.find_dictionary(NAME))
    assert [(each.feature, each.reason) for each in found] == [
        (1, "detects red, AP 0.93"),
        (8, "explained as 'a dark red area', accuracy 1.00"),
        (0, "detects red, AP 0.93"),
        (4, "fires in images whose captions say red, 6 of 6"),
        (6, "fires in images whose captions say red, 6 of 6"),
    ]
    assert [each.is_named for each in found] == [True, False, False, False, False]
    assert all(0 <= each.score <= 1 for each in found)


def test_words_are_whole_plural_tolerant_and_all_needed(study: Study):
    assert {feature for feature, _ in reasons(study, "Rings", place=study.find_dictionary(NAME))} >= {4, 5, 6}
    assert [feature for feature, reason in reasons(study, "red rings") if "captions" in reason] == [4, 6]
    assert not any("credits" in reason for _, reason in reasons(study, "red"))


def test_all_dictionaries_are_searched_up_to_a_limit(study: Study):
    assert {str(found.place) for found in search(study, "red")} == {NAME, OTHER}
    assert len(search(study, "red", limit=2)) == 2
    assert search(study, "red")[0].place == study.find_dictionary(NAME)
    assert search(study, "blue")[0].place == study.find_dictionary(OTHER)


def test_what_nothing_fits_gives_an_empty_list_and_no_words_an_error(study: Study):
    assert search(study, "zebra") == []
    with pytest.raises(BadInput, match="nothing to search for"):
        search(study, " - ")


def test_a_study_without_books_and_matches_says_how_to_make_them(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, NAME)
    with pytest.raises(BadInput, match="difflex collect, difflex concepts or both"):
        search(study, "red")


def test_names_are_resolved_in_the_one_dictionary_that_fits_them_best(study: Study):
    [red] = resolve_features(study, ["red"])
    assert str(red) == f"feature 1 of {NAME} (detects red, AP 0.93)"
    assert [str(found.place) for found in resolve_features(study, ["red", "blue"])] == [OTHER, OTHER]
    assert resolve_features(study, ["red"], study.find_dictionary(OTHER))[0].place == study.find_dictionary(OTHER)


def test_a_concept_left_out_as_rare_says_how_to_match_it(study: Study):
    with pytest.raises(
        UnknownName, match=r"Left out because too rare in 9 images; run difflex concepts .* --site double.1 --images 1000"
    ):
        resolve_features(study, ["orange"])


def test_the_command_for_a_rare_concept_repeats_the_present_settings(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, NAME)
    config = ConceptsConfig(images=600, noise=(0.5,), pixels=(64, 128), empty_prompts=True, held_out=0.5)
    write_matches(study, NAME, (0.9, 0.3, 0.7, 0.6), inputs={"config": config}, levels=(0.5,), rare=(RARE,), per_concept=1)
    flags = "--site double.1 --images 2000 --held-out 0.5 --noise 0.5 --pixels 64x128 --empty-prompts"
    assert rarity(study, "orange") == f"Left out because too rare in 600 images; run difflex concepts {tmp_path} {flags}."
    inputs = {"config": config, "images": "folder 123"}
    write_matches(study, NAME, (0.9, 0.3, 0.7, 0.6), inputs=inputs, levels=(0.5,), rare=(RARE,), per_concept=1)
    assert "add images that show it to the folder, then run difflex concepts" in rarity(study, "orange")


def test_a_word_that_nothing_fits_names_the_nearest_concepts(study: Study):
    with pytest.raises(UnknownName, match=r"'rad' is unknown; nearest: red.* difflex features"):
        resolve_features(study, ["rad"])


def test_matches_and_books_of_a_changed_dictionary_do_not_count(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, NAME)
    write_matches(study, NAME, (0.9, 0.9, 0.9, 0.9), concepts=CONCEPTS)
    write_book(study, NAME, captions={4: "red"})
    assert search(study, "red")
    write_dictionary(study, NAME, weights=b"other")
    with pytest.raises(BadInput, match="of its present dictionaries"):
        search(study, "red")


def test_the_command_lists_features_and_the_command_to_look_at_the_first(study: Study, capsys: pytest.CaptureFixture[str]):
    assert main(["search", str(study.folder), "red", "--limit", "2"]) == 0
    output = capsys.readouterr().out
    assert "detects red, AP 0.93" in output and output.count(NAME) == 3 and output.count(OTHER) == 1
    assert f"difflex show {study.folder} 1 --dictionary {NAME}" in output
    assert main(["search", str(study.folder), "red", "--dictionary", OTHER]) == 0
    assert NAME not in capsys.readouterr().out
    assert main(["search", str(study.folder), "zebra"]) == 2
    assert "The feature 'zebra' is unknown; known: red, blue, star, ring" in capsys.readouterr().err


def test_the_sheet_of_a_feature_is_drawn_by_name(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(study.folder), "red", "--columns", "2", "--out", str(tmp_path / "red.png")]) == 0
    assert f"red: feature 1 of {NAME} (detects red, AP 0.93)" in capsys.readouterr().out and (tmp_path / "red.png").is_file()


def test_the_settings_that_advice_leaves_out_are_those_of_the_command():
    config, command = ConceptsConfig(), ConceptsCommand(studies=())
    for name, usual in USUAL.items():
        values = [getattr(each, name) for each in (config, command)]
        assert [list(value) if isinstance(value, tuple) else value for value in values] == [usual, usual], name
