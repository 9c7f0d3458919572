"""Painting: images and records from a real server with a real model; the queue of the studio with a model that can be stopped."""

import io
import json
import threading
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_web import Reply, Site

from difflex.cli import main
from difflex.commands.serve import ServeCommand
from difflex.errors import BadInput, UnknownName
from difflex.features import Book
from difflex.images import contact_sheet
from difflex.records import Edit, RegionMap, Shot
from difflex.study import DictionaryRef, Study
from difflex.testing import tiny_folder
from difflex.web import Client, Studio
from difflex.web.studio import MOST_WAITING, Event, ImageModel, PaintChoices, QueueFull, ReadImage, Report, Shelf

SITE, LABEL = "double.1", "topk-64-k4"
EDIT = {"site": SITE, "dictionary": LABEL, "features": [1]}
MAP = RegionMap.of([[0.0, 1.0, 0.5], [0.0, 0.0, 0.25]])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("paint")
    model = tiny_folder("flux", root / "tiny-flux", defaults={"pixels": [[16, 24]]})
    (root / "prompts.txt").write_text("\n".join(f"star {number}" for number in range(20)))
    words = ["harvest", str(model), "--prompts", str(root / "prompts.txt"), "--out", str(root / "study")]
    assert main([*words, "--site", SITE]) == 0
    words = ["train", str(root / "study"), "--site", SITE, "--k", "4", "--size", "64", "--tokens", "2000", "--batch", "64"]
    assert main(words) == 0
    assert main(["collect", str(root / "study"), "--images", "8"]) == 0
    words = ["contrast", str(root / "study"), "lines", "--site", SITE, "--positive", "lines", "--negative", "dots"]
    assert main(words) == 0
    return Study.open(root / "study")


@pytest.fixture(scope="module")
def site(study: Study) -> Iterator[Site]:
    studio = ServeCommand(study=study.folder).studio(study)
    site = Site(study, studio=studio)
    yield site
    site.close()
    studio.close()


def post(site: Site, target: str, body: object) -> Reply:
    return site.get(target, "POST", json.dumps(body).encode(), **{"Content-Type": "application/json"})


def events(site: Site, target: str, body: object) -> list[Event]:
    reply = post(site, target, body)
    assert reply.status == 200 and '"error"' not in reply.text, reply
    return [json.loads(line) for line in reply.text.splitlines()]


def image(site: Site, event: Event) -> np.ndarray:
    connection = HTTPConnection("127.0.0.1", site.port)
    connection.request("GET", f"/generated/{event['image']}")
    content = connection.getresponse().read()
    connection.close()
    return np.asarray(Image.open(io.BytesIO(content)))


def feature(study: Study) -> int:
    """The feature that fires most."""
    with Book.open(study.book(SITE, LABEL)) as book:
        return book.features("density", descending=True, limit=1)[0].feature


def request(study: Study, **changes: object) -> dict[str, object]:
    edit = {"site": SITE, "dictionary": LABEL, "features": [feature(study)], "strength": 3.0}
    return {"client": "test-client", "prompt": "star 1", "edits": [edit], **changes}


