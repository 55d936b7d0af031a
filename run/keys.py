"""Typed settings from text: one dataclass field per key, its rules in the field's metadata.

The machinery behind run/config.py and nothing about training: a key is declared with `key(...)`, and from that one line
follow conversion and check (`convert`), the words of an error (`rule`), the command line (`read_argv`), the help
(`help_lines`) and the TOML notation (`show`). Problems are collected as texts and raised together by `refuse`.
"""

import dataclasses
import difflib
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from run.errors import UserError

Fields = Mapping[str, dataclasses.Field]
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text"}
# What people used to other trainers type; only ever suggested, never accepted.
OTHER_NAMES = {"learning_rate": "lr", "max_iters": "steps", "block_size": "context", "seq_len": "context",
               "n_embd": "d_model", "optimizer": "method", "dataset": "data", "wd": "weight_decay",
               "dtype": "precision"}


def key(default: Any, group: str, help: str, **rules: Any) -> Any:
    """One setting: default, the group it is listed in, its meaning, and rules, all optional:

    choices       the texts allowed
    low, high     bounds that are themselves allowed; above, below: bounds that are not
    needs         "key=value" or "key!=value", several separated by spaces, alternatives by "|":
                  else the key has no effect
    bare          the value meant by --key with nothing after it
    free          True: may differ between a checkpoint and its resumption, the final weights are the same
    """
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, **rules))


def convert(f: dataclasses.Field, value: Any) -> Any:
    """value in f's type. Raises ValueError with the rule and a remedy."""
    rules, wrong = f.metadata, ValueError(f"must be {rule(f)} (default {show(f.default)}){_remedy(f, value)}")
    if f.type is str:
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ",".join(value)
        if isinstance(value, bool) and "true" in rules.get("choices", ()):
            value = str(value).lower()
        if not isinstance(value, str) or value not in rules.get("choices", [value]) or (f.default and not value):
            raise wrong
        if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in value):
            raise ValueError("must be UTF-8 text without control characters; remove them")
        return value
    if isinstance(value, bool) or not isinstance(value, int if f.type is int else (int, float)):
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong
    if (value < rules.get("low", value) or value > rules.get("high", value)
            or value <= rules.get("above", -math.inf) or value >= rules.get("below", math.inf)):
        raise wrong
    return f.type(value)


def number(f: dataclasses.Field, text: str) -> Any:
    """text as a number where f wants one and it is one; otherwise unchanged, for `convert` to refuse."""
    try:
        return text if f.type is str else f.type(text)
    except ValueError:
        return text


def rule(f: dataclasses.Field) -> str:
    """The values f may take, as a noun: "a whole number from 1 to 8"."""
    if "choices" in f.metadata:
        return _limits(f)
    return f"{TYPE_NAMES[f.type]} {'that is not empty' if f.type is str and f.default else _limits(f)}".rstrip()


def _limits(f: dataclasses.Field) -> str:
    rules = f.metadata
    if "choices" in rules:
        return "one of " + ", ".join(c or '""' for c in rules["choices"])
    if "low" in rules and "high" in rules:
        return f"from {rules['low']:,} to {rules['high']:,}"
    words = {"low": "from", "above": "above", "high": "up to", "below": "below"}
    return " and ".join(f"{word} {rules[bound]:,}" for bound, word in words.items() if bound in rules)


def _remedy(f: dataclasses.Field, value: Any) -> str:
    """"; write 6" for "6" and 6.0 where a whole number is wanted, "; did you mean ...?" for a misspelt choice."""
    if f.type is str:
        return closest(value, f.metadata.get("choices", ()), '; did you mean "{}"?') if isinstance(value, str) else ""
    try:
        meant = f.type(float(value))
        same = meant == float(value) and type(value) is not f.type and not isinstance(value, bool)
        return f"; write {meant}" if same and math.isfinite(meant) else ""
    except (TypeError, ValueError, OverflowError):
        return ""


