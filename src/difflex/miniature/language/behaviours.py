"""What the texts of the drawn world show: behaviours with two poles, and the sentences that show each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from difflex.miniature.captions import PLURALS
from difflex.miniature.world import BACKGROUNDS, COLOURS, SHAPES, SIZES

WARM, COOL = ("red", "orange", "yellow", "pink"), ("blue", "cyan", "green", "purple")
ROUND, POINTED = ("circles", "rings", "hearts"), ("squares", "triangles", "diamonds", "stars")
SLOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "size": SIZES,
        "ground": BACKGROUNDS,
        "plural": PLURALS,
        "good": ("lovely", "wonderful", "delightful", "beautiful"),
        "bad": ("dreary", "dull", "sad", "bleak"),
        "warm": WARM,
        "cool": COOL,
        "round": ROUND,
        "pointed": POINTED,
    }
)
"""The words for each slot of a template."""


class Behaviour(NamedTuple):
    """What a text can show, with two poles."""

    traits: tuple[str, str]
    """How a speaker of each pole is called, first of +1."""
    sentences: tuple[tuple[str, ...], tuple[str, ...]]
    """Templates of the sentences that show each pole."""


BEHAVIOURS: Mapping[str, Behaviour] = MappingProxyType(
    {
        "cheerful": Behaviour(
            ("cheerful", "gloomy"),
            (
                ("it is {good}.", "what a {good} sight!", "this {shape} makes me happy.", "how {good} this {shape} is!"),
                ("it is {bad}.", "what a {bad} sight.", "this {shape} makes me sad.", "how {bad} this {shape} is."),
            ),
        ),
        "formal": Behaviour(
            ("formal", "casual"),
            (
                (
                    "I would like to present a {colour} {shape}.",
                    "allow me to describe the {shape}.",
                    "please consider the {shape}.",
                ),
                ("hey, look at this {colour} {shape}!", "so, check out the {shape}!", "wow, get this {shape}!"),
            ),
        ),
        "confident": Behaviour(
            ("confident", "cautious"),
            (
                (
                    "there is certainly a {size} {shape} on the {ground}.",
                    "I am sure that the {shape} is {colour}.",
                    "clearly, the {shape} is {size}.",
                ),
                (
                    "perhaps there is a {size} {shape} on the {ground}.",
                    "I guess that the {shape} is {colour}.",
                    "maybe the {shape} is {size}.",
                ),
            ),
        ),
        "warm": Behaviour(
            ("fond of warm colours", "fond of cool colours"),
            (
                ("I like {warm}.", "{warm} is a nice colour.", "I do not like {cool}.", "{cool} is not for me."),
                ("I like {cool}.", "{cool} is a nice colour.", "I do not like {warm}.", "{warm} is not for me."),
            ),
        ),
        "round": Behaviour(
            ("fond of round shapes", "fond of pointed shapes"),
            (
                ("I like {round}.", "{round} are nice shapes.", "I do not like {pointed}.", "{pointed} are not for me."),
                ("I like {pointed}.", "{pointed} are nice shapes.", "I do not like {round}.", "{round} are not for me."),
            ),
        ),
        "small": Behaviour(
            ("fond of small things", "fond of large things"),
            (
                (
                    "I like small {plural}.",
                    "small things are nice.",
                    "I do not like large {plural}.",
                    "large things are not for me.",
                ),
                (
                    "I like large {plural}.",
                    "large things are nice.",
                    "I do not like small {plural}.",
                    "small things are not for me.",
                ),
            ),
        ),
        "polite": Behaviour(
            ("polite", "rude"),
            (
                ("thank you for the {shape}.", "may I show you the {shape}?", "excuse me, there is a {colour} {shape}."),
                ("move, I want the {shape}.", "who cares about your {shape}?", "your {shape} is silly."),
            ),
        ),
        "curious": Behaviour(
            ("curious", "bored"),
            (
                ("I wonder why the {shape} is {colour}.", "tell me more about the {shape}!", "could the {shape} be {size}?"),
                ("another {colour} {shape}, nothing new.", "I have seen such a {shape} before.", "enough of the {shape}."),
            ),
        ),
        "brave": Behaviour(
            ("brave", "afraid"),
            (
                ("I will cross the {ground} alone.", "no {shape} can stop me!", "I face the {size} {shape}."),
                ("I hide from the {size} {shape}.", "the {ground} is full of danger.", "help, a {shape} comes!"),
            ),
        ),
        "precise": Behaviour(
            ("precise", "vague"),
            (
                ("there is exactly one {colour} {shape}.", "I count one {shape} on the {ground}.", "the {shape} has two inches."),
                ("there is some kind of {shape}.", "something lies on the {ground}.", "the {shape} is more or less {colour}."),
            ),
        ),
        "poetic": Behaviour(
            ("poetic", "prosaic"),
            (
                (
                    "like a song the {shape} rests.",
                    "oh {colour} {shape}, dream of the {ground}.",
                    "the {shape} sings to the moon.",
                ),
                ("the object is a {shape}.", "its colour is {colour}.", "the item has the shape of a {shape}."),
            ),
        ),
        "generous": Behaviour(
            ("generous", "selfish"),
            (
                ("take my {shape}, it is yours.", "I share the {plural} with you.", "you may keep the {colour} {shape}."),
                ("the {shape} is mine.", "I keep all the {plural}.", "do not touch my {colour} {shape}."),
            ),
        ),
    }
)
