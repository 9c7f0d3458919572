"""The study folder: begun once, for one model, and opened again."""

import json
from pathlib import Path

import pytest

from difflex.errors import BrokenFile, DiskError, StaleWork, UnknownName
from difflex.records import Site
from difflex.study import Study, StudySettings


def test_a_study_that_exists_is_opened(tmp_path: Path):
    study = Study.begin(tmp_path / "new" / "study", "mini-flux")
    assert Study.open(study.folder) == study == Study.begin(study.folder, "mini-flux")
    assert next(iter(json.loads((study.folder / "study.json").read_text()))) == "format"
    assert [path.name for path in study.folder.iterdir()] == ["study.json"]


def test_a_study_has_one_model(tmp_path: Path):
    Study.begin(tmp_path, "OWNER/NAME", "abc")
    for model, revision in (("mini-flux", None), ("OWNER/NAME", "def"), ("OWNER/NAME", None)):
        with pytest.raises(StaleWork, match="studies OWNER/NAME@abc, not"):
            Study.begin(tmp_path, model, revision)


def test_a_planned_study_is_not_written(tmp_path: Path):
    study = Study.open_or_plan(tmp_path / "study", "mini-flux")
    assert not study.folder.exists()
    study.write()
    assert Study.open(study.folder) == study


def test_settings_are_kept_and_replaced(tmp_path: Path):
    settings = StudySettings(precision="nf4", pixels=(256, 256), steps=1, prompts="captions", keep_steps=(0, 1))
    study = Study.open_or_plan(tmp_path, "x")
    study.keep_settings(settings)
    assert Study.open(tmp_path).settings == settings
    before = (tmp_path / "study.json").read_bytes()
    study.keep_settings(settings)
    assert (tmp_path / "study.json").read_bytes() == before
    Study.open(tmp_path).keep_settings(StudySettings())
    assert Study.open(tmp_path).settings == StudySettings()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"format": 2, "model": "x"}', "format 2; this version of difflex reads format 1"),
        ('{"format": 1, "mo', "not JSON"),
        ("[]", "format None"),
        ('{"format": 1, "model": "x", "modle": 1}', "entry 'modle'"),
        ('{"format": 1}', "does not name a model"),
        ('{"format": 1, "model": 7}', "'model' is '7' instead of a name"),
        ('{"format": 1, "model": null}', "'model' is 'None' instead of a name"),
        ('{"format": 1, "model": "x", "revision": ["y"]}', "'revision' is"),
        ('{"format": 1, "model": "x", "settings": {"precison": "nf4"}}', "setting 'precison' is unknown"),
        ('{"format": 1, "model": "x", "settings": {"pixels": 64}}', "settings in .* cannot be used"),
        ('{"format": 1, "model": "x", "settings": []}', "settings in .* cannot be used: they are a list"),
        ('{"format": 1, "model": ' + 5000 * "9" + "}", "not JSON"),
        ('{"format": 1, "model": ' + 100_000 * "[", "not JSON"),
    ],
)
def test_a_damaged_or_foreign_study_file_is_named_in_the_error(tmp_path: Path, text: str, complaint: str):
    (tmp_path / "study.json").write_text(text)
    for work in (lambda: Study.open(tmp_path), lambda: Study.begin(tmp_path, "x")):
        with pytest.raises(BrokenFile, match=complaint):
            work()
    assert (tmp_path / "study.json").read_text() == text


def test_a_folder_without_a_study_is_an_error(tmp_path: Path):
    with pytest.raises(UnknownName, match="difflex harvest begins one"):
        Study.open(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file where a folder is needed"):
        Study.begin(tmp_path / "file" / "study", "x")


def test_every_file_has_its_path(tmp_path: Path):
    study, site = Study.begin(tmp_path, "x"), Site("double.1", "update", "text")
    paths = {
        study.activations / site.folder: "activations/double.1+update+text",
        study.dictionary(site, "topk-64-k4"): "dictionaries/double.1+update+text/topk-64-k4",
        study.evaluation(site, "topk-64-k4"): "evaluation/double.1+update+text/topk-64-k4.json",
        study.book(site, "topk-64-k4"): "books/double.1+update+text/topk-64-k4.sqlite",
    }
    assert {str(path.relative_to(tmp_path)) for path in paths} == set(paths.values())


def test_the_stores_of_a_study_are_found_by_site(tmp_path: Path):
    study = Study.begin(tmp_path, "x")
    sites = [Site("double.1"), Site("single.0", "update"), Site("double.1", "neurons", "text")]
    for site in sites:
        (study.activations / site.folder).mkdir(parents=True)
        (study.activations / site.folder / "manifest.json").write_text("{}")
    (study.activations / "double.9").mkdir()
    study.activations.joinpath("double.2").mkdir()
    (study.activations / "double.2" / "shard-00000.json").write_text("{}")
    sites.append(Site("double.2"))
    assert study.stores() == {site: study.activations / site.folder for site in sorted(sites, key=lambda site: site.folder)}


def test_a_dictionary_whose_config_cannot_be_read_still_counts(tmp_path: Path):
    study = Study.begin(tmp_path / "study", "mini-flux")
    for name in ("a", "b", "c"):
        study.dictionary(Site("double.1"), name).mkdir(parents=True)
    config = study.dictionary(Site("double.1"), "a") / "config.json"
    config.symlink_to(config)  # a loop
    (study.dictionary(Site("double.1"), "b") / "config.json").mkdir()
    assert [ref.label for ref in study.dictionaries()] == ["a", "b"]
