"""The command line before it is parsed: `--config FILE.yaml`, and underscores in option names.

A configuration file maps option names to values, for all commands or below a command's name. What stands on the command line wins.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtool.errors import InputError


def expand(arguments: list[str]) -> list[str]:
    """argv without the program's name → argv with the configuration's options put behind the command's name."""
    arguments = [_dashed(argument) for argument in arguments]
    rest, path = _take(arguments)
    if path is None:
        return rest
    values = _load(path)
    command = next((index for index, argument in enumerate(rest) if not argument.startswith("-")), None)
    if command is None:
        return rest
    name = rest[command]
    chosen = {key: value for key, value in values.items() if not isinstance(value, dict)} | values.get(name, {})
    given = {argument.partition("=")[0] for argument in rest if argument.startswith("--")}
    extra = []
    for key, value in chosen.items():
        option = "--" + key.replace("_", "-")
        if option not in given:
            extra += _spelled(option, value)
    return [*rest[: command + 1], *extra, *rest[command + 1 :]]


def _dashed(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


def _take(arguments: list[str]) -> tuple[list[str], str | None]:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return arguments[:index] + arguments[index + 1 :], argument.partition("=")[2]
        if argument == "--config":
            if index + 1 == len(arguments):
                raise InputError("--config needs a file")
            return arguments[:index] + arguments[index + 2 :], arguments[index + 1]
    return arguments, None


def _load(path: str) -> dict[str, Any]:
    import yaml  # only when asked for: start-up stays light

    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError("cannot read the configuration", got=path) from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML", got=str(error).splitlines()[0]) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is no configuration", got=type(values).__name__, expected="option names with values")
    return values


def _spelled(option: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [option] if value else []
    if isinstance(value, dict):
        return [part for key, item in value.items() for part in (option, f"{key}={_flat(item)}")]
    if isinstance(value, list):
        return [part for item in value for part in (option, str(item))]
    return [option, str(value)]


def _flat(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
