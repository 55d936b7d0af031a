"""sample.py: the sampler against its definition, the cache against no cache, the program against its users."""

import io
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import decoder
import sample
from data.bpe import PATTERN
from data.tokenizers import BpeTokenizer, CharTokenizer
from decoder import CHUNK
from kernels.philox import Stream, uniform
from model import ModelConfig, Transformer
from run import checkpoint, command
from run.config import Config, to_dict
from run.errors import UserError
from sample import NetSource

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = dict(temperature=1.0, top_k=0, top_p=1.0, seed=3)


class FakeNet(nn.Module):
    """Logits that depend on the newest token alone; `fed` notes how many tokens came at each call, `modes` how."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", table)
        self.fed: list[int] = []
        self.modes: set[tuple[bool, bool]] = set()

    def new_cache(self) -> object:
        return SimpleNamespace(repeat=lambda rows: None)

    def forward(self, tokens: torch.Tensor, cache: object = None) -> torch.Tensor:
        self.fed.append(tokens.shape[1])
        self.modes.add((self.training, torch.is_grad_enabled()))
        return self.table[tokens]


@pytest.fixture
def net() -> FakeNet:
    return FakeNet(torch.randn(13, 13, generator=torch.Generator().manual_seed(0)) * 2)


def tokens(net, n=40, prompt=(1,), use_cache=True, sample_index=0, **options) -> list[int]:
    options = DEFAULTS | options | {"samples": (sample_index,)}
    return [token for (token,) in sample.generate(NetSource(net, use_cache), list(prompt), n, **options)]


def probabilities(logits, temperature=1.0, top_k=0, top_p=1.0) -> torch.Tensor:
    """Of one text."""
    return torch.from_numpy(sample.probabilities(np.asarray(logits, np.float32)[None], temperature, top_k, top_p)[0])


def draw(p, u: float) -> int:
    return int(sample.draw(np.asarray(p)[None], np.array([u]))[0])


def kept(logits, top_k=0, top_p=1.0) -> set[int]:
    return set(probabilities(logits, 1.0, top_k, top_p).nonzero().flatten().tolist())


def test_greedy_is_the_argmax_and_ignores_the_seed(net):
    text = tokens(net, temperature=0.0)
    assert text == [int(net.table[token].argmax()) for token in [1, *text[:-1]]]
    assert text == tokens(net, temperature=0.0, seed=99) == tokens(net, top_k=1, temperature=5.0)


def test_greedy_takes_the_lower_of_equal_tokens():
    assert tokens(FakeNet(torch.tensor([[0.0, 2.0, 2.0]] * 3)), n=3, temperature=0.0) == [1, 1, 1]


def test_a_vanishing_temperature_is_greedy_and_a_large_one_is_uniform(net):
    assert tokens(net, temperature=1e-320) == tokens(net, temperature=0.0)
    p = probabilities(net.table[0], 1e6, 0, 1.0)
    torch.testing.assert_close(p, torch.full((13,), 1 / 13, dtype=torch.float64), atol=1e-5, rtol=0)


def test_probabilities_without_filters_are_the_softmax(net):
    expected = torch.softmax(net.table[4].double() / 0.7, 0)
    torch.testing.assert_close(probabilities(net.table[4], 0.7, 0, 1.0), expected, atol=1e-15, rtol=1e-13)


def test_top_k_keeps_exactly_k_and_of_equal_logits_the_lower_index():
    logits = [1.0, 3.0, 2.0, 3.0, 2.0, 2.0]
    sets = [{1}, {1, 3}, {1, 3, 2}, {1, 3, 2, 4}, {1, 3, 2, 4, 5}, set(range(6)), set(range(6))]
    assert [kept(logits, top_k=k) for k in range(1, 8)] == sets


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = [math.log(w) for w in (0.125, 0.5, 0.25, 0.125)]
    cases = {1e-9: {1}, 0.49: {1}, 0.51: {1, 2}, 0.74: {1, 2}, 0.76: {0, 1, 2}, 0.87: {0, 1, 2}, 0.88: {0, 1, 2, 3}}
    assert {p: kept(logits, top_p=p) for p in cases} == cases
    assert kept([0.0] * 4, top_p=0.5) == {0, 1}  # reached exactly: nothing more is taken


def test_top_p_counts_what_top_k_left_and_the_rest_sums_to_one():
    logits = torch.tensor([math.log(w) for w in (0.4, 0.3, 0.2, 0.1)])
    assert kept(logits.tolist(), top_k=2, top_p=0.5) == {0}  # 0.4 of the remaining 0.7
    p = probabilities(logits, 1.0, 3, 0.6)  # 0.4 + 0.3 of the remaining 0.9
    torch.testing.assert_close(p, torch.tensor([4 / 7, 3 / 7, 0, 0], dtype=torch.float64), atol=1e-7, rtol=0)


def test_draw_inverts_the_distribution_function():
    p = torch.tensor([0.0, 0.3, 0.0, 0.2, 0.5, 0.0], dtype=torch.float64)
    n = 1000
    drawn = torch.tensor([draw(p, (i + 0.5) / n) for i in range(n)])
    assert torch.equal(torch.bincount(drawn, minlength=6), (p * n).round().long())
    assert torch.equal(drawn, drawn.sort().values)
    assert draw(p, 0.0) == 1 and draw(p, math.nextafter(1.0, 0.0)) == 4


def test_generated_tokens_are_distributed_as_the_softmax_says(net):
    n = 4000
    (drawn,) = sample.generate(NetSource(net), [1], 1, **DEFAULTS, samples=range(n))
    expected = probabilities(net.table[1], 1.0, 0, 1.0) * n
    seen = torch.bincount(torch.tensor(drawn), minlength=13)
    assert ((seen - expected) ** 2 / expected).sum() < 32.9  # chi-squared of 12 degrees: passed by 99.9 %


def test_token_t_of_sample_i_is_drawn_by_its_own_philox_number(net):
    text = tokens(net, n=5, seed=2**63 + 7, sample_index=6, temperature=0.9, top_p=0.9)
    for t, (before, token) in enumerate(zip([1, *text], text)):
        u = float(uniform(2**63 + 7, t, Stream.SAMPLE, 7)[6])
        assert token == draw(probabilities(net.table[before], 0.9, 0, 0.9), u)


def test_same_seed_same_text_other_seed_or_sample_other_text(net):
    assert tokens(net) == tokens(net)
    texts = {tuple(tokens(net, seed=seed, sample_index=i)) for seed in (0, 1, 2**40) for i in (0, 1, 5)}
    assert len(texts) == 9


def test_samples_in_one_pass_are_the_texts_of_each_alone(net):
    together = list(sample.generate(NetSource(net), [1], 300, **DEFAULTS, samples=(0, 5, 2)))
    assert [list(text) for text in zip(*together)] == [tokens(net, 300, sample_index=i) for i in (0, 5, 2)]


def test_the_cache_is_fed_each_token_once_and_a_long_prompt_in_parts(net):
    assert tokens(net, n=4, prompt=range(3)) == tokens(net, n=4, prompt=range(3), use_cache=False)
    assert net.fed == [3, 1, 1, 1] + [3, 4, 5, 6]
    net.fed.clear()
    tokens(net, n=2, prompt=[1] * (2 * CHUNK + 5))
    assert net.fed == [CHUNK, CHUNK, 5, 1]


def test_modes_are_the_callers_between_tokens(net):
    net.train()
    for _ in sample.generate(NetSource(net), [1], 3, **DEFAULTS):
        assert torch.is_grad_enabled() and net.training
    assert net.modes == {(False, False)}


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(UserError, match="not finite"):
        tokens(FakeNet(torch.full((2, 2), math.nan)))


def test_an_empty_prompt_starts_from_a_newline_or_token_0():
    assert sample.start_ids(CharTokenizer("\nab"), "") == [0] and sample.start_ids(CharTokenizer("\t\nab"), "") == [1]
    assert sample.start_ids(CharTokenizer("ab"), "") == [0]
    assert sample.start_ids(CharTokenizer("ab"), "ba") == [1, 0]


def test_a_character_of_several_tokens_is_printed_whole():
    tokenizer = BpeTokenizer([bytes([i]) for i in range(256)], PATTERN)
    text = "aé\U0001f600\ufffdz"
    pieces = list(sample.decoded(tokenizer, text.encode()))
    assert "".join(pieces) == text and {len(piece) for piece in pieces} == {0, 1}
    assert "".join(sample.decoded(tokenizer, text.encode()[:4])) == "aé\ufffd"


@pytest.mark.parametrize("method", ["gft", "adamw", "ste"])
def test_cache_and_no_cache_give_the_same_text_past_the_context(method, monkeypatch):
    config = ModelConfig(vocab_size=31, n_layer=2, n_head=2, d_model=32, context=8, method=method)
    net = Transformer(config, seed=5)
    monkeypatch.setattr(decoder, "CHUNK", 5)
    for prompt in (range(3), range(21)):
        cached = tokens(net, n=40, prompt=prompt)
        assert cached == tokens(net, n=40, prompt=prompt, use_cache=False)
        assert len(set(cached)) > 5


CHARS = "\nROMEO:abcé "


def save_run(folder: Path, name: str = "last", step: int = 7, seed: int = 1) -> None:
    tokenizer = CharTokenizer(CHARS)
    config = Config(n_layer=1, n_head=2, d_model=16, context=8)
    net = Transformer(ModelConfig.from_config(config, tokenizer.vocab_size), seed=seed)
    meta = {
        "step": step, "config": to_dict(config), "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json()
    }
    checkpoint.save(folder, name, checkpoint.join(model=net.state_dict()), meta)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "tiny"
    save_run(folder)
    return folder


def call(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program, run in this process."""
    code = sample.main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_the_program_prints_the_prompt_and_max_tokens_tokens(run, capsys):
    code, out, err = call(capsys, run, "--prompt", "ROMEO:é", "--max-tokens", 20)
    assert code == 0 and out.startswith("ROMEO:é") and len(out) == 7 + 20 + 1 and out.endswith("\n")
    assert "checkpoint last of step 7; in numpy" in err
    assert call(capsys, run, "--max_tokens=0", "--prompt=ab")[1] == "ab\n"


