"""Named things with options: the fields of a frozen dataclass are the options that users may set.

There is no second list of them: specs, ``model.attention_options``, the command line of ``vit_attn.masks``, error
messages and reports all read the dataclasses that are registered here.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar, cast, get_args, get_type_hints

from vit_attn.attention.names import unknown_name

_OPTION = "option"  # marks the metadata of a field that is an option
T = TypeVar("T", bound=type)


def option(
    default: Any = None,
    *,
    help: str,
    least: int | None = None,
    choices: tuple[str, ...] = (),
    check: Callable[[str, Any], Any] | None = None,
) -> Any:
    """A dataclass field that users may set.

    Args:
        default: None stands for a default that depends on the patch grid, or for the pattern's own, which
            ``Pattern.on`` fills in.
        help: a few words for ``--help``.
        least: the smallest number that is allowed.
        choices: the words that are allowed.
        check: (name, value) to the value that is kept; raises ValueError.
    """
    metadata = {_OPTION: True, "help": help, "least": least, "choices": choices, "check": check}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Named:
    """What users write by its ``name``, with its options behind it: "strided", "strided:window:4".

    Raises:
        ValueError: an option out of its range.
    """

    name: ClassVar[str]
    registry: ClassVar[dict[str, Any]]
    what: ClassVar[str]  # the word for it in messages

    def __post_init__(self) -> None:
        for key, each in self.options().items():
            value = getattr(self, key)
            if value is not None or each.default is not None:
                object.__setattr__(self, key, checked(type(self), key, value))

    @classmethod
    def options(cls) -> dict[str, Field]:
        """The options by name, in the order of the class, what it inherits last."""
        return _options(cast(Any, cls))

    def given(self) -> dict[str, Any]:
        """The options that are not at their default."""
        return {key: getattr(self, key) for key, each in self.options().items() if getattr(self, key) != each.default}

    def __str__(self) -> str:
        """The term of a spec that stands for this."""
        return ":".join([self.name, *(f"{key}:{text(value)}" for key, value in self.given().items())])

    @classmethod
    def summary(cls) -> str:
        """The first paragraph of the class's docstring, in one line."""
        return " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split())


@cache
def _options(cls: Any) -> dict[str, Field]:
    inherited = [
        each.name for base in cls.__mro__[1:] if hasattr(base, "__dataclass_fields__") for each in fields(base)
    ]
    found = {each.name: each for each in fields(cls) if each.metadata.get(_OPTION)}
    own = [key for key in found if key not in inherited]
    return {key: found[key] for key in [*own, *(key for key in found if key not in own)]}


@cache
def _kinds(cls: Any) -> dict[str, type]:
    """The type of each option: bool, int, float or str."""
    hints = get_type_hints(cls)
    found = {}
    for key in _options(cast(Any, cls)):
        kinds = [kind for kind in get_args(hints[key]) or (hints[key],) if kind is not type(None)]
        assert len(kinds) == 1, f"{cls.__name__}.{key}: an option is a bool, an int, a float or a str"
        found[key] = kinds[0]
    return found


def checked(cls: type[Named], key: str, value: Any) -> Any:
    """The value of an option, as a plain Python object.

    Raises:
        ValueError: another type, or out of its range.
    """
    rules, kind = cls.options()[key].metadata, _kinds(cast(Any, cls))[key]
    if rules["check"] is not None:
        return rules["check"](key, value)
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, not {value!r}")
        return value
    if kind is str:
        if value not in rules["choices"]:
            raise ValueError(unknown_name(key, value, rules["choices"]))
        return value
    number, least = Integral if kind is int else Real, rules["least"]
    if isinstance(value, bool) or not isinstance(value, number) or (least is not None and not value >= least):
        words = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key} must be {words}{'' if least is None else f' of at least {least}'}, not {value!r}")
    return kind(value)


def parsed(cls: type[Named], key: str, word: str) -> Any:
    """The value of an option that is written as a word of a spec; what is no value of it is left for ``checked``."""
    kind = _kinds(cast(Any, cls))[key]
    if kind is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    try:
        return kind(word)
    except ValueError:
        return word


def text(value: Any) -> str:
    """Write the value of an option as a spec takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


_REGISTRIES: list[dict[str, Any]] = []
_WITHOUT_NAME: list[type] = []


def new_registry() -> dict[str, Any]:
    """A registry whose names no other registry may use."""
    _REGISTRIES.append({})
    return _REGISTRIES[-1]


def register(cls: T) -> T:
    """Let users write the ``name`` of a normalizer, a pattern or a mechanism, and set its fields.

    Raises:
        ValueError: the name is taken.
    """
    taken = next((registry[cls.name] for registry in _REGISTRIES if cls.name in registry), None)  # type: ignore[attr-defined]
    if taken is not None:
        raise ValueError(f"the name {cls.name!r} is taken by {taken.__module__}.{taken.__name__}")  # type: ignore[attr-defined]
    cls.registry[cls.name] = cls  # type: ignore[attr-defined]
    return cls


def register_options(cls: T) -> T:
    """Let users set the fields of a class that has no name to write."""
    _WITHOUT_NAME.append(cls)
    return cls


def registered() -> Iterator[type[Named]]:
    """Every class whose options users can set."""
    for registry in _REGISTRIES:
        yield from registry.values()
    yield from _WITHOUT_NAME


def import_modules(package: str, path: list[str]) -> None:
    """Import every module of a package, so that a file is registered by being there."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def declaring(key: str) -> list[type[Named]]:
    """The registered classes that have an option of this name."""
    return [cls for cls in registered() if key in cls.options()]


def option_names() -> list[str]:
    """Every option of every registered class, each once."""
    return list(dict.fromkeys(key for cls in registered() for key in cls.options()))


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that stand for every mechanism, without those that are None.

    Raises:
        ValueError: a key that no mechanism has, or a value that none takes.
    """
    known = option_names()
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        if key not in known:
            raise ValueError(unknown_name("attention option", key, known))
        first: ValueError | None = None
        for cls in declaring(key):
            try:
                checked(cls, key, value)
                break
            except ValueError as error:
                first = first or error
        else:
            assert first is not None
            raise first
    return given
