"""What long runs need: checkpoints that stay, evaluations that take a share of the time, TensorBoard."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import train
from data.text_task import TextTask
from run import checkpoint, config, log

TINY = """--data stdlib --n_layer 1 --n_head 2 --d_model 32 --context 16 --batch_size 4 --steps 12 --log_every 4
    --eval_every 2 --save_every 5 --monitor_every 6 --eval_windows 8 --sample_tokens 0 --compile false --threads 1
    --ortho_tile 32 --topk_tile 32""".split()


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(log, "draw", lambda *_: None)


def run(capsys, out: Path, **keys) -> dict:
    assert train.main([*TINY, "--out_dir", str(out), *(f"--{k}={v}" for k, v in keys.items())]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_checkpoints_that_stay_do_not_change_the_run(capsys, tmp_path):
    whole = run(capsys, tmp_path / "a")
    kept = run(capsys, tmp_path / "b", keep_every=3, keep_last=2)
    assert kept["weights_sha256"] == whole["weights_sha256"]
    assert [path.name for path in sorted((tmp_path / "b").glob("step-*"))] == ["step-00000009", "step-00000012"]
    again = run(capsys, tmp_path / "b" / "step-00000009", resume="last")
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert checkpoint.load(tmp_path / "b" / "step-00000012", "last")[1]["step"] == 12


def test_evaluations_take_their_share(capsys, tmp_path, monkeypatch):
    """Here time passes in evaluations alone, ten seconds in each, and one in each reading of the clock."""
    evaluate, now = TextTask.evaluate, [0.0]

    def slow(*args):
        now[0] += 10
        return evaluate(*args)

    def clock():
        now[0] += 0.1
        return now[0]

    monkeypatch.setattr(TextTask, "evaluate", slow)
    monkeypatch.setattr(log.time, "perf_counter", clock)
    for share, steps in ((1.0, [2, 4, 6, 8, 10, 12]), (0.3, [2, 12])):
        out = tmp_path / str(share)
        run(capsys, out, eval_share=share)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if "val_loss" in record] == steps


def test_tensorboard_gets_what_metrics_get(capsys, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    assert train.main([*TINY, "--logger", "tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: True)
    run(capsys, tmp_path / "o", logger="tensorboard")
    assert written[0] == (str(tmp_path / "o"), 1)
    last = json.loads((tmp_path / "o" / "metrics.jsonl").read_text().splitlines()[-1])
    names = {"loss", "flips", "seconds", "val_loss", "bits_per_byte", "perplexity"}
    assert {(name, last[name], 12) for name in names - {"flips"}} <= set(written[1:])
    assert {name for name, _, step in written[1:] if step == 12} == names | {"at_limit", "zeros", "dead_rows", "undone"}
