"""The subjects of the built-in world: eight shapes in eight colours, and the captions that name them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from picardopt_3d.world.shapes import SHAPES

BACKGROUND = (1.0, 1.0, 1.0)
"""The plain background behind every view, RGB."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.65, 0.15),
    "cyan": (0.10, 0.75, 0.85),
    "blue": (0.10, 0.20, 0.90),
    "purple": (0.55, 0.10, 0.75),
    "brown": (0.45, 0.25, 0.10),
}

CAPTIONS = (
    "a {colour} {shape}",
    "a 3d render of a {colour} {shape}",
    "a picture of a {colour} {shape}",
    "the {colour} {shape}",
    "a {shape} that is {colour}",
    "{colour} {shape}",
)
"""Ways to say the same thing; the first is the canonical one."""


@dataclass(frozen=True)
class Subject:
    """One object of the built-in world: a shape in a colour."""

    shape: str
    colour: str

    def __post_init__(self) -> None:
        """Checks the words.

        Raises:
            ValueError: The shape or the colour is not one of the built-in ones.
        """
        for name, value, known in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, COLOURS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: give one of {', '.join(known)}")

    @property
    def caption(self) -> str:
        """The canonical caption, such as "a red cube"."""
        return CAPTIONS[0].format(colour=self.colour, shape=self.shape)

    @property
    def captions(self) -> tuple[str, ...]:
        """Every caption that training uses for it."""
        return tuple(text.format(colour=self.colour, shape=self.shape) for text in CAPTIONS)


def all_subjects() -> tuple[Subject, ...]:
    """Returns every shape in every colour, shapes outermost."""
    return tuple(Subject(shape, colour) for shape in SHAPES for colour in COLOURS)


def held_out_subjects() -> tuple[Subject, ...]:
    """Returns eight subjects, each shape and colour once, that the shipped text models never saw in training."""
    colours = list(COLOURS)
    return tuple(
        Subject(shape, colours[(index + 3) % len(colours)]) for index, shape in enumerate(SHAPES)
    )


def parse_prompt(prompt: str) -> Subject | None:
    """Returns the subject that a prompt names, or None if it names none of the built-in world.

    A prompt names a subject if it contains exactly one built-in shape and exactly one built-in colour, each once.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    shapes = [word for word in words if word in SHAPES]
    colours = [word for word in words if word in COLOURS]
    if len(shapes) != 1 or len(colours) != 1:
        return None
    return Subject(shapes[0], colours[0])
