"""Published optimizers: how the tests make each of them, run it, and write docs/optimizers.md.

python -m tests.helpers.optimizer_table        # runs all of them and writes the table anew
"""

import contextlib
import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from tests.helpers.problems import Problem, draw, quantize
from tests.helpers.versions import needs_package

# Distribution on PyPI -> modules to look in, with the names that count (None: all of the package's own).
PACKAGES: dict[str, dict[str, re.Pattern[str] | None]] = {
    "torch": {"torch.optim": re.compile("Muon|Adafactor")},
    "torch-optimizer": {"torch_optimizer": None},
    "pytorch-optimizer": {"pytorch_optimizer": None},
    "adam-atan2-pytorch": {"adam_atan2_pytorch": None},
    "adan-pytorch": {"adan_pytorch": None},
    "apollo-torch": {"apollo_torch": re.compile("APOLLOAdamW")},
    "bitsandbytes": {"bitsandbytes.optim": re.compile(".*8bit")},
    "came-pytorch": {"came_pytorch": None},
    "dadaptation": {"dadaptation": None},
    "galore-torch": {"galore_torch": None},
    "heavyball": {"heavyball": re.compile("(?!.*Base$).*")},
    "lion-pytorch": {"lion_pytorch": None, "lion_pytorch.cautious_lion": re.compile("Lion")},
    "muon-optimizer": {"muon": None},
    "prodigy-plus-schedule-free": {"prodigyplus": re.compile("Prodigy.*")},
    "prodigyopt": {"prodigyopt": None},
    "schedulefree": {"schedulefree": None},
    "torch-optimi": {"optimi": None},
    "torch-sgld": {"torch_sgld": None},
    "transformers": {"transformers.optimization": re.compile("Adafactor")},
}
needs_all = needs_package(
    *dict.fromkeys(m.partition(".")[0] for modules in PACKAGES.values() for m in modules)
)
"""Skips a test of all of them where some are not installed."""
# These take longest; each is one of a package's many, all of which run in the slow suite.
QUICK = re.compile(r"(?!heavyball\.).*|heavyball\.(AdamW|SOAP|Muon|SFAdamW|PSGDKron)")


def shapes() -> Problem:
    """A convolution and two quantized layers: parameters of four, one and two dimensions."""
    kernel, bias = draw((3, 2, 3, 3), 21), draw((3,), 22)
    table, mix = draw((6, 12), 23), draw((2, 6), 24)

    def loss(step: int) -> Tensor:
        x, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2)
        hidden = torch.tanh(F.conv2d(x, quantize(kernel) / 2, quantize(bias)))
        hidden = torch.tanh(hidden.flatten(1) @ quantize(table).T / 2)
        return (hidden @ quantize(mix).T / 2 - y).square().mean()

    return Problem([kernel, bias, table, mix], loss)


def matrices() -> Problem:
    """The same without what is not a matrix, for optimizers that take nothing else."""
    table, mix = draw((6, 12), 23), draw((2, 6), 24)

    def loss(step: int) -> Tensor:
        x, y = torch.randn(3, 12), torch.randn(3, 2)
        return (torch.tanh(x @ quantize(table).T / 2) @ quantize(mix).T / 2 - y).square().mean()

    return Problem([table, mix], loss)


# -- how each is made, where its defaults would do next to nothing in ten steps, or it wants more than parameters


Parameters = list[nn.Parameter]
Make = Callable[[Any, Parameters], Optimizer]


def with_options(**options: Any) -> Make:
    return lambda kind, parameters: kind(parameters, **options)


def of_module(**options: Any) -> Make:
    """Of a module with these parameters."""

    def make(kind: Any, parameters: Parameters) -> Optimizer:
        module = nn.Module()
        for index, parameter in enumerate(parameters):
            module.register_parameter(f"weight{index}", parameter)
        return kind(module, **options)

    return make


def around_adam(**options: Any) -> Make:
    """Around an Adam with momentum and a step count of its own."""
    return lambda kind, parameters: kind(torch.optim.Adam(parameters, lr=1e-3), **options)


def of_groups(by: Callable[[Tensor], bool], yes: dict[str, Any], no: dict[str, Any]) -> Make:
    """Of two groups: the parameters for which `by` holds, and the others."""

    def make(kind: Any, parameters: Parameters) -> Optimizer:
        split = [[p for p in parameters if by(p) is wanted] for wanted in (True, False)]
        groups = zip(split, (yes, no), strict=True)
        return kind([{"params": own, **options} for own, options in groups if own])

    return make


def low_rank(**options: Any) -> Make:
    return of_groups(lambda p: p.dim() == 2, {"rank": 2, "lr": 1e-3, **options}, {"lr": 1e-3})