def test_an_image_is_painted_recorded_and_replayed_to_the_pixel(study: Study, site: Site, tmp_path: Path):
    region = {"rows": 2, "columns": 3, "weights": MAP.weights}
    body = request(study)
    body["edits"][0] |= {"region": region, "steps": [0, 1]}  # pyright: ignore
    stream = events(site, "/api/generate", body | {"seeds": [3, 4], "factors": [1.0, -1.0]})
    shown = [(event["seed"], event["factor"]) for event in stream if event["type"] == "image"]
    assert shown == [(3, None), (4, None), (3, 1.0), (4, 1.0), (3, -1.0), (4, -1.0)] and stream[-1]["type"] == "done"
    plain, painted = (
        image(site, event) for event in (e for e in stream if e["type"] == "image" and e["seed"] == 3) if event["factor"] != -1.0
    )
    assert plain.shape == (16, 24, 3) and (plain != painted).any()
    *_, record, done = events(site, "/api/record", body | {"seed": 3})
    assert done == {"type": "done"}
    (tmp_path / "edit.json").write_text(record["record"])
    assert main(["steer", str(study.folder), "--replay", str(tmp_path / "edit.json"), "--out", str(tmp_path / "sheet.png")]) == 0
    rows = [[Image.fromarray(plain), Image.fromarray(painted)]]
    expected = contact_sheet(rows, row_labels=["star 1, seed 3"], column_labels=["unedited", "add 3 peak"])
    assert (np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")) == np.asarray(expected.convert("RGB"))).all()


def test_no_edit_generates_the_unedited_images_once(study: Study, site: Site):
    body = {"client": "test-client", "prompt": "a star that is new", "seeds": [7]}
    first, second = (events(site, "/api/generate", body) for _ in range(2))
    assert [event["type"] for event in second if event["type"] not in ("waiting",)] == ["image", "done"]
    assert first[-2] == second[-2] and any(event["type"] == "step" for event in first)


def test_the_client_generates_the_images_that_the_page_shows(study: Study, site: Site):
    body = request(study)
    shown = [image(site, event) for event in events(site, "/api/generate", body) if event["type"] == "image"]
    client = Client(f"http://127.0.0.1:{site.port}/")
    found = list(client.generate("star 1", edits=body["edits"]))  # pyright: ignore
    assert [(each.seed, each.factor) for each in found] == [(0, None), (0, 1.0)]
    assert all((np.asarray(each.image) == pixels).all() for each, pixels in zip(found, shown, strict=True))
    with pytest.raises(UnknownName, match="nothing"):
        next(client.generate("star 1", edits=[EDIT | {"dictionary": "nothing"}]))


def test_a_contrast_paints_too(study: Study, site: Site):
    edit = {"site": SITE, "contrast": "lines", "unit": "norm", "strength": 4.0}
    plain, painted = (event for event in events(site, "/api/generate", request(study, edits=[edit])) if event["type"] == "image")
    assert (image(site, plain) != image(site, painted)).any()


def test_the_settings_name_what_can_be_painted_with(study: Study, site: Site):
    settings = site.json("/api/paint")
    assert settings["pixels"] == [16, 24] and settings["contrasts"] == {"lines": SITE}  # pyright: ignore
    assert settings["dictionaries"] == [{"site": SITE, "label": LABEL, "grid": [4, 6]}]  # pyright: ignore
    assert site.get("/paint").status == 200


@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({"seeds": list(range(17))}, 422, "seeds"),
        ({"seeds": list(range(16)), "factors": [1.0, 2.0, 3.0, 4.0]}, 422, "80 images are too many"),
        ({"steps": 101}, 422, "steps"),
        ({"prompt": "a" * 2001}, 422, "prompt"),
        ({"client": "../../etc"}, 422, "client"),
        ({"edits": [{"site": SITE, "dictionary": "nothing", "features": [1]}]}, 404, "nothing"),
        ({"edits": [{"site": SITE, "dictionary": LABEL, "features": [64]}]}, 422, "numbered 0 to 63"),
        ({"edits": [EDIT | {"region": "/etc/passwd"}]}, 422, "region"),
        ({"edits": [EDIT | {"region": {"rows": 2, "columns": 2, "weights": "/w=="}}]}, 422, "bytes"),
        ({"edits": [{"site": SITE, "contrast": "../../study"}]}, 422, "contrast"),
        ({"edits": [{"site": SITE, "contrast": "dots"}]}, 404, "dots"),
        ({"edits": [{"site": "nowhere", "dictionary": LABEL, "features": [1]}]}, 404, "nowhere"),
        ({"unknown": 1}, 422, "unknown"),
    ],
)
def test_what_cannot_be_painted_is_refused_with_a_sentence(
    study: Study, site: Site, change: dict[str, object], status: int, sentence: str
):
    reply = post(site, "/api/generate", request(study, **change))
    assert reply.status == status and sentence in json.loads(reply.text)["error"]


class SlowModel(ImageModel):
    """A model whose images take as many steps as their shots say; each step waits until it is let go."""

    def __init__(self) -> None:
        self.batch = 1
        self.go = threading.Semaphore(0)
        self.made = list[int]()

    def shots(self, prompt: str, seeds: Sequence[int], steps: int | None) -> list[Shot]:
        return [Shot(model="m", prompt=prompt, seed=seed, pixels=(2, 2), steps=steps or 1, guidance=0.0) for seed in seeds]

    def images(self, shots: Sequence[Shot], edits: Sequence[Edit], report: Report) -> list[Image.Image]:
        for step in range(shots[0].steps):
            assert self.go.acquire(timeout=10)
            report(step + 1, shots[0].steps)
        self.made += [shot.seed for shot in shots]
        return [Image.new("RGB", (2, 2)) for _ in shots]

    def read(self, shot: Shot, refs: Sequence[DictionaryRef], report: Report) -> ReadImage:
        raise AssertionError

    def record(self, shot: Shot, edits: Sequence[Edit]) -> str:
        raise AssertionError


