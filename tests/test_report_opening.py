"""The opening of the report: five sentences, the cleanest features, a strip of steering; what is empty is left out."""

import csv
import io
import re
from pathlib import Path

import pytest
from sample_study import (
    full_study,
    new_study,
    write_book,
    write_dictionary,
    write_evaluation,
    write_matches,
    write_steering,
)

from difflex.report import read_facts, write_report
from difflex.report.figures import MissingFigure, ReportFigure
from difflex.report.figures.gallery import wall
from difflex.report.figures.quality import quality
from difflex.report.figures.steering import strip
from difflex.report.figures.summary import summary
from difflex.study import Study

NAME = "double.1/topk-512-k8"


def words(study: Study) -> str:
    """The text of the summary."""
    return re.sub(r"<[^>]+>", "", summary(read_facts(study)))


def rows_of(study: Study, figure: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((study.folder / "report" / f"{figure}.csv").read_text(encoding="utf-8"))))


def test_a_study_is_summarised_in_five_sentences(tmp_path: Path):
    text = words(full_study(tmp_path))
    assert text.startswith(
        "mini-flux was read at double.1 and double.2. It has 8 ITDA dictionaries and 10 TopK SAEs, of 508 to 1,024"
    )
    assert "Single features of double.1/topk-1024-k16 detect 2 of 4 known concepts (AP 0.8 or more), best red and blue;" in text
    assert "are no better than chance: 63 % accurate on held-out images (50 % is chance)." in text
    assert "The best reconstruction, by double.1/itda-1020-k16-first100, keeps 97 % of the variance" in text
    assert text.endswith(
        "into 90 % more of the images in the median and, at best, red into 90 %; random directions of equal length 0 %."
    )


def test_the_summary_leaves_out_what_was_not_measured(tmp_path: Path):
    study = new_study(tmp_path)
    assert words(study) == "This study is about mini-flux; nothing has been made yet."
    write_dictionary(study, NAME)
    assert (
        words(study)
        == "mini-flux was read at double.1. It has 1 TopK SAE, of 512 features each, of which 8 are active at a token."
    )
    write_matches(study, NAME, (0.3, 0.2, 0.1, 0.0))
    assert "no single feature detects any of 4 known concepts" in words(study).lower()


def test_the_wall_has_a_feature_for_each_concept_by_ap_then_peak(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, NAME)
    write_matches(study, NAME, (0.9, 0.9, 0.7, 0.6), per_concept=3)
    write_book(study, NAME, features=12)
    page = write_report(study)[0].read_text(encoding="utf-8")
    shown = [(row["feature"], row["concept"], row["measure"]) for row in rows_of(study, "wall")]
    assert shown == [("9", "blue", "AP"), ("8", "red", "AP"), ("10", "star", "AP"), ("11", "ring", "AP")]
    assert [row["feature"] for row in rows_of(study, "images")][:4] == ["9", "8", "5", "4"]
    assert page.index("<img") < page.index('id="images"') and "AP 0.90" in page


def test_the_strip_is_of_the_concept_at_which_a_feature_gains_most(tmp_path: Path):
    study = full_study(tmp_path)
    section = strip(read_facts(study))
    assert section.title == "Steering towards red" and "Feature 1 of double.1/topk-1024-k16 is added" in section.lead
    assert "At strength 1, 90 % of 4 images show it (0 % without the edit" in section.lead and section.body.count("<img") == 4
    for name in ("double.1/topk-1024-k16", "double.1/itda-1020-k16-first100"):
        write_steering(study, name, success=0.0)
    section = strip(read_facts(study))
    assert not section.body and not section.parts
    assert "do not make any of them appear" in words(study)


@pytest.mark.parametrize("explained", [True, False])
def test_a_large_model_without_known_concepts_has_a_wall_and_no_empty_section(tmp_path: Path, explained: bool):
    study = new_study(tmp_path, model="black-forest-labs/FLUX.1-schnell")
    names = [f"{site}/{label}" for site in ("double.9", "single.9") for label in ("topk-65536-k64", "itda-65000-k64")]
    for name in names:
        write_evaluation(study, name, share=None)
        write_book(study, name, features=6, explained={f: (f"{name} {f}", 0.5 + f / 10) for f in range(3)} if explained else None)
    page = write_report(study)[0].read_text(encoding="utf-8")
    rows = rows_of(study, "wall")
    assert len(rows) == 12 and {row["measure"] for row in rows} == {"accuracy of its explanation" if explained else "peak"}
    assert {row["dictionary"] for row in rows[:4]} == {*names}  # as peaks of different sites do not compare
    sections = re.findall(r'<section id="(\w+)"', page)
    expected = ["wall", "reconstruction", "explanations", "images", "claims", "paper", "study", "missing"]
    assert sections == [name for name in expected if explained or name != "explanations"]
    for command in ("concepts STUDY", "steer-eval STUDY", "removal STUDY", "findings STUDY"):
        assert f"<dt><code>difflex {command}</code></dt>" in page


def test_explanations_that_are_near_chance_are_said_to_be(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, NAME)
    write_book(study, NAME, explained={f: ("a thing", 0.45 + f / 100) for f in range(12)})
    page = write_report(study)[0].read_text(encoding="utf-8")
    assert f"On held-out images, explanations are no better than chance for {NAME} (0.51)." in page
    write_book(study, NAME, explained=dict.fromkeys(range(12), ("a thing", 0.55)))
    assert f"explanations are little better than chance for {NAME} (0.55)." in write_report(study)[0].read_text(encoding="utf-8")


def test_one_dictionary_has_no_chart_with_a_single_value_but_the_commands_for_more(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, NAME)
    parts = quality(read_facts(study)).parts
    assert {part.name for part in parts if isinstance(part, ReportFigure) and part.drawings} == {"timesteps", "density"}
    missing = [part.name for part in parts if isinstance(part, MissingFigure)]
    assert "Reconstruction over k and size at double.1" in missing and len(missing) == 3


def test_neurons_do_not_stretch_the_axis_of_dictionaries(tmp_path: Path):
    study = new_study(tmp_path)
    for name, fvu in ((NAME, 0.2), ("double.1/topk-512-k16", 0.1), ("double.1/neurons-512-k8", 9.0)):
        write_evaluation(study, name, fvu=fvu)
    figure = next(part for part in quality(read_facts(study)).parts if isinstance(part, ReportFigure) and part.name == "sweep")
    ticks = [float(tick) for tick in re.findall(r'class="tick">([\d.]+)<', figure.drawings[0].svg)]
    assert max(tick for tick in ticks if tick < 8) <= 0.3 and "drawn at its edge" in figure.caption
    assert not wall(read_facts(study)).body
