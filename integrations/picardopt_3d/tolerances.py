"""Tolerances as recipes, YAML files and command lines give them: one text form, one parser.

| text | meaning |
| --- | --- |
| `0`, `1e-6`, `inf` | a fixed number; 0 is exact |
| `drift`, `drift:0.2,0.05` | noise, drift of `picardopt.DriftTolerance` |
| `step-relative`, `step-relative:2,0.2,0.9` | factor, distance, decay of `picardopt.StepRelativeTolerance` |
| `adaptive`, `adaptive:5e-6,0.9,median` | initial, decay, statistic of `picardopt.AdaptiveTolerance` (the paper's) |

Numbers that are left out, at the end or between two commas, are the recipe's if it has a tolerance of the same kind,
else the defaults of the class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.constructors import PrimitiveConstructorSpec

from picardopt import AdaptiveTolerance, DriftTolerance, StepRelativeTolerance


@dataclass(frozen=True)
class FixedTol:
    """One number for all sweeps.

    Attributes:
        value: Largest accepted squared distance per parameter, from 0 (exact) to infinity.
    """

    kind: ClassVar[str] = "fixed"
    value: float

    def __post_init__(self) -> None:
        """Checks the number.

        Raises:
            ValueError: It is negative or NaN.
        """
        if not self.value >= 0:
            raise ValueError(f"tolerance={self.value:g}: {_REMEDY}")

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class DriftTol:
    """`picardopt.DriftTolerance`; None stands for the recipe's number, or the default.

    Attributes:
        noise: Accepted variance of a drift's error, as a share of the variance between neighbouring steps.
        drift: Accepted error of a drift that has little variance, as a share of its length.
    """

    kind: ClassVar[str] = "drift"
    noise: float | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        """Checks the numbers, by building the tolerance."""
        build_tolerance(self)

    def __str__(self) -> str:
        return _text_of(self)


@dataclass(frozen=True)
class StepRelativeTol:
    """`picardopt.StepRelativeTolerance`; None stands for the recipe's number, or the default.

    Attributes:
        factor: Accepted residual in units of the mean squared step length.
        distance: Accepted residual as a fraction of the squared distance from the head.
        decay: Weight of the past in the running mean.
    """

    kind: ClassVar[str] = "step-relative"
    factor: float | None = None
    distance: float | None = None
    decay: float | None = None

    def __post_init__(self) -> None:
        """Checks the numbers, by building the tolerance."""
        build_tolerance(self)

    def __str__(self) -> str:
        return _text_of(self)


@dataclass(frozen=True)
class AdaptiveTol:
    """`picardopt.AdaptiveTolerance`, the paper's rule; None stands for the recipe's number, or the default.

    Attributes:
        initial: The first tolerance, squared distance per parameter.
        decay: The paper's gamma.
        statistic: What it averages, the paper's M.
    """

    kind: ClassVar[str] = "adaptive"
    initial: float | None = None
    decay: float | None = None
    statistic: Literal["median", "mean"] | None = None

    def __post_init__(self) -> None:
        """Checks the numbers, by building the tolerance."""
        build_tolerance(self)

    def __str__(self) -> str:
        return _text_of(self)


TolConfig = FixedTol | DriftTol | StepRelativeTol | AdaptiveTol
_WithNumbers = DriftTol | StepRelativeTol | AdaptiveTol

_KINDS: dict[str, type[_WithNumbers]] = {
    "drift": DriftTol,
    "step-relative": StepRelativeTol,
    "adaptive": AdaptiveTol,
}
_REMEDY = (
    'give 0 (exact), a positive number, inf, "drift", "step-relative" or "adaptive", the last three with their numbers '
    'if you like: "drift:0.2,0.05" (noise, drift), "step-relative:2,0.2" (factor, distance, decay), '
    '"adaptive:5e-6,0.9,median" (initial, decay, statistic)'
)


def parse_tolerance(given: Any) -> TolConfig:
    """Reads a tolerance.

    Args:
        given: A number, a text as the table at the top of this module has it, or a tolerance, which is returned as
            it is.

    Raises:
        ValueError: It is none of these, or a number is out of range.
    """
    if isinstance(given, TolConfig):
        return given
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise ValueError(f"tolerance={given!r}: {_REMEDY}")
    name, colon, numbers = str(given).partition(":")
    if name in _KINDS:
        try:
            return _with_numbers(_KINDS[name], numbers.split(",") if colon else [])
        except (ValueError, TypeError) as error:
            raise ValueError(f"tolerance={given}: {error}; {_REMEDY}") from None
    try:
        value = float(given)
    except ValueError:
        raise ValueError(f"tolerance={given}: {_REMEDY}") from None
    return FixedTol(value)


def build_tolerance(
    config: TolConfig | None,
    recipe: TolConfig | None = None,
    losses: Sequence[int] | None = None,
) -> float | DriftTolerance | StepRelativeTolerance | AdaptiveTolerance | None:
    """Builds what `ParallelPicardOptimizer` takes as its tolerance.

    Args:
        config: What the run asks for; None: the recipe's.
        recipe: Gives the numbers that `config` leaves out, if it is of the same kind.
        losses: How many parameter groups each loss has, where there are several; `DriftTolerance` judges them one by
            one.

    Returns:
        None for the optimizer's own default, which is for one loss.
    """
    config = recipe if config is None else config
    if config is None:
        return None if losses is None else DriftTolerance(losses=losses)
    if isinstance(config, FixedTol):
        return config.value
    numbers = _given(recipe) if type(recipe) is type(config) else {}
    numbers |= _given(config)
    if isinstance(config, DriftTol):
        return DriftTolerance(**numbers, losses=losses)
    if isinstance(config, AdaptiveTol):
        return AdaptiveTolerance(**numbers)
    return StepRelativeTolerance(**numbers)


def _given(config: Any) -> dict[str, Any]:
    """The numbers that are not left out."""
    return {name: value for name, value in vars(config).items() if value is not None}


def _with_numbers(kind: type[Any], texts: list[str]) -> _WithNumbers:
    """Fills a kind's numbers in their order; an empty text leaves one out."""
    names = [item.name for item in dataclasses.fields(kind)]
    if len(texts) > len(names):
        raise ValueError(f"at most {len(names)} numbers: {', '.join(names)}")
    given = {name: text.strip() for name, text in zip(names, texts, strict=False) if text.strip()}
    filled: _WithNumbers = kind(
        **{name: text if name == "statistic" else float(text) for name, text in given.items()}
    )
    return filled


def _text_of(config: Any) -> str:
    """The text that `parse_tolerance` reads as this tolerance."""
    texts = ["" if value is None else str(value) for value in vars(config).values()]
    while texts and not texts[-1]:
        texts.pop()
    return f"{config.kind}:{','.join(texts)}" if texts else str(config.kind)


ToleranceOption = Annotated[
    TolConfig | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="0|NUMBER|drift[:N,D]|step-relative[:F,D]|adaptive[:E,G,M]",
        instance_from_str=lambda texts: None if texts[0] == "None" else parse_tolerance(texts[0]),
        is_instance=lambda value: value is None or isinstance(value, TolConfig),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""The type of a command-line option that is a tolerance, or None."""
