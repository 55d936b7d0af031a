"""predict.py: probabilities against those of the run that saved the net, files that cannot be used, wrong options."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from data import decode
from data.image_task import ImageTask
from data.images import ImageData
from model import ModelConfig, Transformer, make_net
from run import checkpoint
from run.config import Config, to_dict

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("tench", "chain saw", "église", "golf ball", "gas pump", "parachute")
KINDS = {
    "ViT of colours": (Config(data="imagenette", image_side=8, patch=4, n_layer=1, n_head=2, d_model=16), (8, 8, 3)),
    "MLP of greys": (Config(data="mnist", model="mlp", n_layer=1, d_model=16), (28, 28, 1)),
}


@dataclass
class Run:
    """What train.py saves of a run."""

    folder: Path
    task: ImageTask
    net: torch.nn.Module
    step: int

    def save(self, name: str) -> None:
        task = self.task
        meta = {"step": self.step, "config": to_dict(task.cfg), "vocab_size": task.outputs, **task.saved()}
        checkpoint.save(self.folder, name, checkpoint.join(model=self.net.state_dict()), meta)


def make_run(folder: Path, cfg: Config, shape: tuple[int, int, int], step: int = 3) -> tuple[Run, np.ndarray]:
    """A run that is saved but not trained, and the seven images it would be evaluated on."""
    pixels = np.random.default_rng(cfg.seed).integers(0, 256, (7, *shape), dtype=np.uint8)
    labels, spread = np.arange(7) % len(CLASSES), (0.31, 0.27, 0.22)[: shape[2]]
    mean = (0.45, 0.5, 0.4)[: shape[2]]
    data = ImageData("tiny", pixels, labels, pixels, labels, CLASSES, mean, spread, {}, "0" * 64, "a test")
    task = ImageTask(cfg, data)
    run = Run(folder, task, make_net(ModelConfig.from_config(cfg, task.outputs, task.image), cfg.seed), step)
    run.save("last")
    return run, pixels


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, list[Path], np.ndarray]:
    """A ViT's folder, seven lossless files, and the probabilities (7, 6) of its own task."""
    folder = tmp_path_factory.mktemp("out") / "tiny"
    run, pixels = make_run(folder, *KINDS["ViT of colours"])
    files = [write(folder.parent / "images" / f"{n}.png", image) for n, image in enumerate(pixels)]
    return folder, files, expected(run, pixels)


def expected(run: Run, pixels: np.ndarray) -> np.ndarray:
    return run.task.outputs_of(run.net, pixels, torch.device("cpu")).double().softmax(1).numpy()


