"""`difflex collect`, `features` and `show`: books, lists and sheets of the dictionaries of a study."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from changed_book import change_book
from PIL import Image

from difflex.cli import main
from difflex.commands.estimates import estimate
from difflex.commands.features import CollectCommand
from difflex.commands.forecast import DictionaryForecast, Forecast, Machine
from difflex.commands.inputs import stored_strength
from difflex.dictionaries import ITDA, SAE, Dictionary, DictionaryOrigin, Neurons, Normalisation, SAEWeights
from difflex.dictionaries.itda import AtomProvenance
from difflex.evaluation.concepts import ConceptsConfig, drawn_concepts
from difflex.evaluation.concepts.results import ConceptMatches, FeatureMatches, MatchInputs
from difflex.features import Book, ImageAlbum
from difflex.features.explanations import Explanation, ExplanationScore, Judgement
from difflex.features.images import overview
from difflex.files import folder_lock
from difflex.records import Edit, Shot, Site
from difflex.steering import EditRecord, StudyEditor
from difflex.study import DictionaryRef, Study

SITE, NEURONS = Site("double.0"), Site("double.0", "neurons")
SIZE = 24
SAE_REF = DictionaryRef(SITE, "topk-24-k4")
COLLECT = ["--images", "20", "--batch", "8", "--top-examples", "4", "--random-examples", "4", "--silent-examples", "2"]


def random_sae(seed: int) -> Dictionary:
    directions = torch.nn.functional.normalize(torch.randn(SIZE, 192, generator=torch.Generator().manual_seed(seed)), dim=1)
    weights = SAEWeights(encoder=directions, decoder=directions.clone(), bias=torch.zeros(192), encoder_bias=torch.zeros(SIZE))
    origin = DictionaryOrigin(site=SITE, model="mini-flux")
    return SAE(kind="topk", k=4, origin=origin, normalisation=Normalisation.identity(192), weights=weights)


def random_itda(shots: list[Shot]) -> Dictionary:
    atoms = torch.nn.functional.normalize(torch.randn(6, 192, generator=torch.Generator().manual_seed(3)), dim=1)
    provenance = AtomProvenance(shots=torch.arange(6) % 2, tokens=torch.arange(6) * 10, details=dict(enumerate(shots)))
    origin, plain = DictionaryOrigin(site=SITE, model="mini-flux"), Normalisation.identity(192)
    return ITDA(k=3, origin=origin, normalisation=plain, atoms=atoms, provenance=provenance)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study with the books of three dictionaries, from a harvest of 24 images at two steps."""
    folder = tmp_path_factory.mktemp("collected") / "study"
    words = ["--prompts", "captions", "--tokens", str(24 * 2 * 64), "--steps", "3", "--keep-steps", "1:3", "--batch", "8"]
    assert main(["harvest", "mini-flux", "--site", "double.0", *words, "--out", str(folder)]) == 0
    study = Study.open(folder)
    random_sae(0).save(study.dictionary(*SAE_REF))
    Neurons(width=768, k=4, origin=DictionaryOrigin(site=NEURONS, model="mini-flux")).save(
        study.dictionary(NEURONS, "neurons-768-k4")
    )
    shots = [
        Shot(model="mini-flux", prompt=prompt, seed=5, pixels=(64, 64), steps=1, guidance=0.0, timestep=1000.0)
        for prompt in ("a red star on grass", "a blue circle on sky")
    ]
    random_itda(shots).save(study.dictionary(SITE, "itda-6-k3"))
    assert main(["collect", str(folder), *COLLECT]) == 0
    return study


def test_every_dictionary_gets_a_book_of_the_harvested_images(study: Study):
    for ref, size in ((SAE_REF, SIZE), (DictionaryRef(NEURONS, "neurons-768-k4"), 768), (DictionaryRef(SITE, "itda-6-k3"), 6)):
        with Book.open(study.book(*ref)) as book:
            assert (book.about.dictionary, book.about.size, book.about.grid) == (str(ref), size, (8, 8))
            assert (book.about.images, book.about.tokens) == (20, 20 * 2 * 64) and len(book.about.timesteps) == 2
            assert all((study.images / image.file).is_file() for image in book.images())
            top = book.examples(max(book.features(), key=lambda row: row.firings).feature, "top")
            assert 0 < len(top) <= 8 and {example.split for example in top} == {"train", "held-out"}
    assert not [*study.folder.glob("books/*.safetensors")]


