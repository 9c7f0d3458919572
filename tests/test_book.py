"""Books: entries are read back as written, damaged files are refused, and readers work next to a writer."""

import hashlib
import os
import sqlite3
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from difflex.choices import HighlightStyle
from difflex.errors import BadInput, BrokenFile, DiskError, StaleWork, UnknownName
from difflex.features import Book, BookInfo, BookWriter, FeatureFilter, ImageAlbum, overlaid
from difflex.features.entries import AtomImage, Example, FeatureNeighbour, FeatureStats, Histogram, ImageFile, TokenMap
from difflex.features.explanations import Explanation, ExplanationScore, Judgement, RecordedUsage
from difflex.features.images import enlarged
from difflex.records import Shot

ABOUT = BookInfo(
    dictionary="double.1/topk-3-k2",
    kind="topk",
    size=3,
    k=2,
    fingerprint="abc",
    model="mini-flux",
    data="two shots",
    grid=(2, 2),
    tokens=8,
    shots={"train": 1, "held-out": 1},
    images=2,
    timesteps=(1000.0, 500.0),
)
SHOTS = [
    Shot(model="mini-flux", prompt="a star", pixels=(8, 8), steps=1, guidance=0.0, timestep=1000.0),
    Shot(model="mini-flux", prompt="a moon", pixels=(8, 8), steps=1, guidance=0.0, timestep=500.0, split="held-out"),
]
IMAGES = [ImageFile(0, "a.webp", 8, 8), ImageFile(1, "b.webp", 8, 8)]
EXAMPLES = [
    Example(feature=0, kind="top", split="train", rank=0, shot=0, peak=4.0, map=TokenMap((0, 3), (4.0, 2.0))),
    Example(feature=0, kind="silent", split="held-out", rank=0, shot=1, peak=0.0),
    Example(feature=1, kind="quantile", split="held-out", rank=0, shot=1, peak=0.5, quantile=0.25, map=TokenMap((1,), (0.5,))),
]


def stats(feature: int, density: float, peak: float) -> FeatureStats:
    return FeatureStats(
        feature=feature,
        firings=int(density * 8),
        shots=1,
        density=density,
        peak=peak,
        mean=peak / 2,
        area=density or None,
        strength=peak / 4 or None,
        histogram=Histogram(-4, (1, 0, 2)),
        activity=(density, 0.0),
    )


def write_book(path: Path, about: BookInfo = ABOUT) -> Path:
    with BookWriter.open(path, about) as writer:
        writer.add_images(IMAGES)
        writer.add_shots((number, number, shot) for number, shot in enumerate(SHOTS))
        writer.add_features([stats(0, 0.25, 4.0), stats(1, 0.5, 0.5), stats(2, 0.0, 0.0)])
        writer.add_examples(EXAMPLES)
        writer.add_neighbours(
            0, [FeatureNeighbour(1, "firing", 0.5), FeatureNeighbour(2, "direction", 0.9), FeatureNeighbour(1, "direction", 0.8)]
        )
        writer.add_patch(AtomImage(1, 2, IMAGES[0], SHOTS[0]))
        writer.add_patch(AtomImage(2, 0, None, SHOTS[1]))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_book(tmp_path / "books" / "book.sqlite")


def test_a_book_is_read_as_it_was_written(path: Path):
    with Book.open(path) as book:
        assert book.about == ABOUT
        assert book.features() == [stats(0, 0.25, 4.0), stats(1, 0.5, 0.5), stats(2, 0.0, 0.0)]
        assert book.feature(1) == stats(1, 0.5, 0.5)
        assert book.shots([0, 1, 1])[1].shot == SHOTS[1] and book.shots([0])[0].image == IMAGES[0]
        assert book.images() == IMAGES
        assert book.neighbours(0) == [
            FeatureNeighbour(1, "firing", 0.5),
            FeatureNeighbour(2, "direction", 0.9),
            FeatureNeighbour(1, "direction", 0.8),
        ]
        assert book.patch(1) == AtomImage(1, 2, IMAGES[0], SHOTS[0]) and book.patch(2) == AtomImage(2, 0, None, SHOTS[1])
        assert book.patch(0) is None


def test_examples_are_read_with_their_maps(path: Path):
    with Book.open(path) as book:
        [top, silent] = book.examples(0)
        assert (top.kind, top.split, top.rank, top.shot, top.peak) == ("top", "train", 0, 0, 4.0)
        assert top.map.tokens == (0, 3) and top.map.values == pytest.approx((4.0, 2.0), rel=1e-4)
        assert (silent.kind, silent.map) == ("silent", TokenMap((), ()))
        [sampled] = book.examples(1, kind="quantile", split="held-out")
        assert sampled.quantile == 0.25 and book.examples_by_number([sampled.id]) == {sampled.id: sampled}
        assert book.examples(1, kind="top") == [] and book.examples(1, split="train") == []


