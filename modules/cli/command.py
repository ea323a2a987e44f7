"""Command lines from dataclasses: a field is a flag, and its metadata says what it is for, as in `KIVIOptions`.

@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    prompt: str | None = argument(None, "instead of the demo's own")
    cache: KIVIOptions = group(KIVIOptions)

parse(Demo, description="A demo.")    # --prompt, --k-bits, --v-bits, …
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

from modules.options import with_preset

T = TypeVar("T")
_REQUIRED = object()


def argument(
    default: Any = _REQUIRED, help: str = "", choices: Sequence[Any] | None = None, *, positional: bool = False
) -> Any:
    """A field that is a flag: its default (none: it must be given), a sentence on it and the values it may take.

    A `positional` one is given without its name.
    """
    metadata = {"help": help, "choices": choices, "positional": positional}
    return (
        dataclasses.field(metadata=metadata)
        if default is _REQUIRED
        else dataclasses.field(default=default, metadata=metadata)
    )


def group(command: type) -> Any:
    """A field that stands for all flags of another dataclass."""
    return dataclasses.field(default_factory=command, metadata={"help": "", "group": True})


def check_least(value: float, minimum: float, flag: str) -> None:
    """Raise `ValueError` where the number given for a flag is less than `minimum`."""
    if not value >= minimum:
        raise ValueError(f"{flag} must be {minimum} or more; got {value}.")


def parse(command: type[T], arguments: Sequence[str] | None = None, *, description: str, prog: str | None = None) -> T:
    """A command from its flags; without tyro only `--help` is answered.

    Args:
        command: a dataclass made of `argument` and `group`; what its `__post_init__` raises is shown as a mistake.
        arguments: those of the process where None.
        prog: how the command is called; None: by the file that runs.

    Raises:
        SystemExit: with 0 after `--help`, with 2 after a mistake.
        ModuleNotFoundError: where tyro is missing.
    """
    try:
        import tyro
    except ModuleNotFoundError:
        if not {"-h", "--help"} & set(sys.argv[1:] if arguments is None else arguments):
            raise
        print(plain_help(command, description))
        raise SystemExit(0) from None
    return tyro.cli(command, prog=prog, args=_with_preset(arguments), description=description, **_settings())


def parse_one_of(
    commands: Mapping[str, type], arguments: Sequence[str] | None = None, *, prog: str, description: str
) -> Any:
    """One of several commands, by the name that comes first; otherwise as `parse`."""
    from tyro.extras import subcommand_cli_from_dict

    return subcommand_cli_from_dict(
        dict(commands), prog=prog, description=description, args=_with_preset(arguments), **_settings()
    )


def _with_preset(arguments: Sequence[str] | None) -> list[str]:
    """Arguments in which `--preset NAME` is replaced by the flags that it stands for, but for those that are given themselves."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = [argument for argument in given if argument.split("=")[0] == "--preset"]
    if not flags:
        return given
    at = given.index(flags[-1])
    name = flags[-1].split("=")[1] if "=" in flags[-1] else given[at + 1] if at + 1 < len(given) else ""
    try:
        chosen = with_preset({"preset": name})
    except ValueError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    known = {argument.split("=")[0] for argument in given}
    pairs = [(flag_of(name), str(value)) for name, value in chosen.items()]
    given[at : at + (1 if "=" in flags[-1] else 2)] = [part for pair in pairs if pair[0] not in known for part in pair]
    return given


def plain_help(command: type, description: str) -> str:
    """The flags of a command, with what they are for and their defaults, one below the other."""
    lines = [textwrap.dedent(description).strip(), ""]
    for flag, field in flags(command):
        choices = field.metadata.get("choices")
        values = f" {{{','.join(map(str, choices))}}}" if choices else ""
        default = "" if field.default is dataclasses.MISSING else f" (default: {shown(field.default)})"
        text = textwrap.wrap(
            field.metadata["help"] + default, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
        lines += [f"  {flag}{values}", *text]
    return "\n".join(lines)


def flag_of(name: str) -> str:
    """What sets the field `name` on a command line."""
    return f"--{name.replace('_', '-')}"


def flags(command: type) -> Iterator[tuple[str, dataclasses.Field]]:
    """Every flag of a command, those of its groups included, with the field it sets; a positional one by its name."""
    for field in dataclasses.fields(command):
        if field.metadata.get("group"):
            yield from flags(typing.cast(type, field.default_factory))
        elif field.metadata.get("positional"):
            yield field.name.upper(), field
        elif field.default is True:
            yield f"{flag_of(field.name)}, {flag_of(f'no-{field.name}')}", field
        else:
            yield flag_of(field.name), field


def shown(default: Any) -> str:
    """A default as it would be typed."""
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _settings() -> dict[str, Any]:
    import tyro
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

    registry = ConstructorRegistry()

    @registry.struct_rule
    def from_metadata(info: StructTypeInfo) -> StructConstructorSpec | None:
        """How tyro reads a dataclass whose fields say in their metadata what they are for."""
        if not dataclasses.is_dataclass(info.type) or not any(
            "help" in f.metadata for f in dataclasses.fields(info.type)
        ):
            return None
        hints = typing.get_type_hints(info.type, include_extras=True)
        return StructConstructorSpec(
            instantiate=typing.cast(type, info.type),
            fields=tuple(
                StructFieldSpec(
                    name=field.name,
                    type=_type_of(hints[field.name], field),
                    default=_default(field, tyro.MISSING),
                    helptext=field.metadata.get("help"),
                )
                for field in dataclasses.fields(info.type)
            ),
        )

    return {"registry": registry, "config": (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)}


def _default(field: dataclasses.Field, missing: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return missing if field.default_factory is dataclasses.MISSING else field.default_factory()


def _type_of(hint: Any, field: dataclasses.Field) -> Any:
    """The type of a field as tyro is told of it."""
    import tyro

    chosen = _with_choices(hint, field.metadata.get("choices"))
    if not field.metadata.get("positional"):
        return chosen
    shown_as = tyro.conf.arg(metavar=field.name.upper())
    return typing.Annotated[tyro.conf.Positional[chosen], shown_as]  # type: ignore[misc, valid-type] # made at run time


def _with_choices(hint: Any, choices: Sequence[Any] | None) -> Any:
    """A type that takes only these values, or lists of them where the hint allows a list."""
    if not choices:
        return hint
    one: Any = Literal[tuple(choices)]
    if typing.get_origin(hint) is tuple:
        return tuple[one, ...]
    lists = any(typing.get_origin(part) is list for part in typing.get_args(hint))
    return one | list[one] if lists else one
