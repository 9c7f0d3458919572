"""The report shows what the records contain; records that cannot be used are named and left out."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sample_study import (
    CONCEPTS,
    control_study,
    full_study,
    new_study,
    write_anatomy,
    write_book,
    write_dictionary,
    write_evaluation,
    write_matches,
    write_removal,
    write_steering,
)

from difflex.cli import main, parse
from difflex.commands import VERBS
from difflex.commands.evaluation import EvaluateCommand
from difflex.commands.harvest import HarvestCommand
from difflex.commands.study import command_words
from difflex.commands.training import TrainCommand
from difflex.effects.addition_findings import AdditionFinding, AdditionFindings
from difflex.effects.finding_rules import FindingLine
from difflex.errors import UnknownName
from difflex.evaluation.concepts import Concept, ConceptsConfig
from difflex.recipes import RECIPES
from difflex.report import read_facts, write_report
from difflex.report.claims import judge_claims
from difflex.report.dictionary_claims import Claim
from difflex.report.style import number, percent
from difflex.study import CommandRecord, Study, command_statuses, run_study


def page_of(study: Study, control_study: Study | None = None) -> str:
    return write_report(study, control_study)[0].read_text(encoding="utf-8")


def rows_of(study: Study, figure: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((study.folder / "report" / f"{figure}.csv").read_text(encoding="utf-8"))))


def claim(study: Study, name: str, control_study: Study | None = None) -> Claim:
    return next(own for own in judge_claims(read_facts(study, control_study)) if own.name == name)


EXPLANATIONS = {"explained", "falls", "surfaces"}
STEERING = {"strengths", "steered", "points", "removal", "findings", "edits", "edit_curves"}
STEERING |= {"finding_pairs", "finding_out_of_distribution"}


def _unmeasured(root: Path) -> list[Claim]:
    claims = judge_claims(read_facts(Study.open(root / "study"), Study.open(root / "control")))
    return [own for own in claims if own.verdict == "not measured"]


def figures_of(page: str) -> str:
    """A page without its list of problems."""
    return re.sub(r"<aside.*?</aside>", "", page, flags=re.DOTALL)


def tips(page: str, figure: str) -> list[str]:
    """The tooltips of a figure."""
    [part] = re.findall(rf'id="figure-{figure}".*?</figure>', page, flags=re.DOTALL)
    return re.findall(r'data-tip="([^"]*)"', part)


def test_a_whole_study_has_every_figure(tmp_path: Path):
    page = page_of(full_study(tmp_path / "study"), control_study(tmp_path / "control"))
    names = {
        "norms",
        "spectra",
        "dead",
        "density",
        "sweep",
        "sites",
        "timesteps",
        "effect",
        "replaced",
        "transfer",
        "features",
        "coverage",
        "roles",
    }
    names |= {"dictionaries", "claims", "images", "wall", "paper", "measures", "block_roles"} | EXPLANATIONS | STEERING
    assert {path.stem for path in (tmp_path / "study" / "report").glob("*.csv")} == names
    assert set(re.findall(r'id="figure-(\w+)"', page)) == names
    # Steering has two groups, neither of them texture; three features are explained, and the claim takes ten.
    lacking = {"steering-sae", "steering-itda", "surfaces", "removal-itda", "untrained-itda"}
    assert {own.name for own in _unmeasured(tmp_path)} == lacking


def test_a_whole_study_has_every_figure_of_the_paper(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    rows = {row["figure"]: row for row in rows_of(study, "paper")}
    assert list(rows) == ["3", "4", "5", "6", "7", "8", "B"]
    assert {row["state"] for row in rows.values()} == {"complete"} and not any(row["command"] for row in rows.values())
    assert rows["7"]["here"] == "explained features" and "Appendix B" in page and 'href="#figure-sweep"' in page


def lacking(study: Study) -> dict[str, tuple[str, str]]:
    """The state of each figure of the paper, and the command for what it lacks first."""
    page_of(study)
    rows = reversed(rows_of(study, "paper"))
    return {row["figure"]: (row["state"], row["command"]) for row in rows}


def test_what_a_figure_of_the_paper_lacks_is_named_with_its_command(tmp_path: Path):
    study = new_study(tmp_path)
    assert {state for state, _ in lacking(study).values()} == {"missing"} and all(
        command for _, command in lacking(study).values()
    )
    write_anatomy(study, norms={"double.0": {1000.0: 10.0}, "double.1": {1000.0: 30.0}})
    for name in ("double.1/topk-512-k8", "double.1/topk-1024-k8", "double.2/topk-1024-k8", "double.1/itda-1000-k8"):
        write_evaluation(study, name)
    assert lacking(study) == {
        "3": ("missing", "difflex anatomy mini-flux --prompts FILE --steps 4 --out STUDY"),
        "4": ("in part", "difflex anatomy mini-flux --prompts FILE --steps 4 --out STUDY"),
        "5": (
            "missing",
            "difflex train STUDY --site double.1 --k 8 --size 512 --normalisation none, then difflex evaluate STUDY",
        ),
        "6": ("in part", "difflex itda STUDY --site double.1 --k 8 --size 512"),
        "7": (
            "missing",
            "difflex neurons STUDY --site SITE:neurons, then difflex collect STUDY, then difflex explain STUDY --vlm NAME",
        ),
        "8": ("in part", "difflex itda STUDY --site double.2 --k 8 --size 1024"),
        "B": ("missing", "difflex collect STUDY"),
    }
    for name in ("double.1/itda-512-k8", "double.2/itda-1020-k8"):
        write_evaluation(study, name)
    write_evaluation(study, "double.1/topk-512-k8-none", normalisation="none")
    write_matches(study, "double.1/topk-512-k8", (0.9, 0.8, 0.7, 0.6))
    write_matches(study, "double.1/itda-512-k8", (0.9, 0.8, 0.7, 0.6))
    write_book(study, "double.1/topk-512-k8", explained={3: ("red", 0.8), 5: ("stars", 0.6), 8: ("a blue star", 0.5)})
    now = lacking(study)
    assert {figure for figure, (state, _) in now.items() if state == "complete"} == {"5", "6", "8", "B"}
    assert now["7"] == ("in part", "difflex neurons STUDY --site SITE:neurons, then difflex concepts STUDY")
    write_evaluation(study, "double.3/topk-1024-k8")
    assert lacking(study)["8"] == ("in part", "difflex itda STUDY --site double.3 --k 8 --size 1024")


def test_a_dictionary_of_a_comparison_of_normalisations_is_not_in_the_sweep_beside_another_of_its_shape(tmp_path: Path):
    study = new_study(tmp_path)
    for name in ("double.1/topk-512-k8-paper", "double.1/topk-1024-k8-paper"):
        write_evaluation(study, name, normalisation="whiten", data="live")
    for normalisation in ("none", "whiten"):
        write_evaluation(study, f"double.1/topk-512-k8-paper-{normalisation}", normalisation=normalisation, data="stored")
    page_of(study)
    assert [row["dictionary"] for row in rows_of(study, "sweep")] == ["double.1/topk-512-k8-paper", "double.1/topk-1024-k8-paper"]
    assert len(rows_of(study, "dead")) == 2


def test_every_metric_of_an_evaluation_is_in_the_table(tmp_path: Path):
    study = new_study(tmp_path)
    evaluation = write_evaluation(study, "double.1/topk-512-k8", fvu=0.1234, dead=5, share=0.3, r2=0.777)
    page = page_of(study)
    for text in ("4,321", "0.123", "0.777", "0.900", "16.0", "25 %", "0.98 %", "0.300", "0.150", "30.0"):
        assert f">{text}</td>" in page
    (row,) = rows_of(study, "dictionaries")
    assert float(row["FVU"]) == evaluation.overall.model_space.fvu and float(row["dead"]) == evaluation.dead_share
    assert float(row["v / mean"]) == 0.3 and row["dictionary"] == "double.1/topk-512-k8"


def heads(page: str) -> list[str]:
    """The columns of the table of dictionaries."""
    [table] = re.findall(r'<section id="reconstruction".*?</thead>', page, flags=re.DOTALL)
    return re.findall(r"<button[^>]*>([^<]*)</button>", table)


def test_the_table_has_a_column_for_each_measure_that_a_dictionary_has(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8")
    usual = heads(page_of(study))
    place = usual.index("SSIM") + 1
    assert "lpips" not in usual
    write_evaluation(study, "double.1/topk-512-k16", similarity={"lpips": 0.0625})
    write_evaluation(study, "double.2/topk-512-k8", similarity={"clip:a<b": 0.875, "lpips": 0.25})
    page = page_of(study)
    assert heads(page) == [*usual[:place], "clip:a&lt;b", "lpips", *usual[place:]]
    rows = {row["dictionary"]: (row["clip:a<b"], row["lpips"]) for row in rows_of(study, "dictionaries")}
    assert rows == {
        "double.1/topk-512-k8": ("", ""),
        "double.1/topk-512-k16": ("", "0.0625"),
        "double.2/topk-512-k8": ("0.875", "0.25"),
    }
    assert ">0.875</td>" in page and ">0.0625</td>" in page
    for meaning in ("1 for equal images", "0 for equal images"):
        assert page.count(meaning) == 2  # in the head of its column, and in the legend


@pytest.mark.parametrize(
    ("figure", "column", "write"),
    [("sweep", "FVU", number), ("sites", "r2", number), ("timesteps", "FVU", number), ("dead", "dead share", percent)],
)
def test_a_csv_file_holds_what_is_drawn(tmp_path: Path, figure: str, column: str, write: Callable[[float], str]):
    study = full_study(tmp_path)
    texts = tips(page_of(study), figure)
    rows = rows_of(study, figure)
    assert rows and len(texts) % len(rows) == 0
    for row in rows:
        own = [tip for tip in texts if tip.startswith(row["dictionary"] + "\n")]
        assert any(write(float(row[column])) in tip for tip in own)


def test_the_numbers_of_heat_maps_and_distributions_are_those_of_their_files(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    norms, roles, features = (rows_of(study, name) for name in ("norms", "roles", "features"))
    assert [
        f"{row['site']}\ntimestep {float(row['timestep']):g}\nmean norm {number(float(row['norm']), 4)}" for row in norms
    ] == tips(page, "norms")
    assert len(roles) == len(tips(page, "roles")) == 2 * 2 * 2 * 2 and len(features) == len(tips(page, "features"))
    assert {float(row["mean AP"]) for row in roles if row["method"] == "topk-1024-k16" and row["group"] == "colour"} == {
        (0.9 + 0.8) / 2
    }
    best = [row for row in features if row["method"] == "topk-1024-k16"]
    assert max(float(row["AP at least"]) for row in best) == 0.9 and best[0]["share of features"] == "1.0"
    assert [row["detected"] for row in rows_of(study, "coverage") if row["method"] == "topk-1024-k16"] == ["2", "2"]


def test_dictionaries_are_drawn_at_each_step_of_both_models_and_results_of_older_weights_are_named(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    rows = rows_of(study, "transfer")
    assert [row["EV"] for row in rows if row["model"] == "mini-flux-base"] == ["0.75", "0.65"]
    assert rows[0]["overlap"] == "" and rows[1]["overlap by chance"] == "0.25"
    assert any("EV 0.650 (0.600 to 0.700)" in tip and "mini-flux, 4 steps" in tip for tip in tips(page, "transfer"))
    write_dictionary(study, "double.1/topk-1024-k16", weights=b"other")
    assert "mini-flux-4.json is of older weights of its dictionary" in page_of(study)


def test_the_download_in_the_page_is_the_file_on_disk(tmp_path: Path):
    page = page_of(full_study(tmp_path))
    links = re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]+)" download="(\w+)\.csv"', page)
    assert len(links) == 20 + len(EXPLANATIONS | STEERING)
    for code, name in links:
        assert base64.b64decode(code).decode() == (tmp_path / "report" / f"{name}.csv").read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path):
    page = page_of(full_study(tmp_path))
    assert "default-src 'none'" in page
    assert {link.split(",")[0].split(";")[0] for link in re.findall(r'(?:href|src)="([^"#]*)', page)} <= {
        "",
        "data:",
        "data:text/csv",
        "data:image/webp",
    }
    assert not re.search(r"https?://|@import|url\(|<(?:iframe|object|embed|video|audio)\b|fetch\(|XMLHttp", page)


def test_the_same_study_gives_the_same_files_and_stale_ones_are_deleted(tmp_path: Path):
    study = full_study(tmp_path)
    first = {path: path.read_bytes() for path in write_report(study)}
    (tmp_path / "report" / "old.csv").write_text("of a figure that no longer exists")
    assert {path: path.read_bytes() for path in write_report(study)} == first
    assert not (tmp_path / "report" / "old.csv").exists()


def test_the_report_of_an_empty_study_names_every_verb(tmp_path: Path):
    page = page_of(new_study(tmp_path))
    steering = ("steer-eval", "removal", "edit-bench", "findings")
    for verb in ("anatomy", "harvest", "train", "itda", "evaluate", "concepts", *steering):
        assert f"difflex {verb}" in page
    assert {own.verdict for own in judge_claims(read_facts(new_study(tmp_path)))} == {"not measured"}
    assert "<svg" not in page.replace("querySelectorAll", "")


def test_records_of_older_weights_are_named_and_left_out(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8", fvu=0.1234)
    write_matches(study, "double.1/topk-512-k8", (0.9, 0.9, 0.9, 0.987))
    assert "0.123" in (page := page_of(study)) and "mean AP" in page
    write_dictionary(study, "double.1/topk-512-k8", weights=b"trained again")
    page = page_of(study)
    assert "0.123" not in page and "mean AP" not in page
    assert "double.1/topk-512-k8: the dictionary has changed since it was evaluated" in page
    assert "concepts/double.1/topk-512-k8.json: the dictionary has changed since" in page


def change(path: Path, edit: Callable[[str], str]) -> None:
    """Change the text of a record, and leave out its checksum as a file written by hand does."""
    path.write_text(re.sub(r',\s*"checksum": "\w+"', "", edit(path.read_text())))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"format": 2', '"format": 99'), "format 99"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (
            lambda text: text.replace('"dead": 3', '"dead": "three"'),
            "cannot be read as results of difflex evaluate",
        ),
        (lambda text: text.replace('"density": [', '"density": [0,'), "does not fit its dictionary"),
        (lambda text: text.replace('"size": 512', '"size": 0'), "does not fit its dictionary"),
        (lambda text: text.replace('"size": 512', '"sise": 512'), "cannot be read as results of difflex evaluate"),
    ],
)
def test_a_damaged_evaluation_is_named_and_left_out(tmp_path: Path, damage: Callable[[str], str], message: str):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8", fvu=0.1234, dead=3)
    write_evaluation(study, "double.1/topk-512-k16", fvu=0.4321)
    path = next((tmp_path / "evaluation").glob("*/topk-512-k8.json"))
    change(path, damage)
    page = page_of(study)
    assert re.search(message, page) and "0.432" in page
    assert [row["dictionary"] for row in rows_of(study, "dictionaries")] == ["double.1/topk-512-k16"]


def test_other_damaged_files_do_not_stop_the_report(tmp_path: Path):
    study = full_study(tmp_path)
    for name in (
        "anatomy.json",
        "run.json",
        "concepts/double.1/pca-16-k16.json",
        "dictionaries/double.2/topk-512-k8/config.json",
    ):
        (tmp_path / name).write_text("{")
    (tmp_path / "activations" / "double.1").mkdir(parents=True)
    (tmp_path / "activations" / "double.1" / "manifest.json").write_text("{")
    page = page_of(study)
    for name in ("anatomy.json", "run.json", "pca-16-k16.json", "topk-512-k8/config.json", "manifest.json"):
        assert re.search(rf"<li>[^<]*{name}[^<]*</li>", page)
    assert "double.2/topk-512-k16" in page and "pca-16-k16" not in figures_of(page)


def test_matches_and_anatomies_of_another_model_are_left_out(tmp_path: Path):
    study = full_study(tmp_path)
    write_anatomy(study, model="other-flux")
    write_matches(study, "double.1/random-1024-k16", (0.1, 0.1, 0.1, 0.1), inputs={"model": "other-flux"})
    page = page_of(study)
    assert "anatomy.json is of other-flux" in page and "random-1024-k16.json is of other-flux" in page
    concepts = page.split('<section id="concepts"')[1].split("</section>")[0]
    assert ">principal axes<" in concepts and ">random directions<" not in concepts


def test_matches_measured_on_other_images_are_left_out(tmp_path: Path):
    study = full_study(tmp_path)
    write_matches(study, "double.1/random-1024-k16", (0.99, 0.99, 0.99, 0.99), inputs={"config": ConceptsConfig(noise=(0.9,))})
    page = page_of(study)
    assert "double.1: random-1024-k16 was matched to other images, or at other noise levels" in page
    assert "random-1024-k16" not in {row["method"] for row in rows_of(study, "coverage")}
    assert claim(study, "axes-sae").verdict == "undecided"


def test_a_dictionary_that_was_matched_again_on_more_images_stays_and_is_marked(tmp_path: Path):
    study = full_study(tmp_path)
    config = ConceptsConfig(images=5000, noise=(0.25, 0.5))
    write_matches(study, "double.1/topk-1024-k16", (0.99, 0.8, 0.7, 0.6), inputs={"config": config})
    facts = read_facts(study)
    assert facts.problems == ()
    assert "topk-1024-k16 (5,000 images)" in {match.name for match in facts.matches}


def test_dictionaries_that_are_all_matched_again_stay_whatever_their_baselines_were_measured_on(tmp_path: Path):
    study = full_study(tmp_path)
    trained = [match.name for match in read_facts(study).matches if match.is_trained]
    again = [ConceptsConfig(images=600, held_out=0.5, noise=(0.25, 0.5)), ConceptsConfig(noise=(0.9,))]
    for config, expected in zip(again, (0, len(read_facts(study).matches) - len(trained)), strict=True):
        for name in trained:
            write_matches(study, f"double.1/{name}", (0.9, 0.8, 0.7, 0.6), inputs={"config": config})
        facts = read_facts(study)
        assert trained == [match.name for match in facts.matches if match.is_trained]
        assert len(facts.problems) == expected


def test_values_that_are_unknown_are_counted_and_not_drawn(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8", fvu=None)
    write_evaluation(study, "double.1/topk-512-k16", fvu=0.25)
    page = page_of(study)
    assert f">{number(None)}</td>" in page and not re.search(r'\b(?:x|y|d|cx|width)="[^"]*(?:nan|inf)', page)
    assert "values are not drawn (NaN, infinity, or 0 on a logarithmic axis)" in page
    assert len([tip for tip in tips(page, "sweep") if tip.startswith("double.1/topk-512-k8\n")]) == 2  # r2 and dead share
    assert claim(study, "itda").verdict == "not measured"


def test_names_are_escaped(tmp_path: Path):
    evil = '<script>alert("1")</script>'
    study = new_study(tmp_path / "<b>study", model=evil, revision="<i>r</i>&amp;")
    write_evaluation(study, "double.1/topk-512-k8-<u>x<u>")
    concepts = (*CONCEPTS[:2], Concept(evil, "<em>shape"), Concept("ring", "<em>shape"))
    write_matches(study, "double.1/topk-512-k8-<u>x<u>", (0.9, 0.5, 0.5, 0.5), concepts=concepts)
    write_anatomy(study)
    page = page_of(study)
    assert page.count("<script") == 1 and "&lt;script&gt;" in page
    for tag in ("<b>study", "<i>r", "<u>", "<em>shape", "&amp;amp;amp;"):
        assert tag not in page
    assert "&lt;em&gt;shape" in page and "topk-512-k8-&lt;u&gt;x&lt;u&gt;" in page


def test_the_claim_about_normalisation_follows_the_dead_shares(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-100-k8", dead=10)
    assert claim(study, "normalisation").verdict == "not measured"
    write_evaluation(study, "double.1/topk-100-k8-none", dead=60, normalisation="none")
    normalisation = claim(study, "normalisation")
    assert normalisation.verdict == "undecided" and "60 % dead without, 10 % with" in normalisation.evidence[0]  # one pair
    write_evaluation(study, "double.1/topk-100-k8-whiten", dead=10, normalisation="whiten")
    assert claim(study, "normalisation").verdict == "holds here"
    write_evaluation(study, "double.1/topk-100-k8-none", dead=40, normalisation="none")
    assert claim(study, "normalisation").verdict == "does not hold here"
    write_evaluation(study, "double.1/topk-100-k8-whiten", dead=10, normalisation="whiten", data="others")
    write_evaluation(study, "double.1/topk-100-k8-none", dead=60, normalisation="none")
    write_evaluation(study, "double.1/topk-100-k8", dead=31, data="other tokens")
    assert claim(study, "normalisation").verdict == "not measured"
    write_evaluation(study, "double.1/topk-100-k8-seed1", dead=0)
    assert claim(study, "normalisation").verdict == "not measured"  # another seed is another difference
    write_evaluation(study, "double.1/topk-100-k8", dead=10)
    write_evaluation(study, "double.1/topk-100-k8-whiten", dead=31, normalisation="whiten")
    assert claim(study, "normalisation").verdict == "undecided"  # the pairs disagree


def test_the_claim_about_itda_needs_an_equal_size_and_k_and_every_pair(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8", fvu=0.3)
    write_evaluation(study, "double.1/itda-512-k16", fvu=0.2)
    write_evaluation(study, "double.1/itda-300-k8", fvu=0.2)
    write_evaluation(study, "double.2/itda-512-k8", fvu=0.2)
    assert claim(study, "itda").verdict == "not measured"
    write_evaluation(study, "double.1/itda-500-k8", fvu=0.2)
    assert claim(study, "itda").verdict == "undecided" and "1 of 1 pair" in claim(study, "itda").evidence[0]
    write_evaluation(study, "double.1/itda-500-k8-seed1", fvu=0.2)
    assert claim(study, "itda").verdict == "holds here"
    write_evaluation(study, "double.1/topk-512-k8-seed1", fvu=0.19)
    assert claim(study, "itda").verdict == "does not hold here"
    write_evaluation(study, "double.1/itda-500-k8-seed1", fvu=0.1)
    assert claim(study, "itda").verdict == "undecided"
    write_evaluation(study, "double.1/topk-512-k8-seed1", fvu=None)
    assert claim(study, "itda").verdict == "holds here"


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("neurons-sae", "double.1/topk-512-k8", "double.1:neurons/neurons-k8"),
        ("neurons-itda", "double.1/itda-512-k8", "double.1:neurons/neurons-k8"),
        ("axes-itda", "double.1/itda-512-k8", "double.1/random-512-k8"),
    ],
)
def test_claims_about_concepts_follow_the_average_precisions(tmp_path: Path, name: str, ours: str, theirs: str):
    study = new_study(tmp_path)
    write_dictionary(study, ours)
    write_matches(study, ours, (0.9, 0.8, 0.7, 0.6))
    assert claim(study, name).verdict == "not measured"
    write_matches(study, theirs.replace("-k8", "-k32"), (0.1, 0.1, 0.1, 0.1))
    assert claim(study, name).verdict == "not measured"  # at another k
    write_matches(study, theirs, (0.5, 0.4, 0.3, 0.1))
    assert claim(study, name).verdict == "undecided"  # one pair
    write_dictionary(study, f"{ours}-seed1")
    write_matches(study, f"{ours}-seed1", (0.9, 0.8, 0.7, 0.6))
    judged = claim(study, name)
    assert judged.verdict == "holds here"
    assert all(text in judged.evidence[1] for text in ("mean AP 0.750", "mean AP 0.325", "difference +0.425"))
    write_matches(study, theirs, (0.1, 0.1, 0.9, 0.9))  # lower in the mean, by no more than chance
    assert claim(study, name).verdict == "undecided"
    write_matches(study, theirs, (1.0, 1.0, 1.0, 1.0))
    assert claim(study, name).verdict == "does not hold here"


def test_only_neurons_are_compared_with_other_sites_of_their_block(tmp_path: Path):
    study, untrained = full_study(tmp_path / "study"), control_study(tmp_path / "control")
    names = ("axes-sae", "untrained-sae", "neurons-sae")
    before = [claim(study, name, untrained) for name in names]
    assert [own.verdict for own in before] == ["holds here", "holds here", "undecided"]
    for label in ("pca-32-k16", "random-2048-k16"):
        write_matches(study, f"double.1:neurons/{label}", (0.95, 0.9, 0.9, 0.9))
    write_dictionary(untrained, "double.1:neurons/topk-1024-k16")
    write_matches(untrained, "double.1:neurons/topk-1024-k16", (0.95, 0.9, 0.9, 0.9))
    assert [claim(study, name, untrained) for name in names] == before
    page_of(study, untrained)
    drawn, listed = ({row["method"] for row in rows_of(study, figure)} for figure in ("features", "coverage"))
    assert {"pca-16-k16", "random-1024-k16", "topk-1024-k16, untrained model"} <= drawn
    assert not any("(neurons)" in name for name in drawn)
    assert {"pca-16-k16", "pca-32-k16 (neurons)", "neurons-k16", "topk-1024-k16 (neurons), untrained model"} <= listed


def test_dictionaries_of_two_sites_of_a_block_are_not_compared(tmp_path: Path):
    study = new_study(tmp_path)
    for name in ("double.1/topk-512-k8", "double.1:update/itda-512-k8"):
        write_dictionary(study, name)
        write_matches(study, name, (0.9,) * 4, per_concept=10)
        write_book(study, name)
    assert claim(study, "surfaces").verdict == claim(study, "covering").verdict == "not measured"


def test_the_control_is_the_untrained_model(tmp_path: Path):
    study, untrained = new_study(tmp_path / "study"), control_study(tmp_path / "control")
    write_dictionary(study, "double.1/topk-512-k16")
    write_matches(study, "double.1/topk-512-k16", (0.9, 0.8, 0.7, 0.6))
    assert claim(study, "untrained-sae").verdict == "not measured"
    assert claim(study, "untrained-sae", untrained).verdict == "holds here"
    write_matches(untrained, "double.1/topk-1024-k16", (0.95, 0.85, 0.75, 0.65))
    assert claim(study, "untrained-sae", untrained).verdict == "does not hold here"
    assert "of an untrained model" in page_of(study, untrained)


def test_claims_about_the_model_follow_its_anatomy(tmp_path: Path):
    study = new_study(tmp_path)
    assert {claim(study, name).verdict for name in ("norms", "spectrum")} == {"not measured"}
    write_anatomy(study)
    assert {claim(study, name).verdict for name in ("norms", "spectrum")} == {"holds here"}
    even = {"double.0": {1000.0: 10.0, 500.0: 12.0}, "double.1": {1000.0: 11.0, 500.0: 13.0}}
    write_anatomy(study, norms=even, variances=(1.0,) * 20)
    assert {claim(study, name).verdict for name in ("norms", "spectrum")} == {"does not hold here"}
    still = {"double.0": {1000.0: 10.0, 500.0: 10.0}, "double.1": {1000.0: 30.0, 500.0: 30.0}}
    write_anatomy(study, norms=still)
    assert claim(study, "norms").verdict == "does not hold here"


def test_every_verdict_and_every_rule_is_on_the_page(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    claims = judge_claims(read_facts(study))
    measured = [own for own in claims if own.verdict != "not measured"]
    for verdict in {own.verdict for own in measured}:
        assert page.count(f'class="verdict">{verdict}<') == sum(own.verdict == verdict for own in measured)
    assert page.count('class="rule"') == len(measured) == 10 and len(claims) == 16
    assert all(f"<dt><code>{own.command}" in page for own in claims if own not in measured)
    assert next(row["verdict"] for row in rows_of(study, "claims") if row["name"] == "itda") == "holds here"


@pytest.mark.parametrize("name", RECIPES)
def test_the_words_of_a_command_parse_to_the_same_command(name: str):
    study = RECIPES[name](Path("STUDY"))
    for step, command in zip(command_statuses(study), study.commands, strict=True):
        line = command_words(step.record)
        assert parse(line) == command, line


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"run"}))
def test_every_verb_of_a_recipe_is_known(verb: str):
    assert command_words(CommandRecord(verb=verb, flags={})) == [verb]


def test_words_contain_only_flags_that_differ_from_their_defaults():
    line = command_words(
        command_statuses(replace(RECIPES["mini"](Path("S")), commands=(EvaluateCommand(study=Path("S"), effect_shots=8),)))[
            0
        ].record,
        "demo",
    )
    assert line == ["evaluate", "demo", "--effect-shots", "8"]
    train = TrainCommand(study=Path("S"), site=("double.1",), k=(8, 16), learning_rate=2e-4, log=("wandb",))
    line = command_words(command_statuses(replace(RECIPES["mini"](Path("S")), commands=(train,)))[0].record)
    assert line == ["train", "STUDY", "--site", "double.1", "--k", "8,16", "--learning-rate", "0.0002", "--log", "wandb"]
    harvest = HarvestCommand(model="mini-flux", site=("double.1",), prompts="captions", pixels=(64, 96), out=Path("S"))
    line = command_words(command_statuses(replace(RECIPES["mini"](Path("S")), commands=(harvest,)))[0].record)
    assert line == ["harvest", "mini-flux", "--site", "double.1", "--prompts", "captions", "--out", "STUDY", "--pixels", "64x96"]
    with pytest.raises(UnknownName, match="'embroider' is unknown"):
        command_words(CommandRecord(verb="embroider", flags={}))


def test_the_page_says_how_to_run_the_study_again(tmp_path: Path):
    study = full_study(tmp_path)
    assert "has no log" in page_of(study)
    commands = (EvaluateCommand(study=tmp_path, effect_shots=8),)
    flags = command_statuses(replace(study, commands=commands))[0].record.flags
    done = {"verb": "evaluate", "flags": flags, "outputs": ["study.json"], "seconds": 61.0}
    alien = {"verb": "embroider", "flags": {"colour": "red"}, "outputs": [], "seconds": None}
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "recipe": "mini", "commands": [done, alien]}))
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "difflex run mini --out STUDY" in page and "difflex evaluate STUDY --effect-shots 8" in page
    assert "finished in 61 seconds" in page and "difflex embroider colour=red" in page and "started, not finished" in page


@pytest.mark.parametrize(
    ("seconds", "done", "text"),
    [
        (0.4, "2026-11-21T13:11:58+00:00", "finished 21 November 2026, 13:11 UTC, in 0 seconds"),
        (705.1, "2026-11-21T13:31:25+00:00", "finished 21 November 2026, 13:31 UTC, in 705 seconds (12 minutes)"),
        (9000.0, "2026-11-22T00:30:00+02:00", "finished 21 November 2026, 22:30 UTC, in 9,000 seconds (2.5 hours)"),
        (1.0, None, "finished in 1 second"),
        (None, None, "started, not finished"),
    ],
)
def test_the_page_says_when_each_command_finished_and_how_long_it_took(
    tmp_path: Path, seconds: float | None, done: str | None, text: str
):
    study = new_study(tmp_path)
    entry = {"verb": "evaluate", "flags": {"study": "."}, "outputs": [], "seconds": seconds, "finished": done}
    (tmp_path / "run.json").write_text(json.dumps({"format": 2, "recipe": "mini", "commands": [entry]}))
    assert f"<span>{text}</span>" in page_of(study)


def test_the_report_command_finds_the_control_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = full_study(tmp_path)
    control_study(tmp_path / "untrained")
    assert main(["report", str(tmp_path)]) == 0 and "report.html: the report" in capsys.readouterr().out
    assert claim(study, "untrained-sae", Study.open(tmp_path / "untrained")).verdict == "holds here"
    assert "topk-1024-k16, untrained model" in (tmp_path / "report.html").read_text(encoding="utf-8")
    command = parse(["report", str(tmp_path)])
    run_study(replace(study, commands=(command,)), report=lambda _: None)
    assert all((tmp_path / path).exists() for path in json.loads((tmp_path / "run.json").read_text())["commands"][0]["outputs"])
    assert main(["report", str(tmp_path / "nowhere")]) == 2


def test_the_best_and_the_worst_features_are_shown_in_images(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8")
    write_book(study, "double.1/topk-512-k8", features=12)
    page = page_of(study)
    # Without explanations and known concepts features are ranked by peak: the four highest and the two lowest.
    assert [row["feature"] for row in rows_of(study, "images")] == ["11", "10", "9", "8", "1", "0"]
    assert [row["feature"] for row in rows_of(study, "wall")] == [str(feature) for feature in reversed(range(12))]
    assert page.count("<img") == page.count("data:image/webp;base64,") == (12 + 6) * 5
    assert "<b>a star</b>" not in page and "&lt;b&gt;a star" in page


def test_features_are_ranked_by_the_accuracy_of_their_explanations_which_are_escaped(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8")
    write_book(study, "double.1/topk-512-k8", explained={3: ("<script>red</script>", 0.9), 5: ("stars", 0.6)})
    page = page_of(study)
    ranked = [(row["feature"], row["explanation"], row["value"]) for row in rows_of(study, "images")]
    # Not by the paper's protocol, whose scores are higher as its judge sees the explained images.
    assert ranked == [("3", "<script>red</script>", "0.9"), ("5", "stars", "0.6")]
    assert "<script>red" not in page and "&lt;script&gt;red" in page


def test_images_that_are_missing_or_damaged_are_empty_tiles(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8")
    write_book(study, "double.1/topk-512-k8")
    whole = page_of(study)
    first, second, *_ = sorted(study.images.iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    page = page_of(study)
    assert page.count("<img") == whole.count("<img") > page.count("the image is missing or damaged") > 0
    assert "double.1/topk-512-k8: 2 of its images cannot be shown" in page and "Run difflex collect" in page


def test_a_damaged_book_is_named_and_left_out(tmp_path: Path):
    study = new_study(tmp_path)
    ref = write_dictionary(study, "double.1/topk-512-k8")
    write_book(study, "double.1/topk-512-k8")
    path = study.book(*ref)
    path.with_name(f"{path.stem}.former-abc-1.sqlite").write_bytes(b"kept, and not counted as a book")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    page = page_of(study)
    assert f"{path} does not match its checksum" in page and "<img" not in page and "former" not in page


def test_a_book_of_older_weights_is_named_and_left_out(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8")
    write_book(study, "double.1/topk-512-k8")
    write_dictionary(study, "double.1/topk-512-k8", weights=b"others")
    page = page_of(study)
    assert "has changed since its book was written" in page and "<img" not in page


def test_accuracies_are_shown_by_protocol_and_by_surface_words(tmp_path: Path):
    study = new_study(tmp_path)
    write_evaluation(study, "double.1/topk-512-k8")
    write_book(study, "double.1/topk-512-k8", explained={3: ("red", 0.8), 5: ("a star", 0.6), 8: ("a star", 0.4)})
    page_of(study)
    means = {row["protocol"]: float(row["accuracy"]) for row in rows_of(study, "falls")}
    assert means["heldout"] == pytest.approx(0.6) and means["paper"] == pytest.approx(0.7)
    surfaces = {
        row["colour or place"]: (row["features"], row["accuracy"])
        for row in rows_of(study, "surfaces")
        if row["protocol"] == "heldout"
    }
    assert surfaces == {"none": ("2", "0.5"), "all": ("1", "0.8")}
    shares = {
        row["accuracy at least"]: row["share of features"] for row in rows_of(study, "explained") if row["protocol"] == "heldout"
    }
    assert float(shares["0.5"]) == pytest.approx(2 / 3) and float(shares["0.8"]) == pytest.approx(1 / 3) and "0.82" not in shares


PLACES = ("double.1/topk-512-k8", "double.1/itda-300-k8")


@pytest.mark.parametrize(
    ("itda", "images", "verdict"),
    [(0.5, "made", "holds here"), (0.1, "made", "does not hold here"), (0.5, "other", "not measured")],
)
def test_the_claim_about_coverage_follows_the_books_of_the_same_images(tmp_path: Path, itda: float, images: str, verdict: str):
    study = new_study(tmp_path)
    for name, coverage, data in zip(PLACES, (0.25, itda), ("made", images), strict=True):
        write_dictionary(study, name)
        write_book(study, name, coverage=coverage, data=data)
    covering = claim(study, "covering")
    assert covering.verdict == ("undecided" if images == "made" else verdict)  # one pair
    write_dictionary(study, f"{PLACES[0]}-seed1")
    write_book(study, f"{PLACES[0]}-seed1", coverage=0.25)
    assert claim(study, "covering").verdict == verdict
    assert (f"{PLACES[1]} {itda:.0%}".replace("%", " %") in covering.evidence[0]) == (images == "made")


@pytest.mark.parametrize(
    ("sae", "itda", "verdict"),
    [
        ("star", "red", "holds here"),
        ("red", "red", "undecided"),
        ("red", "star", "does not hold here"),
        ("a thing with words", "red", "not measured"),
    ],
)
def test_the_claim_about_surfaces_follows_the_concepts_that_explain_features(tmp_path: Path, sae: str, itda: str, verdict: str):
    study = new_study(tmp_path)
    for name, text in zip((f"{PLACES[0]}-seed1", *PLACES), (sae, sae, itda), strict=True):
        write_dictionary(study, name)
        write_matches(study, name, (0.9, 0.9), concepts=(Concept("red", "colour"), Concept("star", "shape")))
        write_book(study, name, explained=dict.fromkeys(range(10), (text, 0.85)) | {10: ("star", 0.7), 11: ("red", 0.7)})
    surfaces = claim(study, "surfaces")
    assert surfaces.verdict == verdict
    if verdict == "not measured":
        assert "double.1/topk-512-k8: a known concept explains 0 features, 10 are needed" in surfaces.evidence


WORLD = tuple(Concept(f"{group} {i}", group) for group in ("colour", "texture", "background") for i in range(4))


def test_the_claim_about_steering_needs_features_success_specificity_and_failing_random_directions(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, PLACES[0])

    def verdict(
        aps: tuple[float, ...] = (0.9, 0.9, 0.1, 0.1) * 3, success: float = 0.9, random: float = 0.0, kept: float = 0.95
    ) -> str:
        write_matches(study, PLACES[0], aps, concepts=WORLD)
        write_steering(study, PLACES[0], success, random, kept, WORLD)
        return claim(study, "steering-sae").verdict

    assert claim(study, "steering-sae").verdict == "not measured"
    assert verdict() == "holds here"
    every = (0.9,) * 12
    assert verdict(every, success=0.6) == verdict(every, random=0.2) == verdict(kept=0.85) == "does not hold here"
    assert verdict(success=0.6) == verdict(random=0.2) == "undecided"  # two concepts of each group, and some success
    assert (
        verdict(aps=(0.9, 0.9, 0.9, 0.9, 0.9, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9)) == "does not hold here"
    )  # one texture of four


def test_concepts_that_too_few_images_show_count_as_without_a_feature(tmp_path: Path):
    study, rare = new_study(tmp_path), tuple(Concept(f"texture {i}", "texture") for i in range(4, 9))
    write_dictionary(study, PLACES[0])
    write_matches(study, PLACES[0], (0.9, 0.9, 0.1, 0.1) * 3, concepts=WORLD, rare=rare[:1])
    write_steering(study, PLACES[0], concepts=WORLD)
    steering = claim(study, "steering-sae")
    assert steering.verdict == "undecided"
    assert any("texture: 2 of 5 have a feature (1 of the 5 is shown too rarely to tell)" in line for line in steering.evidence)
    page = page_of(study)
    assert ">2 of 5</td>" in page and ">2 of 4</td>" in page
    write_matches(study, PLACES[0], (0.9,) * 8, concepts=[concept for concept in WORLD if concept.group != "texture"], rare=rare)
    assert claim(study, "steering-sae").verdict == "not measured"


def test_the_evidence_on_steering_begins_with_all_three_groups_together(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, PLACES[0])
    write_matches(study, PLACES[0], (0.9,) * 5 + (0.1,) * 7, concepts=WORLD)
    write_steering(study, PLACES[0], concepts=WORLD, success=0.6)
    places = (PLACES[0], "double.1/topk-300-k8")
    write_dictionary(study, places[1])  # it comes first by name, and has no feature
    write_matches(study, places[1], (0.1,) * 12, concepts=WORLD)
    write_steering(study, places[1], concepts=WORLD)
    evidence = claim(study, "steering-sae").evidence
    assert evidence[0] == (
        f"{PLACES[0]}, colours, textures and backgrounds together: 5 of 12 have a feature; 60 % above the rate without (keeping "
        "95 %, at strength 1.00); random directions 0 %"
    )
    assert evidence[1] == f"{places[1]}, colours, textures and backgrounds together: 0 of 12 have a feature"
    assert [line.split(":")[0] for line in evidence[2:]] == [
        f"{place}, {group}" for place in places for group in ("colour", "texture", "background")
    ]


def test_concepts_from_a_file_are_shown_but_are_no_evidence_for_the_claim(tmp_path: Path):
    study, groups = new_study(tmp_path), ("colour", "texture", "background")
    for name in PLACES:
        write_dictionary(study, name)
    write_steering(study, PLACES[0], concepts=(Concept("a dog", "animal"),), checksum="5eed", judge="clip-large", groups=groups)
    write_steering(study, PLACES[1])
    page = page_of(study)
    assert f"{PLACES[0]}: results of steering" not in page
    assert f"{PLACES[1]}: results of steering need the matches of its features" in page
    assert "a dog by features, unedited" in page and ">1 from a file</td>" in page
    assert "clip-large says whether" in page and "a judge of the miniature world" not in page
    drawn = {(row["dictionary"], row["group"], row["concepts"]) for row in rows_of(study, "strengths")}
    assert drawn == {(PLACES[0], "animal", "1"), (PLACES[0], "all", "1")}
    assert {row["detected"] for row in rows_of(study, "points")} == {"from a file"}
    assert claim(study, "steering-sae").verdict == "not measured"
    write_matches(study, PLACES[0], (0.9,) * 12, concepts=WORLD)
    write_steering(study, PLACES[0], concepts=WORLD, checksum="5eed", judge="clip-large")
    assert claim(study, "steering-sae").verdict == "not measured"


def test_baselines_are_measured_on_the_concepts_that_each_dictionary_detects(tmp_path: Path):
    study = full_study(tmp_path)
    write_steering(study, "double.1/itda-1020-k16-first100", random=0.1)
    page = page_of(study)
    concepts = {(row["dictionary"], row["method"], row["concepts"]) for row in rows_of(study, "strengths")}
    methods = ("feature", "neuron", "contrast", "random", "prompt")
    both = (("double.1/topk-1024-k16", "2"), ("double.1/itda-1020-k16-first100", "1"))
    assert concepts == {(name, method, number) for name, number in both for method in methods}
    random = [tip for tip in tips(page, "strengths") if tip.startswith("random directions\nstrength 1\nsuccess")]
    assert random == [
        "random directions\nstrength 1\nsuccess 10 % (10 % to 10 %)\n1 concept",
        "random directions\nstrength 1\nsuccess 0 % (0 % to 0 %)\n2 concepts",
    ]


def test_captions_follow_the_settings_of_the_records(tmp_path: Path):
    study = full_study(tmp_path)
    peak, norm = "what its largest code adds", "as long as a mean activation"
    page = page_of(study)
    assert peak in page and norm not in page and "ablated at every step;" in page
    write_steering(study, "double.1/itda-1020-k16-first100", unit="norm")
    write_removal(study, "double.1/topk-1024-k16", steps=(0, 5))
    page = page_of(study)
    assert f"{norm} (double.1/itda-1020-k16-first100); {peak} (double.1/topk-1024-k16)" in page
    assert "ablated at steps 0 to 4;" in page and "ablated at every step" not in page
    write_steering(study, "double.1/topk-1024-k16", unit="norm")
    assert peak not in page_of(study)


def test_the_numbers_on_steering_are_those_of_the_records(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    [own] = [
        row
        for row in rows_of(study, "steered")
        if (row["dictionary"], row["method"], row["group"]) == ("double.1/topk-1024-k16", "feature", "colour")
    ]
    assert (own["concepts"], own["with a feature"], own["gain"], own["kept"], own["strength"]) == ("2", "2", "0.9", "0.95", "1.0")
    points = rows_of(study, "points")
    drawn = [row for row in rows_of(study, "strengths") if row["measure"] == "success" and row["group"] != "all"]
    assert len(points) == 2 * 4 * (4 * 3 + 1) and {row["group"] for row in points if row["detected"] == "yes"} == {"colour"}
    assert {row["group"] for row in drawn} == {"colour"}  # no shape has a feature of AP 0.8
    itda = [row for row in drawn if row["dictionary"].endswith("first100") and row["method"] == "feature"]
    assert [(row["strength"], row["median"], row["concepts"]) for row in itda] == [
        ("0.5", "0.3", "1"),
        ("1.0", "0.6", "1"),
        ("2.0", "0.6", "1"),
    ]
    assert "red by features, unedited" in page and "&lt;i&gt;a star&lt;/i&gt;" in page


def test_steering_results_of_older_weights_are_named_and_left_out(tmp_path: Path):
    study = full_study(tmp_path)
    strip = tmp_path / "steering" / "judged" / "double.1" / "topk-1024-k16" / "colour-feature.webp"
    strip.write_bytes(b"no image")
    page = page_of(study)
    assert "colour-feature.webp" in page and "colour-feature.webp" not in figures_of(page) and "red by neurons, unedited" in page
    write_dictionary(study, "double.1/topk-1024-k16", weights=b"trained again")
    page = page_of(study)
    assert "double.1/topk-1024-k16: the dictionary has changed since it was steered with" in page
    assert {row["dictionary"] for row in rows_of(study, "points")} == {"double.1/itda-1020-k16-first100"}


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_steering_results_that_are_not_finite_are_named_and_left_out(tmp_path: Path, value: str):
    study = full_study(tmp_path)
    path = tmp_path / "steering" / "judged" / "double.1" / "topk-1024-k16.json"
    change(path, lambda text: text.replace('"success": 0.9', f'"success": {value}', 1))
    assert f"{path} cannot be read as results of difflex steer-eval" in page_of(study)
    assert {row["dictionary"] for row in rows_of(study, "points")} == {"double.1/itda-1020-k16-first100"}


def test_the_editing_benchmark_is_drawn_by_type_and_against_change_elsewhere(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    best = next(tip for tip in tips(page, "edits") if tip.startswith("colour: ITDA, double.1"))
    assert "score 0.50 (0.50 to 0.50)" in best  # strength 1 succeeds in half and keeps all, strength 2 keeps a quarter
    rows = rows_of(study, "edit_curves")
    assert [(row["method"], row["change elsewhere"], row["success"]) for row in rows] == [
        ("none", "0.0", "0.0"),
        ("prompt", "0.0", "1.0"),
        ("features", "0.0", "0.5"),
        ("features", "0.75", "1.0"),
    ]
    assert len(rows_of(study, "edits")) == 2 * 4 * 5
    write_dictionary(study, str(study.dictionaries()[0]), weights=b"other")
    assert "edit-bench/drawn.json is of older weights of its dictionaries" in page_of(study)


def test_the_claim_about_removal_needs_half_of_the_colours_and_of_the_backgrounds(tmp_path: Path):
    study = new_study(tmp_path)
    write_dictionary(study, PLACES[0])
    assert claim(study, "removal-sae").verdict == "not measured"
    write_removal(study, PLACES[0], groups=("colour",))
    assert claim(study, "removal-sae").verdict == "not measured"
    write_removal(study, PLACES[0])
    assert claim(study, "removal-sae").verdict == "holds here"
    write_removal(study, PLACES[0], cra=0.85)
    assert claim(study, "removal-sae").verdict == "does not hold here"
    write_dictionary(study, PLACES[0], weights=b"trained again")
    assert "is of older weights of its dictionaries" in page_of(study) and claim(study, "removal-sae").verdict == "not measured"


def test_findings_are_shown_with_verdict_and_rule_at_every_site(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    [part] = re.findall(r'id="figure-finding_out_of_distribution".*?</figure>', page, flags=re.DOTALL)
    assert "The claim about &lt;b&gt;out-of-distribution" in part and "The gain rises." in part
    assert part.count("does not hold here. It rises by 0.25.") == 2
    rows = rows_of(study, "finding_pairs")
    assert {row["site"] for row in rows} == {"double.1", "double.2"} and len(rows) == 8
    path = tmp_path / "steering" / "findings" / "double.1.json"
    change(path, lambda text: text.replace('"model": "mini-flux"', '"model": "other"'))
    assert "double.1.json is of other" in page_of(study)
    assert {row["site"] for row in rows_of(study, "findings")} == {"double.2"}


def test_findings_on_language_models_are_shown(tmp_path: Path):
    study = full_study(tmp_path)
    line = FindingLine(name="all behaviours", x=(1.0, 80.0), y=(0.1, 0.3), errors=(0.02, 0.02), concepts=6)
    finding = AdditionFinding(
        name="samples",
        claim="It flattens.",
        rule="Less than 0.05.",
        verdict="holds here",
        reason="It rises by 0.01.",
        x="pairs",
        y="shift",
        lines=(line,),
    )
    AdditionFindings(model=study.model, findings=(finding,)).save(study.addition("findings"))
    [part] = re.findall(r'id="figure-finding_cae_samples".*?</figure>', page_of(study), flags=re.DOTALL)
    assert "It flattens." in part and "holds here. It rises by 0.01." in part and "arXiv 2505.03189" in part
    assert [row["shift"] for row in rows_of(study, "finding_cae_samples")] == ["0.1", "0.3"]
    assert "all behaviours: shift at pairs 80" in {row["number"] for row in rows_of(study, "findings")}
    change(study.addition("findings"), lambda text: text.replace('"model": "mini-flux"', '"model": "other"'))
    assert "of other, not of this study. Run difflex cae again." in page_of(study)


def test_measures_and_block_roles_are_shown_with_their_baselines_and_verdicts(tmp_path: Path):
    study = full_study(tmp_path)
    page = page_of(study)
    assert "double.1/topk-1024-k16" in tips(page, "measures")[0]
    assert {row["measure"] for row in rows_of(study, "measures")} == {"specificity", "colour"}
    assert "up.0.1:update" in page and "cannot be said" in page
    assert {row["share"] for row in rows_of(study, "block_roles")} == {"0.25"}
    write_dictionary(study, "double.1/topk-1024-k16", weights=b"trained again")
    assert "of older weights of its dictionary. Run difflex measure again." in page_of(study)
