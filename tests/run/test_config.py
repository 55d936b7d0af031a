"""The command line and TOML: what is accepted, and that every mistake is told with the value, the rule and the remedy.

    python -m pytest -q tests/run/test_config.py
"""

import dataclasses
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kernels.limits import MAX_REDUCTION
from run.config import (
    CONFIGS,
    CONFLICTS,
    FIELDS,
    OTHER_NAMES,
    Config,
    differences,
    from_dict,
    load,
    to_dict,
    to_toml,
    unmet,
)
from run.errors import UserError
from run.keys import rule, show

ROOT = Path(__file__).resolve().parents[2]


def refused(argv: list[str]) -> str:
    """The message with which load refuses argv."""
    with pytest.raises(UserError) as caught:
        load(argv)
    assert caught.value.code == 2
    return str(caught.value)


# command line, fragments the message must hold
BAD_COMMAND_LINES = [
    ("--bitz 4", ["unknown key bitz", "did you mean bits?"]),
    ("--bitz=4", ["unknown key bitz", "did you mean bits?"]),
    ("--batch-sise 4", ["unknown key batch_sise", "did you mean batch_size?"]),
    ("--learning_rate=1", ["unknown key learning_rate", "did you mean lr?"]),
    ("--int_layers mlp,attn", ['int_layers = "mlp,attn"', "must be all, or some of embedding,patch,attention"]),
    ("--bits 2 --keep_bits 2 --init_std 0.1",
     ["bits = 2, keep_bits = 2, init_std = 0.1", "would be 0", "raise init_std or bits"]),
    ("--int_layers patch", ["this net has no such layer", "name others, or all"]),
    ("--data mnist --model mlp --int_layers attention", ["this net has no such layer"]),
    ("--data imagenette --model mlp --image_side 256", ["image_side = 256", "overflow", "use 210 or less"]),
    ("--data imagenette --eval_on test", ['data = "imagenette"', 'eval_on = "test"', "use eval_on = val"]),
    ("--model mlp", ['model = "mlp"', "reads images", "data = mnist"]),
    ("--data imagenette --patch 7", ["image_side = 64, patch = 7", "must divide", "change one of them"]),
    ("--data mnist --patch 8", ['data = "mnist", patch = 8', "must divide 28", "use patch = 1, 2, 4, 7, 14 or 28"]),
    ("--data mnist --patch 7 --d_model 24 --n_head 4", ["d_model = 24, n_head = 4", "2 n_head (images: 4)"]),
    ("--update backward --grad_accum 4", ['update = "backward", grad_accum = 4', "or use grad_accum = 1"]),
    ("--zzzzzz 4", ["unknown key zzzzzz", "--help lists every key"]),
    ("-bits 4", ["unknown key -bits; did you mean bits?"]),
    ("--print-config=1", ["print_config", "1"]),
    ("--name x", ["unknown key name"]),
    ("--bits abc", ["bits = abc", "a whole number from 1 to 8", "default 6"]),
    ("--bits 2.5", ["bits = 2.5", "a whole number"]),
    ("--bits 0", ["bits = 0", "from 1 to 8"]),
    ("--bits 9", ["bits = 9", "from 1 to 8"]),
    ("--bits=-1", ["bits = -1", "from 1 to 8"]),
    ("--bits -1", ["bits = -1", "from 1 to 8"]),
    ("--bits=", ['bits = ""', "from 1 to 8"]),
    ("--steps 1e3", ["steps = 1e3", "a whole number"]),
    ("--steps 0", ["steps = 0", "from 1 to"]),
    ("--steps " + "9" * 5000, ["steps = 999", "from 1 to"]),
    ("--k 1.01", ["k = 1.01", "a number from 0 to 1"]),
    ("--k -0.1", ["k = -0.1", "from 0 to 1"]),
    ("--k nan", ["k = nan", "from 0 to 1"]),
    ("--lr inf", ["lr = inf", "a number from"]),
    ("--lr 1e999", ["lr = 1e999", "a number from"]),
    ("--lr 0", ["lr = 0", "a number from 1e-09"]),
    ("--momentum 1", ["momentum = 1", "from 0 to 0.9999"]),
    ("--flip-gamma 0", ["flip_gamma = 0", "from 0.001"]),
    ("--threads -1", ["threads = -1", "from 0 to"]),
    ("--threads 5000", ["threads = 5000", "from 0 to 1,024"]),
    ("--seed -1", ["seed = -1", "from 0 to"]),
    ("--out_dir=a\nb", ["control characters are not allowed"]),
    ("--rule spectrl", ["rule = spectrl", "one of contribution, gain", 'did you mean "spectral"?']),
    ("--method AdamW", ["method = AdamW", 'did you mean "adamw"?']),
    ("--compile yes", ["compile = yes", "one of auto, true, false"]),
    ("--resume=lats", ["resume = lats", 'did you mean "last"?']),
    ("shakespeare_char_small --resume lats", ["resume = lats", 'did you mean "last"?']),
    ("--bits", ["--bits: expected one argument", "write --key value"]),
    ("--bits --k 0.5", ["--bits: expected one argument"]),
    ("shakespeare_char_smal", ["'shakespeare_char_smal'", "did you mean shakespeare_char_small?"]),
    ("no/such/file.toml", ["'no/such/file.toml'", "neither a TOML file nor a name"]),
    ("configs", ["'configs'", "neither a TOML file"]),
    ("shakespeare_char_small 4", ["'4' is one config too many", "shakespeare_char_small"]),
    ("shakespeare_char_small shakespeare_char_small", ["one config too many"]),
    ("--d-model 100 --n-head 3", ["d_model = 100, n_head = 3", "a multiple of 2 n_head"]),
    ("--d-model 12 --n-head 4", ["d_model = 12, n_head = 4", "a multiple of 2 n_head"]),
    ("--d-model 7 --n-head 1", ["d_model = 7", "a multiple of 2 n_head"]),
    ("--grad-accum 5", ["batch_size = 48, grad_accum = 5", "must divide"]),
    ("x" * 300, ["File name too long"]),
    ("--k 0.1 --k-end 0.2", ["k_end = 0.2, k = 0.1", "lower k_end", "constant"]),
    ("--ortho-tile 100", ["ortho_tile = 100", "multiple of 16"]),
    ("--rule gain --embedding-rule spectral --ortho-tile 8", ["ortho_tile = 8", "multiple of 16"]),
    ("--topk-tile 7", ["topk_tile = 7", "from 8 to 256"]),
    ("--topk-tile 257", ["topk_tile = 257", "from 0 to 256"]),
    ("--bits 3 --step-size 63", ["step_size = 63, bits = 3, keep_bits = 0", "lower step_size or raise keep_bits"]),
    ("--bits 4 --keep-bits 3", ["keep_bits = 3, bits = 4", "keeps at least the bits that are read"]),
    ("--bits 1 --keep_bits 1 --step-size 2", ["step_size = 2, bits = 1, keep_bits = 1"]),
    ("--method adamw --warmup 1000", ["warmup = 1000, steps = 1000", "lower warmup"]),
    ("--int_layers mlp --warmup 1000", ["warmup = 1000, steps = 1000", "lower warmup"]),
    ("--k-warmup 1001", ["k_warmup = 1001, steps = 1000", "lower k_warmup"]),
    *[(f"--{old} 1", [f"unknown key {old}; did you mean {new}?"]) for old, new in OTHER_NAMES.items()],
]