def set_strength(study: Study, feature: int, strength: float | None) -> None:
    """Change the default strength of a feature in the book of the SAE."""
    change_book(study.book(*SAE_REF), "UPDATE features SET strength = ? WHERE feature = ?", strength, feature)


@pytest.mark.filterwarnings("ignore:.*is dead")
def test_setting_a_code_takes_the_default_strength_from_the_book(study: Study, capsys: pytest.CaptureFixture[str]):
    editor = StudyEditor(study)
    edits = [Edit(operation="add", site=SITE, dictionary=SAE_REF.label, features=(feature,)) for feature in range(SIZE)]
    computed = [editor.with_default_strength(edit).strength for edit in edits]
    with Book.open(study.book(*SAE_REF)) as book:
        assert [row.strength for row in book.features()] == computed
        row = next(row for row in book.features("peak", descending=True) if row.strength)
    assert row.strength and 0 < row.strength <= 1
    assert stored_strength(study, SAE_REF, range(SIZE)) == min(computed)
    assert main(["features", str(study.folder), "--dictionary", str(SAE_REF), "--sort", "strength"]) == 0
    assert "strength" in capsys.readouterr().out
    record, image = study.folder / "edit.json", study.folder / "x.png"
    words = [
        "steer",
        str(study.folder),
        str(row.feature),
        "--dictionary",
        str(SAE_REF),
        "--prompt",
        "a red star",
        "--operation",
        "set",
        "--out",
        str(image),
    ]
    for stored, used in ((0.125, 0.125), (None, computed[row.feature])):
        set_strength(study, row.feature, stored)
        assert main([*words, "--record", str(record)]) == 0
        assert EditRecord.load(record).edits[0].strength == used
    set_strength(study, row.feature, row.strength)


def test_the_cost_of_collecting_is_predicted(study: Study):
    machine = Machine.with_cpu(1e11, 1 << 40)
    forecast = Forecast(
        machine, dictionaries={(study.folder, SITE): (DictionaryForecast(24, 4, 192), DictionaryForecast(6, 3, 192))}
    )
    both = estimate(forecast, CollectCommand(study=study.folder, images=100))
    assert (both.sites, both.tokens, both.unknown) == ((str(SITE),), 100 * 3 * 64, "")
    drawn = estimate(forecast, CollectCommand(study=study.folder, images=100, drawn_world=True, noise=(0.25,)))
    single = estimate(forecast, CollectCommand(study=study.folder, images=100, dictionary=(str(SAE_REF),)))
    assert drawn.tokens == 100 * 64 and single.bytes is not None and both.bytes == single.bytes + 6 * 4000
    assert both.seconds and single.seconds and single.seconds < both.seconds
    assert "not known" in estimate(Forecast(machine), CollectCommand(study=study.folder)).unknown


def test_the_image_of_a_shot_is_the_final_image_of_its_run(study: Study):
    import difflex

    with Book.open(study.book(*SAE_REF)) as book:
        row = book.shots([book.examples(0, "silent")[0].shot]).popitem()[1]
        assert (row.shot.steps, row.shot.timestep in book.about.timesteps) == (3, True)
        [generated] = difflex.load("mini-flux").generate(row.shot.prompt, seed=row.shot.seed, steps=3)
        stored = ImageAlbum(study.images).open(row.image.file)
    bytes = [torch.tensor(list(image.tobytes())) for image in (generated.image, stored)]
    assert (bytes[0] - bytes[1]).abs().max() <= 2, "equal up to rounding in batches of another size"


def test_the_book_of_an_itda_dictionary_has_the_images_of_its_atoms(study: Study):
    with Book.open(study.book(SITE, "itda-6-k3")) as book:
        patch = book.patch(3)
        assert patch is not None and patch.image is not None
        assert (patch.token, patch.shot.prompt) == (30, "a blue circle on sky")
        assert ImageAlbum(study.images).open(patch.image.file).size == (64, 64)


def collected(study: Study) -> dict[str, bytes]:
    """Return the contents of all books and images of a study."""
    files = [path for folder in ("books", "images") for path in (study.folder / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(study.folder)): path.read_bytes() for path in files}


