"""`grm-hf`: train and score reward models from the command line."""

import sys
from importlib import import_module


COMMANDS = {
    "train": "fine-tune a reward model from a causal language model",
    "score": "rewards of the rows of a JSON Lines file",
}


def main(argv: list[str] | None = None) -> int:
    """
    Run a command and give its exit code: 0, 1 where a check or an input failed, 2 for a wrong call.

    Args:
        argv (`list[str]`, *optional*): The command and its flags. Defaults to those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: grm-hf COMMAND [--help] ...\n")
        for name, description in COMMANDS.items():
            print(f"  {name:10} {description}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"grm-hf: unknown command {argv[0]!r}; commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # Imported here: `grm-hf --help` should not wait for torch.
    command = import_module(f".{argv[0]}", __name__)
    try:
        command.main(argv[1:])
    except (ValueError, OSError) as error:
        print(f"grm-hf {argv[0]}: {error}", file=sys.stderr)
        return 1
    return 0
