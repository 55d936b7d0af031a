"""run/packed.py: weights in few bits, and the packed file that sample.py and predict.py read."""

import numpy as np
import pytest
import torch

import export
import predict
import sample
from data.tokenizers import CharTokenizer
from kernels.limits import weight_limit
from model import ModelConfig, load_net, make_net
from run import checkpoint
from run.config import Config, to_dict
from run.errors import UserError
from run.packed import pack, unpack

CHARS = " abcdefgh"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 8), (5, 13)], ids=str)
def test_packing_loses_nothing(bits, shape):
    q, unit = weight_limit(bits)
    values = torch.arange(-q, q + 1, unit, dtype=torch.int8)
    weight = values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(bits))]
    packed = pack(weight.numpy(), bits)
    assert packed.shape == (bits, -(-weight.numel() // 8)) and packed.dtype == np.uint8
    assert np.array_equal(unpack(packed, shape), weight)


def test_four_levels_take_two_bits():
    weight = np.array([[-3, -1, 1], [3, 3, -3]], np.int8)
    packed = pack(weight, 2, levels=4)
    assert packed.tolist() == [[0b011010], [0b011100]] and np.array_equal(unpack(packed, (2, 3), levels=4), weight)


def run_of(folder, **settings):
    cfg = Config(n_layer=1, n_head=2, d_model=16, context=8, **settings)
    net = make_net(ModelConfig.from_config(cfg, len(CHARS)), 3)
    tokenizer = CharTokenizer(CHARS).to_json()
    meta = {"step": 7, "config": to_dict(cfg), "vocab_size": len(CHARS), "tokenizer": tokenizer}
    checkpoint.save(folder, "last", checkpoint.join(model=net.state_dict()), meta)
    return net


@pytest.mark.parametrize("settings", [
    {}, {"bits": 2}, {"bits": 2, "levels": 4}, {"bits": 2, "init_std": 0.04}, {"bits": 1}, {"int_layers": "mlp"},
    {"method": "adamw"},
], ids=str)  # fmt: skip
def test_a_packed_file_is_the_same_net(tmp_path, settings, capsys):
    net, file = run_of(tmp_path / "run", **settings), tmp_path / "net.safetensors"
    assert export.main([str(tmp_path / "run"), str(file)]) == 0
    again, meta, head = load_net(file)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens), net(tokens))
    assert meta["step"] == 7 and head == file
    capsys.readouterr()
    texts = []
    for place in (tmp_path / "run", file):
        assert sample.main([str(place), "--prompt", "abc", "--max-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_predict_reads_a_packed_file(tmp_path):
    cfg = Config(data="mnist", model="mlp", n_layer=1, d_model=16, bits=2)
    net = make_net(ModelConfig.from_config(cfg, 3, (28, 28, 1)), 3)
    meta = {"step": 7, "config": to_dict(cfg), "vocab_size": 3, "image": [28, 28, 1], "classes": ["a", "b", "c"],
            "mean": [0.1], "std": [0.3]}  # fmt: skip
    checkpoint.save(tmp_path / "run", "last", checkpoint.join(model=net.state_dict()), meta)
    assert export.main([str(tmp_path / "run"), str(tmp_path / "net.safetensors")]) == 0
    images = np.random.default_rng(1).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)
    found = [predict.load(place, None, "cpu") for place in (tmp_path / "run", tmp_path / "net.safetensors")]
    assert torch.equal(found[0].probabilities(images), found[1].probabilities(images))


def test_a_ternary_file_is_small(tmp_path):
    net, file = run_of(tmp_path / "run", bits=2), tmp_path / "net.safetensors"
    export.main([str(tmp_path / "run"), str(file)])
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    scales = 4 * 6  # of embedding, head and the block's four matrices
    weights = sum(p.numel() for p in net.parameters())
    assert weights / 4 <= file.stat().st_size - header - scales <= weights / 4 + 2 * 6


@pytest.mark.parametrize("change", [-3, 200], ids=["weights", "header"])
def test_a_damaged_file_is_recognised(tmp_path, change):
    run_of(tmp_path / "run")
    file = tmp_path / "net.safetensors"
    export.main([str(tmp_path / "run"), str(file)])
    data = bytearray(file.read_bytes())
    data[change] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged|can be read|no packed net"):
        load_net(file)
    file.write_bytes(data[:50])
    with pytest.raises(UserError, match="can be read"):
        load_net(file)
    checkpoint_file = next((tmp_path / "run").glob("*.safetensors"))
    with pytest.raises(UserError, match="no packed net"):
        load_net(checkpoint_file)
