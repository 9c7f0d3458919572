"""What was studied, what is done of it, and how to do it again."""

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from markupsafe import Markup

from difflex.report.drawing import element
from difflex.report.facts import StudyFacts
from difflex.report.sections import ReportSection
from difflex.report.telling import count
from difflex.study import CommandRecord

__all__ = ["Spell", "again", "overview", "plainly"]

Spell = Callable[[CommandRecord], Sequence[str]]
"""From an entry of the diary to the words that the command is given by."""


def overview(facts: StudyFacts) -> ReportSection:
    """The section about the study itself: the model, and which stations are done."""
    study = facts.study
    seconds = sum(entry.seconds or 0 for entry in facts.diary)
    told = {
        "Model": study.model,
        "Revision": study.revision or "none named",
        "Study": facts.name,
        "Begun": f"{_day(facts.begun)}, with difflex {study.difflex}",
        "Latest file": _day(facts.latest),
        **({"Time its commands took": _duration(seconds)} if seconds else {}),
    }
    entries = [element("div", element("dt", name), element("dd", value)) for name, value in told.items()]
    return ReportSection(
        name="study",
        title="What was studied",
        lead="",
        body=element("dl", *entries, class_="told") + _stations(facts) + _troubles(facts),
    )


def again(facts: StudyFacts, spell: Spell) -> ReportSection:
    """The section about how to run the study again."""
    whole = ["difflex", "run", facts.recipe or "RECIPE", "--out", "STUDY"]
    if not facts.diary:
        lead = "This study has no diary: its commands were given one by one, not by a recipe. What each dictionary was made "
        "with is in its config.json."
        return ReportSection(name="again", title="How to run it again", lead=lead, body=_code([["difflex", "report", "STUDY"]]))
    lead = (
        "One command runs the recipe: what is done is left out, what a change made useless is made again. These are its commands."
    )
    commands = element("ol", *(_command(entry, spell) for entry in facts.diary if entry.verb != "report"), class_="commands")
    return ReportSection(name="again", title="How to run it again", lead=lead, body=_code([whole]) + commands)


def plainly(entry: CommandRecord) -> list[str]:
    """The words of an entry where nobody knows the flags of its verb: the values that say something, by name."""
    told = [
        f"{name}={value}" for name, value in entry.flags.items() if value not in (None, False, [], {}) and "SHA-256" not in name
    ]
    return [entry.verb, *told]


def _stations(facts: StudyFacts) -> Markup:
    """A line for each station: how far it is, and the verb that goes on where it is not done."""
    rows = sum(store.rows for store in facts.stores)
    waiting = sum(not store.complete for store in facts.stores)
    trained, evaluated = len(facts.dictionaries), len(facts.evaluated)
    effects = sum(evaluation.effect is not None for _, evaluation in facts.evaluated)
    held = len({str(each.matches.site) + each.matches.label for each in facts.judged if each.is_trained})
    sites = ", ".join(f"{store.site} ({store.rows:,})" for store in facts.stores)
    harvested = f"{count(rows, 'token')} at {count(len(facts.stores), 'site')}: {sites}" + (
        f"; {waiting} not finished" if waiting else ""
    )
    lines = [
        ("Activations", bool(rows) and not waiting, harvested if facts.stores else "none", "harvest"),
        ("Dictionaries", trained > 0, count(trained, "dictionary", "dictionaries"), "train, difflex itda"),
        ("Evaluation", 0 < evaluated == trained, f"{evaluated} of {trained} evaluated", "evaluate"),
        ("Effect on the model", 0 < effects == trained, f"{effects} of {trained} measured", "evaluate --effect"),
        ("Known concepts", held > 0, f"{count(held, 'dictionary', 'dictionaries')} of {trained} compared", "concepts"),
        ("Anatomy", facts.anatomy is not None, _anatomy(facts), "anatomy"),
    ]
    items = [
        element(
            "li",
            element("span", "✓" if done else "○", aria_hidden="true", class_="sign"),
            element("span", element("b", name), " ", said, *(() if done else (" · ", element("code", f"difflex {verb}")))),
            class_="done" if done else "open",
        )
        for name, done, said, verb in lines
    ]
    return element("ul", *items, class_="stations")


def _anatomy(facts: StudyFacts) -> str:
    found = facts.anatomy
    return "not measured" if found is None else f"norms of {count(len(found.norms), 'site')}, spectra of {len(found.shapes)}"


def _troubles(facts: StudyFacts) -> Markup:
    """What is there but is not shown."""
    if not facts.troubles:
        return Markup("")
    items = [element("li", trouble) for trouble in facts.troubles]
    return element("aside", element("h3", "Left out, because it cannot be trusted"), element("ul", *items), class_="troubles")


def _command(entry: CommandRecord, spell: Spell) -> Markup:
    return element("li", element("code", f"difflex {shlex.join(spell(entry))}"), " ", element("span", _state(entry)))


def _state(entry: CommandRecord) -> str:
    """When a command was done, and what it took."""
    if entry.seconds is None:
        return "begun, not done"
    when = f" {_day(datetime.fromisoformat(entry.done).astimezone(UTC))}," if entry.done else ""
    took, told = count(round(entry.seconds), "second"), _duration(entry.seconds)
    return f"done{when} in {took}{'' if took == told else f' ({told})'}"


def _code(lines: Sequence[Sequence[str]]) -> Markup:
    return element("pre", element("code", "\n".join(map(shlex.join, lines))), tabindex="0")


def _day(when: datetime | None) -> str:
    return "unknown" if when is None else f"{when:%-d %B %Y, %H:%M} UTC"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return (
        count(round(seconds), "second")
        if seconds < 120
        else f"{minutes:.0f} minutes"
        if minutes < 120
        else f"{minutes / 60:.1f} hours"
    )