def test_features_are_sorted_and_filtered(path: Path):
    with Book.open(path) as book:
        assert [row.feature for row in book.features("density", descending=True)] == [1, 0, 2]
        assert [row.feature for row in book.features("area", descending=False)] == [0, 1, 2], "features without a value come last"
        assert [row.feature for row in book.features("peak", where=[FeatureFilter.parse("peak>0.1")], limit=1)] == [1]
        with pytest.raises(UnknownName, match="The column 'densty' is unknown; nearest: density"):
            book.features("densty")


def test_a_filter_is_parsed_or_refused():
    assert FeatureFilter.parse(" density <= 1e-3") == FeatureFilter("density", "<=", 0.001)
    with pytest.raises(UnknownName, match="nearest: peak"):
        FeatureFilter.parse("paek>1")
    with pytest.raises(BadInput, match="is not a condition"):
        FeatureFilter.parse("peak")


def test_the_edges_of_a_histogram_double_every_four_bins():
    assert Histogram(-4, (1, 0, 2, 5, 1)).edges == (0.5, 0.625, 0.75, 0.875, 1.0, 1.25)


def test_an_explanation_replaces_an_older_one_with_its_judgements_and_scores(path: Path):
    explanation = Explanation(feature=0, backend="rule", protocol="heldout", text="stars", descriptions=("one star",))
    with Book.edit(path) as book:
        book.add_explanation(
            explanation,
            [Judgement(1, True, 0.9)],
            [ExplanationScore("accuracy", 0.9, 0.8, 1.0, 10)],
            [RecordedUsage(backend="rule", role="judge")],
        )
        number = book.add_explanation(
            explanation, [Judgement(1, True, 0.7), Judgement(2, False, 0.2)], [ExplanationScore("accuracy", 0.7, None, None, 2)]
        )
        book.add_usage([RecordedUsage(backend="rule", role="explainer", tokens_in=5, cost=0.1)])
    with Book.open(path) as book:
        [entry] = book.explanations(0)
        assert (entry.id, entry.text, entry.descriptions, entry.state) == (number, "stars", ("one star",), "done")
        assert book.judgements(number) == [Judgement(1, True, 0.7), Judgement(2, False, 0.2)]
        assert book.scores(number) == [ExplanationScore("accuracy", 0.7, None, None, 2)]
        assert book.best_scores() == {0: 0.7} and book.best_scores("auroc") == {}
        assert [row.feature for row in book.features("score", descending=True)] == [0, 1, 2]
        assert [usage.role for usage in book.usage()] == ["judge", "explainer"]


def test_an_invalid_explanation_is_refused_as_a_whole(path: Path):
    explanation = Explanation(feature=0, backend="rule", protocol="heldout", text="stars")
    with Book.edit(path) as book:
        with pytest.raises(BadInput, match="does not accept this entry: FOREIGN KEY"):
            book.add_explanation(explanation, [Judgement(99, True, 0.5)])
        assert book.explanations() == []
    with Book.open(path) as book, pytest.raises(BadInput, match="is open for reading only"):
        book.add_explanation(explanation)


def test_readers_work_while_a_writer_writes(path: Path):
    with Book.edit(path) as writer, Book.open(path) as reader:
        writer._connection.execute("BEGIN IMMEDIATE")
        writer._connection.execute("INSERT INTO usage VALUES (1, NULL, 'rule', 'judge', 1, 0, 0, NULL, 0, '')")
        assert list(reader.usage()) == [] and reader.feature(0).peak == 4.0
        with Book.open(path) as second_reader:
            assert len(second_reader.features()) == 3
        writer._connection.execute("COMMIT")
        assert len(list(reader.usage())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_book_can_be_read_but_not_changed_in_a_read_only_folder(path: Path):
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        with Book.open(path) as book:
            assert len(book.features()) == 3
            book.verify()
        with Book.edit(path) as book, pytest.raises(DiskError, match="may be read-only"):
            book.add_usage([RecordedUsage(backend="rule", role="judge")])
    finally:
        path.parent.chmod(0o700)


def test_a_failed_writer_leaves_the_older_book(path: Path):
    with pytest.raises(KeyError), BookWriter.open(path, ABOUT) as writer:
        writer.add_features([stats(0, 0.1, 1.0)])
        raise KeyError
    with Book.open(path) as book:
        assert len(book.features()) == 3
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda path: path.unlink(), UnknownName, "There is no book"),
        (lambda path: path.write_bytes(b"not a book" * 1000), BrokenFile, "is damaged"),
        (
            lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 5").close(),
            BadInput,
            "is of format 5; this difflex .* Use the difflex that wrote it",
        ),
        (
            lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 1").close(),
            StaleWork,
            "is of format 1, which this difflex no longer reads. Run difflex collect",
        ),
        (lambda path: sqlite3.connect(path).execute("PRAGMA application_id = 0").close(), BrokenFile, "not a finished book"),
        (lambda path: path.write_bytes(path.read_bytes()[:4096]), BrokenFile, "is damaged|cannot be read"),
    ],
    ids=["missing", "foreign", "newer", "older", "unfinished", "truncated"],
)
def test_a_file_that_is_not_a_book_of_this_format_is_refused(path: Path, damage, error: type[Exception], message: str):
    damage(path)
    with pytest.raises(error, match=message):
        Book.open(path).features()


