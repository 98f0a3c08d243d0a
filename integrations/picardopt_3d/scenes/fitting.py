"""Trains one field to look like another, whatever kinds they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from picardopt_3d.scenes.field import Field

_STEPS, _POINTS, _RATE = 400, 4096, 0.01


def fit(field: Field, other: Field) -> None:
    """Trains a field to match another one's opacity, colour (where it is opaque) and background at random points.

    The field is evaluated as at step 0: levels of an encoding that are added later keep their initial values. The
    points are drawn from torch's global CPU generator.

    Args:
        field: The field to train; on the device of the other one.
        other: The field to match.
    """
    parameters = [p for p in field.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, _RATE, betas=(0.9, 0.99), eps=1e-15)
    length = 2 * field.radius / field.samples
    with torch.enable_grad():
        for step in range(_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _RATE * (1 - step / _STEPS)
            directions, points = _draw(min(field.radius, other.radius))
            directions, points = directions.to(other.device), points.to(other.device)
            with torch.no_grad():
                wanted, behind = other.query(points, None, False), other.background(directions)
                opacity = _opacity(wanted.density, length)
            found = field.query(points, 0, False)
            loss = F.mse_loss(_opacity(found.density, length), opacity)
            loss = loss + (opacity * (found.colour - wanted.colour).square().mean(0)).mean()
            loss = loss + (field.background(directions) - behind).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _opacity(density: Tensor, length: float) -> Tensor:
    """Returns the opacity of a segment of a ray."""
    return -torch.expm1(-density * length)


def _draw(radius: float) -> tuple[Tensor, Tensor]:
    """Draws unit directions, and points uniform in a ball, each `[count, 3]`."""
    directions = F.normalize(torch.randn(_POINTS, 3), dim=1)
    return directions, radius * torch.rand(_POINTS, 1).pow(1 / 3) * directions