def test_samples_do_not_depend_on_how_many_are_printed(run, capsys):
    one = call(capsys, run, "--max-tokens", 30)[1]
    three = call(capsys, run, "--max-tokens", 30, "--samples", 3)[1]
    code, again, err = call(capsys, run, "--max-tokens", 30, "--samples", 3, "--no-cache")
    assert code == 0 and "in torch" in err and three == again
    assert three.startswith(f"{one}---\n") and len(set(three.split("\n---\n"))) == 3
    assert call(capsys, run, "--max-tokens", 30, "--seed", 2)[1] != one


def test_best_is_the_default_where_there_is_one(tmp_path, capsys):
    for step in (1, 2):
        save_run(tmp_path, "last", step, seed=step)
    save_run(tmp_path, "best", 1, seed=9)
    assert "best of step 1" in call(capsys, tmp_path, "--max-tokens", 0)[2]
    assert "last of step 2" in call(capsys, tmp_path, "--max-tokens", 0, "--checkpoint", "last")[2]
    assert "previous of step 1" in call(capsys, tmp_path, "--max-tokens", 0, "--checkpoint", "previous")[2]


def test_the_prompt_can_come_from_standard_input(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\nO".encode())))
    assert call(capsys, run, "--prompt", "-", "--max-tokens", 0)[1] == "é\nO\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    code, _, err = call(capsys, run, "--prompt", "-")
    assert code == 2 and "not UTF-8 at byte 2" in err


def test_byte_order_marks_in_a_prompt_are_left_out(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfab\n\xef\xbb\xbfO")))
    assert call(capsys, run, "--prompt", "-", "--max-tokens", 0)[1] == "ab\nO\n"
    assert call(capsys, run, "--prompt", "\ufeffab", "--max-tokens", 0)[1] == "ab\n"


@pytest.mark.parametrize("words", [["--help"], ["x", "--sed", "3"]], ids=["help", "mistyped"])
def test_help_and_wrong_options_need_no_torch(words):
    code = f"""
import sys, sample
try:
    sample.main({words!r})
finally:
    print({{"torch", "numpy"}} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("set()\n"), done.stderr


def test_text_of_an_integer_net_needs_no_torch(run):
    code = f"import sys, sample; sample.main([{str(run)!r}, '--max-tokens', '9']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and len(done.stdout) == 10, done.stderr


def test_checkpoints_are_those_that_can_be_loaded():
    assert sorted(command.CHECKPOINTS) == sorted(checkpoint.LOADED)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_an_error_and_any_other_is_raised(run, capsys, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(sample, "load", fail)
    code, _, err = call(capsys, run)
    assert code == 1 and "out of memory" in err
    error = RuntimeError("a fault of the program")
    with pytest.raises(RuntimeError, match="a fault"):
        sample.main([str(run)])


BAD_OPTIONS = {
    "--temperature -0.1": "--temperature -0.1: it must be at least 0",
    "--temperature nan": "must be at least 0 and finite",
    "--temperature inf": "must be at least 0 and finite",
    "--temperature warm": "invalid float value: 'warm'",
    "--top-p 0": "--top-p 0.0: it must be above 0 and at most 1",
    "--top_p 1.01": "at most 1",
    "--top-k -1": "--top-k -1: it must be at least 0",
    "--top-k 2.5": "invalid int value",
    "--max-tokens -1": "must be at least 0",
    "--samples 0": "must be at least 1",
    "--seed -1": "from 0 to 2^64 - 1",
    "--checkpoint first": "choose from",
    "--device tpu": "choose from",
    "--temprature 1": "unknown argument '--temprature'; did you mean --temperature?",
    "--sed=3": "did you mean --seed?",
    "--top 3": "could match --top-k, --top-p",
    "--prompt": "expected one argument",
    "another": "unknown argument 'another'",
}


@pytest.mark.parametrize("words, says", BAD_OPTIONS.items(), ids=BAD_OPTIONS)
def test_a_wrong_option_is_named_with_its_rule(run, capsys, words, says):
    code, out, err = call(capsys, run, *words.split())
    assert code == 2 and out == "" and err.startswith("error: ") and says in err


def test_a_gpu_asked_for_and_not_there_is_an_error(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(capsys, run, "--device", "cuda")
    assert code == 2 and "torch sees no CUDA GPU" in err


def test_an_unknown_character_is_named(run, capsys):
    code, out, err = call(capsys, run, "--prompt", "ROMEO!")
    assert code != 0 and out == "" and "'!'" in err


def test_a_folder_that_is_not_there_is_named_with_the_closest(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    (run.parent.parent / "out").symlink_to(run.parent)
    code, _, err = call(capsys, "out/tony")
    assert code == 2 and "out/tony is not a folder: did you mean out/tiny?" in err
    assert call(capsys, "tiny", "--max-tokens", 0)[0] == 0
    assert "the folder that train.py wrote" in call(capsys, "xyz")[2]


def test_a_damaged_checkpoint_is_named_with_the_option_that_helps(tmp_path, capsys):
    code, _, err = call(capsys, tmp_path)
    assert code == 1 and "last.json is missing" in err
    for step in (1, 2):
        save_run(tmp_path, step=step)
    (tmp_path / "last-00000002.safetensors").write_bytes(b"half")
    code, out, err = call(capsys, tmp_path)
    assert code == 1 and out == "" and "last-00000002.safetensors is damaged" in err
    assert "--checkpoint previous" in err


def test_weights_that_do_not_fit_the_config_are_an_error(tmp_path, capsys):
    save_run(tmp_path)
    tensors, meta = checkpoint.load(tmp_path, "last")
    checkpoint.save(tmp_path, "last", {k: v for k, v in tensors.items() if "head" not in k}, meta)
    code, _, err = call(capsys, tmp_path)
    assert code == 1 and "does not fit" in err and "head" in err


def start(run: Path, *words: str, **options) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    return subprocess.Popen(
        [sys.executable, "sample.py", str(run), *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE,
        # A shell that started the tests in the background has them, and all they start, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **({"stdout": subprocess.PIPE} | options),
    )


def test_stdout_is_utf8_whatever_the_locale(run):
    process = start(run, "--prompt", "-", "--max-tokens", "5", stdin=subprocess.PIPE)
    out, err = process.communicate("éé".encode(), timeout=60)
    assert process.returncode == 0 and out.startswith("éé".encode()) and len(out.decode()) == 8, err


def test_text_streams_and_ctrl_c_ends_it_cleanly(run):
    process = start(run, "--prompt", "ROMEO:", "--max-tokens", "1000000000")
    first = process.stdout.read(30)  # returns long before a billion tokens
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and first.startswith(b"ROMEO:") and out.endswith(b"\n") and b"Traceback" not in err


def test_a_closed_output_is_told(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert sample.main([str(run)]) == 1
    assert "standard output is closed" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_it_quietly(run):
    process = start(run, "--max-tokens", "1000000000")
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0 and len(err.splitlines()) == 1 and err.startswith("checkpoint "), err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_behind_stdout_is_an_error(run):
    with open("/dev/full", "wb") as full:
        process = start(run, "--prompt", "ab", stdout=full)
        err = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and "No space left" in err and "Traceback" not in err and "Exception" not in err
