import json
from contextlib import suppress
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from difflex.errors import BadInput, BrokenFile, DifflexError, MissingExtra, UnknownName
from difflex.pipeline import prompts, read_prompts

CAPTIONS = ["a red star", "zwei blaue Kreise, größer", 'a "quoted" heart']


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_lists_and_endless_iterators_are_passed_on():
    def endless():
        while True:
            yield "a star"

    assert list(read_prompts(CAPTIONS)) == CAPTIONS
    assert list(islice(read_prompts(endless()), 3)) == ["a star"] * 3


def test_a_text_file_holds_a_prompt_on_each_line_that_is_not_empty(tmp_path: Path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red star\r\n\n  a blue circle\n")
    assert list(read_prompts(tmp_path / "prompts.txt")) == ["a red star", "a blue circle"]


def test_a_csv_column_may_hold_commas_quotes_and_line_breaks(tmp_path: Path):
    (tmp_path / "prompts.csv").write_text('id,caption\n1,"a red, ""big""\nstar"\n2,a circle\n', encoding="utf-8")
    assert list(read_prompts(tmp_path / "prompts.csv")) == ['a red, "big"\nstar', "a circle"]
    assert list(read_prompts(tmp_path / "prompts.csv", column="id")) == ["1", "2"]


def test_a_jsonl_file_holds_objects_or_strings(tmp_path: Path):
    assert list(read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"text": text, "n": 1} for text in CAPTIONS]))) == CAPTIONS
    assert list(read_prompts(write_jsonl(tmp_path / "b.jsonl", [*CAPTIONS]))) == CAPTIONS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_parquet_file_and_a_folder_of_a_dataset_are_streamed(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"caption_llava_short": CAPTIONS, "key": [1, 2, 3]})
    table.to_parquet(tmp_path / "train.parquet")
    assert list(read_prompts(tmp_path / "train.parquet", column="caption_llava_short")) == CAPTIONS
    assert list(read_prompts(tmp_path, column="caption_llava_short")) == CAPTIONS
    with pytest.raises(UnknownName, match=r"'caption_llava'.*caption_llava_short"):
        read_prompts(tmp_path, column="caption_llava")


def test_the_error_for_missing_datasets_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompts, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"difflex\[data\]"):
        read_prompts(tmp_path)


@pytest.mark.parametrize("name", ["empty.txt", "empty.csv", "empty.jsonl"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str):
    (tmp_path / name).write_text("prompt\n" if name.endswith("csv") else "\n")
    with pytest.raises(BadInput, match=f"no prompt in .*{name}"):
        read_prompts(tmp_path / name)


def test_the_error_for_a_missing_column_lists_the_columns(tmp_path: Path):
    (tmp_path / "prompts.csv").write_text("id,title\n1,a star\n")
    with pytest.raises(BadInput, match=r"not given\. Its columns are: id, title"):
        read_prompts(tmp_path / "prompts.csv")
    with pytest.raises(UnknownName, match=r"'titel'.*nearest: title"):
        read_prompts(tmp_path / "prompts.csv", column="titel")
    with pytest.raises(BrokenFile, match="entry 2, has no 'text'"):
        list(read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"caption": "b"}])))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.csv", "prompts.jsonl"])
def test_the_error_for_a_file_that_is_not_utf8_names_it(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes('"prompt"\n"größer"\n'.encode("latin-1"))
    with pytest.raises(BrokenFile, match=rf"{name}.*UTF-8"):
        list(read_prompts(tmp_path / name))


def test_the_error_for_a_missing_file_says_how_to_name_a_data_set(tmp_path: Path):
    with pytest.raises(BadInput, match="OWNER/NAME:COLUMN"):
        read_prompts(tmp_path / "nothing.txt")
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(BrokenFile, match=r"broken\.jsonl, entry 1"):
        read_prompts(tmp_path / "broken.jsonl")


@pytest.mark.parametrize("name", ["prompts.CSV", "prompts.Jsonl", "prompts.json", "prompts.JSON"])
def test_the_suffix_determines_the_format_in_upper_and_lower_case(tmp_path: Path, name: str):
    texts = {"csv": "text\na star\n", "jsonl": '{"text": "a star"}\n', "json": '[{"text": "a star"}\n]'}
    (tmp_path / name).write_text(texts[name.lower().partition(".")[2]])
    assert list(read_prompts(tmp_path / name)) == ["a star"]


def test_a_json_file_without_a_list_is_an_error(tmp_path: Path):
    (tmp_path / "prompts.json").write_text('{"text": "a star"}')
    with pytest.raises(BrokenFile, match=r"prompts\.json holds no list.*\.jsonl"):
        read_prompts(tmp_path / "prompts.json")


def test_a_column_of_a_text_file_is_an_error(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a star\n")
    with pytest.raises(BadInput, match=r"no column 'text'.*\.csv"):
        read_prompts(tmp_path / "prompts.txt", column="text")


def test_null_and_empty_entries_are_left_out(tmp_path: Path):
    assert list(read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"text": None}, {"text": "a"}, {"text": ""}]))) == ["a"]
    (tmp_path / "a.csv").write_text("n,text\n1,a\n2,\n3\n")
    assert list(read_prompts(tmp_path / "a.csv")) == ["a"]


