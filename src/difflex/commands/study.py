"""`difflex status`, `report` and `compare`: a study as text and as pages; the command lines of logged commands."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, final, get_args, get_type_hints

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from difflex.commands import verb_class
from difflex.dictionary_config import read_config
from difflex.errors import BadInput, DifflexError
from difflex.files import Json
from difflex.hub import read_hub_origin
from difflex.images import check_output
from difflex.study import Command, CommandRecord, DictionaryRef, Study, read_log
from difflex.tables import text_table

COLUMNS = ("", "state", "finished (UTC)", "seconds", "verb", "flags")


@final
@dataclass(frozen=True, kw_only=True)
class StatusCommand(Command):
    """Show the activations and dictionaries of a study, and which commands of its recipe are done."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""

    def __call__(self) -> None:
        from difflex.store import Store

        study = Study.open(self.study)
        print(f"{study.folder}: a study of {study.model}")
        for site, folder in study.stores().items():
            try:
                store = Store.open(folder)
            except DifflexError as error:
                print(f"  {site}: cannot be read: {error}")
                continue
            rows = store.count() + store.count("held-out")
            print(f"  {site}: {rows:,} tokens of width {store.width}{'' if store.complete else ', not finished'}")
        for ref in study.dictionaries():
            print(f"  {ref}{_imported(study, ref)}")
        if records := read_log(study.folder):
            print(text_table([COLUMNS, *(_line(number, record) for number, record in enumerate(records, 1))]))


def _imported(study: Study, ref: DictionaryRef) -> str:
    """Return where a dictionary is from, for its line; nothing for one that was made here or cannot be read."""
    with suppress(DifflexError):
        if origin := read_hub_origin(study.dictionary(*ref)):
            return f", pulled from {origin.repository} at {origin.commit[:12]}"
        if imported := read_config(study.dictionary(*ref)).imported:
            return f", imported {imported}"
    return ""


def _line(number: int, record: CommandRecord) -> tuple[str, ...]:
    finished = record.finished[:16].replace("T", " ") if record.finished else ""
    state, seconds = ("begun", "") if record.seconds is None else ("done", f"{record.seconds:.0f}")
    return str(number), state, finished, seconds, record.verb, " ".join(record.settings)


CONTROL = "untrained"
"""The folder in a study where recipes put that of an untrained model."""


@final
@dataclass(frozen=True, kw_only=True)
class ReportCommand(Command):
    """Write the report of a study: one page with tables, figures and claims, and a CSV file for every figure."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of the study."""
    control: Annotated[
        Path | None, arg(metavar="STUDY", help_behavior_hint="(default: STUDY/untrained, where recipes put it)")
    ] = None
    """A study of the same model untrained, whose features are compared with those of this one."""

    def __call__(self) -> list[Path]:
        from difflex.report import write_report

        study = Study.open(self.study)
        inside = study.folder / CONTROL
        control = self.control or (inside if (inside / "study.json").is_file() else None)
        paths = write_report(study, control and Study.open(control), command_words)
        print(f"{paths[0]}: the report, with {len(paths) - 1} files in {paths[0].parent / 'report'}")
        return paths


@final
@dataclass(frozen=True, kw_only=True)
class CompareCommand(Command):
    """Compare two studies, or with --dictionary two dictionaries of one study.

    Of studies: settings, block roles, dictionaries and their metrics, detected concepts, explanations, steering.
    """

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """The folder of a study."""
    other: Annotated[Positional[Path | None], arg(metavar="OTHER", help_behavior_hint="(needed without --dictionary)")] = None
    """The folder of a second study, of the same model or not; differences are its values less those of the first."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="NAME NAME", help_behavior_hint="(default: compare studies)")] = ()
    """Two dictionaries of the study, compared in a table: SITE/LABEL of each."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("compare.html")
    """The file of the page."""

    def __call__(self) -> list[Path]:
        from difflex.report import read_facts
        from difflex.report.comparison import compare, describe, describe_dictionaries, write_comparison

        names = [name for names in self.dictionary for name in names.split(",") if name]
        if (len(names), self.other is None) not in ((0, False), (2, True)):
            raise BadInput(
                f"Studies: {1 + (self.other is not None)}, dictionaries: {len(names)}: these cannot be compared. Name two "
                f"studies, or one and two of its dictionaries: difflex compare {self.study} --dictionary SITE/LABEL SITE/LABEL. "
                f"difflex status {self.study} lists them."
            )
        if self.other is None:
            study = Study.open(self.study)
            first, second = map(study.find_dictionary, names)
            print(describe_dictionaries(read_facts(study), first, second))
            return []
        check_output(self.out)
        comparison = compare(*(read_facts(Study.open(folder)) for folder in (self.study, self.other)))
        print(describe(comparison))
        write_comparison(comparison, self.out)
        print(f"{self.out}: the page")
        return [self.out]


POSITIONAL = get_args(Positional[int])[1:]
"""What marks a field whose value is given without its name."""


def command_words(record: CommandRecord, study: str = "STUDY") -> list[str]:
    """Return the words of the command line of a record; defaults are left out, and `study` stands for the study's folder."""
    command: type[Any] = verb_class(record.verb)
    hints = get_type_hints(command, include_extras=True)
    positional, flags = [], []
    for field in fields(command):
        if field.name not in record.flags:
            continue
        value, hint = record.flags[field.name], hints[field.name]
        if any(mark in POSITIONAL for mark in _marks(hint)):
            positional += _value_words(value, hint, study)
        elif not _is_default(value, field):
            flags += [f"--{field.name.replace('_', '-')}", *([] if value is True else _value_words(value, hint, study))]
    return [record.verb, *positional, *flags]


def _marks(hint: object) -> Iterator[object]:
    """Yield the metadata of `Annotated` types, however deep they are nested."""
    yield from getattr(hint, "__metadata__", ())
    for inner in (getattr(hint, "__origin__", None), *get_args(hint)):
        if inner is not None and inner is not hint and not isinstance(inner, str):
            yield from _marks(inner)


def _value_words(value: Json, hint: object, study: str) -> list[str]:
    """Return the words that a flag parses to `value`, by the rule of its type if it has one."""
    rule = next((mark for mark in _marks(hint) if isinstance(mark, PrimitiveConstructorSpec)), None)
    if rule is not None and not isinstance(value, str):
        with suppress(TypeError, ValueError, AttributeError, LookupError):  # a value that was changed by hand is written as it is
            return rule.str_from_instance(tuple(value) if isinstance(value, list) else value)
    return [_word(item, study) for item in (value if isinstance(value, list) else [value])]


def _word(value: Json, study: str) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return study if text == "." else f"{study}/{text[2:]}" if text.startswith("./") else text


def _is_default(value: Json, field: "Field[Any]") -> bool:
    default = field.default
    if isinstance(default, range):
        return value == f"{default.start}:{default.stop}"
    return default is not MISSING and value == (list(default) if isinstance(default, tuple) else default)
