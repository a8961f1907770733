"""A training run's options from a file: YAML, or JSON such as a run's own config.json."""

import types
import typing
from pathlib import Path
from typing import Any

from ldm4ts_kernels.data import DataConfig, OptionError
from ldm4ts_kernels.runs import TrainConfig

KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def parse_horizons(text: str) -> tuple[int, ...]:
    """Read `1,5,20` or `1-96`. Raises OptionError for anything else."""
    first, dash, last = text.partition("-")
    try:
        if dash:
            return tuple(range(int(first), int(last) + 1))
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"horizons: expected `1,5,20` or `1-96`, got {text!r}") from error


def parse_names(text: str) -> tuple[str, ...]:
    """Read `open,close`."""
    return tuple(part.strip() for part in text.split(","))


def read_run_file(path: str | Path) -> dict[str, Any]:
    """Return the options in a file, as `runs.plan` takes them: only those that stand there.

    Keys are fields of TrainConfig; `data` holds those of DataConfig, `model_fields` those of
    LDM4TSConfig. Lists may be written as text: `horizons: 1-96`, `columns: open,close`.

    Raises OptionError, naming the file and the key, for an unknown key or a value of another type.
    """
    values = _read_mapping(Path(path))
    options = _typed(values, TrainConfig, f"{path}: ")
    if "data" in options:
        options["data"] = _typed(options["data"], DataConfig, f"{path}: data.")
    return options


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"config: {path} is not readable: {error}") from error
    return _mapping(values, f"config: {path}")


def _typed(values: dict[str, Any], known: type, where: str) -> dict[str, Any]:
    """Check names and types of values against the dataclass `known`; leave out what is null."""
    hints = typing.get_type_hints(known)
    for name in values:
        if name not in hints:
            raise OptionError(f"{where}{name}: no such option; known are {', '.join(hints)}")
    given = {name: value for name, value in values.items() if value is not None}
    return {name: _value(value, hints[name], f"{where}{name}") for name, value in given.items()}


def _value(value: Any, hint: Any, where: str) -> Any:
    union = isinstance(hint, types.UnionType)
    kind = next(arm for arm in typing.get_args(hint) if arm is not type(None)) if union else hint
    if typing.get_origin(kind) is tuple:
        return _items(value, typing.get_args(kind)[0], where)
    if kind in KINDS:
        return _scalar(value, kind, where)
    return _mapping(value, where)


def _scalar(value: Any, kind: type, where: str) -> Any:
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a text
        except ValueError:
            pass
    if type(value) is not kind:
        raise OptionError(f"{where}: expected {KINDS[kind]}, got {value!r}")
    return value


def _items(value: Any, kind: type, where: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        return parse_horizons(value) if kind is int else parse_names(value)
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise OptionError(f"{where}: expected a list, each {KINDS[kind]}, got {value!r}")
    return tuple(value)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(f"{where}: expected names and values, got {value!r}")
    return value
