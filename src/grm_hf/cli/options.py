"""Flags and a YAML file as dataclasses: flags override the file, and unknown keys of either fail."""

from dataclasses import field, make_dataclass
from inspect import signature
from typing import Any

import yaml
from transformers import HfArgumentParser

from ..modeling import GRMConfig


def _help(parameter: Any) -> str:
    return f"As in GRMConfig, whose default is {parameter.default}."


# The fields of GRMConfig as flags; None where not given, which leaves the default, or what a trained GRM has.
GRMOptions: Any = make_dataclass(
    "GRMOptions",
    [
        (name, parameter.annotation | None, field(default=None, metadata={"help": _help(parameter)}))
        for name, parameter in signature(GRMConfig.__init__).parameters.items()
        if name not in ("self", "text_config", "kwargs")
    ],
)


def parse(command: str, dataclasses: list[Any], argv: list[str], defaults: dict[str, Any]) -> tuple[Any, ...]:
    """
    Instances of `dataclasses` from flags, over the file named by `--config`, over `defaults`, over their own.

    Raises:
        SystemExit: With code 2 and a message, if a flag or a key of the file is unknown or a value has the wrong type.
    """
    parser = HfArgumentParser(dataclasses, prog=f"grm-hf {command}", allow_abbrev=False)
    parser.usage = f"grm-hf {command} [--config FILE] [--option value ...]"
    parser.add_argument("--config", help="YAML file with any of these options.")
    parser.set_defaults(**defaults)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("config", "help")}
    path = _config_path(parser, argv)
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                values = yaml.safe_load(file) or {}
        except (OSError, yaml.YAMLError) as error:
            parser.error(f"can't read {path}: {error}")
        if not isinstance(values, dict):
            parser.error(f"{path} must hold options as `name: value`")
        if unknown := set(values) - set(actions):
            parser.error(f"{path} has unknown options: {', '.join(sorted(unknown))}")
        parser.set_defaults(**{name: _as_default(actions[name], value) for name, value in values.items()})
    try:
        *parsed, _ = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    return tuple(parsed)


def _config_path(parser: HfArgumentParser, argv: list[str]) -> str | None:
    for index, argument in enumerate(argv):
        if argument == "--config":
            if index + 1 == len(argv):
                parser.error("--config needs a path")
            return argv[index + 1]
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
    return None


def _as_default(action: Any, value: Any) -> Any:
    if isinstance(value, dict) and action.nargs in ("*", "+"):
        return [f"{key}={entry}" for key, entry in value.items()]
    # argparse converts text alone, and so also "1e-5", which YAML takes for text.
    return value
