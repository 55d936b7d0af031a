"""export.py: exported nets against torch's, packed and not; what is said of floats; the example that runs them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import sample
from data.augment import normalise, pixel_scale
from data.bpe import PATTERN
from data.tokenizers import BpeTokenizer, CharTokenizer, make_tokenizer
from model import ModelConfig, make_net
from run import checkpoint
from run.config import Config, to_dict
from run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BOUND = 0.3  # docs/export.md: where the two best logits are nearer than this, another token may be chosen
CHARS = "\n !',-.:?ABCDEFGHIJKLMNOPRSTUVWYabcdefghijklmnopqrstuvwxyz"
SMALL = dict(n_layer=2, n_head=2, d_model=32, context=12)
IMAGES = {
    "ViT": (Config(data="imagenette", image_side=8, patch=4, n_layer=2, n_head=2, d_model=16), (8, 8, 3)),
    "MLP": (Config(data="mnist", model="mlp", n_layer=2, d_model=16), (28, 28, 1)),
}


@pytest.fixture(scope="module")
def onnx_session():
    """onnxruntime on one thread, from a model."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1

    def session(model):
        data = model if isinstance(model, bytes) else model.SerializeToString()
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    return session


@pytest.fixture(scope="module")
def example(onnx_session):
    """The functions of examples/onnx_generate.py."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import onnx_generate
    finally:
        sys.path.pop(0)
    return onnx_generate


def text_run(folder: Path, **settings) -> Path:
    """A saved, untrained net of characters."""
    cfg, tokenizer = Config(**(SMALL | settings)), CharTokenizer(CHARS)
    net = make_net(ModelConfig.from_config(cfg, tokenizer.vocab_size), 5)
    meta = {"step": 3, "config": to_dict(cfg), "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json()}
    checkpoint.save(folder, "last", checkpoint.join(model=net.state_dict()), meta)
    return folder


def image_run(folder: Path, cfg: Config, image: tuple[int, int, int]) -> Path:
    net = make_net(ModelConfig.from_config(cfg, 6, image), 5)
    meta = {"step": 3, "config": to_dict(cfg), "vocab_size": 6, "image": image, "classes": list("abcdef"),
            "mean": [0.4, 0.5, 0.45][: image[2]], "std": [0.31, 0.27, 0.22][: image[2]]}  # fmt: skip
    checkpoint.save(folder, "last", checkpoint.join(model=net.state_dict()), meta)
    return folder


def tokens_of(shape: tuple[int, int]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, len(CHARS), shape))


@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "packed"])
@pytest.mark.parametrize("settings", [
    {}, {"bits": 2}, {"bits": 2, "levels": 4}, {"bits": 1}, {"bits": 8}, {"bits": 3, "keep_bits": 5},
    {"int_layers": "mlp"}, {"method": "adamw"}, {"method": "ste", "bits": 2},
], ids=lambda settings: "-".join(map(str, settings.values())) or "6")  # fmt: skip
def test_text_logits(tmp_path, onnx_session, settings, packed):
    net, meta, _ = export.load_net(text_run(tmp_path, **settings))
    session = onnx_session(export.onnx_model(net, meta, packed, cache=False))
    for shape in ((1, 1), (3, 7), (2, 30)):  # the last is longer than the context
        tokens = tokens_of(shape)
        with torch.no_grad():
            expected = net(tokens).numpy()
        (logits,) = session.run(None, {"tokens": tokens.numpy()})
        assert logits.shape == expected.shape
        # A last bit of a float moves few activations to the next integer: most logits agree closely, all roughly.
        assert np.median(np.abs(logits - expected)) < 1e-4
        assert np.abs(logits - expected).max() < BOUND / 2


def test_the_cache_changes_nothing(tmp_path, onnx_session):
    net, meta, _ = export.load_net(text_run(tmp_path))
    whole = onnx_session(export.onnx_model(net, meta, cache=False))
    parts = onnx_session(export.onnx_model(net, meta))
    tokens = tokens_of((2, 40)).numpy()
    (expected,) = whole.run(None, {"tokens": tokens})
    past, seen, found = np.zeros((2, 2, 2, 2, 0, 16), np.float32), 0, []
    for size in (5, 1, 1, 20, 1, 1, 11):
        fed = {"tokens": tokens[:, seen : seen + size], "past": past, "seen": np.array(seen)}
        logits, past = parts.run(None, fed)
        seen += size
        found.append(logits)
        assert past.shape[4] == min(seen, SMALL["context"])
    assert np.median(np.abs(np.concatenate(found, axis=1) - expected)) < 1e-4
    assert np.abs(np.concatenate(found, axis=1) - expected).max() < BOUND / 2


def test_the_example_writes_what_sample_writes(tmp_path, onnx_session, example):
    net, meta, _ = export.load_net(text_run(tmp_path))
    session = onnx_session(export.onnx_model(net, meta))
    source, tokenizer, _ = sample.load(tmp_path, None, "cpu")
    prompt = tokenizer.encode("ROMEO: ")
    expected = [token for (token,) in sample.generate(source, prompt, 200, 0, 0, 1.0, 1)]
    found = list(example.generate(session, list(prompt), 200))
    for wanted, (token, logits) in zip(expected, found, strict=True):
        if wanted != token:
            best = np.sort(logits)
            assert best[-1] - best[-2] < BOUND
            break


def test_the_example_runs_without_torch(tmp_path, onnx_session):
    assert export.main([str(text_run(tmp_path / "run")), str(tmp_path / "m.onnx"), "--packed"]) == 0
    code = ("import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = sys.argv[2:]; "
            f"runpy.run_path({str(ROOT / 'examples/onnx_generate.py')!r}, run_name='__main__')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, "-", str(tmp_path / "m.onnx"), "ROMEO:", "--max-tokens", "9"],
                          capture_output=True, cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"ROMEO:") and len(done.stdout) == 6 + 9 + 1


def test_the_example_refuses_in_one_line(tmp_path, onnx_session, example, monkeypatch, capsys):
    text, whole, image, missing = (str(tmp_path / f"{name}.onnx") for name in ("text", "whole", "image", "missing"))
    run = str(text_run(tmp_path / "run"))
    export.main([run, text]), export.main([run, whole, "--no-cache"])
    export.main([str(image_run(tmp_path / "images", *IMAGES["MLP"])), image])
    for words, said in {
        (missing, "RO"): "cannot be read as ONNX", (run + "/last.json", "RO"): "cannot be read as ONNX",
        (image, "RO"): "no net for text", (whole, "RO"): "without --no-cache", (text, "Z"): "does not know ['Z']",
        (text, "RO", "--max-tokens", "-3"): "at least 0",
    }.items():  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["onnx_generate.py", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            example.main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("pattern", [
    PATTERN, r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
], ids=["ours", "GPT-2's"])  # fmt: skip
def test_the_example_encodes_as_tiktoken(example, pattern):
    text = "It's naïve: 12 345 ²³ Ⅷ  façade\n\n  ελληνικά e\u0301té — I'll \t say 東京, don't… we've x_y\u00a0z ١٢" * 2
    trained = make_tokenizer("bpe", 330, "", [text])
    tokenizer = BpeTokenizer(trained._vocabulary, pattern)
    assert example.encode(text, tokenizer.to_json()) == tokenizer.encode(text)


@pytest.mark.parametrize("packed", [False, True], ids=["bytes", "packed"])
@pytest.mark.parametrize("kind", IMAGES)
def test_image_logits(tmp_path, onnx_session, kind, packed):
    cfg, image = IMAGES[kind]
    net, meta, _ = export.load_net(image_run(tmp_path, cfg, image))
    session = onnx_session(export.onnx_model(net, meta, packed))
    pixels = np.random.default_rng(2).integers(0, 256, (9, *image), dtype=np.uint8)
    with torch.no_grad():
        expected = net(normalise(torch.from_numpy(pixels), pixel_scale(meta["mean"], meta["std"]))).numpy()
    (logits,) = session.run(None, {"pixels": pixels})
    assert np.array_equal(logits, expected) if kind == "MLP" else np.abs(logits - expected).max() < BOUND / 2
    assert json.loads(session.get_modelmeta().custom_metadata_map["nanogft"])["classes"] == list("abcdef")


def test_onnxruntime_multiplies_int8_exactly(onnx_session):
    """The largest operands that 7 bits have; 8 bits are not promised on every processor (docs/export.md)."""
    g = export.Graph(False)
    rng = np.random.default_rng(3)
    weight = np.where(rng.random((600, 33)) < 0.5, -63, 63).astype(np.int8)
    g.output("y", g("MatMulInteger", "x", g.constant(weight, "w"), np.uint8(128)))
    session = onnx_session(g.model([("x", "uint8", ["rows", 600])], [("y", "int32", ["rows", 33])], {}))
    x = np.where(rng.random((5, 600)) < 0.5, -127, 127).astype(np.int8)
    x[0] = 127 * np.sign(weight[:, 0])  # the largest sum there is
    (y,) = session.run(None, {"x": (x.astype(np.int32) + 128).astype(np.uint8)})
    assert np.array_equal(y, x.astype(np.int32) @ weight.astype(np.int32))


def test_packed_weights_take_their_bits(tmp_path, onnx_session):
    sizes = {}
    for bits in (1, 2, 6):
        net, meta, _ = export.load_net(text_run(tmp_path / str(bits), bits=bits, d_model=64))
        model = export.onnx_model(net, meta, packed=True)
        tensors = [t for t in model.graph.initializer if t.name.endswith(".weight")]
        sizes[bits] = sum(len(t.raw_data) for t in tensors)
        weights = sum(p.numel() for p in net.parameters())
        assert bits * weights / 8 <= sizes[bits] <= bits * (weights / 8 + len(tensors))


def test_float_layers_are_named(tmp_path, onnx_session, capsys):
    assert export.main([str(text_run(tmp_path / "a", int_layers="attention,mlp")), str(tmp_path / "a.onnx")]) == 0
    out, err = capsys.readouterr()
    assert "8 integer layers" in out
    assert "2 layers are exported in fp32, as they were trained: embedding, head" in err
    assert export.main([str(text_run(tmp_path / "b")), str(tmp_path / "b.onnx")]) == 0
    assert "fp32" not in capsys.readouterr().err


def test_what_is_said_fits_the_file(tmp_path, onnx_session, capsys):
    run, images = str(text_run(tmp_path / "a", bits=8)), str(image_run(tmp_path / "b", *IMAGES["MLP"]))
    assert export.main([run, str(tmp_path / "a.onnx"), "--packed"]) == 0
    err = capsys.readouterr().err
    assert "VNNI" in err and "--packed saves nothing" in err
    assert export.main([run, str(tmp_path / "a.safetensors")]) == 0
    assert not capsys.readouterr().err
    assert export.main([images, str(tmp_path / "b.onnx"), "--no-cache"]) == 2
    assert "net for images" in capsys.readouterr().err


def test_mistakes(tmp_path, capsys, monkeypatch):
    folder = text_run(tmp_path / "a")
    assert export.main([str(folder), str(tmp_path / "a.onnx"), "--pakced"]) == 2
    assert "did you mean --packed?" in capsys.readouterr().err
    assert export.main([str(folder), str(tmp_path / "a.pt")]) == 2
    assert "must end in .onnx or .safetensors" in capsys.readouterr().err
    monkeypatch.setattr(export, "onnx", None)
    assert export.main([str(folder), str(tmp_path / "a.onnx")]) == 1
    assert "pip install onnx" in capsys.readouterr().err
    assert export.main([str(folder), str(folder / "last.json" / "a.safetensors")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    for option in ("--packed", "--no-cache", "--no_cache"):
        assert export.main([str(folder), str(tmp_path / "a.safetensors"), option]) == 2
        assert f"{option.replace('_', '-')} is for ONNX" in capsys.readouterr().err
    assert export.main([str(folder), str(tmp_path / "a.safetensors")]) == 0
    assert export.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--checkpoint", "last"]) == 2
    assert sample.main([str(tmp_path / "a.safetensors"), "--checkpoint", "last"]) == 2
    assert capsys.readouterr().err.count("--checkpoint last: ") == 2
    with pytest.raises(UserError, match="is not a folder"):
        export.run([str(tmp_path / "nothing"), str(tmp_path / "a.safetensors")])