def muon_groups(most: int) -> Make:
    """The package's flag on parameters of 2 .. `most` dimensions."""
    options = [{"lr": 1e-3, "use_muon": flag} for flag in (True, False)]
    return of_groups(lambda p: 2 <= p.dim() <= most, *options)


def in_train_mode(make: Make) -> Make:
    def made(kind: Any, parameters: Parameters) -> Optimizer:
        optimizer = make(kind, parameters)
        optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return made


def two_lists(kind: Any, parameters: Parameters) -> Optimizer:
    return kind([p for p in parameters if p.dim() == 2], parameters, lr=1e-3)


def of_rho(kind: Any, parameters: Parameters) -> Optimizer:
    """Around an Adam, with a schedule of the radius."""
    package, adam = imported("pytorch_optimizer"), torch.optim.Adam(parameters, lr=1e-3)
    rate = package.LinearScheduler(adam, t_max=9, max_lr=1e-3)
    radius = package.ProportionScheduler(
        rate, max_lr=1e-3, min_lr=0.0, max_value=2.0, min_value=2.0
    )
    return kind(parameters, adam, nn.Module(), radius)


def eager(kind: Any, parameters: Parameters) -> Optimizer:
    """heavyball without torch.compile, which would need a compiler and minutes."""
    import heavyball

    heavyball.utils.compile_mode = None
    if kind.__name__ == "SplitOpt":
        specs = [{"params": parameters[:2]}, {"params": parameters[2:]}]
        return kind(
            [{**specs[0], "optimizer": heavyball.AdamW}, {**specs[1], "optimizer": heavyball.SOAP}]
        )
    if kind.__name__ == "SAMWrapper":
        return kind(parameters)
    return kind(parameters, lr=1e-3)


MAKE: list[tuple[str, Make]] = [
    (r"torch\.optim\.Muon", with_options(lr=1e-3)),
    (r"torch_optimizer\.(Adafactor|Shampoo)", with_options(lr=1e-3)),
    (r"torch_optimizer\.A2Grad.*", with_options(beta=50.0)),
    (r"torch_optimizer\.Lookahead", around_adam(k=3)),
    (r"pytorch_optimizer\.(AdaLOMO|LOMO|AdamMini)", of_module(lr=1e-3)),
    (r"pytorch_optimizer\.(AdaGO|AdaMuon|DistributedMuon|Muon|MuonClip|NorMuon)", muon_groups(4)),
    (r"pytorch_optimizer\.(GaLore|Fira)", low_rank(update_proj_gap=3, scale=1.0, projection_type="std")),
    (r"pytorch_optimizer\.APOLLO", low_rank(update_proj_gap=3, scale=1.0, projection_type="random")),
    (r"pytorch_optimizer\.A2Grad", with_options(beta=50.0)),
    (r"pytorch_optimizer\.(Alice)", with_options(lr=1e-3, rank=2, leading_basis=1, update_interval=3)),
    (r"pytorch_optimizer\.AdaShift", with_options(lr=1e-3, keep_num=3)),
    (r"pytorch_optimizer\.EXAdam", with_options(lr=2e-4)),
    (r"pytorch_optimizer\.Conda", with_options(lr=1e-3, update_proj_gap=3)),
    (r"pytorch_optimizer\.DAdapt.*", with_options(d0=1e-3)),
    (r"pytorch_optimizer\.(SOAP|DASH)", with_options(lr=1e-3, precondition_frequency=3)),
    (r"pytorch_optimizer\.ScalableShampoo", with_options(
        lr=1e-3, start_preconditioning_step=2, preconditioning_compute_steps=2)),
    (r"pytorch_optimizer\.SPAM", with_options(lr=1e-3, update_proj_gap=4, density=0.5)),
    (r"pytorch_optimizer\.StableSPAM", with_options(lr=1e-3, update_proj_gap=4, t_max=9)),
    (r"pytorch_optimizer\.(Ranger)", with_options(lr=1e-3, k=3)),
    (r"pytorch_optimizer\.Ranger21", with_options(
        lr=1e-3, num_iterations=30, num_warm_up_iterations=4, num_warm_down_iterations=8,
        lookahead_merge_time=3)),
    (r"pytorch_optimizer\.SaRA", with_options(lr=1e-3, threshold=0.5, progressive_iter=4)),
    (r"pytorch_optimizer\.(Prodigy)", with_options(d0=1e-3)),
    (r"pytorch_optimizer\.Lookahead", around_adam(k=3)),
    (r"pytorch_optimizer\.TRAC", around_adam(s_prev=1e-2)),
    (r"pytorch_optimizer\.ScheduleFreeWrapper", in_train_mode(around_adam())),
    (r"pytorch_optimizer\.(Magma|OrthoGrad|PCGrad|SafeFP16Optimizer)", around_adam()),
    (r"pytorch_optimizer\.(SAM|LookSAM|FriendlySAM)", with_options(base_optimizer=torch.optim.Adam, lr=1e-3)),
    (r"pytorch_optimizer\.GSAM", of_rho),
    (r"pytorch_optimizer\.WSAM", lambda kind, parameters: kind(
        nn.Module(), parameters, torch.optim.Adam)),
    (r"pytorch_optimizer\.BSAM", with_options(num_data=10)),
    (r"adam_atan2_pytorch\.(MuonAdamAtan2|PolarAdamAtan2)", two_lists),
    (r"apollo_torch\.Q?APOLLOAdamW", low_rank(
        update_proj_gap=3, scale=1.0, proj="random", proj_type="std", scale_type="channel")),
    (r"galore_torch\..*Adafactor", low_rank(update_proj_gap=3, scale=1.0, proj_type="std")),
    (r"galore_torch\.GaLoreAdamW.*", low_rank(update_proj_gap=3, scale=1.0, proj_type="std")),
    (r"bitsandbytes\.optim\.(LARS|SGD)8bit", with_options(lr=1e-3, momentum=0.9, min_8bit_size=16)),
    (r"bitsandbytes\.optim\..*", with_options(lr=1e-3, min_8bit_size=16)),
    (r"dadaptation\..*", with_options(d0=1e-3)),
    (r"heavyball\..*", eager),
    (r"muon\..*WithAuxAdam", muon_groups(2)),
    (r"optimi\.Ranger", with_options(lr=1e-3, k=3)),
    (r"prodigyopt\..*", with_options(d0=1e-3)),
    (r"prodigyplus\..*", with_options(d0=1e-3)),
    (r"schedulefree\.\w+(Free|Paper|Reference)", in_train_mode(with_options(lr=1e-3))),
    (r"transformers.*Adafactor", with_options(lr=1e-3, relative_step=False)),
    (r".*", with_options(lr=1e-3)),
]  # fmt: skip
# These talk to other ranks, if only to find that there are none.
GROUPED = re.compile(r"pytorch_optimizer\.(DeMo|DistributedMuon)|muon\.Muon(WithAuxAdam)?")
# These take matrices only.
MATRICES = re.compile(
    r"torch\.optim\.Muon|torch_optimizer\.Adafactor|pytorch_optimizer\.(SpectralSphere|DeMo)|muon\.(SingleDevice)?Muon"
)


