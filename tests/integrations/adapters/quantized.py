"""Models of which guesses can be right to the bit."""

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tests.helpers.problems import quantize


class Quantized(nn.Module):
    """Steps of a weight that change no forward pass, so that guesses can be right to the bit."""

    def forward(self, weight: Tensor) -> Tensor:
        return quantize(weight, 0.008)


def quantized(model: nn.Module) -> list[nn.Parameter]:
    """Quantizes the linear layers that are trained, freezes what else there is, and returns what is left to train."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    model.requires_grad_(False)
    for module in linear:
        parametrize.register_parametrization(module, "weight", Quantized())
        module.parametrizations.weight.original.requires_grad_(True)  # type: ignore[index,union-attr]
    return [p for p in model.parameters() if p.requires_grad]