def show(value: Any) -> str:
    """value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >> 64:
        return "(an integer of more than 64 bits)"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def short(text: str) -> str:
    """text, its middle left out if it would fill the screen."""
    return text if len(text) <= 80 else f"{text[:40]} ... {text[-30:]}"


def listed(numbers: Iterable[int], near: int, most: int = 6) -> str:
    """"1, 2 or 4": the numbers nearest to near, ascending."""
    *first, last = sorted(sorted(numbers, key=lambda n: abs(n - near))[:most])
    return (", ".join(map(str, first)) + " or " if first else "") + str(last)


def closest(word: str, names: Iterable[str], wording: str) -> str:
    """wording with the name most like word in place of {}; empty if none is alike."""
    known = [name for name in names if name]
    found = difflib.get_close_matches(word.lower(), known, n=1)
    if OTHER_NAMES.get(word.lower()) in known:
        found = [OTHER_NAMES[word.lower()]]
    return wording.format(found[0]) if found else ""


def known_keys(values: Mapping[str, Any], fields: Fields, where: str = "") -> tuple[dict[str, Any], list[str]]:
    """-> (the values of known keys, with underscores in place of dashes; problems with the others)."""
    known, problems = {}, []
    for spelled, value in values.items():
        k = spelled.replace("-", "_")
        if k in known:
            problems.append(f"{k} is given twice{where}, with a dash and with an underscore; keep one")
        elif isinstance(value, dict):
            problems.append(f"[{spelled}]{where}: keys are not grouped in tables; remove that line, keep its keys")
        elif k in fields:
            known[k] = value
        else:
            remedy = closest(k, fields, "did you mean {}?") or "--help lists every key"
            problems.append(f"unknown key {short(spelled)}{where}; {remedy}")
    return known, problems


def read_argv(argv: Sequence[str], fields: Fields) -> tuple[str | None, dict[str, str], list[str], list[str]]:
    """-> (the one argument that is no option, {key: text}, flags that are no key, problems).

    `--key value` and `--key=value`; of a key given twice the last counts. A value that begins with two dashes needs the
    form with "=", so that a forgotten value is noticed; one dash (a negative number) does not.
    """
    target, given, flags, problems = None, {}, [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if target is None:
                target = word
            else:
                problems.append(f"{word!r} is one config too many, after {target!r}; name one, and write --key before "
                                "each value")
            continue
        option, equals, text = word.partition("=")
        k = option.lstrip("-").replace("-", "_")
        has_next = bool(rest) and not rest[0].startswith("--")
        if k == "print_config" and option.startswith("--") and not equals:
            flags.append(k)
        elif k not in fields or not option.startswith("--"):
            remedy = closest(k, fields, "did you mean --{}?") or "--help lists every key"
            problems.append(f"unknown key {short(option)}; {remedy}")
            if has_next and not equals:
                rest.pop(0)  # its value, not the config's name
        elif equals:
            given[k] = text
        elif "bare" in fields[k].metadata:
            takes_next = has_next and (target is not None or rest[0] in fields[k].metadata["choices"])
            given[k] = rest.pop(0) if takes_next else fields[k].metadata["bare"]
        elif has_next:
            given[k] = rest.pop(0)
        else:
            problems.append(f"{option} has no value; it must be {rule(fields[k])}: write {option} VALUE")
    return target, given, flags, problems


def help_lines(fields: Fields) -> list[str]:
    """Every key by group: name, type, meaning, limits and default."""
    lines, group = [], ""
    for k, f in fields.items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"{group}:"]
        about = "; ".join(filter(None, (f.metadata["help"], _limits(f)))) + f" [{show(f.default)}]"
        name = f"  --{k} {f.type.__name__}"
        lines += textwrap.wrap(about, 112, initial_indent=f"{name:<24}  ", subsequent_indent=" " * 28)
    return lines


def refuse(problems: Sequence[str]) -> None:
    """Raises UserError(code=2) with every problem, one a line, if there are any."""
    if problems:
        many = f"{len(problems)} problems with the configuration:\n  " if len(problems) > 1 else ""
        raise UserError(many + "\n  ".join(problems), code=2)