def test_flags_that_change_no_content_rewrite_nothing(study: Study, capsys: pytest.CaptureFixture[str]):
    before = collected(study)
    for words in (["--batch", "3"], ["--batch", "8", "--precision", "fp32"], ["--offline"]):
        assert main(["collect", str(study.folder), *COLLECT[:2], *COLLECT[4:], *words]) == 0
        assert capsys.readouterr().out.count("up to date") == 3
    assert collected(study) == before


def test_books_that_are_made_again_keep_their_explanations(study: Study, capsys: pytest.CaptureFixture[str]):
    path, words = study.book(*SAE_REF), ["collect", str(study.folder), *COLLECT[2:], "--dictionary", str(SAE_REF)]
    before = collected(study)
    try:
        with Book.edit(path) as book:
            example = book.examples(7)[0]
            explanation = Explanation(feature=7, backend="rule", protocol="heldout", text="round")
            book.add_explanation(explanation, [Judgement(example.id, True, 1.0)])
        assert main([*words, "--images", "16"]) == 0
        with Book.open(path) as book:
            [entry] = book.explanations()
            [judgement] = book.judgements(entry.id)
            assert entry.text == "round" and book.about.images == 16
            assert judgement.example is None or book.examples_by_number([judgement.example])[judgement.example].feature == 7
        assert main([*words, "--images", "16", "--discard-explanations"]) == 0
        output = capsys.readouterr().out
        assert "1 explanations discarded" in output and f"{path}: up to date" in output
        with Book.open(path) as book:
            assert book.explanations() == []
    finally:
        restore(study, before)


def test_damaged_books_are_kept_aside_and_collected_again(study: Study, capsys: pytest.CaptureFixture[str]):
    path, words = study.book(*SAE_REF), ["collect", str(study.folder), *COLLECT, "--dictionary", str(SAE_REF)]
    before = collected(study)
    try:
        path.write_bytes(b"not a book")
        assert main(words) == 0
        output = capsys.readouterr().out
        assert "It is collected again." in output and f"{path}: collected" in output
        assert path.with_name(f"{path.stem}.damaged-1.sqlite").read_bytes() == b"not a book"
        main(["verify", str(study.folder)])
        assert "books: 3 files, all intact" in capsys.readouterr().out, "what was kept aside is no book"
        damaged = bytearray(path.read_bytes())
        damaged[len(damaged) // 2] ^= 8
        path.write_bytes(damaged)
        assert main(["show", str(study.folder), "1", "--dictionary", str(SAE_REF), "--out", str(study.folder / "x.png")]) == 2
        assert "does not match its checksum" in capsys.readouterr().err
    finally:
        restore(study, before)


def test_missing_and_damaged_images_are_made_again(study: Study, capsys: pytest.CaptureFixture[str]):
    words = ["collect", str(study.folder), *COLLECT, "--dictionary", str(SAE_REF)]
    before = collected(study)
    with Book.open(study.book(*SAE_REF)) as book:
        first, second, *_ = [study.images / image.file for image in book.images()]
        shown = study.images / book.shots([number := book.examples(7, "top")[0].shot])[number].image.file
    try:
        first.unlink()
        second.write_bytes(second.read_bytes()[:-9])
        shown.write_bytes(b"")
        assert main(["show", str(study.folder), "7", "--dictionary", str(SAE_REF), "--out", str(study.folder / "x.png")]) == 2
        error = capsys.readouterr().err
        assert str(shown) in error and "Run difflex collect" in error
        assert main(words) == 0
        output = capsys.readouterr().out
        assert f"{len({first, second, shown})} images of" in output and "missing or damaged" in output
        assert main(words) == 0 and "up to date" in capsys.readouterr().out
    finally:
        restore(study, before)


def restore(study: Study, before: dict[str, bytes]) -> None:
    """Restore the contents that `collected` returned."""
    for name in collected(study).keys() - before.keys():
        (study.folder / name).unlink()
    for name, content in before.items():
        (study.folder / name).write_bytes(content)


def test_a_folder_is_known_by_its_contents_and_its_odd_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study, folder = Study.begin(tmp_path / "study", "mini-flux"), tmp_path / "images"
    random_sae(1).save(study.dictionary(*SAE_REF))
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (number * 90, 0, 0)).save(folder / f"{number}.png")
    words = ["collect", str(study.folder), "--folder", str(folder), "--noise", "0.5", "--top-examples", "2"]
    assert main(words) == 0 and "collected" in capsys.readouterr().out
    assert main([*words, "--batch", "1", "--images", "50"]) == 0 and "up to date" in capsys.readouterr().out
    Image.new("RGB", (64, 64), "blue").save(folder / "1.png")
    assert main(words) == 0 and f"{study.book(*SAE_REF)}: collected" in capsys.readouterr().out
    (folder / "0.txt").write_bytes(b"\xff\xfe")
    assert main(words) == 2 and "0.txt cannot be read as a prompt" in capsys.readouterr().err
    (folder / "0.txt").unlink()
    (folder / "2.png").write_text("no image")
    assert main(words) == 2 and "2.png cannot be read as an image" in capsys.readouterr().err
    (folder / "2.png").unlink()
    (folder / "3.png").mkdir()
    assert main(words) == 2 and "3.png cannot be read: Is a directory" in capsys.readouterr().err


