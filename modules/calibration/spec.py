"""The YAML that says which attention layers are quantized, and how.

    spec:
      process:
        - type: dynamic_cache
          qconfig: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
          include: ["*"]
          exclude: ["model.layers.0.self_attn"]

The format is that of msModelSlim's `dynamic_cache` processor, with its names and defaults; a list of such entries, or one
entry, is taken as well. Patterns are globs over the full paths of attention modules, and `exclude` wins over `include`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

SHOWN = 4  # names that an error lists


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class QuantizationConfig(_Entry):
    """How the states of a layer are quantized."""

    scope: Literal["per_channel"] = "per_channel"
    dtype: Literal["int8"] = "int8"
    symmetric: StrictBool = True
    method: Literal["minmax"] = "minmax"


class DynamicCacheProcess(_Entry):
    """One entry of `process`: a config for the attention modules that `include` matches and `exclude` does not."""

    type: Literal["dynamic_cache"]
    qconfig: QuantizationConfig
    include: list[str] = Field(default=["*"], min_length=1)
    exclude: list[str] = []


class Spec(_Entry):
    """What stands under `spec`. Every entry of `process` adds the layers that it chooses."""

    process: list[DynamicCacheProcess] = Field(min_length=1)

    def choose(self, paths: Sequence[str]) -> dict[str, QuantizationConfig]:
        """The config of each attention module that is quantized, of those with these full paths, in their order.

        Raises:
            ValueError: for a pattern that matches none of them, for entries that give one module different configs, and where
                no module is left.
        """
        chosen: dict[str, tuple[int, QuantizationConfig]] = {}
        for number, entry in enumerate(self.process):
            for name in ("include", "exclude"):
                _check_matches(f"spec.process[{number}].{name}", getattr(entry, name), paths)
            for path in paths:
                if not _matches(path, entry.include) or _matches(path, entry.exclude):
                    continue
                first, config = chosen.setdefault(path, (number, entry.qconfig))
                if config != entry.qconfig:
                    raise ValueError(
                        f"spec.process[{number}].qconfig and spec.process[{first}].qconfig differ, and both entries take "
                        f"{path}; exclude it from one of them."
                    )
        if not chosen:
            raise ValueError(
                f"the spec leaves no layer to quantize: exclude takes out all that include takes in, of {_some(paths)}."
            )
        return {path: chosen[path][1] for path in paths if path in chosen}

    def as_data(self) -> dict[str, Any]:
        """The spec as it would stand in a file, defaults included."""
        return {"spec": self.model_dump()}


class _File(_Entry):
    spec: Spec


def load_spec(source: str | Path | Mapping[str, Any] | Sequence[Any] | Spec) -> Spec:
    """A spec from a YAML file, or from what one holds.

    Args:
        source: the path of a file, plain data, or a `Spec`.

    Raises:
        ValueError: for a file that is not there or is no YAML, and for keys and values that are not allowed; it names the
            path of the key (`spec.process[0].qconfig.dtype`) and what is allowed.
    """
    if isinstance(source, Spec):
        return source
    data = _read(Path(source)) if isinstance(source, (str, Path)) else source
    where = f"{source}: " if isinstance(source, (str, Path)) else ""
    bare: tuple[str | int, ...] = ()
    if isinstance(data, Mapping) and "spec" in data:
        whole: Mapping[str, Any] = data
    elif isinstance(data, Mapping) and "type" in data:
        whole, bare = {"spec": {"process": [data]}}, ("spec", "process", 0)
    elif isinstance(data, Sequence) and not isinstance(data, str):
        whole, bare = {"spec": {"process": list(data)}}, ("spec", "process")
    else:
        raise ValueError(
            f"{where}a spec is a mapping with the key 'spec', a list of process entries, or one entry with its 'type'; "
            f"got {_shown(data)}."
        )
    try:
        return _File.model_validate(whole).spec
    except ValidationError as invalid:
        mistakes = "; ".join(_explained(error, len(bare)) for error in invalid.errors())
        raise ValueError(f"{where}{mistakes}.") from None


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader; a key that stands twice in a mapping is a mistake, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, (at, _) in zip(keys, node.value):
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", at.start_mark)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ValueError(f"the spec {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the spec {path} is no UTF-8 text: {error}.") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f'the spec {path} is no YAML: {" ".join(str(error).split())}. Patterns need quotes: include: ["*"].'
        ) from error


def _explained(error: Any, bare: int) -> str:
    """One mistake in words; `bare` parts of its path do not stand in the file."""
    location, given = error["loc"], _shown(error["input"])
    path = _path(location[bare:]) or "the entry"
    fields = _fields_at(location[:-1])
    match error["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(str(location[-1]), fields, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            return f"{path} is not known{hint}; allowed here: {', '.join(fields)}"
        case "missing":
            return f"{path} is missing; here stand {', '.join(fields)}"
        case "literal_error":
            return f"{path} must be {error['ctx']['expected']}; got {given}"
        case "too_short":
            return f"{path} must not be empty"
        case "bool_type":
            return f"{path} must be true or false; got {given}"
        case "list_type":
            return f"{path} must be a list; got {given}"
        case "string_type":
            return f"{path} must be a string; got {given}"
        case _:
            return f"{path} must be a mapping; got {given}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """The names of the fields of the mapping at a place."""
    if "qconfig" in location:
        entry: type[_Entry] = QuantizationConfig
    elif any(isinstance(part, int) for part in location):
        entry = DynamicCacheProcess
    else:
        entry = Spec if location else _File
    return list(entry.model_fields)


def _path(location: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _check_matches(where: str, patterns: Sequence[str], paths: Sequence[str]) -> None:
    for number, pattern in enumerate(patterns):
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(
                f"{where}[{number}] is {pattern!r}, which matches no attention module; they are {_some(paths)}. Patterns are "
                "compared with the whole path."
            )


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(paths[:SHOWN]) + more