@dataclass(frozen=True)
class Entry:
    """One published optimizer.

    Attributes:
        package: Its distribution on PyPI.
        name: Module and class.
    """

    package: str
    name: str

    @property
    def kind(self) -> Any:
        module, _, name = self.name.rpartition(".")
        return getattr(imported(module), name)

    def problem(self) -> Problem:
        return matrices() if MATRICES.fullmatch(self.name) else shapes()

    def make(self, problem: Problem) -> Optimizer:
        torch.manual_seed(0)  # some draw as they are made
        make = next(make for pattern, make in MAKE if re.fullmatch(pattern, self.name))
        if make is MAKE[-1][1] and "lr" not in inspect.signature(self.kind.__init__).parameters:
            make = with_options()
        return make(self.kind, problem.groups)


@functools.cache
def imported(module: str) -> Any:
    """A package, without what its decorators compile: where that is in use, every optimizer looks for modules."""
    with warnings.catch_warnings():  # of their own imports
        warnings.simplefilter("ignore")
        found = importlib.import_module(module)
    torch.compiler.reset()
    return found


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every optimizer of those packages above that are installed, by what they export."""
    found = []
    for package, modules in PACKAGES.items():
        if not all(find_spec(module.partition(".")[0]) for module in modules):
            continue  # as in an environment of another torch: `needs_all` skips what wants them all
        seen = set()
        for module, pattern in modules.items():
            for name, kind in sorted(vars(imported(module)).items()):
                if (
                    inspect.isclass(kind)
                    and issubclass(kind, Optimizer)
                    and kind.__module__.partition(".")[0] == module.partition(".")[0]
                    and (pattern is None or pattern.fullmatch(name))
                    and kind not in seen
                ):
                    seen.add(kind)
                    found.append(Entry(package, f"{module}.{name}"))
    return tuple(found)


@contextlib.contextmanager
def surroundings(entry: Entry) -> Iterator[None]:
    """What an optimizer wants around it: its warnings ignored, perhaps a process group of one rank."""
    grouped = GROUPED.fullmatch(entry.name) is not None
    if grouped:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if grouped:
            dist.destroy_process_group()