class Reader:
    """Somebody who waits for images of some seeds."""

    def __init__(self, studio: Studio, name: str, *seeds: int, steps: int = 1) -> None:
        self.events = list[Event]()
        self.started, self.ended = threading.Event(), threading.Event()

        def work(model: ImageModel, report: Report) -> Iterator[Event]:
            self.started.set()
            for seed in seeds:
                model.images(model.shots("", [seed], steps), [], report)
                yield {"type": "image", "seed": seed}

        self.job = studio.submit(name, work, self._receive)

    def _receive(self, event: Event | None) -> None:
        self.events.append(event) if event is not None else self.ended.set()

    def wait(self) -> list[str]:
        """Return the types of all events but the places in the queue."""
        assert self.ended.wait(10)
        return [event["type"] for event in self.events if event["type"] != "waiting"]


@pytest.fixture
def model() -> SlowModel:
    return SlowModel()


@pytest.fixture
def studio(model: SlowModel) -> Iterator[Studio]:
    studio = Studio(lambda: model, lambda: PaintChoices([], {}))
    yield studio
    model.go.release(1000)
    studio.close()


def test_two_people_have_their_turns_one_after_the_other(studio: Studio, model: SlowModel):
    one, two = Reader(studio, "one", 1, 2, 3), Reader(studio, "two", 11, 12, 13)
    model.go.release(6)
    assert one.wait() == ["loading", "step", "image", "step", "image", "step", "image", "done"]
    assert two.wait()[-1] == "done" and model.made == [1, 11, 2, 12, 3, 13]
    assert {"type": "waiting", "before": 1} in two.events


def test_a_new_request_cancels_the_old_one_at_its_next_step(studio: Studio, model: SlowModel):
    old = Reader(studio, "one", 1, steps=50)
    model.go.release(2)
    new = Reader(studio, "one", 2)
    model.go.release(10)
    assert old.wait()[-1] == "cancelled" and new.wait()[-1] == "done" and model.made == [2]


def test_a_full_queue_refuses_and_an_error_ends_one_job_alone(studio: Studio, model: SlowModel):
    def fail(model: ImageModel, report: Report) -> Iterator[Event]:
        raise BadInput("This cannot be.")
        yield {}

    first = Reader(studio, "first", 1)
    assert first.started.wait(10)
    received = list[Event | None]()
    studio.submit("broken", fail, received.append)
    others = [Reader(studio, f"reader-{number}", 10 + number) for number in range(MOST_WAITING - 2)]
    last = Reader(studio, "last", 5)
    with pytest.raises(QueueFull, match=f"{MOST_WAITING} people wait"):
        for number in range(3):
            Reader(studio, f"late-{number}", 6)
    model.go.release(100)
    assert all(reader.wait()[-1] == "done" for reader in (first, *others, last))
    assert {"type": "error", "error": "This cannot be."} in received and received[-1] is None


def test_images_are_kept_up_to_a_number_of_bytes():
    shelf = Shelf(most_bytes=300)
    shots = [Shot(model="m", seed=seed, pixels=(2, 2), steps=1, guidance=0.0) for seed in range(9)]
    names = [shelf.add(Image.new("RGB", (2, 2), (shot.seed, 0, 0)), shot) for shot in shots]
    assert shelf.get(names[-1]) is not None and shelf.unedited(shots[-1]) == names[-1]
    assert shelf.get(names[0]) is None and shelf.unedited(shots[0]) is None
    assert shelf.get("../../study.json") is None


def test_a_reader_that_goes_away_cancels_its_request(study: Study, model: SlowModel):
    studio = Studio(lambda: model, lambda: PaintChoices([], {}))
    site = Site(study, studio=studio)
    connection = HTTPConnection("127.0.0.1", site.port, timeout=10)
    body = json.dumps({"client": "test-client", "seeds": [1], "steps": 100})
    connection.request("POST", "/api/generate", body, {"Content-Type": "application/json"})
    model.go.release(2)
    answer = connection.getresponse()
    while json.loads(answer.readline())["type"] != "step":
        pass
    answer.close()
    connection.close()
    for _ in range(200):
        if studio.is_idle:
            break
        model.go.release(1)
        threading.Event().wait(0.02)
    assert studio.is_idle and model.made == []
    site.close()
    studio.close()