def test_it_is_checked_that_books_can_be_written_before_a_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    study = Study.begin(tmp_path / "study", "mini-flux")
    random_sae(1).save(study.dictionary(*SAE_REF))
    monkeypatch.setattr("difflex.commands.features.load_study_model", lambda *_: pytest.fail("the model was loaded"))
    words = ["collect", str(study.folder), "--prompts", "captions"]
    for path in (study.folder / "books", study.images):
        path.write_text("a file")
        assert main(words) == 2 and "a folder is needed" in capsys.readouterr().err
        path.unlink()
    (study.folder / "books").mkdir(exist_ok=True)  # a failed start leaves no empty folder
    (study.folder / "books" / ".x.sqlite.abc.tmp").write_text("of a killed process")
    with folder_lock(study.folder / "books"):
        assert main(words) == 2 and "Another process is writing" in capsys.readouterr().err
    assert not [*study.folder.glob("books/.*")], "leftovers are deleted"


def test_images_come_from_the_drawn_world_a_folder_or_prompts(tmp_path: Path):
    study = Study.begin(tmp_path / "study", "mini-flux")
    random_sae(1).save(study.dictionary(*SAE_REF))
    words = ["collect", str(study.folder), "--batch", "4", "--top-examples", "2"]
    assert main([*words, "--drawn-world", "--images", "10", "--noise", "0.25,0.75"]) == 0
    with Book.open(study.book(*SAE_REF)) as book:
        assert (book.about.tokens, book.about.timesteps) == (10 * 2 * 64, (750.0, 250.0))
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (80 + number, 64), (number * 90, 0, 0)).save(folder / f"{number}.png")
    (folder / "1.txt").write_text("a red square\n", encoding="utf-8")
    assert main([*words, "--folder", str(folder), "--noise", "0.5", "--pixels", "64"]) == 0
    with Book.open(study.book(*SAE_REF)) as book:
        shots = book.shots(range(3)).values()
        assert {(row.shot.image, row.shot.prompt) for row in shots} == {("0.png", ""), ("1.png", "a red square"), ("2.png", "")}
    assert main([*words, "--prompts", "captions", "--images", "4", "--steps", "2", "--keep-steps", "0:1", "--seeds", "0:2"]) == 0
    with Book.open(study.book(*SAE_REF)) as book:
        assert book.about.tokens == 4 * 64 and {row.shot.seed for row in book.shots(range(4)).values()} == {0, 1}


def test_features_are_sorted_and_filtered_by_statistics_concepts_and_scores(study: Study, capsys: pytest.CaptureFixture[str]):
    columns = {name: () for name in ("iou_concepts", "iou", "unrelated", "monosemanticity")}
    best = FeatureMatches(features=(2, 5), concepts=(0, 1), ap=(0.4, 0.9), **columns)
    concepts = drawn_concepts()
    matches = ConceptMatches(
        site=SITE, label=SAE_REF.label, size=SIZE, concepts=concepts, rare_concepts=(), levels=(), features=best
    )
    matches.save(study.concepts(*SAE_REF))
    with Book.edit(study.book(*SAE_REF)) as book:
        explanation = Explanation(feature=7, backend="rule", protocol="heldout", text="the border of something round")
        book.add_explanation(explanation, (), [ExplanationScore("accuracy", 0.75, None, None, 10)])

    def lines(*words: str) -> list[list[str]]:
        assert main(["features", str(study.folder), "--dictionary", str(SAE_REF), *words]) == 0
        return [line.split() for line in capsys.readouterr().out.splitlines()[2:]]

    densities = [float(line[1].rstrip("%")) for line in lines("--top", "30")]
    assert len(densities) == SIZE and densities == sorted(densities, reverse=True)
    assert [line[0] for line in lines("--sort", "concept")] == ["5", "2"]
    assert [line[0] for line in lines("--filter", f"concept={concepts[0].name}")] == ["2"]
    [line] = lines("--sort", "score", "--top", "1")
    assert line[0] == "7" and "0.75" in line and line[-1] == "round"
    peaks = [float(line[2]) for line in lines("--sort", "peak", "--ascending", "--filter", "peak>0", "density<0.5")]
    assert peaks == sorted(peaks) and peaks
    inputs = MatchInputs(model="mini-flux", revision=None, images="drawn", config=ConceptsConfig(images=9), fingerprint="older")
    replace(matches, inputs=inputs).save(study.concepts(*SAE_REF))
    assert main(["features", str(study.folder), "--dictionary", str(SAE_REF)]) == 0
    output = capsys.readouterr().out
    assert "no concepts are shown. Run difflex concepts again" in output and concepts[0].name not in output
    matches.save(study.concepts(*SAE_REF))


