"""A text as a task: which windows a step reads, micro-batches, evaluation."""

import dataclasses
import math
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.text_task import TextTask
from data.tokenizers import CharTokenizer
from kernels.philox import Stream, uniform
from run.config import Config

CPU = torch.device("cpu")
SMALL = Config(context=9, batch_size=12, eval_windows=5)


def task(dtype: str = "<u2", largest: int = 60_000, **settings) -> TextTask:
    random = np.random.default_rng(0)
    train, val = (random.integers(0, largest, n).astype(dtype) for n in (500, 100))
    train[:3] = largest - 1
    train.flags.writeable = val.flags.writeable = False
    text = SimpleNamespace(
        train=train, val=val, name="made", source="a test", sha256="0",
        tokenizer=SimpleNamespace(vocab_size=largest, byte_lengths=lambda: np.arange(largest) % 7),
    )  # fmt: skip
    return TextTask(dataclasses.replace(SMALL, **settings), text)


@pytest.mark.parametrize(("dtype", "largest"), [("<u2", 65), ("<u2", 65_536), ("<u4", 100_000)])
def test_windows_begin_where_philox_says(dtype, largest):
    made = task(dtype, largest, seed=7)
    ((x, y),) = made.batches(11, CPU)
    starts = (uniform(7, 11, Stream.BATCH, 12) * (500 - 9)).long()
    for row, start in enumerate(starts.tolist()):
        window = made.data.train[start : start + 10].astype("int64")
        assert x[row].tolist() == window[:-1].tolist() and y[row].tolist() == window[1:].tolist()
    assert x.dtype == y.dtype == torch.int64


def test_the_whole_text_is_read():
    made = task()
    made.prepare(0, CPU)
    first = torch.cat([made.starts(torch.tensor([1, step]), 0, 12) for step in range(1000)])
    assert first.min() == 0 and first.max() == 500 - 9 - 1  # the last token is only a target


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_micro_batches_are_parts_of_the_batch(parts):
    (x, y), split = *task().batches(4, CPU), list(task(grad_accum=parts).batches(4, CPU))
    assert len(split) == parts
    assert torch.equal(torch.cat([a for a, _ in split]), x) and torch.equal(torch.cat([b for _, b in split]), y)


def test_evaluation_is_the_mean_over_windows_spread_over_the_text():
    made = task(largest=50, batch_size=4, eval_windows=3)
    seen = []

    def net(x):
        seen.append(x)
        return torch.zeros(*x.shape, 50)

    assert made.evaluate(net, CPU)["val_loss"] == pytest.approx(math.log(50), abs=1e-6)
    expected = [made.data.val[start : start + 9].tolist() for start in (0, 45, 90)]  # 90 + 10 tokens: the end
    assert torch.cat(seen).tolist() == expected
    assert len(made.data.val) == 100
    targets = np.concatenate([made.data.val[start + 1 : start + 10] for start in (0, 45, 90)])
    found = made.evaluate(net, CPU)
    assert found["bits_per_byte"] == pytest.approx(27 * math.log2(50) / (targets % 7).sum(), abs=1e-6)
    assert found["perplexity"] == pytest.approx(50, abs=1e-4)
    seen.clear()
    wide = task(largest=50, batch_size=4, eval_windows=1000)
    seen.clear()
    wide.evaluate(net, CPU)
    assert len(torch.cat(seen)) == 91 and len(seen) == 23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_in_parts_is_that_of_the_whole(dtype, monkeypatch):
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = task(largest=50, batch_size=4)
    whole = made.evaluate(lambda x: table[x], CPU)
    parts = []
    monkeypatch.setattr("kernels.tiles.PART", 400)  # logits of 2 tokens of 4 windows
    monkeypatch.setattr("data.text_task.joined", lambda found, dim: parts.append(len(found)) or torch.cat(found, dim))
    assert made.evaluate(lambda x: table[x], CPU) == whole and max(parts) == 5


def test_usage_begins_with_a_word_of_the_text(tmp_path):
    made = task()
    made.tokenizer = CharTokenizer("\nROMEO: hark")
    made.data.val = made.tokenizer.encode_array("ark\nROMEO:\nhark")
    assert shlex.split(made.usage(tmp_path)) == ["sample.py", str(tmp_path), "--prompt", "ROMEO:"]
    made.tokenizer = CharTokenizer("\n\x1b[OK hark")
    made.data.val = made.tokenizer.encode_array("ark\n\x1b[O hark")
    assert shlex.split(made.usage(tmp_path))[-1] == "hark"  # nothing that acts on a terminal
    assert made.saved() == {"tokenizer": made.tokenizer.to_json()}
