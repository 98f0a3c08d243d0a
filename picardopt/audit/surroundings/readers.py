"""Reads functions, objects, modules and containers, as keys and values, without running anything of theirs."""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from torch import nn

from picardopt.audit.surroundings.values import CONTAINERS, MISSING, MOST_ITEMS, Contents, is_plain

MOST_BYTES = 4096
"""Size of a NumPy array up to which its content is compared."""
_TABLES = ("_parameters", "_buffers", "_modules")
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Names:
    """Which globals and attributes a function's code, and functions inside it, name."""

    def __init__(self, code: types.CodeType) -> None:
        self.globals: dict[str, None] = {}
        self.attributes: dict[str, None] = {}
        for part in _with_nested(code):
            for instruction in dis.get_instructions(part):
                if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                    self.globals[instruction.argval] = None
                elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                    self.attributes[instruction.argval] = None


names_in = functools.lru_cache(maxsize=256)(Names)


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


class FunctionReader:
    """Reads a function's cells, the globals that its code names, its defaults and attributes."""

    def __init__(self, function: types.FunctionType) -> None:
        self._globals = tuple(names_in(function.__code__).globals)
        self.again(function)

    def again(self, function: types.FunctionType) -> Contents:
        """Reads a function that may have other defaults."""
        code, defaults = function.__code__, function.__defaults__ or ()
        optional = code.co_varnames[: code.co_argcount][-len(defaults) :] if defaults else ()
        self._keys = (
            *[("cell", name) for name in code.co_freevars],
            *[("global", name) for name in self._globals],
            *[("default", name) for name in optional],
            ("default", "keywords"),
            ("attribute", "attributes"),
        )
        return self(function)

    def __call__(self, function: types.FunctionType) -> Contents:
        """Reads a function of the same code."""
        found = function.__globals__
        return self._keys, [
            *[_content(cell) for cell in function.__closure__ or ()],
            *[found.get(name, MISSING) for name in self._globals],
            *(function.__defaults__ or ()),
            function.__kwdefaults__,
            vars(function) or None,
        ]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return MISSING


class ObjectReader:
    """Reads an object's attributes, in its ``__dict__`` and its slots, and those of its methods that are named.

    Args:
        value: The object.
        names: The methods' names; what these name counts too.
    """

    def __init__(self, value: object, names: Iterable[str] = ()) -> None:
        kinds = type(value).__mro__
        self._slots = {
            name: member
            for kind in kinds
            for name, member in vars(kind).items()
            if isinstance(member, types.MemberDescriptorType) and name != "__dict__"
        }
        self._methods = _methods(type(value), names)

    def __call__(self, value: object) -> Contents:
        """Reads an object of the same class."""
        fields = _fields(value)
        keys, values = [*fields, *self._slots, *self._methods], [*fields.values()]
        for member in self._slots.values():
            try:
                values.append(member.__get__(value))
            except AttributeError:  # not set
                values.append(MISSING)
        values += self._methods.values()
        return keys, values


def _methods(kind: type, names: Iterable[str]) -> dict[str, types.FunctionType]:
    """The methods of a class that are named, and those that they name."""
    found: dict[str, types.FunctionType] = {}
    todo = list(names)
    for name in todo:
        member = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        if isinstance(member, types.FunctionType) and name not in found:
            found[name] = member
            todo += names_in(member.__code__).attributes
    return found


def _fields(value: object) -> dict[Any, Any]:
    """An object's ``__dict__``, whatever its class makes of attributes."""
    try:
        fields = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return fields if type(fields) is dict else {}


class NamedReader:
    """Reads those attributes of a class, or of a module in the sense of ``import``, that are named."""

    def __init__(self, value: type | types.ModuleType, names: Iterable[str]) -> None:
        found = vars(value)
        self._keys = tuple(name for name in names if name in found)

    def __call__(self, value: type | types.ModuleType) -> Contents:
        """Reads it."""
        found = vars(value)
        return self._keys, [found.get(name, MISSING) for name in self._keys]


