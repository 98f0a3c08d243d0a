"""accelerate between two tests."""

from accelerate.state import AcceleratorState, GradientState, PartialState


def forget() -> None:
    """Empties accelerate's state, which it keeps in class attributes."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
