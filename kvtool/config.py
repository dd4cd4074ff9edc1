"""The command line before it is parsed: `--config FILE.yaml`, and underscores in option names.

A configuration file maps option names to values, for all commands or below a command's name:

    seed: 1
    profile:
      tokens: 512
      set: {needle: {lengths: [500, 1000]}}

What stands on the command line wins, settings (`--set`) key by key. A value for all commands goes to those that
have the option.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from kvtool.errors import InputError, unknown

Options = Mapping[str, Literal["switch", "one", "many"]]  # "--name" → takes no value, one, or may be repeated


def expand(arguments: list[str], options: Callable[[], Mapping[str, Options]]) -> list[str]:
    """argv without the program's name → argv with the configuration's options put behind the command's name.

    `options` gives each command's options; it is asked only when there is a configuration.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, names = [_dashed(argument) for argument in arguments[:end]], arguments[end:]
    rest, path = _take(arguments)
    place = next((index for index, argument in enumerate(rest) if not argument.startswith("-")), None)
    if path is None or place is None:
        return rest + names
    commands = options()
    chosen = _chosen(path, commands).get(rest[place], {})
    given = {argument.partition("=")[0] for argument in rest}
    extra = []
    for option, value in chosen.items():
        if option not in given or option == "--set":
            extra += _spelled(option, value, commands[rest[place]][option], path)
    return [*rest[: place + 1], *extra, *rest[place + 1 :], *names]


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


def _chosen(path: str, commands: Mapping[str, Options]) -> dict[str, dict[str, Any]]:
    """Command → option → value. Every name in the file is checked, whatever command runs."""
    values = _load(path)
    shared = {key: value for key, value in values.items() if key not in commands}
    chosen = {name: {o: v for o, v in _named(shared).items() if o in known} for name, known in commands.items()}
    for option in _named(shared):
        if not any(option in known for known in commands.values()):
            everything = {spelling.removeprefix("--") for known in commands.values() for spelling in known}
            raise unknown(f"name in {path}", option.removeprefix("--"), everything | set(commands))
    for name in commands:
        section = values.get(name) or {}
        if not isinstance(section, dict):
            raise InputError(f"{path} gives {name} no options", got=repr(section), expected="option names with values")
        for option, value in _named(section).items():
            if option not in commands[name]:
                known = [spelling.removeprefix("--") for spelling in commands[name]]
                raise unknown(f"option of {name} in {path}", option.removeprefix("--"), known)
            chosen[name][option] = _joined(chosen[name].get(option), value)
    return chosen


def _named(section: dict[Any, Any]) -> dict[str, Any]:
    return {"--" + str(key).replace("_", "-"): value for key, value in section.items()}


def _joined(shared: Any, own: Any) -> Any:
    """A command's own value wins; mappings are joined."""
    return shared | own if isinstance(shared, dict) and isinstance(own, dict) else own


def _load(path: str) -> dict[str, Any]:
    import yaml  # only when asked for: start-up stays light

    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}", got=error.strerror) from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path} is not YAML{line}", got=error.problem) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML", got=str(error).splitlines()[0]) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is no configuration", got=type(values).__name__, expected="option names with values")
    return values


def _spelled(option: str, value: Any, kind: str, path: str) -> list[str]:
    """One option of the file as arguments; a null leaves the option at its default."""
    if value is None:
        return []
    if (kind == "switch") != isinstance(value, bool) or (isinstance(value, dict) and option != "--set"):
        expected = "true or false" if kind == "switch" else "a value"
        raise InputError(f"bad value of {option} in {path}", got=repr(value), expected=expected)
    if kind == "switch":
        return [option] if value else []
    if isinstance(value, dict):
        return [f"{option}={setting}" for setting in _settings(value)]
    if kind == "many" and isinstance(value, list):
        return [f"{option}={item}" for item in value]
    return [f"{option}={_flat(value)}"]


def _settings(values: dict[Any, Any], scope: str = "") -> list[str]:
    """{"needle": {"lengths": [500, 1000]}} → ["needle.lengths=500,1000"]."""
    found = []
    for key, value in values.items():
        found += _settings(value, f"{scope}{key}.") if isinstance(value, dict) else [f"{scope}{key}={_flat(value)}"]
    return found


def _flat(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
