"""What a run is asked for: a text or a picture, and what it can be measured against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from picardopt_3d.guidance.choose import GuidanceConfig
from picardopt_3d.images import ReferenceImage, load_reference, prepare_reference
from picardopt_3d.prompts import ImagePrompt, TextPrompt
from picardopt_3d.world import COLOURS, SHAPES, parse_prompt
from picardopt_3d.world.yardstick import Yardstick

SHEET_ELEVATION = 20.0
"""Elevation of the contact sheet's views of a run from a text, degrees."""


@dataclass(frozen=True)
class TextTask:
    """An object that is described.

    Attributes:
        text: The description.
    """

    text: str

    @property
    def title(self) -> str:
        """What is asked for, in a few words."""
        return self.text

    @property
    def caption(self) -> str | None:
        """The text that pictures of the result can be held against."""
        return self.text

    @property
    def yardstick(self) -> Yardstick | None:
        """The true views, if the built-in world has them."""
        return yardstick_of(self.text)

    @property
    def sheet_view(self) -> tuple[float, float]:
        """Elevation and azimuth of the contact sheet's first view, degrees."""
        return SHEET_ELEVATION, 0.0

    def check(self) -> None:
        """Checks the text.

        Raises:
            ValueError: It is empty.
        """
        if not self.text.strip():
            raise ValueError('prompt is empty: describe an object, e.g. "a red cube"')

    def prepare(self, target: Path) -> str | None:
        """Prepares nothing: a text needs no file."""
        return None

    def reference(self, source: Path, distance: float, fov: float) -> ReferenceImage | None:
        """Returns None: there is no picture."""
        return None

    def prompt(
        self, guidance: GuidanceConfig, reference: ReferenceImage | None
    ) -> TextPrompt | ImagePrompt:
        """Returns what the guidance hears of the text."""
        return guidance.text_prompt(self.text)

    def caution(self, guidance: GuidanceConfig) -> str | None:
        """Returns a warning if the model was not trained on such texts, else None."""
        if guidance.source is not None or guidance.model == "exact" or self.yardstick is not None:
            return None
        return (
            f"{self.text!r} is nothing that the model that ships knows ({', '.join(SHAPES)}, in {', '.join(COLOURS)}): "
            "expect no likeness; --preset paper takes a published model"
        )


@dataclass(frozen=True)
class ImageTask:
    """An object of which there is a picture.

    Attributes:
        picture: The file that the user gave; a run reads its prepared copy.
        elevation: Of the camera that took it, degrees above the horizon.
        azimuth: Of that camera, degrees about the vertical axis.
        framed: Whether the picture is left as it is, not centred.
        cut_background: Whether a background of one colour is cut without rembg.
        subject: What it shows, if that is an object of the built-in world.
    """

    picture: Path
    elevation: float = 0.0
    azimuth: float = 0.0
    framed: bool = False
    cut_background: bool = False
    subject: str | None = None

    @property
    def title(self) -> str:
        """The picture's name."""
        return self.picture.name

    @property
    def caption(self) -> str | None:
        """The text that pictures of the result can be held against, if it is known."""
        return None if self.yardstick is None else self.yardstick.caption

    @property
    def yardstick(self) -> Yardstick | None:
        """The true views, if the built-in world has them."""
        return None if self.subject is None else yardstick_of(self.subject)

    @property
    def sheet_view(self) -> tuple[float, float]:
        """Elevation and azimuth of the camera that took the picture, degrees."""
        return self.elevation, self.azimuth

    def check(self) -> None:
        """Checks the camera and the subject.

        Raises:
            ValueError: There is no such camera, or the built-in world has no such subject.
        """
        if not -90 <= self.elevation <= 90:
            raise ValueError(f"elevation={self.elevation}: give an angle from -90 to 90 degrees")
        if self.subject is not None and self.yardstick is None:
            raise ValueError(
                f"subject={self.subject!r} is not of the built-in world: give a shape and a colour of it, such as "
                '"a red chair", or leave it out'
            )

    def prepare(self, target: Path) -> str | None:
        """Cuts the object out and writes the copy that every worker, and a resumed run, reads.

        Returns:
            A note for the user on what was cut; None if nothing was.
        """
        return prepare_reference(
            self.picture, target, framed=self.framed, cut_background=self.cut_background
        )

    def reference(self, source: Path, distance: float, fov: float) -> ReferenceImage | None:
        """Returns the prepared picture with the camera that took it.

        Args:
            source: The prepared copy.
            distance: Of the camera from the origin, scene units.
            fov: Its vertical field of view, degrees.
        """
        return load_reference(
            source,
            elevation=self.elevation,
            azimuth=self.azimuth,
            distance=distance,
            fov=fov,
            prepared=True,
        )

    def prompt(
        self, guidance: GuidanceConfig, reference: ReferenceImage | None
    ) -> TextPrompt | ImagePrompt:
        """Returns the picture as the guidance takes it.

        Raises:
            ValueError: There is no picture.
        """
        if reference is None:
            raise ValueError(
                "reference=None: a run from a picture needs the picture, `load_reference(path, ...)`"
            )
        return reference.prompt()

    def caution(self, guidance: GuidanceConfig) -> str | None:
        """Returns None: what a picture shows is not known."""
        return None


Task = TextTask | ImageTask


def yardstick_of(text: str) -> Yardstick | None:
    """Returns the true views of what a text names, or None if the built-in world has no such object."""
    subject = parse_prompt(text)
    return None if subject is None else Yardstick(subject)
