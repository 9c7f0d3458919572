"""The web app against its own OpenAPI document: what schemathesis makes of it is answered as documented, never with a 5xx."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance
from test_web import SAE, Site
from test_web_attack import book_study, contents, studio

from difflex.study import Study

CHECKS = (checks.not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
KNOWN = dict(zip(("site", "label"), SAE.split("/"), strict=True))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return book_study(tmp_path_factory.mktemp("schema") / "study")


@pytest.fixture(scope="module")
def site(study: Study) -> Iterator[Site]:
    before, site = contents(study.folder), Site(study, studio=studio())
    yield site
    site.close()
    assert contents(study.folder) == before, "nothing was written"


def try_all(site: Site, examples: int) -> list[str]:
    """Send each operation of the document `examples` cases, valid ones and others; return the names of the operations."""
    schema = schemathesis.openapi.from_dict(json.loads(site.get("/api").text))
    schema.config.update(base_url=f"http://127.0.0.1:{site.port}")
    names = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        names.append(operation.label)

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy(), is_known=st.booleans(), feature=st.integers(0, 11))
        def attack(case: Any, is_known: bool, feature: int) -> None:
            if is_known and case.path_parameters:
                known = {**KNOWN, "feature": feature}
                case.path_parameters.update({name: known[name] for name in case.path_parameters if name in known})
            case.call_and_validate(checks=CHECKS, timeout=20)

        attack()
    return names


def test_a_few_cases_of_each_operation_are_answered_as_documented(site: Site):
    assert len(try_all(site, 12)) >= 5


@pytest.mark.slow
def test_many_cases_of_each_operation_are_answered_as_documented(site: Site):
    try_all(site, 300)


def test_a_planted_error_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr("difflex.web.catalogue.Catalogue.dictionaries", fails)
    site = Site(book_study(tmp_path / "study"))
    try:
        with pytest.raises(BaseExceptionGroup):
            try_all(site, 1)
    finally:
        site.close()
