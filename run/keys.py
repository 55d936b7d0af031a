"""Typed settings: each key is one dataclass field, declared with `key(...)`. Nothing here is about training.

The check of a value, the words of an error, the command line and its help follow from that declaration.
"""

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from run.errors import UserError, closest

SHOWN = 200  # characters of a value in an error


def key(default: Any, help: str, allowed: Sequence = (), needs: str = "True", **rules: Any) -> Any:
    """Declare one setting: its default, its meaning, the allowed texts or the smallest and the largest number.

    needs   a Python expression over the keys; where it is false, this key has no effect
    also    names other trainers or earlier versions have for it, suggested but not accepted
    group   title above this key and the ones after it in the help
    bare    the value meant by --key with nothing after it
    free    True: a resumed run may change this key, because the final weights stay the same, or because
            something better is compared: the data's content (sha256), what device, backend, compile and threads came to
    """
    return dataclasses.field(default=default, metadata={"help": help, "allowed": allowed, "needs": needs, **rules})


def rule(f: dataclasses.Field) -> str:
    """The values `f` may take, as a noun: "a whole number from 1 to 8"; empty for any text."""
    allowed = f.metadata["allowed"]
    if f.type is str:
        return "one of " + ", ".join(text or '""' for text in allowed) if allowed else ""
    return f"{'a whole number' if f.type is int else 'a number'} from {allowed[0]:,} to {allowed[1]:,}"


def convert(f: dataclasses.Field, value: Any) -> Any:
    """`value`, or the text of one, in the type of `f`. Raises ValueError naming the rule and the closest choice."""
    text, allowed = "", f.metadata["allowed"]
    with contextlib.suppress(ValueError, RecursionError):  # a text that is no number; what cannot be a text
        text = value if isinstance(value, str) else show(value)
        typed = f.type(text)
        if not allowed or (typed in allowed if f.type is str else allowed[0] <= typed <= allowed[1]):
            return typed
    near = closest(text, allowed, '; did you mean "{}"?') if f.type is str else ""
    raise ValueError(f"must be {rule(f) or 'a text'} (default {show(f.default)}){near}")


def show(value: Any) -> str:
    """`value` as TOML writes it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def brief(value: Any) -> str:
    """`value` in an error: the beginning of what is long; of what Python will not print, what it is."""
    try:
        text = str(value) or show(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, tables in tables
        text = f"({type(value).__name__}, too large to show)"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def read_argv(argv: Sequence[str], fields: dict[str, dataclasses.Field], prog: str, about: str) -> tuple[dict, list]:
    """{key: text} of a command line, and its words that are no options. An unknown key has "", its value is left out.

    --print_config is one of the keys. --help prints and raises SystemExit(0). Raises UserError for a missing value.
    """
    usage = f"python {prog} [CONFIG] [--key value | --key=value ...]"
    parser = argparse.ArgumentParser(usage=usage, description=about, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, exit_on_error=False)  # fmt: skip
    parser.add_argument("--print_config", action="store_true", help="print the resolved settings as TOML and exit")
    for k, f in fields.items():
        if "group" in f.metadata:
            group = parser.add_argument_group(f.metadata["group"])
        meaning = f"{'; '.join(filter(None, (f.metadata['help'], rule(f))))} [{show(f.default)}]"
        bare = {"nargs": "?", "const": f.metadata["bare"]} if "bare" in f.metadata else {}
        group.add_argument(f"--{k}", metavar=f.type.__name__, help=meaning.replace("%", "%%"), **bare)
    words = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
    try:
        known, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; write --key value", code=2) from None
    unknown = {word.removeprefix("--").partition("=")[0]: "" for word in rest if word.startswith("-")}
    others = [word for before, word in zip(["", *rest], rest)
              if not word.startswith("-") and (not before.startswith("-") or "=" in before)]  # fmt: skip
    return vars(known) | unknown, others
