"""The page of an image: what its book knows, what a real model reads in it, and what is refused or not kept any more."""

import base64
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, urlencode

import numpy as np
import pytest
from PIL import Image
from sample_study import new_study, write_book, write_dictionary, write_matches
from test_web import Site
from test_web_paint import LABEL, SITE, SlowModel, events, image, post, study  # noqa: F401 (a fixture)
from test_web_paint import site as real  # noqa: F401 (a fixture)

import difflex
from difflex.dictionaries import Dictionary
from difflex.features import Book
from difflex.records import Shot
from difflex.study import DictionaryRef, Study
from difflex.web import Studio
from difflex.web.catalogue import Catalogue
from difflex.web.firing import Firing, KeptReadings, Reading
from difflex.web.studio import PaintChoices, ReadImage, Report, TokenFeatures

SAE, NEURONS, TEXT = "double.1/topk-12-k4", "double.2:neurons/neurons-12-k4", "double.1:text/topk-12-k4"
TIMESTEPS = (1000.0, 500.0)


def address(key: str, what: str, **values: object) -> str:
    return f"/api/readings/{key}/{what}?{urlencode(values)}"


def levels(entry: dict[str, object]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(str(entry["levels"])), np.uint8)


def read(site: Site, **body: object) -> dict[str, object]:
    *_, reading, done = events(site, "/api/read", {"client": "test-client", **body})
    assert done == {"type": "done"} and reading["type"] == "reading"
    return reading


def test_reading_reports_the_steps_while_it_generates(real: Site):  # noqa: F811 (the fixture)
    found = events(real, "/api/read", {"client": "test-client", "prompt": "star 2", "seed": 5, "steps": 3})
    assert [event["step"] for event in found if event["type"] == "step"][:3] == [1, 2, 3]