def test_a_sheet_can_be_drawn_in_every_style(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = set()
    for style in ("blue", "outline", "plain"):
        out = tmp_path / f"{style}.png"
        words = ["--style", style, "--columns", "4", "--side", "64", "--out", str(out)]
        assert main(["show", str(study.folder), "7", "--dictionary", str(SAE_REF), *words]) == 0
        assert capsys.readouterr().out.splitlines()[0] == str(out.resolve())
        with Image.open(out) as image:
            sizes.add(image.size)
    assert len(sizes) == 1
    assert len({(tmp_path / f"{style}.png").read_bytes() for style in ("blue", "outline", "plain")}) == 3
    assert main(["show", str(study.folder), "0", "--dictionary", f"{SITE}/itda-6-k3", "--out", str(tmp_path / "atom.png")]) == 0
    with Book.open(study.book(*SAE_REF)) as book:
        image = overview(book, ImageAlbum(study.images), [1, 7, 9], labels={7: "round"})
        assert image.height > 3 * 96


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["collect", "STUDY", "--site", "double.9"], "The site 'double.9' is unknown"),
        (["collect", "STUDY", "--drawn-world", "--prompts", "captions"], "three sources of images"),
        (["collect", "STUDY", "--folder", "nowhere"], "There is no folder nowhere"),
        (["collect", "STUDY", "--pixels", "64", "--steps", "2"], "--steps, --pixels would change nothing"),
        (["collect", "STUDY", "--drawn-world", "--guidance", "0"], "--guidance would change nothing"),
        (["features", "STUDY"], "has 3 books. Name one with --dictionary"),
        (["features", "STUDY", "--dictionary", "double.0/topk-24-k4", "--sort", "densty"], "The column 'densty' is unknown"),
        (["features", "STUDY", "--dictionary", "double.0/itda-6-k3", "--sort", "concept"], "Run difflex concepts first"),
        (["show", "STUDY", "24", "--dictionary", "double.0/topk-24-k4"], "has no feature 24: they are numbered from 0 to 23"),
        (["show", "STUDY", "1", "--dictionary", "double.0/topk-24-k4", "--out", "x.txt"], "does not name an image file"),
        (["show", "STUDY", "1", "--dictionary", "double.0"], "has 2 dictionaries"),
    ],
    ids=lambda words: " ".join(words[:1] + words[2:]) if isinstance(words, list) else "",
)
def test_wrong_flags_are_explained_in_a_sentence(study: Study, words: list, message: str, capsys):
    assert main([str(study.folder) if word == "STUDY" else word for word in words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("stamp", [0, 2**32])
def test_the_book_of_a_changed_dictionary_is_refused_whatever_its_age(study: Study, tmp_path: Path, capsys, stamp: int):
    folder = study.dictionary(*SAE_REF)
    before = {path: (path.read_bytes(), path.stat()) for path in folder.glob("*.*")}
    random_sae(9).save(folder)
    try:
        for path in before:
            os.utime(path, (stamp, stamp))
        assert main(["show", str(study.folder), "1", "--dictionary", str(SAE_REF), "--out", str(tmp_path / "x.png")]) == 2
        assert "has changed since" in capsys.readouterr().err
    finally:
        for path, (content, stat) in before.items():
            path.write_bytes(content)
            os.utime(path, (stat.st_atime, stat.st_mtime))