def test_an_unknown_feature_is_refused_with_the_known_range(path: Path):
    with Book.open(path) as book, pytest.raises(UnknownName, match="no feature 3: they are numbered from 0 to 2"):
        book.feature(3)


def test_reading_a_book_does_not_import_torch(path: Path):
    code = f"import sys; from difflex.features import Book; Book.open({str(path)!r}).features(); print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"


def colours(count: int = 64) -> Image.Image:
    return Image.frombytes("RGB", (count, count), bytes((x * 3) % 256 for x in range(count * count * 3)))


def test_an_album_stores_an_image_once_and_without_loss(tmp_path: Path):
    album = ImageAlbum(tmp_path / "images")
    stored, is_new = album.add(colours())
    assert is_new and album.add(colours()) == (stored, False) and len(list(album.folder.iterdir())) == 1
    assert album.open(stored.file).tobytes() == colours().tobytes() and (stored.width, stored.height) == (64, 64)


def test_an_album_notices_missing_and_damaged_images_and_writes_them_again(tmp_path: Path):
    album = ImageAlbum(tmp_path / "images")
    stored, _ = album.add(colours())
    path = album.folder / stored.file
    content = path.read_bytes()
    for damage in (content[:-1], bytes([*content[:40], content[40] ^ 1, *content[41:]]), b"not an image", b""):
        path.write_bytes(damage)
        with pytest.raises(BrokenFile, match=r"is damaged\. Run difflex collect: it makes the image again"):
            album.open(stored.file)
        assert album.add(colours()) == (stored, False) and path.read_bytes() == content
    path.unlink()
    with pytest.raises(BrokenFile, match="is missing"):
        album.open(stored.file)
    for name in ("/dev/zero", "../images/x.webp", "x.webp"):
        with pytest.raises(BrokenFile, match="is not the name of an image"):
            album.open(name)


def test_an_image_of_huge_size_is_refused_before_it_is_decoded(tmp_path: Path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    file = f"{hashlib.sha256(bomb).hexdigest()[:32]}.webp"
    (tmp_path / file).write_bytes(bomb)
    with pytest.raises(BadInput, match=r"pixels|cannot be read as an image"):
        ImageAlbum(tmp_path).open(file)


def changed_cells(style: HighlightStyle, where: TokenMap, peak: float) -> set[tuple[int, int]]:
    """Return the cells of an 8 x 8 grid that the overlay changes."""
    plain, marked = enlarged(colours(), 256), overlaid(colours(), where, (8, 8), peak, style=style, side=256)
    return {
        (row, column)
        for row in range(8)
        for column in range(8)
        if plain.crop(box := (column * 32, row * 32, column * 32 + 32, row * 32 + 32)).tobytes() != marked.crop(box).tobytes()
    }


def test_an_overlay_marks_the_tokens_at_which_a_feature_fires():
    assert changed_cells("blue", TokenMap((0, 9, 63), (4.0, 0.1, 2.0)), 4.0) == {(0, 0), (1, 1), (7, 7)}
    assert changed_cells("plain", TokenMap((0, 9), (4.0, 2.0)), 4.0) == set()
    outlined = changed_cells("outline", TokenMap((9, 63), (4.0, 0.1)), 4.0)
    assert (1, 1) in outlined and (7, 7) not in outlined, "values below the threshold have no outline"


def test_an_overlay_is_more_opaque_nearer_to_the_peak_of_the_feature():
    white = Image.new("RGB", (8, 8), "white")
    darkness = [overlaid(white, TokenMap((0,), (1.0,)), (8, 8), peak).tobytes()[0] for peak in (1.0, 2.0, 4.0)]
    assert darkness == sorted(darkness) and len(set(darkness)) == 3


def test_a_map_that_does_not_fit_the_grid_is_refused():
    with pytest.raises(BadInput, match="Token 64 is not on a grid of 8 x 8"):
        overlaid(colours(), TokenMap((64,), (1.0,)), (8, 8), 1.0)