def test_a_new_image_is_read_as_the_pipeline_and_the_dictionary_say(study: Study, real: Site):  # noqa: F811 (the fixtures)
    reading = read(real, prompt="star 1", seed=3, steps=2)
    [own] = reading["dictionaries"]  # pyright: ignore
    assert (own["site"], own["label"], own["grid"], reading["left_out"]) == (SITE, LABEL, [4, 6], [])
    pipe = difflex.load(study.model)
    settings = {"pixels": study.settings.pixels, "guidance": study.settings.guidance, "steps": 2}
    shots = list(pipe.shots("star 1", seeds=[3], **settings))
    assert reading["timesteps"] == [shot.timestep for shot in shots] and len(shots) == 2
    dictionary = Dictionary.load(study.dictionary(*study.find_dictionary(f"{SITE}/{LABEL}")))
    [plain] = (
        found
        for found in events(real, "/api/generate", {"client": "test-client", "prompt": "star 1", "seeds": [3], "steps": 2})
        if found["type"] == "image"
    )
    assert (image(real, plain) == image(real, reading)).all()
    for step, part in enumerate(pipe.harvest(shots, [SITE])):
        codes = dictionary.encode(part.values[0].float())
        dense = np.zeros((24, 64), np.float32)
        np.put_along_axis(dense, codes.indices.numpy(), np.maximum(codes.values.numpy(), 0), 1)
        for token in (0, 9, 23):
            here = real.json(
                address(str(reading["key"]), "at", dictionary=f"{SITE}/{LABEL}", step=step, row=token // 6, column=token % 6)
            )
            assert {entry["tile"]["feature"]: entry["value"] for entry in here["features"]} == pytest.approx(  # pyright: ignore
                {int(feature): float(dense[token, feature]) for feature in np.flatnonzero(dense[token])}, rel=1e-4
            )
            shares = [entry["share"] for entry in here["features"]]  # pyright: ignore
            assert shares == sorted(shares, reverse=True)
        strongest = real.json(address(str(reading["key"]), "features", dictionary=f"{SITE}/{LABEL}", step=step, order="peak"))
        assert strongest["total"] == np.count_nonzero(dense.any(0))  # pyright: ignore
        for entry in strongest["features"]:  # pyright: ignore
            column, peak = dense[:, entry["tile"]["feature"]], entry["tile"]["peak"]
            assert entry["value"] == pytest.approx(column.max(), rel=1e-4) and entry["share"] == pytest.approx(
                entry["value"] / peak
            )
            assert entry["area"] == (column >= 0.2 * peak).mean()
            np.testing.assert_allclose(levels(entry), np.where(column > 0, np.clip(255 * column / peak, 1, 255), 0), atol=0.51)


def test_an_image_of_a_book_shows_its_examples_and_is_read_again(study: Study, real: Site):  # noqa: F811 (the fixtures)
    with Book.open(study.book(SITE, LABEL)) as book:
        [row] = book.shots([0]).values()
        number = [entry.id for entry in book.shots_of(row.image.file)]
        examples = [example for shot in number for example in book.examples_at(shot)]
    base = f"/api/images/{SITE}/{LABEL}/0"
    answer = real.json(base)
    assert answer["image"] == row.image.file and answer["places"] == [{"site": SITE, "label": LABEL, "shot": number[0]}]  # pyright: ignore
    known = real.json(f"{base}/features")
    highest = {e.feature: max(other.peak for other in examples if other.feature == e.feature) for e in examples}
    assert known["total"] == len(highest)  # pyright: ignore
    for entry in known["features"]:  # pyright: ignore
        assert entry["value"] == pytest.approx(highest[entry["tile"]["feature"]], rel=1e-3)
    page = real.get(f"/image/{SITE}/{LABEL}/0").text
    assert row.shot.prompt in page and page.count('<li data-feature="') == len(known["features"])  # pyright: ignore
    reading = read(real, dictionary=f"{SITE}/{LABEL}", shot=0)
    step = list(reading["timesteps"]).index(row.shot.timestep)  # pyright: ignore
    for example in examples:
        if example.shot == 0:
            found = real.json(
                address(str(reading["key"]), "features", dictionary=f"{SITE}/{LABEL}", step=step, feature=example.feature)
            )
            [value] = [e["value"] for e in found["features"] if e["tile"]["feature"] == example.feature]  # pyright: ignore
            assert value == pytest.approx(example.peak, rel=1e-2)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"prompt": "a" * 2001}, 422, "prompt"),
        ({"steps": 101}, 422, "steps"),
        ({"seed": -1}, 422, "seed"),
        ({"client": "../../etc"}, 422, "client"),
        ({"unknown": 1}, 422, "unknown"),
        ({"dictionaries": []}, 422, "dictionaries"),
        ({"dictionaries": ["double.1/none"]}, 404, "none"),
        ({"dictionary": f"{SITE}/{LABEL}"}, 422, "Name an image of a book"),
        ({"dictionary": f"{SITE}/{LABEL}", "shot": 10**6}, 404, "has no image 1000000"),
        ({"dictionary": "../../study", "shot": 0}, 404, "study"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(
    real: Site,  # noqa: F811 (the fixture)
    body: dict[str, object],
    status: int,
    sentence: str,
):
    reply = post(real, "/api/read", {"client": "test-client", **body})
    assert reply.status == status and sentence in json.loads(reply.text)["error"]


class KnownModel(SlowModel):
    """A model in whose images feature 1 fires at token 0, 2 at all tokens, and 3 at the last step's token 3."""

    def __init__(self) -> None:
        super().__init__()
        self.read_refs = list[Sequence[DictionaryRef]]()

    def shots(self, prompt: str, seeds: Sequence[int], steps: int | None) -> list[Shot]:
        return [Shot(model="m", prompt=prompt, seed=seed, pixels=(8, 8), steps=steps or 2, guidance=0.0) for seed in seeds]

    def read(self, shot: Shot, refs: Sequence[DictionaryRef], report: Report) -> ReadImage:
        self.read_refs.append(refs)
        fired = []
        for step in range(shot.steps):
            report(step + 1, shot.steps)
            for ref in refs:
                values = np.array([[2.0, 1.5], [1.5, 0], [1.5, 0], [1.5, 4.0 if step else 0]], np.float32)
                numbers = np.array([[1, 2], [2, 0], [2, 0], [2, 3]])
                fired.append(TokenFeatures(ref, step, TIMESTEPS[step % 2] - step // 2, (2, 2), values, numbers))
        return ReadImage(Image.new("RGB", (8, 8), (shot.seed % 256, 90, 200)), fired)


def sample(folder: Path) -> Study:
    """A study with books at three sites, one of them of text; image 0 of the first was given."""
    study = new_study(folder)  # noqa: F811
    for name in (SAE, NEURONS, TEXT):
        write_dictionary(study, name)
        write_book(study, name)
    write_matches(study, SAE, (0.9, 0.7, 0.6, 0.4), per_concept=2)
    with sqlite3.connect(study.book(*study.find_dictionary(SAE))) as book:
        book.execute("UPDATE shots SET shot = json_set(shot, '$.image', 'mine.png', '$.noise', 0.5) WHERE id = 0")
    book.close()
    return study


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, KnownModel]]:
    model = KnownModel()
    studio = Studio(lambda: model, lambda: PaintChoices([], {}))
    site = Site(sample(tmp_path_factory.mktemp("image") / "study"), studio=studio)
    yield site, model
    site.close()
    studio.close()


def test_text_is_left_out_and_the_same_image_is_read_once(known: tuple[Site, KnownModel]):
    site, model = known
    model.read_refs.clear()
    first, second = (read(site, prompt="once", seed=5) for _ in range(2))
    assert first == second and len(model.read_refs) == 1 and first["left_out"] == [TEXT]
    assert [str(ref) for ref in model.read_refs[0]] == [SAE, NEURONS], "the one that detects most concepts first"
    reply = post(site, "/api/read", {"client": "test-client", "dictionaries": [TEXT]})
    assert reply.status == 422 and "None of these dictionaries is of image tokens" in reply.text
    reply = post(site, "/api/read", {"client": "test-client", "steps": 40, "dictionaries": [SAE, NEURONS]})
    assert reply.status == 422 and "2 dictionaries at 40 steps are too many at once: ask for at most 1" in reply.text


def test_features_are_ranked_by_peak_and_by_area(known: tuple[Site, KnownModel]):
    site, _ = known
    key = str(read(site, prompt="ranked")["key"])

    def ranked(**values: object) -> list[int]:
        answer = site.json(address(key, "features", dictionary=SAE, **values))
        return [entry["tile"]["feature"] for entry in answer["features"]]  # pyright: ignore

    # Peaks are 1 + the number of the feature: shares of 1, 0.5 and 1.
    assert ranked(order="peak", step=0) == [1, 2] and ranked(order="area", step=0) == [2, 1]
    assert ranked(order="peak", step=1) == [1, 3, 2] and ranked(step=1)[-1] in (2, 3)
    assert ranked(order="peak", step=0, feature=7) == [1, 2, 7], "one that is silent is shown if it is named"


@pytest.mark.parametrize(
    ("target", "status", "sentence"),
    [
        ("at?dictionary={SAE}&row=2&column=0", 422, "2 rows and 2 columns"),
        ("at?dictionary={SAE}&row=0&column=-1", 422, "column"),
        ("at?dictionary={SAE}&row=0&column=0&step=2", 404, "There are steps 0 to 1"),
        ("at?dictionary={TEXT}&row=0&column=0", 404, "was not read"),
        ("features?dictionary={SAE}&feature=12", 404, "numbered from 0 to 11"),
        ("features?dictionary={SAE}&order=beauty", 422, "order"),
        ("features?dictionary=../../study", 404, "study"),
    ],
)
def test_what_was_not_read_is_refused_with_a_sentence(known: tuple[Site, KnownModel], target: str, status: int, sentence: str):
    site, _ = known
    key = read(site, prompt="ranked")["key"]
    reply = site.get(f"/api/readings/{key}/{target.format(SAE=quote(SAE), TEXT=quote(TEXT))}")
    assert reply.status == status and sentence in json.loads(reply.text)["error"]


def test_a_given_image_shows_what_the_book_knows_and_is_not_generated(known: tuple[Site, KnownModel]):
    site, _ = known
    page = site.get(f"/image/{SAE}/0").text
    assert "A given image, noised by 50 %" in page and "&lt;b&gt;a star" in page and 'id="read"' not in page
    assert 'id="read"' in site.get(f"/image/{SAE}/6").text
    reply = post(site, "/api/read", {"client": "test-client", "dictionary": SAE, "shot": 0})
    assert reply.status == 422 and "was given, not generated" in reply.text
    at = site.json(f"/api/images/{SAE}/0/at?row=0&column=0")
    assert [(entry["tile"]["feature"], entry["value"]) for entry in at["features"]] == [(0, 1.0)]  # pyright: ignore
    places = site.json(f"/api/images/{SAE}/7")["places"]  # pyright: ignore
    assert [(place["site"], place["shot"]) for place in places][:2] == [("double.1", 6), ("double.1:text", 6)]
    for target, status in ((f"/image/{SAE}/99", 404), (f"/image/{SAE}/-1", 422), (f"/image/{SAE}/one", 422)):
        assert site.get(target).status == status
    assert "Prompts to try" in site.get("/image").text and site.get("/image?seed=-1").status == 422
    assert site.get("/image?prompt=a&steps=").status == 200 and site.get("/image?prompt=a&steps=101").status == 422


def test_without_a_model_only_books_are_shown(tmp_path: Path):
    site = Site(sample(tmp_path / "study"))
    try:
        page = site.get(f"/image/{SAE}/6")
        assert page.status == 200 and 'id="read"' not in page.text and "/paint" not in page.text
        assert site.get("/image").status == 404 and post(site, "/api/read", {"client": "test-client"}).status == 404
    finally:
        site.close()


def test_an_answer_about_a_token_has_the_features_of_the_largest_shares(tmp_path: Path):
    study = new_study(tmp_path / "study")  # noqa: F811
    ref = write_dictionary(study, "double.1/topk-200-k4")
    write_book(study, str(ref), features=200)
    tokens, numbers = np.zeros(200, np.int32), np.arange(200, dtype=np.int32)
    answer = Firing((2, 2), tokens, numbers, np.full(200, 2.0, np.float32)).at(Catalogue(study), ref, 0)
    assert answer.total == 200 and [entry.tile.feature for entry in answer.features] == [*range(64)]


def test_readings_are_kept_up_to_a_number_of_bytes(known: tuple[Site, KnownModel]):
    site, model = known
    read(site, prompt="ranked")
    ref = model.read_refs[0][0]
    firing = Firing((2, 2), *(np.zeros(100, kind) for kind in (np.int32, np.int32, np.float32)))
    readings = KeptReadings(most_bytes=2500)
    for key in ("one", "two", "three"):
        shot = Shot(model="m", pixels=(8, 8), steps=1, guidance=0.0)
        readings.add(key, Reading(shot, "x.png", (8, 8), (1000.0,), {(ref, 0): firing}))
        readings.find("one")
    assert readings.find("one") and readings.find("three") and readings.find("two") is None
    reply = site.get(address("0" * 32, "features", dictionary=SAE))
    assert reply.status == 404 and "not kept in memory any more" in reply.text
