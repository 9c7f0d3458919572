"""The roles of blocks: every block in the order of the model, the levels and the blocks that were not measured, and SVG files."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from sample_study import CONCEPTS, new_study, write_anatomy, write_evaluation, write_matches

from difflex.evaluation.concepts import Concept
from difflex.report import read_facts, write_report
from difflex.report.figures import MissingFigure, ReportFigure
from difflex.report.figures.roles import BlockRoles, roles
from difflex.study import Study

APS = (0.9, 0.7, 0.4, 0.2)


def studied(folder: Path, *sites: str, label: str = "topk-512-k8", levels: tuple[float, ...] = (0.25, 0.5)) -> Study:
    study = new_study(folder)
    for site in sites:
        write_evaluation(study, f"{site}/{label}")
        write_matches(study, f"{site}/{label}", APS, levels=levels)
    return study


def missing(study: Study) -> list[MissingFigure]:
    return [part for part in roles(read_facts(study)) if isinstance(part, MissingFigure)]


@pytest.mark.parametrize(
    ("sites", "order"),
    [
        (("single.0", "double.10", "double.2"), ["double.2", "double.10", "single.0"]),
        (("up.0.0:update", "mid.0:update", "down.2.1:update"), ["down.2.1", "mid.0", "up.0.0"]),
    ],
)
def test_blocks_are_in_the_order_of_the_model(tmp_path: Path, sites: tuple[str, ...], order: list[str]):
    study = studied(tmp_path, *sites)
    assert list(BlockRoles.of(read_facts(study)).blocks) == order
    write_anatomy(study, norms={path: {500.0: 1.0} for path in reversed(order)})
    assert list(BlockRoles.of(read_facts(study)).blocks) == order[::-1]


def test_blocks_are_compared_by_dictionaries_of_one_label_that_are_saes_of_the_trained_model(tmp_path: Path):
    study = studied(tmp_path, "double.0", "double.1")
    write_evaluation(study, "double.1/topk-4096-k64")
    write_evaluation(study, "double.1/itda-512-k8")
    for name in ("double.1/topk-4096-k64", "double.1/itda-512-k8", "double.1:neurons/neurons-k8"):
        write_matches(study, name, (1.0, 1.0, 1.0, 1.0))
    own = BlockRoles.of(read_facts(study))
    assert [match.matches.label for match in own.blocks.values()] == ["topk-512-k8"] * 2 and own.label == "topk-512-k8"
    only = studied(tmp_path / "other", "double.0", label="itda-512-k8")
    assert BlockRoles.of(read_facts(only)).label == "itda-512-k8"


def test_a_role_has_the_mean_of_its_group_and_the_clearest_is_named(tmp_path: Path):
    study = studied(tmp_path, "double.0")
    write_evaluation(study, "double.1/topk-512-k8")
    write_matches(study, "double.1/topk-512-k8", (0.9, 0.9, 0.1, 0.1), levels=(0.5,))
    own = BlockRoles.of(read_facts(study))
    assert own.levels == ["0.5", "0.25"] and own.groups == ["colour", "shape"]
    best = own.clearest("colour")
    assert best and str(best) == "double.1, noise 0.5: 0.90, 2 of 2 detected"
    role = own.role("double.0", "colour", "0.5", probe=False)
    assert role and role.mean == pytest.approx(0.8) and role.detected == 1 and role.chance == pytest.approx(0.05)
    assert own.role("double.1", "colour", "0.25", probe=False) is None and len(own.roles(probe=True)) == 6
    drawing = own.drawing(probe=False).svg
    assert drawing.count('class="frame"') == 2 and drawing.count('class="ground"') == 2 and drawing.count("data-tip") == 6


def test_what_the_figure_lacks_is_named_with_the_command_that_measures_it(tmp_path: Path):
    study = studied(tmp_path, "double.0", "double.1", levels=(0.3, 0.7))
    assert missing(study) == []
    write_evaluation(study, "double.2:update/topk-512-k8")
    write_evaluation(study, "double.10/topk-512-k8")
    write_matches(study, "double.10/topk-512-k8", APS, levels=(0.7,))
    write_anatomy(study, norms={f"{stem}.{i}": {500.0: 1.0} for stem in ("double", "single") for i in range(3)})
    levels, blocks = missing(study)
    assert levels.name == "Known concepts at double.2, double.10 at the noise levels 0.3, 0.7"
    assert levels.command == "difflex concepts STUDY --site double.2:update double.10 --noise 0.3,0.7 --images 9"
    assert blocks.name == "Known concepts at blocks without a dictionary (single.0, single.1, single.2)"
    assert blocks.command.startswith("difflex harvest MODEL --prompts FILE --out STUDY --site SITE..., then difflex train STUDY")
    (single,) = missing(studied(tmp_path / "other", "double.0", levels=(0.9,)))
    assert single.command == "difflex concepts STUDY --noise 0.25,0.5,0.75,0.9 --images 9"
    write_matches(study, "double.0/topk-512-k8", APS, levels=(0.3, 0.7), rare=[Concept("grass", "background")])
    (rare,) = [gap for gap in missing(study) if "too few" in gap.name]
    assert rare.name == "Concepts that too few images show (grass)" and rare.command.endswith("--noise 0.3,0.7 --images 18")


def test_its_drawings_are_files_of_their_own(tmp_path: Path):
    study = studied(tmp_path, *(f"double.{i}" for i in range(3)))
    files = {path.name: path for path in write_report(study)}
    for name in ("roles-features.svg", "roles-probe.svg"):
        root = ET.parse(files[name]).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "--heat" in "".join(root.itertext())
    (tmp_path / "concepts").rename(tmp_path / "gone")
    write_report(study)
    assert not list((tmp_path / "report").glob("*.svg"))


def test_the_file_has_the_numbers_that_are_drawn(tmp_path: Path):
    figure, *_ = roles(read_facts(studied(tmp_path, "double.0", "double.1")))
    assert isinstance(figure, ReportFigure) and len(figure.rows) == 2 * 2 * 2 * 2
    assert figure.rows[0] == ("double.0", "topk-512-k8", "colour", "0.5", 2, pytest.approx(0.8), pytest.approx(0.05), 1)
    assert len(CONCEPTS) == 4 and sum(drawing.svg.count("data-tip") for drawing in figure.drawings) == len(figure.rows)