def call(capsys, *argv) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program, run in this process on the CPU."""
    code = predict.main([str(word) for word in ("--device", "cpu", *argv)])
    return code, *capsys.readouterr()


def records(out: str) -> list[tuple[str, list[str], list[float]]]:
    objects = [json.loads(line) for line in out.splitlines()]
    assert all(list(o) == ["file", "predictions"] for o in objects)
    return [(o["file"], *map(list, zip(*[(p["class"], p["probability"]) for p in o["predictions"]]))) for o in objects]


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_those_of_the_run_that_saved_the_net(kind, tmp_path, capsys):
    run, pixels = make_run(tmp_path / "run", *KINDS[kind])
    files = [write(tmp_path / f"{n}.png", image) for n, image in enumerate(pixels)]
    code, out, err = call(capsys, tmp_path / "run", *files, "--json", "--top", 99)
    assert code == 0 and err == "checkpoint last of step 3; device cpu (as asked)\n"
    found = records(out)
    assert [file for file, _, _ in found] == [str(file) for file in files]
    for (_, names, values), p in zip(found, expected(run, pixels), strict=True):
        assert values == sorted(values, reverse=True) and len(names) == len(CLASSES)
        assert dict(zip(names, values)) == pytest.approx(dict(zip(CLASSES, p)), rel=1e-5)
    assert len({names[0] for _, names, _ in found}) > 1


def test_a_line_for_people_names_the_file_and_the_likeliest_classes(tiny, capsys):
    folder, files, p = tiny
    code, out, _ = call(capsys, folder, files[2], "--top", 2)
    first, second = [f"{CLASSES[c]} {100 * p[2, c]:.1f} %" for c in p[2].argsort()[::-1][:2]]
    assert code == 0 and out == f"{files[2]}: {first}, {second}\n"
    assert call(capsys, folder, files[2])[1].count("%") == 5  # the default


def test_the_result_does_not_depend_on_the_batch(tiny, capsys, monkeypatch):
    folder, files, _ = tiny
    whole = call(capsys, folder, *files)
    monkeypatch.setattr(predict, "BATCH_PIXELS", 3 * 64)  # three images at once
    assert call(capsys, folder, *files) == whole
    assert call(capsys, folder, files[4])[1] == whole[1].splitlines(keepends=True)[4]


def test_a_batch_is_printed_before_the_next_is_read(tiny, monkeypatch):
    folder, files, _ = tiny
    monkeypatch.setattr(predict, "BATCH_PIXELS", 2 * 64)
    read = []

    def paths():
        for file in files:
            read.append(file)
            yield str(file)

    batches = predict.classify(predict.load(folder, None, "cpu"), paths(), 1, pytest.fail)
    assert len(next(batches)) == 2 and len(read) == 2
    assert [len(batch) for batch in batches] == [2, 2, 1]


def test_of_equally_likely_classes_the_first_goes_first(tiny, monkeypatch, capsys):
    folder, files, _ = tiny
    monkeypatch.setattr(predict.Classifier, "probabilities", lambda self, images: torch.full((len(images), 6), 1 / 6))
    _, out, _ = call(capsys, folder, files[0], "--json", "--top", 6)
    assert records(out)[0][1] == list(CLASSES)


def test_pictures_of_another_size_and_colour_are_cut_and_converted(tiny, tmp_path, capsys):
    folder, _, _ = tiny
    for name, mode, size in (("wide.jpg", "RGB", (50, 20)), ("grey.png", "L", (9, 31)), ("palette.gif", "P", (8, 8)),
                             ("clear.webp", "RGBA", (20, 20)), ("one.bmp", "1", (1, 1))):  # fmt: skip
        Image.new(mode, size, 1).save(tmp_path / name)
    code, out, err = call(capsys, folder, tmp_path)
    assert code == 0 and len(out.splitlines()) == 5 and "skipped" not in err


def ring(ink: int, hidden: int) -> Image.Image:
    """Ink with transparent surroundings that hide another grey."""
    pixels = np.full((8, 8, 4), (hidden,) * 3 + (0,), np.uint8)
    pixels[2:6, 2:5] = (ink,) * 3 + (255,)
    return Image.fromarray(pixels)


def test_transparency_is_white_and_a_blank_image_is_said_to_be_blank(tiny, tmp_path, capsys):
    folder, _, _ = tiny
    for name, image in (("black.png", ring(0, 0)), ("hides.png", ring(0, 200)), ("white.png", ring(255, 0))):
        image.save(tmp_path / name)
    pixels = np.full((8, 8, 3), 255, np.uint8)
    pixels[2:6, 2:5] = 0
    write(tmp_path / "on_white.png", pixels)
    code, out, err = call(capsys, folder, tmp_path, "--json")
    black, hides, on_white, white = records(out)
    assert code == 0 and black[1:] == hides[1:] == on_white[1:] != white[1:]
    assert err.count("note: ") == 1 and f"note: {tmp_path / 'white.png'} is blank: all its pixels have one" in err


def test_a_folder_is_searched_in_order_by_content_and_hidden_files_are_left_out(tiny, tmp_path, capsys):
    folder, files, _ = tiny
    for name in ("b.JPEG", "a.png", "deep/er/c.Png", "deep/a.jfif", ".hidden.png", ".git/x.png", "a.txt", "no_ending",
                 "__MACOSX/deep/a.png", "._a.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[0].read_bytes())
    code, out, err = call(capsys, folder, files[1], tmp_path, tmp_path / "a.txt", "--json")
    names = [os.path.relpath(file, tmp_path) for file, _, _ in records(out)[1:]]
    assert code == 0 and names == ["a.png", "a.txt", "b.JPEG", "no_ending", "deep/a.jfif", "deep/er/c.Png", "a.txt"]
    assert len(err.splitlines()) == 1


def test_files_of_a_folder_that_are_no_images_are_named_together(tiny, tmp_path, capsys):
    """A few of them, and they are no fault; a file that is called an image and is none is one."""
    folder, files, _ = tiny
    (tmp_path / "a.png").write_bytes(files[0].read_bytes())
    for n in range(8):
        (tmp_path / f"{n}.csv").write_text("1,2\n")
    code, out, err = call(capsys, folder, tmp_path)
    assert code == 0 and len(out.splitlines()) == 1
    named = "; ".join(str(tmp_path / f"{n}.csv") for n in range(5))
    assert err.splitlines()[1:] == [f"not images: {named}; and 3 more"]
    (tmp_path / "b.jpg").write_text("1,2\n"), (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    code, _, err = call(capsys, folder, tmp_path)
    said = err.splitlines()[1:]
    assert code == 1 and said[0].startswith(f"skipped: {tmp_path / 'b.jpg'}: not an image in JPEG")
    assert said[1].startswith(f"skipped: {tmp_path / 'c.heic'}: ") and said[-1] == "2 skipped, 1 answered"


def test_a_link_in_a_circle_ends(tiny, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(tiny[1][0].read_bytes())
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    code, out, _ = call(capsys, tiny[0], tmp_path)
    assert code == 0 and len(out.splitlines()) == 1


@pytest.mark.parametrize("error", [TypeError("bad operand type for abs()"), KeyError("x"), MemoryError()], ids=repr)
def test_any_error_of_a_decoder_skips_that_file(tiny, tmp_path, capsys, monkeypatch, error):
    real = decode.square

    def square(image, side):
        if image.size == (5, 5):
            raise error
        return real(image, side)

    monkeypatch.setattr(decode, "square", square)
    bad = write(tmp_path / "bad.png", np.zeros((5, 5, 3), np.uint8))
    code, out, err = call(capsys, tiny[0], tiny[1][0], bad, tiny[1][1])
    assert code == 1 and len(out.splitlines()) == 2 and f"skipped: {bad}: {error or type(error).__name__}" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_a_folder_is_not_waited_for(tiny, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    code, out, err = call(capsys, tiny[0], tmp_path)
    assert code == 1 and out == "" and "a folder without images" in err


def test_files_that_cannot_be_used_are_named_and_the_others_still_classified(tiny, tmp_path, capsys, monkeypatch):
    folder, files, _ = tiny
    noise = write(tmp_path / "noise.png", np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    monkeypatch.setattr(decode, "LARGEST_FILE", 1 << 20)
    (tmp_path / "cut.png").write_bytes(noise.read_bytes()[:6000])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "nothing.gif").touch()
    (tmp_path / "huge.bmp").write_bytes(bytes((1 << 20) + 1))
    (tmp_path / "dead.png").symlink_to("nowhere")
    (tmp_path / "empty").mkdir()
    bad = ["cut.png", "text.jpg", "nothing.gif", "huge.bmp", "dead.png", "missing.png", "empty"]
    reasons = ["truncated", *["not an image in JPEG"] * 2, "more than 1 MiB", *["No such file"] * 2, "a folder without"]
    code, out, err = call(capsys, folder, *[tmp_path / name for name in bad], noise, files[0])
    said = err.splitlines()[1:]
    assert code == 1 and [line.split(": ")[0] for line in out.splitlines()] == [str(noise), str(files[0])]
    assert said.pop() == f"{len(bad)} skipped, 2 answered"
    for line, name, reason in zip(said, bad, reasons, strict=True):
        assert line.startswith(f"skipped: {tmp_path / name}: ") and reason in line
    code, out, err = call(capsys, folder, tmp_path)
    assert code == 1 and len(out.splitlines()) == 1 and err.count("skipped: ") == 5


def test_names_that_would_break_a_line_or_a_terminal_are_escaped(tiny, tmp_path, capsys):
    folder, files, _ = tiny
    for name in (b"a\nb.png", b"\x1b[31m.png", b"\xff.png", "é.png".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(files[0].read_bytes())
    code, out, _ = call(capsys, folder, tmp_path)
    assert code == 0 and len(out.splitlines()) == 4
    assert all(text in out for text in ("\\x1b[31m.png'", "a\\nb.png'", "\\udcff.png'", "/é.png: "))
    _, out, _ = call(capsys, folder, tmp_path, "--json")
    assert b"\xff.png" in {os.path.basename(os.fsencode(file)) for file, _, _ in records(out)}


def test_best_is_the_default_where_there_is_one(tmp_path, capsys):
    cfg, shape = KINDS["ViT of colours"]
    run, pixels = make_run(tmp_path / "run", cfg, shape, step=4)
    file = write(tmp_path / "a.png", pixels[0])
    run.step = 2
    run.save("best")
    assert "best of step 2" in call(capsys, tmp_path / "run", file)[2]
    assert "last of step 4" in call(capsys, tmp_path / "run", file, "--checkpoint", "last")[2]


def test_a_checkpoint_for_text_is_refused_with_the_program_that_uses_it(tmp_path, capsys):
    cfg = Config(n_layer=1, n_head=2, d_model=16, context=8)
    net = Transformer(ModelConfig.from_config(cfg, 11))
    meta = {"step": 1, "config": to_dict(cfg), "vocab_size": 11, "tokenizer": {}}
    checkpoint.save(tmp_path, "last", checkpoint.join(model=net.state_dict()), meta)
    code, out, err = call(capsys, tmp_path, "a.png")
    assert code == 1 and out == "" and "is a net for text" in err and f"python sample.py {tmp_path}" in err


def test_a_missing_damaged_or_foreign_checkpoint_is_an_error(tmp_path, capsys):
    assert "last.json is missing" in call(capsys, tmp_path, "a.png")[2]
    run, _ = make_run(tmp_path, *KINDS["ViT of colours"])
    tensors, meta = checkpoint.load(tmp_path, "last")
    checkpoint.save(tmp_path, "last", {k: t for k, t in tensors.items() if "head" not in k}, meta | {"step": 5})
    code, _, err = call(capsys, tmp_path, "a.png")
    assert code == 1 and "does not fit this version's network" in err and "head" in err
    next(tmp_path.glob("last-00000005*")).write_bytes(b"half")
    code, _, err = call(capsys, tmp_path, "a.png")
    assert code == 1 and "is damaged" in err and "--checkpoint previous" in err


def test_logits_that_are_not_finite_are_an_error(tmp_path, capsys):
    run, pixels = make_run(tmp_path, *KINDS["ViT of colours"])
    run.net.head.scale.fill_(float("nan"))
    run.save("last")
    code, out, err = call(capsys, tmp_path, write(tmp_path / "a.png", pixels[0]))
    assert code == 1 and out == "" and "not finite" in err


BAD_OPTIONS = {
    "a.png --top 0": "--top 0: it must be at least 1",
    "a.png --top two": "invalid int value: 'two'",
    "a.png --checkpoint first": "choose from",
    "a.png --device tpu": "choose from",
    "a.png --chekpoint=best": "unknown argument '--chekpoint=best'; did you mean --checkpoint?",
    "--json": "required: image",
}


@pytest.mark.parametrize("words, says", BAD_OPTIONS.items(), ids=BAD_OPTIONS)
def test_a_wrong_option_is_named_with_its_rule(tiny, capsys, words, says):
    code, out, err = call(capsys, tiny[0], *words.split())
    assert code == 2 and out == "" and err.startswith("error: ") and says in err


@pytest.mark.parametrize("words", [["--help"], ["x", "a.png", "--tpo", "3"]], ids=["help", "mistyped"])
def test_help_and_wrong_options_need_neither_torch_nor_pillow(words):
    code = f"""
import sys, predict
try:
    predict.main({words!r})
finally:
    print({{"torch", "numpy", "PIL"}} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("set()\n"), done.stderr


def test_options_may_stand_between_images(tiny, capsys):
    folder, files, _ = tiny
    assert call(capsys, folder, files[0], "--top", 1, files[1]) == call(capsys, "--top=1", folder, *files[:2])


def test_a_folder_or_a_gpu_that_is_not_there_is_an_error(tiny, capsys, monkeypatch):
    code, _, err = call(capsys, tiny[0] / "not", "a.png")
    assert code == 2 and "is not a folder" in err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = call(capsys, tiny[0], "a.png", "--device", "cuda")
    assert code == 2 and "torch sees no CUDA GPU" in err


def test_in_a_terminal_without_utf8_and_with_a_full_disk(tiny):
    folder, files, _ = tiny
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "predict.py", str(folder), *map(str, files), "--top", "6"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.decode().count("église") == 7, done.stderr
    if not Path("/dev/full").exists():
        return
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr
