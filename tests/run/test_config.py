"""The command line and TOML: what is accepted, and that every mistake is told with the value, the rule and the remedy.

    python -m pytest -q tests/run/test_config.py
"""

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from run import config
from run.config import (
    FIELDS,
    IMAGES,
    SAFE_PRODUCTS,
    Config,
    available,
    check_against_data,
    differences,
    from_dict,
    load,
    to_dict,
    to_toml,
    validate,
)
from run.errors import UserError
from kernels.int8_matmul import MAX_REDUCTION

ROOT = Path(__file__).resolve().parents[2]


def refused(argv: list[str]) -> str:
    """The message with which load refuses argv."""
    with pytest.raises(UserError) as caught:
        load(argv)
    assert caught.value.code == 2
    return str(caught.value)


# command line, fragments the message must hold
BAD_COMMAND_LINES = [
    ("--bitz 4", ["unknown key --bitz", "did you mean --bits?"]),
    ("--batch-sise 4", ["--batch-sise", "did you mean --batch_size?"]),
    ("--learning_rate=1", ["unknown key --learning_rate", "did you mean --lr?"]),
    ("--int_layers mlp,attn", ["there is no 'attn' layer", "attention"]),
    ("--bits 2 --init_spread 0.1", ["init_spread = 0.1, bits = 2", "round to 0", "init_spread = 0.2 or more"]),
    ("--int_layers patch", ["this net has no such layer", "embedding, attention, mlp, head"]),
    ("--data mnist --model mlp --int_layers attention", ["this net has no such layer", "some of mlp, head"]),
    ("--data imagenette --model mlp --image_side 256", ["196,608 pixels", "133,144", "image_side = 210 or less"]),
    ("--model mlp", ["model = mlp", "reads images", "data = mnist"]),
    ("--data imagenette --patch 7", ["patch = 7", "must divide", "64", "8"]),
    ("--data mnist --patch 7 --d_model 24 --n_head 4", ["must be a multiple of 4", "d_model = 32"]),
    ("--flip_at backward --grad_accum 4", ["flip_at = backward", "grad_accum = 4", "flip_at = step"]),
    ("--zzzzzz 4", ["unknown key --zzzzzz", "--help lists every key"]),
    ("-bits 4", ["unknown key -bits", "did you mean --bits?"]),
    ("--", ["unknown key --"]),
    ("--print-config=1", ["unknown key --print-config"]),
    ("--name x", ["unknown key --name"]),
    ("--bits abc", ["--bits abc", "a whole number from 1 to 8", "default 6"]),
    ("--bits 2.5", ["--bits 2.5", "a whole number"]),
    ("--bits 0", ["--bits 0", "from 1 to 8"]),
    ("--bits 9", ["--bits 9", "from 1 to 8"]),
    ("--bits=-1", ["--bits -1", "from 1 to 8"]),
    ("--bits=", ['--bits ""', "from 1 to 8"]),
    ("--steps 1e3", ["--steps 1e3", "write 1000"]),
    ("--steps 0", ["--steps 0", "from 1 to"]),
    ("--steps " + "9" * 5000, ["--steps 999", "from 1 to"]),
    ("--k 1.01", ["--k 1.01", "a number from 0 to 1"]),
    ("--k -0.1", ["--k -0.1", "from 0 to 1"]),
    ("--k nan", ["--k nan", "from 0 to 1"]),
    ("--lr inf", ["--lr inf", "above 0"]),
    ("--lr 1e999", ["--lr 1e999", "above 0"]),
    ("--lr 0", ["--lr 0", "above 0"]),
    ("--beta 1", ["--beta 1", "from 0 and below 1"]),
    ("--flip-gamma 0", ["--flip_gamma 0", "above 0"]),
    ("--threads -1", ["--threads -1", "from 0 to"]),
    ("--threads 5000", ["--threads 5000", "from 0 to 1,024"]),
    ("--seed -1", ["--seed -1", "from 0 to"]),
    ("--data=", ['--data ""', "a text that is not empty"]),
    ("--out_dir=a\nb", ["without control characters"]),
    ("--rule spectrl", ["--rule spectrl", "one of contribution, gain", 'did you mean "spectral"?']),
    ("--method AdamW", ["--method AdamW", 'did you mean "adamw"?']),
    ("--compile yes", ["--compile yes", "one of auto, true, false"]),
    ("--resume=lats", ["--resume lats", 'did you mean "last"?']),
    ("shakespeare_char_small --resume lats", ["--resume lats", 'did you mean "last"?']),
    ("--bits", ["--bits has no value", "from 1 to 8", "write --bits VALUE"]),
    ("--bits --k 0.5", ["--bits has no value"]),
    ("shakespeare_char_smal", ["'shakespeare_char_smal'", "did you mean shakespeare_char_small?"]),
    ("no/such/file.toml", ["'no/such/file.toml'", "neither a TOML file nor a name"]),
    ("configs", ["'configs'", "neither a TOML file"]),
    ("shakespeare_char_small 4", ["'4' is one config too many", "shakespeare_char_small"]),
    ("shakespeare_char_small shakespeare_char_small", ["one config too many"]),
    ("--d-model 100 --n-head 3", ["d_model = 100, n_head = 3", "must divide", "use n_head = 1, 2, 5, 10, 25 or 50"]),
    ("--d-model 12 --n-head 4", ["d_model / n_head = 3", "must be even", "use n_head = 1, 2, 3 or 6"]),
    ("--d-model 7 --n-head 1", ["d_model = 7", "use an even d_model"]),
    ("--grad-accum 5", ["batch_size = 48, grad_accum = 5", "must divide", "use grad_accum = 1, 2, 3, 4, 6 or 8"]),
    ("--k 0.1 --k-end 0.2", ["k_end = 0.2, k = 0.1", "lower k_end", "constant"]),
    ("--ortho-tile 100", ["ortho_tile = 100", "multiple of 16", "use 112"]),
    ("--rule gain --embedding-rule spectral --ortho-tile 8", ["ortho_tile = 8", "use 16"]),
    ("--select-tile 7", ["select_tile = 7", "from 8 to 256"]),
    ("--select-tile 257", ["--select_tile 257", "from 0 to 256"]),
    ("--bits 3 --step-size 7", ["step_size = 7, bits = 3", "at most 6"]),
    ("--bits 1 --step-size 2", ["step_size = 2, bits = 1", "at most 1"]),
    ("--method adamw --warmup 1000", ["warmup = 1000, steps = 1000", "lower warmup"]),
    ("--int_layers mlp --warmup 1000", ["warmup = 1000, steps = 1000", "lower warmup"]),
    ("--k-warmup 1001", ["k_warmup = 1001, steps = 1000", "lower k_warmup"]),
]