@pytest.mark.parametrize("line, fragments", BAD_COMMAND_LINES, ids=[line[:45] for line, _ in BAD_COMMAND_LINES])
def test_bad_command_line(line: str, fragments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    message = refused(line.split(" "))
    for fragment in fragments:
        assert fragment in message


# TOML text, fragments the message must hold
BAD_FILES = {
    "syntax": ("n_layer = 4\nbits = = 6\n", ["bad.toml is not readable TOML", "line 2"]),
    "duplicate": ("k = 1\nk = 0.5\n", ["not readable TOML", "line 2"]),
    "not UTF-8": (b'data = "\xff"\n', ["not readable TOML", "utf-8"]),
    "digits": ("steps = " + "9" * 5000, ["not readable TOML"]),
    "hexadecimal digits": ("steps = 0x" + "f" * 5000, ["steps = (int, too large to show) in bad.toml", "whole number"]),
    "tables in tables": ("k" + ".k" * 5000 + " = 1", ["k = (dict, too large to show) in bad.toml", "a number from"]),
    "lists in lists": ("k = " + "[" * 9000 + "]" * 9000, ["not readable TOML"]),
    "a long text": (f'method = "{"x" * 999}"', [f"method = {'x' * 200}... in bad.toml", "one of gft, adamw"]),
    "too long": ("# nothing\n" * 2001, ["more than 20,000 characters"]),
    "unknown key": ("bit = 6\n", ["unknown key bit in bad.toml", "did you mean bits?"]),
    "dash": ("d-model = 64\n", ["unknown key d-model in bad.toml", "did you mean d_model?"]),
    "name": ('name = "x"\n', ["unknown key name"]),
    "table": ("[training]\nbits = 6\n", ["unknown key training in bad.toml"]),
    "table of a key's name": ("[model]\nbits = 6\n", ["model = {'bits': 6} in bad.toml", "one of transformer, mlp"]),
    "float for int": ("bits = 6.5\n", ["bits = 6.5 in bad.toml", "a whole number"]),
    "bool for int": ("bits = true\n", ["bits = True in bad.toml", "a whole number"]),
    "bool for float": ("k = true\n", ["k = True in bad.toml", "a number from 0 to 1"]),
    "text for float": ('lr = "x"\n', ['lr = x in bad.toml', "a number from"]),
    "nan": ("k = nan\n", ["k = nan in bad.toml", "from 0 to 1"]),
    "inf": ("lr = inf\n", ["lr = inf in bad.toml"]),
    "list": ("k = [0.5]\n", ["k = [0.5] in bad.toml"]),
    "bool for choice": ("method = true\n", ["method = True in bad.toml", "one of gft, adamw"]),
    "date for choice": ("method = 2020-01-01\n", ['method = 2020-01-01 in bad.toml']),
    "control characters": ('data = "a\\u0000b"\n', ['data = "a\\u0000b"', "control characters are not allowed"]),
    "range": ("bits = 9\n", ["bits = 9 in bad.toml", "from 1 to 8"]),
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
    for fragment in ("bits = 9", "unknown key rool", "k = 2", "unknown key lerr"):
        assert fragment in message
    message = refused(["--d-model", "100", "--n-head", "3", "--grad-accum", "5"])
    assert message.startswith("2 problems") and "n_head = 3" in message and "grad_accum = 5" in message


def test_a_mistyped_config_and_mistyped_keys_are_told_together() -> None:
    message = refused(["mnits", "--k", "2", "--lerr=1"])
    assert message.startswith("3 problems") and "did you mean mnist?" in message and "unknown key lerr" in message
    # "mnits" may be the value of an unknown key here; the key is what is told
    assert refused(["--lerr", "mnits"]) == "unknown key lerr; did you mean lr?"


def test_overrides_and_spellings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfbits = 4\r\nbatch_size = 24\r\nk = 1\r\ncompile = true\r\n")  # as Windows writes it
    cfg = load([str(path), "--bits", "3", "--grad-accum=2", "--k_end", "1e-3", "--bits", "5", "--out-dir=-x"])
    assert (cfg.name, cfg.bits, cfg.batch_size, cfg.grad_accum) == ("mine", 5, 24, 2)
    assert (cfg.k, type(cfg.k), cfg.k_end, cfg.compile, cfg.out_dir) == (1.0, float, 1e-3, "true", "-x")
    assert capsys.readouterr() == ("", "")
    assert load(["--bits", "3", str(path)], notes=False).bits == 3
    # a bad value in the file does not matter where the command line replaces it
    path.write_text("bits = 99\n")
    assert load([str(path), "--bits", "2"]).bits == 2


@pytest.mark.parametrize("line, expected", [
    ("--resume", "last"), ("--resume best", "best"), ("--resume=previous", "previous"), ("--resume=", ""),
    ("shakespeare_char_small --resume", "last"),
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
    monkeypatch.setattr(Path, "open", deny)
    assert "mine.toml is not readable TOML: [Errno 13] Permission denied" in refused([str(tmp_path / "mine.toml")])


def test_defaults_are_the_small_config(capsys: pytest.CaptureFixture) -> None:
    assert load([]) == Config() == load(["shakespeare_char_small"])
    assert "no config named, so the defaults are used" in capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs(name: str, capsys: pytest.CaptureFixture) -> None:
    cfg = load([name])
    assert cfg.name == name
    text = CONFIGS[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and f"python train.py {name}" in text and "# Reaches:" in text
    # a key that the method ignores has no place in a config
    load([name, *(f"--{k}={v}" for k, v in tomllib.loads(text).items())])
    assert capsys.readouterr().err == ""


def test_paper_mode_and_baselines() -> None:
    paper = load(["paper_shakespeare_char"])
    assert (paper.delta, paper.rule, paper.embedding_rule, paper.topk_tile, paper.flip_prob, paper.k_schedule) == (
        "sign", "contribution", "contribution", 0, "score", "linear")
    assert [load([f"shakespeare_char_small_{m}"]).method for m in ("adamw", "muon", "ste")] == ["adamw", "muon", "ste"]


@pytest.mark.parametrize("line, note", [
    ("--method adamw --momentum 0.8", "--momentum has no effect here: it needs method == 'gft'"),
    ("--lr 0.1", "--lr has no effect here: it needs (method != 'gft' or int_layers != 'all')"),
    ("--rule gain --ortho-tile 64",
     "--ortho_tile has no effect here: it needs method == 'gft' and 'spectral' in (rule, embedding_rule)"),
    ("--vocab-size 300", "--vocab_size has no effect here: it needs tokenizer == 'bpe'"),
    ("--hflip 0.5", "--hflip has no effect here: it needs (data in ('imagenette', 'mnist') or data.endswith('/'))"),
    ("--momentum 0.8", ""),
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
def test_help_tells_every_key(flag: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "112")
    with pytest.raises(SystemExit) as stopped:
        load(["--bits", "99", flag])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for k, f in FIELDS.items():
        entry = " ".join(text.split(f"  --{k} ")[1].split("\n  --")[0].split())
        assert f.metadata["help"] in entry and rule(f) in entry and f"[{show(f.default)}]" in entry
    for group in ("data", "model", "method", "training", "running"):
        assert f"\n{group}:\n" in text
    assert max(map(len, text.splitlines())) <= 112
    assert all(name in text for name in CONFIGS)


def test_every_default_is_allowed_and_every_condition_is_about_keys() -> None:
    cfg = Config()
    assert from_dict(to_dict(cfg)) == cfg
    for f in FIELDS.values():
        assert unmet(cfg, f) in ("", f.metadata["needs"])
        assert f.type is str or len(f.metadata["allowed"]) == 2
    assert all(compile(must, must, "eval") for must in CONFLICTS)
    assert set(OTHER_NAMES.values()) <= set(FIELDS) and not set(OTHER_NAMES) & set(FIELDS)


def test_pixels_that_an_mlp_can_sum() -> None:
    assert 3 * 210**2 <= MAX_REDUCTION < 3 * 211**2
    assert load("--data imagenette --model mlp --image_side 210".split(), notes=False).image_side == 210


def test_what_a_checkpoint_holds_is_checked() -> None:
    cfg = from_dict(to_dict(dataclasses.replace(Config(name="x"), bits=4, k=1)))
    assert (cfg.name, cfg.bits, type(cfg.k)) == ("x", 4, float)
    with pytest.raises(UserError, match="bits = 12: must be"):
        from_dict(to_dict(dataclasses.replace(cfg, bits=12)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.bits = 2


def test_dict_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(bits=3, name="run", backend="triton", device="cpu")
    back = from_dict(to_dict(cfg))
    assert back == cfg and back.name == "run"
    assert from_dict({"bits": 3}) == Config(bits=3)
    for values, fragment in [({"bitz": 3}, "unknown key bitz; did you mean bits?"), ({"bits": "x"}, "a whole number"),
                             ({"n_head": 3}, "a multiple of 2 n_head")]:
        with pytest.raises(UserError, match=fragment.replace("?", r"\?")) as caught:
            from_dict(values)
        assert caught.value.code == 2


def test_differences_are_those_that_change_the_weights() -> None:
    a = Config()
    free = dict(out_dir="x", resume="last", sample_tokens=0, save_every=7, eval_every=9, monitor_every=3, log_every=5,
                keep_every=3, keep_last=2, logger="tensorboard", eval_share=0.1)  # fmt: skip
    assert differences(a, dataclasses.replace(a, **free, data_dir="y", name="other")) == []
    resolved = dict(data="moved.txt", device="cpu", backend="torch", compile="false", threads=3)
    assert differences(a, dataclasses.replace(a, **resolved)) == [], "contents and choices are compared elsewhere"
    spelled = dict(int_layers="head,mlp,attention,embedding,patch", vocab_size=999, hflip=0.5, muon_lr=1.0)
    assert differences(a, dataclasses.replace(a, **spelled)) == [], "all layers, and keys without an effect"
    assert differences(a, dataclasses.replace(a, int_layers="head,mlp", lr=1.0)) == [
        'int_layers = "all" in the checkpoint, "head,mlp" now', "lr = 0.008 in the checkpoint, 1.0 now"]  # fmt: skip
    assert differences(a, dataclasses.replace(a, keep_bits=6)) == [], "both keep 6 bits"
    assert differences(a, dataclasses.replace(a, keep_bits=7)) == ["keep_bits = 0 in the checkpoint, 7 now"]
    b = dataclasses.replace(a, bits=4, steps=2000, method="ste")
    assert differences(a, b) == ['method = "gft" in the checkpoint, "ste" now', "bits = 6 in the checkpoint, 4 now",
                                 "steps = 1000 in the checkpoint, 2000 now"]


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
    ("shakespeare_char_small --bits 12", 2, "", "error: bits = 12: must be a whole number from 1 to 8 (default 6)\n"),
    ("shakespeare_char_small --print-config", 0, to_toml(load(["shakespeare_char_small"])), ""),
])
def test_as_a_program(line: str, code: int, out: str, err: str) -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, *line.split()], cwd=ROOT, capture_output=True, text=True,
                         encoding="utf-8")
    assert (ran.returncode, ran.stdout, ran.stderr) == (code, out, err)


def test_mistakes_are_answered_without_slow_imports() -> None:
    """torch and what comes with it take seconds to import."""
    program = "import sys, run.config; print(sorted({'torch', 'numpy', 'matplotlib', 'triton'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


def test_a_folder_is_one_of_images_unless_it_holds_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of images gets a slash, by which a checkpoint tells what it was trained on, wherever it is used."""
    monkeypatch.chdir(tmp_path)
    for name in ("pets", "tinyshakespeare", "inside/deep"):
        Path(name).mkdir(parents=True)
    cfg = load(["imagenette_small", "--data", "pets"], notes=False)
    assert (cfg.data, cfg.image_side, cfg.color) == ("pets/", 64, "rgb") and cfg.of_images
    grey = load(["mnist", "--data", "pets"], notes=False)
    assert load(["mnist", "--data=pets/"], notes=False) == grey
    assert (grey.data, grey.image_side, grey.color, grey.layer_kinds) == ("pets/", 28, "grey", ("mlp", "head"))
    assert load(["mnist", "--data", "pets/", "--color", "rgb"], notes=False).color == "rgb"
    assert load(["--data", "deep", "--data_dir", "inside"], notes=False).data == "deep/"
    monkeypatch.setenv("NANOGFT_DATA", "inside")
    assert load(["--data", "deep"], notes=False).data == "deep/"
    assert load(["--data", str(tmp_path / "pets")], notes=False).data == f"{tmp_path}/pets/"
    assert load([], notes=False).data == "tinyshakespeare" and not load([], notes=False).of_images
    for name, slash in {"a.txt": "", "b.jsonl.gz": "", ".hidden.png": "", "README.md": "", "cats/1.jpg": "/"}.items():
        path = Path("pets", name)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert {load(["--data", given], notes=False).data for given in ("pets", "pets/")} == {f"pets{slash}"}
    shutil.rmtree("pets")
    Path("pets").mkdir()
    Path("pets/train.bin").touch()
    assert load(["--data", "pets"], notes=False).data == "pets"
    shutil.rmtree("pets")
    assert from_dict(to_dict(grey)) == grey
    assert "patch must divide" in refused(["--data", "gone/", "--patch", "7"])
