"""python -m experiments inspect: the numbers it draws, and what it says of runs that it cannot draw."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train
from experiments.__main__ import main
from experiments.inspect_run import histograms, over_time, shares, singular_values
from gft.layers import int_layers
from model import load_net
from run import checkpoint

TINY = ["--n_layer=1", "--d_model=16", "--n_head=2", "--context=8", "--steps=4", "--monitor_every=2", "--log_every=1",
        "--eval_every=2", "--eval_windows=2", "--sample_tokens=0", "--compile=false", "--threads=1"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a gft run and of an adamw run."""
    folder = tmp_path_factory.mktemp("inspect")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    for method in ("gft", "adamw"):
        out = [f"--data={text}", f"--out_dir={folder / method}", f"--method={method}"]
        assert train.main(["shakespeare_char_small", *TINY, *out]) == 0
    return folder / "gft", folder / "adamw"


def test_it_draws(runs, capsys):
    gft, adamw = runs
    assert main(["inspect", str(gft), "--against", str(adamw)]) == 0
    assert f"wrote {gft / 'inspect.png'}" in capsys.readouterr().out
    with_both = np.asarray(Image.open(gft / "inspect.png").convert("L"))
    assert main(["inspect", str(gft), "--no-votes"]) == 0
    alone = np.asarray(Image.open(gft / "inspect.png").convert("L"))
    height, width = alone.shape
    votes = np.s_[height // 2 + 40 :, 2 * width // 3 + 60 :]
    assert (with_both[votes] < 200).sum() > (alone[votes] < 200).sum() + 500  # lines in place of a sentence
    assert main(["inspect", str(adamw)]) == 0, "a run without integer layers has its losses"


def test_its_numbers(runs):
    folder = runs[0]
    net, meta, head = load_net(folder, "last")
    cfg = checkpoint.config_of(meta, head)
    found = histograms(folder, cfg, net)
    assert list(found)[0] == "step 0" and list(found)[-1] == "step 4"
    assert all(abs(values.sum() - 1) < 1e-9 and len(values) == 63 for values in found.values())
    weights = torch.cat([layer.weight.flatten() for layer in int_layers(net)])
    assert shares(net)[31] == pytest.approx((weights == 0).double().mean().item())
    assert not np.array_equal(found["step 0"], found["step 4"])

    spectra = singular_values(net, cfg, 4)
    assert list(spectra) == [name for name, _ in net.named_modules() if name.split(".")[-1] in
                             ("embedding", "qkv", "out", "up", "down", "head")]  # fmt: skip
    assert all(values[0] == 1 and (np.diff(values) <= 0).all() for values in spectra.values())


def test_measurements_over_time():
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "layers": {"a": {"flips": 0.5}, "b": {"flips": 0.25}}},
               {"step": 4, "layers": {"a": {"flips": 0.1}, "b": {}}}]  # fmt: skip
    steps, names, values = over_time(records, "flips")
    assert steps == [2, 4] and names == ["a", "b"]
    assert np.array_equal(values, [[0.5, 0.1], [0.25, np.nan]], equal_nan=True)
    assert over_time(records[:1], "flips")[2].shape == (0, 0)


def test_what_cannot_be_drawn_is_said(runs, tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no metrics.jsonl there" in capsys.readouterr().err
    folder = shutil.copytree(runs[0], tmp_path / "moved")
    (runs[0].parent / "text.txt").rename(tmp_path / "text.txt")  # the votes need the data
    try:
        assert main(["inspect", str(folder)]) == 0
    finally:
        (tmp_path / "text.txt").rename(runs[0].parent / "text.txt")
    assert "note: no votes:" in capsys.readouterr().err
    assert json.loads((folder / "last.json").read_text())["meta"]["step"] == 4, "nothing saved is changed"