@pytest.mark.parametrize("line, fragments", BAD_COMMAND_LINES, ids=[line[:45] for line, _ in BAD_COMMAND_LINES])
def test_bad_command_line(line: str, fragments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    message = refused(line.split(" "))
    for fragment in fragments:
        assert fragment in message


# TOML text (None: a folder of that name), fragments the message must hold
BAD_FILES = {
    "syntax": ("n_layer = 4\nbits = = 6\n", ["bad.toml is not valid TOML", "line 2"]),
    "duplicate": ("k = 1\nk = 0.5\n", ["not valid TOML", "line 2"]),
    "not UTF-8": (b'data = "\xff"\n', ["not valid TOML", "utf-8"]),
    "digits": ("steps = " + "9" * 5000, ["not valid TOML"]),
    "unknown key": ("bit = 6\n", ["unknown key bit in ", "bad.toml", "did you mean bits?"]),
    "name": ('name = "x"\n', ["unknown key name"]),
    "table": ("[model]\nbits = 6\n", ["[model]", "not grouped in tables"]),
    "two spellings": ("d-model = 64\nd_model = 64\n", ["d_model is given twice"]),
    "text for int": ('bits = "6"\n', ['bits = "6" in ', "a whole number from 1 to 8", "write 6"]),
    "float for int": ("bits = 6.0\n", ["bits = 6.0 in ", "a whole number", "write 6"]),
    "bool for int": ("bits = true\n", ["bits = true in ", "a whole number"]),
    "bool for float": ("k = true\n", ["k = true in ", "a number from 0 to 1"]),
    "text for float": ('lr = "x"\n', ['lr = "x" in ', "a number above 0"]),
    "nan": ("k = nan\n", ["k = nan in ", "from 0 to 1"]),
    "inf": ("lr = inf\n", ["lr = inf in "]),
    "list": ("k = [0.5]\n", ["k = [0.5] in "]),
    "hex": ("steps = 0x" + "f" * 5000, ["steps = (an integer of more than 64 bits) in "]),
    "int for text": ("data = 3\n", ["data = 3 in ", "a text that is not empty"]),
    "bool for choice": ("method = true\n", ["method = true in ", "one of gft, adamw"]),
    "date": ("data = 2020-01-01\n", ["data = 2020-01-01 in "]),
    "control characters": ('data = "a\\u0000b"\n', ['data = "a\\u0000b" in ', "control characters"]),
    "range": ("bits = 9\n", ["bits = 9 in ", "from 1 to 8"]),
    "conflict": ("n_head = 3\n", ["d_model = 128, n_head = 3"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case: str, tmp_path: Path) -> None:
    text, fragments = BAD_FILES[case]
    path = tmp_path / "bad.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused([str(path)])
    for fragment in fragments:
        assert fragment in message


def test_problems_are_told_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("bits = 9\nrool = 1\n")
    message = refused([str(path), "--k", "2", "--lerr", "1"])
    assert message.startswith("4 problems")
    for fragment in ("bits = 9", "unknown key rool", "--k 2", "unknown key --lerr"):
        assert fragment in message
    message = refused(["--d-model", "100", "--n-head", "3", "--grad-accum", "5"])
    assert message.startswith("2 problems") and "n_head = 3" in message and "grad_accum = 5" in message


def test_overrides_and_spellings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfbits = 4\r\nbatch-size = 24\r\nk = 1\r\ncompile = true\r\n")  # as Windows writes it
    cfg = load([str(path), "--bits", "3", "--grad-accum=2", "--k_end", "1e-3", "--bits", "5", "--out-dir", "-x"])
    assert (cfg.name, cfg.bits, cfg.batch_size, cfg.grad_accum) == ("mine", 5, 24, 2)
    assert (cfg.k, type(cfg.k), cfg.k_end, cfg.compile, cfg.out_dir) == (1.0, float, 1e-3, "true", "-x")
    assert capsys.readouterr() == ("", "")
    # a bad value in the file does not matter where the command line replaces it
    path.write_text("bits = 99\n")
    assert load([str(path), "--bits", "2"]).bits == 2


@pytest.mark.parametrize("line, expected", [
    ("--resume", "last"), ("--resume best", "best"), ("--resume=previous", "previous"), ("--resume=", ""),
    ("--resume shakespeare_char_small", "last"), ("shakespeare_char_small --resume", "last"),
    ("shakespeare_char_small --resume best", "best"), ("--resume --bits 6", "last"),
])
def test_resume(line: str, expected: str) -> None:
    assert load(line.split()).resume == expected


def test_configs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = load(["shakespeare_char_small"])
    for spelling in ("shakespeare_char_small.toml", str(ROOT / "configs" / "shakespeare_char_small.toml")):
        assert load([spelling]) == small
    assert load(["shakespeare_char_small_muon"]).method == "muon"  # in a folder below configs/
    # a folder of the config's name is not the config; a file that the path names comes first
    (tmp_path / "shakespeare_char_small").mkdir()
    assert load(["shakespeare_char_small"]) == small
    (tmp_path / "shakespeare_char_small.toml").write_text("bits = 2\n")
    assert load(["shakespeare_char_small.toml"]).bits == 2
    assert load(["shakespeare_char_small"]).bits == 6


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(self: Path, encoding: str) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.toml").touch()
    monkeypatch.setattr(Path, "read_text", deny)
    assert "cannot be read: Permission denied; check its permissions" in refused([str(tmp_path / "mine.toml")])


def test_defaults_are_the_small_config(capsys: pytest.CaptureFixture) -> None:
    assert load([]) == Config() == load(["shakespeare_char_small"])
    assert "no config named, so the defaults are used" in capsys.readouterr().err


@pytest.mark.parametrize("name", available())
def test_shipped_configs(name: str, capsys: pytest.CaptureFixture) -> None:
    cfg = load([name])
    assert cfg.name == name and cfg.out_path == Path("out", name)
    text = available()[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and f"python train.py {name}" in text and "# Reaches:" in text
    # a key that the method ignores has no place in a config
    load([name, *(f"--{k}={v}" for k, v in tomllib.loads(text).items())])
    assert capsys.readouterr().err == ""


def test_paper_mode_and_baselines() -> None:
    paper = load(["paper_shakespeare_char"])
    assert (paper.delta, paper.rule, paper.embedding_rule, paper.select_tile, paper.flip_prob, paper.k_schedule) == (
        "sign", "contribution", "contribution", 0, "score", "linear")
    assert [load([f"shakespeare_char_small_{m}"]).method for m in ("adamw", "muon", "ste")] == ["adamw", "muon", "ste"]


@pytest.mark.parametrize("line, note", [
    ("--beta 0.8", "--beta has no effect here: it needs memory = int8"),
    ("--method adamw --beta 0.8", "--beta has no effect here: it needs method = gft and memory = int8"),
    ("--lr 0.1", "--lr has no effect here: it needs method or int_layers other than gft or all"),
    ("--rule gain --ortho-tile 64", "--ortho_tile has no effect here: it needs rule or embedding_rule = spectral"),
    ("--vocab-size 300", "--vocab_size has no effect here: it needs tokenizer = bpe"),
    ("--memory int8 --beta 0.8", ""),
    ("--method ste --bits 4 --lr 0.1", ""),
])
def test_notice_of_keys_without_effect(line: str, note: str, capsys: pytest.CaptureFixture) -> None:
    load(["shakespeare_char_small", *line.split()])
    assert capsys.readouterr().err == (f"note: {note}\n" if note else "")


def test_print_config_can_be_fed_back(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    line = ["paper_shakespeare_char", "--lr", "1e-7", "--data", 'a "b" \\ é \U0001f600', "--resume", "--seed", "7"]
    with pytest.raises(SystemExit) as stopped:
        load([*line, "--print-config"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert list(tomllib.loads(text)) == list(FIELDS)
    path = tmp_path / "again.toml"
    path.write_text(text, encoding="utf-8")
    again = load([str(path)])
    assert again == load(line) and hash(again) == hash(load(line)) and again.name == "again"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_tells_every_key(flag: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        load(["--bits", "99", flag])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for k, f in FIELDS.items():
        entry = text.split(f"  --{k} {f.type.__name__} ")[1].split("\n  --")[0]
        assert f.metadata["help"].split()[0] in entry and f"[{config.show(f.default)}]" in entry
    for group in ("data", "model", "method", "gft", "training", "running"):
        assert f"\n{group}:\n" in text
    assert max(map(len, text.splitlines())) <= 112
    assert all(name in text for name in available())


def test_every_default_is_allowed_and_every_rule_refers_to_a_key() -> None:
    assert validate(Config()) == Config()
    for f in FIELDS.values():
        for condition in f.metadata.get("needs", "").split():
            keys, values = condition.replace("!=", "=").split("=")
            for k in keys.split("|"):
                known = FIELDS[k].metadata.get("choices", IMAGES if k == "data" else ("all",))
                assert set(values.split("|")) & set(known)


def test_replace_and_validate() -> None:
    cfg = validate(dataclasses.replace(Config(name="x"), bits=4, k=1))
    assert (cfg.name, cfg.bits, type(cfg.k)) == ("x", 4, float)
    with pytest.raises(UserError, match="bits = 12: must be"):
        validate(dataclasses.replace(cfg, bits=12))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.bits = 2


def test_dict_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(bits=3, name="run", backend="triton", device="cpu")
    back = from_dict(to_dict(cfg))
    assert back == cfg and back.name == "run"
    assert from_dict({"bits": 3}) == Config(bits=3)
    for values, fragment in [({"bitz": 3}, "unknown key bitz; did you mean bits?"), ({"bits": "3"}, "write 3"),
                             ({"n_head": 3}, "must divide")]:
        with pytest.raises(UserError, match=fragment.replace("?", r"\?")) as caught:
            from_dict(values)
        assert caught.value.code == 2


def test_differences_are_those_that_change_the_weights() -> None:
    a = Config()
    assert differences(a, dataclasses.replace(a, out_dir="x", resume="last", sample_tokens=0, save_every=7,
                                              eval_every=9, monitor_every=3, data_dir="y", name="other")) == []
    b = dataclasses.replace(a, bits=4, steps=2000, method="ste")
    assert differences(a, b) == ['method = "gft" in the checkpoint, "ste" now', "bits = 6 in the checkpoint, 4 now",
                                 "steps = 1000 in the checkpoint, 2000 now"]


def test_check_against_data() -> None:
    cfg = Config(context=64)
    check_against_data(cfg, 66, 66)
    with pytest.raises(UserError, match="context = 64: the evaluation part of tinyshakespeare has 65") as caught:
        check_against_data(cfg, 1000, 65)
    assert caught.value.code == 2 and "--context 63" in str(caught.value)
    check_against_data(Config(context=63), 1000, 65)
    with pytest.raises(UserError, match="2 problems"):
        check_against_data(cfg, 0, 1)



PROGRAM = """
import sys
from run.config import load
from run.errors import UserError
try:
    print(load(sys.argv[1:]).bits)
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.code)
"""


@pytest.mark.parametrize("line, code, out, err", [
    ("shakespeare_char_small --bits 4", 0, "4\n", ""),
    ("shakespeare_char_small --bits 12", 2, "", "error: --bits 12: must be a whole number from 1 to 8 (default 6)\n"),
    ("shakespeare_char_small --print-config", 0, to_toml(load(["shakespeare_char_small"])), ""),
])
def test_as_a_program(line: str, code: int, out: str, err: str) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *line.split()], cwd=ROOT, capture_output=True, text=True,
                         encoding="utf-8")
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, out, err)


def test_what_int32_can_sum_is_the_kernels_limit():
    """Written twice, because config needs no torch."""
    assert SAFE_PRODUCTS == MAX_REDUCTION
