"""Every example in examples/ prints what the comment at its end says, and stays short."""

import importlib
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
RUN_ELSEWHERE = {"onnx_generate"}  # tests/cli/test_export.py
NEEDS = {"accelerate_loop": "accelerate"}
NUMBER = re.compile(r"-?\d+\.?\d*")


def expected(name: str) -> list[str]:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return [line[1:].strip() for line in text[text.rindex("\n# Output") :].splitlines()[3:]]


def alike(wanted: str, line: str) -> bool:
    """The same words, numbers within a tenth; `line` may go on."""
    numbers = len(NUMBER.findall(wanted))
    found = NUMBER.findall(line)[:numbers]
    rest = "".join(NUMBER.split(line, maxsplit=numbers)) if numbers else line
    close = [abs(float(a) - float(b)) <= 0.1 + 0.1 * abs(float(a)) for a, b in zip(NUMBER.findall(wanted), found)]
    return len(found) == numbers and all(close) and rest.startswith("".join(NUMBER.split(wanted)))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_shows_its_output(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80
    assert expected(name)


@pytest.mark.parametrize("name", ["own_text", "own_images"])
def test_mistakes_name_the_options_of_the_example(name, tmp_path, capsys):
    main = importlib.import_module(f"examples.{name}").main
    assert main(["--out", str(tmp_path), "--steps", "abc"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: steps = abc") and "eval_every" not in err
    tmp_path.joinpath("last.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "--out" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "examples.accelerate_loop", raising=False)
    with pytest.raises(SystemExit, match="^error: .*pip install accelerate$"):
        importlib.import_module("examples.accelerate_loop")


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in RUN_ELSEWHERE])
def test_an_example_prints_what_it_says(name, tmp_path, capsys):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    module = importlib.import_module(f"examples.{name}")
    model = "model.onnx" if find_spec("onnx") else "model.safetensors"
    threads = torch.get_num_threads()
    module.main(*[["--out", str(tmp_path), "--model", model]] if name.startswith("own_") else [])
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    lines = iter(re.sub(r"(?<=\d),(?=\d{3})", "", out).splitlines())
    for wanted in expected(name):
        wanted = re.sub(r"(?<=\d),(?=\d{3})", "", wanted)
        assert any(alike(wanted, line) for line in lines), f"{wanted!r} is not in\n{out}"