class ModuleReader:
    """Reads the flags, attributes, parameters, buffers and children of a torch module and of all below it.

    Args:
        module: The module.
        names: Methods that are named.
    """

    def __init__(self, module: nn.Module, names: Iterable[str] = ()) -> None:
        self._methods = _methods(type(module), ["forward", *names])
        self.again(module)

    def again(self, module: nn.Module) -> Contents:
        """Reads a module that may have another structure."""
        self._parts: list[tuple[Callable[[], Any], Callable[[dict[str, Any]], Any]]] = []
        keys: list[str] = []
        todo, seen = [("", module)], {id(module)}
        for prefix, part in todo:
            fields = vars(part)
            own = tuple(key for key in fields if key not in _OF_EVERY_MODULE)
            self._parts.append((weakref.ref(part), _getter(own)))
            keys += [prefix + key for key in own]
            for table in _TABLES:
                keys += [prefix + key for key in fields[table]]
            for name, child in fields["_modules"].items():
                if id(child) not in seen and is_module(child):
                    seen.add(id(child))
                    todo.append((f"{prefix}{name}.", child))
        self._keys = (*keys, *[f"{name}()" for name in self._methods])
        return self(module)

    def modules(self) -> Iterator[nn.Module]:
        """The module and all below it."""
        return (part() for part, _ in self._parts)

    def __call__(self, module: nn.Module) -> Contents:
        """Reads the module again."""
        values: list[Any] = []
        try:
            for part, pick in self._parts:
                fields = part().__dict__
                values += pick(fields)
                for name in _TABLES:
                    if table := fields[name]:
                        values += table.values()
        except (AttributeError, KeyError):  # a part, or an attribute of one, is gone
            return self.again(module)
        return self._keys, [*values, *self._methods.values()]


def is_module(value: object) -> bool:
    """Whether this is a torch module that is written in Python and whose constructor has run."""
    # Before torch 2.5 the table was an OrderedDict; of a scripted module it is none of these.
    return issubclass(type(value), nn.Module) and isinstance(vars(value).get("_modules"), dict)


def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], Sequence[Any]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda fields: [fields[name] for name in names]


def method(value: types.MethodType) -> Contents:
    """Reads a bound method."""
    return _METHOD, [value.__func__, value.__self__]


def partial(value: functools.partial[Any]) -> Contents:
    """Reads a ``functools.partial``."""
    return _PARTIAL, [value.func, value.args, value.keywords]


def attributes(value: object) -> Contents:
    """Reads an object's ``__dict__``."""
    fields = _fields(value)
    return [*fields], [*fields.values()]


_METHOD, _PARTIAL = ("function", "self"), ("function", "arguments", "keywords")


def items(value: Any) -> Contents:
    """Reads a list, a tuple, a deque or a dict."""
    if isinstance(value, dict):
        return [*dict.keys(value)], [*dict.values(value)]
    kind = next(kind for kind in CONTAINERS if isinstance(value, kind))
    return range(len(value)), [*kind.__iter__(value)]


def ends(value: Any) -> Contents:
    """Reads the length and both ends of a long container."""
    if not len(value):
        return _ENDS, [0, None, None]
    if isinstance(value, dict):
        return _ENDS, [len(value), next(dict.__iter__(value)), next(dict.__reversed__(value))]
    return _ENDS, [len(value), value[0], value[-1]]


_ENDS = ("length", "first", "last")


def array_stamp(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    """An array's shape and type, and its content if it is small."""
    small = array.nbytes <= MOST_BYTES and not array.dtype.hasobject
    return array.shape, array.dtype.str, array.tobytes() if small else None


def set_stamp(value: set[Any] | frozenset[Any]) -> object:
    """A small set's content, as far as it is plain; a large one's length."""
    if len(value) > MOST_ITEMS:
        return len(value)
    return frozenset((type(item), item) if is_plain(item) else id(item) for item in value)