@pytest.mark.parametrize("row", [3, ["a"], {"text": 3}, {"text": {"en": "a"}}])
def test_the_error_for_an_entry_that_is_not_text_names_its_number(tmp_path: Path, row: object):
    with pytest.raises(BrokenFile, match="entry 2, holds"):
        list(read_prompts(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, row])))


def test_a_quote_that_is_never_closed_is_an_error(tmp_path: Path):
    (tmp_path / "a.csv").write_text('text\na\n"' + "b\n" * 70_000)
    with pytest.raises(BrokenFile, match=r"a\.csv is not a table.*never closed"):
        list(read_prompts(tmp_path / "a.csv"))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 and nothing like it PAR1", b"text\na star\n"])
def test_the_error_for_a_damaged_parquet_file_names_it(tmp_path: Path, content: bytes):
    pytest.importorskip("datasets")
    (tmp_path / "prompts.parquet").write_bytes(content)
    with pytest.raises((BrokenFile, BadInput), match=r"prompts\.parquet"):
        read_prompts(tmp_path / "prompts.parquet")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nulls_of_a_parquet_file_are_left_out(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", None, "b"]}).to_parquet(tmp_path / "prompts.PARQUET")
    assert list(read_prompts(tmp_path / "prompts.PARQUET")) == ["a", "b"]


def test_the_error_for_a_folder_with_a_file_that_is_not_utf8_names_it(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "train.csv").write_bytes("text\ngrößer\n".encode("latin-1"))
    with pytest.raises(BadInput, match=rf"{tmp_path.name}.*UTF-8"):
        list(read_prompts(tmp_path))


def test_a_data_set_may_have_a_dot_in_its_name(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, str | None]] = []
    monkeypatch.setattr(prompts, "_dataset", lambda name, column, revision: calls.append((name, column)) or iter(["a"]))
    for name in ("owner/prompts-v1.5:caption", "owner/prompts-v1.5"):
        assert list(read_prompts(name)) == ["a"]
    assert calls == [("owner/prompts-v1.5", "caption"), ("owner/prompts-v1.5", None)]
    with pytest.raises(BadInput, match="does not exist"):
        read_prompts("owner/prompts.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[" * 100_000),
        ("a.jsonl", b'{"a":' * 100_000),
        ("a.json", b'["\\ud800"]'),
        ("a.txt", b"a star\0"),
        ("a.txt", bytes(range(256))),
        ("a.csv", b"\0" * 1000),
        ("a.csv", b",".join(b"column%d" % i for i in range(10_000)) + b"\n" + b"," * 9_999),
        ("a.csv", b'prompt\n"' + b"a" * 200_000),
        ("a.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    ],
)
def test_odd_files_of_prompts_are_sentences(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DifflexError) as refused:
        list(read_prompts(tmp_path / name))
    assert name in str(refused.value) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("source", ["", "a" * 300, "a\0b", "~nobody-here/prompts.txt", "folder.txt"])
def test_odd_names_of_prompts_are_sentences(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DifflexError):
        list(read_prompts(source))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([".txt", ".csv", ".json", ".jsonl"]),
    st.one_of(st.binary(max_size=200), st.text(max_size=100).map(str.encode)),
)
def test_any_content_gives_prompts_or_a_sentence(tmp_path: Path, suffix: str, content: bytes):
    (tmp_path / f"file{suffix}").write_bytes(content)
    with suppress(DifflexError):
        assert all(prompt and isinstance(prompt, str) for prompt in read_prompts(tmp_path / f"file{suffix}"))
