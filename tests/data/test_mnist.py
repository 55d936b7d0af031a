"""MNIST: IDX files, sound and damaged, by the same search and preparation as Imagenette."""

import gzip
import hashlib
import struct

import numpy as np
import pytest

from data import cache, mnist
from data.cache import cache_root, sha256
from data.images import load_images
from tests.data.inputs import all_files, error_of


def load(folder, side, **settings):
    return load_images("mnist", side, data_dir=str(folder), **settings)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def digits(folder, train=24, val=5):
    """Image n is filled with n; its label is n % 2."""
    contents = {}
    for prefix, count in (("train", train), ("t10k", val)):
        n = np.arange(count)
        contents[f"{prefix}-images-idx3-ubyte.gz"] = idx(np.broadcast_to(n[:, None, None], (count, 28, 28)))
        contents[f"{prefix}-labels-idx1-ubyte.gz"] = idx(n % 2)
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(gzip.compress(content))
    return contents


def test_mnist_becomes_arrays(tmp_path):
    contents = digits(tmp_path / "mine")
    images = load(tmp_path / "mine", 28)
    assert images.train.shape == (24, 28, 28, 1) and images.val.shape == (5, 28, 28, 1)
    assert isinstance(images.train, np.memmap)
    order = [n for n in range(24) if n not in (18, 19)] + [18, 19]  # the tenth 0 and the tenth 1 come last
    assert images.train[:, 5, 5, 0].tolist() == order
    assert images.train_labels.tolist() == [n % 2 for n in order]
    assert images.val_labels.tolist() == [0, 1, 0, 1, 0] and images.classes == tuple("0123456789")
    assert images.sha256 == hashlib.sha256(b"".join(contents.values())).hexdigest()
    tune = load(tmp_path / "mine", 28, eval_on="tune")
    assert tune.val[:, 0, 0, 0].tolist() == [18, 19] and len(tune.train) == 22
    small = load(tmp_path / "mine", 14)
    assert small.train.shape == (24, 14, 14, 1) and small.train[7, 3, 3, 0] == 7


def test_mnist_packed_by_another_gzip_is_the_same(tmp_path):
    contents = digits(tmp_path / "a")
    first = load(tmp_path / "a", 28)
    for name, content in contents.items():
        (tmp_path / "a" / name).write_bytes(gzip.compress(content, compresslevel=1))
    assert load(tmp_path / "a", 28).sha256 == first.sha256 and len(all_files(cache_root())) == 3


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("train-images", lambda c: gzip.compress(c[:-1]), ["is truncated", "24 x 28 x 28", "18,832"]),
        ("train-images", lambda c: gzip.compress(c + b"x"), ["not what its header says"]),
        ("train-images", lambda c: gzip.compress(c)[:-20], ["truncated or not gzip"]),
        ("train-images", lambda c: c, ["truncated or not gzip"]),
        ("train-images", lambda c: gzip.compress(c[:7]), ["is truncated: 7 bytes", "header alone has 16"]),
        ("t10k-images", lambda c: gzip.compress(idx(np.zeros(5))), ["is truncated: 13 bytes"]),
        ("train-labels", lambda c: gzip.compress(idx(np.zeros((24, 1, 1)))), ["0x00000803, not", "exchanged"]),
        ("t10k-labels", lambda c: gzip.compress(idx(np.zeros(4))), ["5 images", "4 labels"]),
        ("t10k-labels", lambda c: gzip.compress(idx(np.array([1, 2, 3, 11, 0]))), ["label 3 is 11"]),
        ("t10k-labels", lambda c: gzip.compress(idx(np.zeros(0))), ["not what its header says"]),
    ],
    ids=["short", "long", "gzip short", "not packed", "header", "few dimensions", "magic", "counts", "label", "none"],
)
def test_damaged_idx_files_are_named(tmp_path, name, change, parts):
    contents = digits(tmp_path / "mine")
    file = next(key for key in contents if key.startswith(name))
    (tmp_path / "mine" / file).write_bytes(change(contents[file]))
    message = error_of(load, tmp_path / "mine", 28)
    for part in [str(tmp_path / "mine" / file), *parts]:
        assert part in message
    assert all_files(cache_root()) == []


def test_mnist_hash_is_that_of_the_contents():
    content = idx(np.zeros((2, 28, 28)))
    file = mnist.GzippedFile("a.gz", "", 100, sha256(content), unpacked=len(content))
    assert file.fault(gzip.compress(content)) == file.fault(gzip.compress(content, compresslevel=1)) == ""
    assert "altered: 1,584 bytes when unpacked" in file.fault(gzip.compress(content[:-1] + b"x"))
    assert "altered: more than 1,584 bytes" in file.fault(gzip.compress(content * 100))
    assert "truncated or not gzip" in file.fault(gzip.compress(content)[:-9])


def test_official_constants_match_the_files_beside_the_checkout(monkeypatch):
    """Without that folder the constants can only be compared with themselves: their form is checked."""
    monkeypatch.undo()
    for file in (file for pair in mnist.FILES.values() for file in pair):
        assert len(file.sha256) == 64 and file.url.startswith("https://") and file.size > 4000
        path = cache.SHARED_DIR / file.path
        if path.exists():
            assert file.fault(path.read_bytes()) == ""
