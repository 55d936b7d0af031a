"""Imagenette: archives that are odd, damaged or hostile; prepared once; the split."""

import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import cache, imagenette
from data import decode as decoder
from data.cache import OfficialFile, cache_root, sha256
from data.images import load_images
from tests.data.inputs import all_files, error_of

ROOT = Path(__file__).resolve().parents[2]
TENCH, CHURCH = "n01440764", "n03028079"
INSIDE = f"imagenette2-160/train/{TENCH}"


@pytest.fixture(autouse=True)
def dead_address(monkeypatch):
    """At the official address nobody answers."""
    official = OfficialFile(imagenette.FILE.path, "http://127.0.0.1:9/file", 1000, "0" * 64)
    monkeypatch.setattr(imagenette, "FILE", official)


def picture(color, size=(40, 30), mode="RGB", kind="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, kind)
    return buffer.getvalue()


def usual_members():
    """Two classes, 12 and 3 training images of one colour each, 2 and 1 validation images."""
    members = {}
    for split, wordnet_id, count in (("train", TENCH, 12), ("train", CHURCH, 3), ("val", TENCH, 2), ("val", CHURCH, 1)):
        for n in range(count):
            red = 100 * (wordnet_id == CHURCH) + 50 * (split == "val") + n
            members[f"imagenette2-160/{split}/{wordnet_id}/{n}.JPEG"] = picture((red, 0, 255))
    return members


def pack(path, members):
    """A .tgz of names with bytes, or with a TarInfo that has everything but the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo()
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def load(folder, **settings):
    return load_images("imagenette", 8, data_dir=str(folder), **settings)


def load_archive(folder, members, **settings):
    pack(folder / "imagenette2-160.tgz", members)
    return load(folder, **settings)


# Imagenette: what is read


def test_archive_becomes_arrays_labels_and_names(tmp_path):
    images = load_archive(tmp_path, usual_members())
    assert images.train.shape == (15, 8, 8, 3) and images.val.shape == (3, 8, 8, 3)
    for array in (images.train, images.val):
        assert isinstance(array, np.memmap) and array.dtype == np.uint8 and not array.flags.writeable
    assert len(images.classes) == 10 and {images.classes[label] for label in images.train_labels} == {"tench", "church"}
    assert images.val_labels.tolist() == [0, 0, 4] and images.val_labels.dtype == np.int64
    assert images.val[:, 3, 3].tolist() == [[50, 0, 255], [51, 0, 255], [150, 0, 255]]
    expected = [0] * 11 + [4] * 3 + [0]  # the tenth tench comes last
    assert images.train_labels.tolist() == expected
    assert images.train[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 100, 101, 102, 9]
    assert images.skipped == {"train": 0, "val": 0}
    assert images.sha256 == sha256((tmp_path / "imagenette2-160.tgz").read_bytes())
    assert "data_dir names its folder (taken as it is: not the official file)" in images.source


def test_tuning_holds_out_every_tenth_training_image_of_a_class(tmp_path):
    full = load_archive(tmp_path, usual_members())
    tune = load(tmp_path, eval_on="tune")
    assert np.array_equal(tune.train, full.train[:14]) and np.array_equal(tune.val, full.train[14:])
    assert tune.train_labels.tolist() == full.train_labels.tolist()[:14] and tune.val_labels.tolist() == [0]
    assert tune.val[0, 0, 0, 0] == 9 and isinstance(tune.val, np.memmap)
    assert tune.mean == full.mean and len(all_files(cache_root())) == 3
    few = {name: content for name, content in usual_members().items() if CHURCH in name}
    message = error_of(load_archive, tmp_path / "few", few, eval_on="tune", code=2)
    assert "every 10th" in message and "--eval_on val" in message


def test_mean_and_spread_are_those_of_the_images_trained_on(tmp_path):
    images = load_archive(tmp_path, usual_members())
    kept = images.train[:14].reshape(-1, 3) / 255.0
    assert images.mean == pytest.approx(kept.mean(axis=0))
    assert images.std == pytest.approx([kept[:, 0].std(), 1 / 255, 1 / 255])  # two channels never change


def test_every_colour_mode_becomes_rgb(tmp_path):
    def save(image, kind):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    deep = Image.fromarray(np.full((30, 40), 40_000, dtype=np.uint16))
    cases = {
        "grey": (picture(77, mode="L", kind="JPEG"), (77, 77, 77)),
        "cmyk": (picture((0, 255, 255, 0), mode="CMYK", kind="JPEG"), (255, 0, 0)),
        "palette": (save(Image.new("RGB", (40, 30), (9, 99, 200)).quantize(4), "PNG"), (9, 99, 200)),
        "alpha": (picture((9, 99, 200, 255), mode="RGBA"), (9, 99, 200)),
        "two_colours": (picture(1, mode="1"), (255, 255, 255)),
        "sixteen_bits": (save(deep, "PNG"), (156, 156, 156)),
    }
    members = {f"{INSIDE}/{name}.JPEG": content for name, (content, _) in cases.items()}
    images = load_archive(tmp_path, members | {f"imagenette2-160/val/{TENCH}/a.JPEG": picture((1, 2, 3))})
    for seen, (name, (_, color)) in zip(images.train, cases.items(), strict=True):
        assert np.abs(seen.astype(int) - color).max() <= 2, name


def test_broken_images_are_named_counted_and_left_out(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    cut = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    members = usual_members() | {
        f"{INSIDE}/cut.JPEG": cut,
        f"{INSIDE}/text.JPEG": b"not an image",
        f"{INSIDE}/empty.JPEG": b"",
        f"imagenette2-160/val/{CHURCH}/bomb.JPEG": bomb(),
    }
    for _ in range(2):  # the second time out of the cache
        images = load_archive(tmp_path, members)
        assert images.skipped == {"train": 3, "val": 1} and len(images.train) == 15 and len(images.val) == 3
        said = capsys.readouterr().err
        assert "3 broken train images of imagenette are left out" in said and "1 broken val images" in said
        for part in (f"{INSIDE}/cut.JPEG': image file is truncated", "text.JPEG': not an image in JPEG", "empty.JPEG",
                     "9000 x 9000 pixels are more than 50,000,000"):
            assert part in said


def bomb():
    """A PNG that claims 9000 x 9000 pixels."""
    header, data = b"IHDR" + struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(9000))
    chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_blank_images_are_named(tmp_path, capsys):
    """White on transparent, for instance, which is white on white."""
    two = np.zeros((30, 40, 3), np.uint8)
    two[:15] = 255
    buffer = io.BytesIO()
    Image.fromarray(two).save(buffer, "PNG")
    members = {name: buffer.getvalue() for name in usual_members()}
    hidden = {f"{INSIDE}/hidden.JPEG": picture((255, 255, 255, 0), mode="RGBA"),
              f"{INSIDE}/grey.JPEG": picture((9, 9, 9))}  # fmt: skip
    for _ in range(2):  # the second time out of the cache
        assert load_archive(tmp_path, members | hidden).train.shape[0] == 17
        said = capsys.readouterr().err
        assert f"2 images of imagenette are blank, of one colour: '{INSIDE}/hidden.JPEG'; '{INSIDE}/grey.JPEG'." in said


def test_other_files_in_the_archive_are_passed_over(tmp_path):
    others = {"imagenette2-160/noisy_imagenette.csv": b"a,b", "imagenette2-160/train/readme": b"x",
              "imagenette2-160/test/unknown/a.JPEG": b"x"}
    images = load_archive(tmp_path, others | usual_members())
    assert len(images.train) == 15 and images.skipped == {"train": 0, "val": 0}


def test_what_a_mac_adds_to_an_archive_is_passed_over(tmp_path, capsys):
    names = ["._imagenette2-160", "imagenette2-160/._train", "imagenette2-160/train/.DS_Store", f"{INSIDE}/._0.JPEG",
             f"imagenette2-160/train/._{TENCH}", "__MACOSX/imagenette2-160/train/._x", f"__MACOSX/{INSIDE}/._0.JPEG",
             f"{INSIDE}/.DS_Store", "imagenette2-160/val/.Spotlight-V100/x/y", ".DS_Store"]  # fmt: skip
    plain = load_archive(tmp_path / "plain", usual_members())
    images = load_archive(tmp_path / "mac", {name: b"\0\5\x16\7" + bytes(99) for name in names} | usual_members())
    assert np.array_equal(images.train, plain.train) and np.array_equal(images.val, plain.val)
    assert images.skipped == {"train": 0, "val": 0} and "broken" not in capsys.readouterr().err
    dotted = {f"./{name}": content for name, content in usual_members().items()}  # as `tar .` writes them
    assert np.array_equal(load_archive(tmp_path / "dotted", dotted).train, plain.train)


# Imagenette: what is refused


def link(kind, target):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (f"/imagenette2-160/train/{TENCH}/a.JPEG", b"x", "points outside"),
        ("imagenette2-160/../../a.JPEG", b"x", "points outside"),
        (f"{INSIDE}/../../../../etc/a.JPEG", b"x", "points outside"),
        ("elsewhere/a.JPEG", b"x", "lies outside the archive's folder"),
        ("a.JPEG", b"x", "lies outside the archive's folder"),
        (f"{INSIDE}/a.JPEG", link(tarfile.SYMTYPE, "/etc/passwd"), "is a link"),
        (f"{INSIDE}/a.JPEG", link(tarfile.LNKTYPE, f"{INSIDE}/0.JPEG"), "is a link"),
        (f"{INSIDE}/a.JPEG", link(tarfile.FIFOTYPE, ""), "is a link or a device"),
        (f"{INSIDE}/a.JPEG", link(tarfile.BLKTYPE, ""), "is a link or a device"),
        (f"{INSIDE}/._a.JPEG", link(tarfile.CHRTYPE, ""), "is a link or a device"),
        ("__MACOSX/../../a.JPEG", b"x", "points outside"),
        ("/.DS_Store", b"x", "points outside"),
        ("imagenette2-160/train/n00000001/a.JPEG", b"x", "none of the classes n01440764"),
    ],
    ids=["absolute", "up", "up from a class", "other folder", "no folder", "symlink", "hard link", "pipe",
         "disk", "hidden device", "up from a Mac's folder", "hidden at the root", "class"],
)
def test_hostile_member_condemns_the_archive_by_name(tmp_path, name, content, reason):
    message = error_of(load_archive, tmp_path / "mine", usual_members() | {name: content})
    assert repr(name) in message and reason in message and str(tmp_path / "mine/imagenette2-160.tgz") in message
    assert all_files(cache_root()) == []


@pytest.mark.parametrize("damage", ["half", "last bytes", "checksum", "text", "empty"])
def test_damaged_archive_is_named(tmp_path, damage):
    path = pack(tmp_path / "imagenette2-160.tgz", usual_members())
    content = path.read_bytes()
    cut = {
        "half": content[: len(content) // 2],
        "last bytes": content[:-9],
        "checksum": content[:-8] + b"abcd" + content[-4:],
        "text": b"<html>",
        "empty": b"",
    }[damage]
    path.write_bytes(cut)
    message = error_of(load, tmp_path)
    assert f"{path} is damaged" in message and f"{len(cut)} bytes" in message and sha256(cut) in message
    assert all_files(cache_root()) == []


@pytest.mark.parametrize("damage", ["a bit", "cut between members", "cut inside a header"])
def test_a_damaged_header_in_a_whole_gzip_is_not_the_end(tmp_path, damage):
    path = pack(tmp_path / "imagenette2-160.tgz", usual_members())
    content = bytearray(gzip.decompress(path.read_bytes()))
    with tarfile.open(path) as archive:
        header = archive.getmembers()[15].offset
    if damage == "a bit":
        content[header + 150] ^= 1
    path.write_bytes(gzip.compress(content[: {"a bit": None, "cut between members": header}.get(damage, header + 99)]))
    message = error_of(load, tmp_path)
    assert f"{path} is damaged after its member" in message and "header of the next one" in message
    assert all_files(cache_root()) == []


@pytest.mark.parametrize("headers", [{"size": "-1536"}, {"size": "-1024"}, {"GNU.sparse.map": "a,b"},
                                     {"GNU.sparse.size": "x"}], ids=str)  # fmt: skip
def test_a_member_of_impossible_size_condemns_the_archive(tmp_path, headers):
    info = tarfile.TarInfo()
    info.pax_headers = headers
    message = error_of(load_archive, tmp_path / "mine", usual_members() | {f"{INSIDE}/bad.JPEG": info})
    assert "claims to have -" in message or "is damaged after its member" in message
    assert all_files(cache_root()) == []


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [1 << 40, 1 << 62])
def test_a_header_that_claims_a_huge_size_is_damage(tmp_path, kind, size):
    """A name or a set of attributes of 2^62 bytes, or a file that begins and has no end."""
    path = pack(tmp_path / "imagenette2-160.tgz", usual_members())
    info = tarfile.TarInfo(f"{INSIDE}/a.JPEG")
    info.type, info.size = kind, size
    content = gzip.decompress(path.read_bytes()).rstrip(b"\0")
    content += bytes(-len(content) % 512) + info.tobuf(tarfile.GNU_FORMAT) + bytes(512)
    path.write_bytes(gzip.compress(content))
    assert f"{path} is damaged after its member" in error_of(load, tmp_path)
    assert all_files(cache_root()) == []


@pytest.mark.parametrize("place", ["after the end", "in a member", "in a name"])
def test_an_archive_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.setattr(imagenette, "LARGEST_UNPACKED", 1 << 24)
    path = pack(tmp_path / "imagenette2-160.tgz", usual_members())
    content, zeros = gzip.decompress(path.read_bytes()), gzip.compress(bytes(1 << 20)) * 20
    if place != "after the end":
        info = tarfile.TarInfo(f"{INSIDE}/notes.txt")
        info.type, info.size = tarfile.REGTYPE if place == "in a member" else tarfile.GNUTYPE_LONGNAME, 20 << 20
        content = content.rstrip(b"\0")
        content += bytes(-len(content) % 512) + info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(gzip.compress(content) + zeros)
    assert "it unpacks to more than 16,777,216 bytes" in error_of(load, tmp_path)
    assert all_files(cache_root()) == []


def test_archive_with_nothing_to_evaluate_on_is_refused(tmp_path):
    members = {name: content for name, content in usual_members().items() if "/train/" in name}
    assert "no image to evaluate on (14 for training" in error_of(load_archive, tmp_path, members)
    assert all_files(cache_root()) == []


def test_truncated_copy_beside_the_checkout_is_not_used(monkeypatch, tmp_path, capsys):
    path = pack(cache.SHARED_DIR / "imagenette/imagenette2-160.tgz", usual_members())
    content = path.read_bytes()
    official = OfficialFile(imagenette.FILE.path, imagenette.FILE.url, len(content), "0" * 64, also=(sha256(content),))
    monkeypatch.setattr(imagenette, "FILE", official)
    assert load_images("imagenette", 8).source.startswith(f"{path}, because it is in the shared/data folder")
    path.write_bytes(content[:-1])
    message = error_of(load_images, "imagenette", 8)
    for part in (f"{path}: truncated", "not downloaded (Connection refused)", "--data_dir FOLDER"):
        assert part in message
    assert "--data stdlib" not in message


# Prepared once


def test_prepared_once_per_side(tmp_path, monkeypatch, capsys):
    first = load_archive(tmp_path, usual_members())
    assert "decoding imagenette to 8 x 8 pixels (once)" in capsys.readouterr().err
    monkeypatch.setattr(decoder, "decode", None)
    second = load(tmp_path)
    assert "decoding" not in capsys.readouterr().err
    assert np.array_equal(first.train, second.train) and np.array_equal(first.val_labels, second.val_labels)
    assert (first.mean, first.std, first.skipped) == (second.mean, second.std, second.skipped)


def _alter(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ending", ["-train.npy", "-val.npy", ".json"])
@pytest.mark.parametrize("damage", [_alter, lambda path: path.write_bytes(b"")], ids=["flip", "empty"])
def test_damaged_preparation_is_told_and_made_again(tmp_path, capsys, ending, damage):
    before = np.array(load_archive(tmp_path, usual_members()).train)
    (path,) = [path for path in (cache_root() / "prepared").iterdir() if path.name.endswith(ending)]
    good = path.read_bytes()
    damage(path)
    assert np.array_equal(load(tmp_path).train, before) and path.read_bytes() == good
    said = capsys.readouterr().err
    assert path.name in said and "preparing again" in said


def test_cache_that_cannot_be_written_costs_only_a_notice(tmp_path, monkeypatch, capsys):
    good = load_archive(tmp_path, usual_members())
    (tmp_path / "a_file").write_bytes(b"")
    monkeypatch.setenv("NANOGFT_CACHE", str(tmp_path / "a_file"))
    images = load(tmp_path)
    assert "stay in memory" in capsys.readouterr().err
    assert np.array_equal(images.train, good.train) and np.array_equal(images.val, good.val)
    assert not images.train.flags.writeable and images.mean == good.mean


def test_leftover_of_a_killed_process_is_deleted_and_a_live_one_is_not(tmp_path):
    load_archive(tmp_path, usual_members())
    (path,) = (cache_root() / "prepared").glob("*-train.npy")
    old, new = path.with_name(f".{path.name}.1-aa.tmp"), path.with_name(f".{path.name}.2-bb.tmp")
    old.touch(), new.touch(), os.utime(old, (0, 0)), path.unlink()
    load(tmp_path)
    assert new.exists() and not old.exists()
    old.touch(), os.utime(old, (0, 0))
    load(tmp_path)
    assert not old.exists(), "also where nothing had to be prepared"


def test_two_processes_preparing_at_once(tmp_path):
    pack(tmp_path / "imagenette2-160.tgz", usual_members())
    command = """if True:
        import pathlib, sys, time
        from data.cache import sha256
        from data.images import load_images
        folder, me = pathlib.Path(sys.argv[1]), sys.argv[2]
        (folder / me).touch()
        while not (folder / "go").exists():
            time.sleep(0.001)
        for side in range(8, 16):
            images = load_images("imagenette", side, str(folder))
            print(side, sha256(images.train.tobytes()), sha256(images.val.tobytes()), images.train_labels.tolist())
    """
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(tmp_path), me],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for me in ("a", "b")
    ]
    while not all((tmp_path / me).exists() or process.poll() is not None for me, process in zip("ab", processes)):
        pass
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert not any("preparing again" in said or "in memory" in said for _, said in outputs)
    assert outputs[0][0] == outputs[1][0] and len(outputs[0][0].splitlines()) == 8
    files = all_files(cache_root() / "prepared")
    assert len(files) == 24 and not [name for name in files if name.endswith(".tmp")]


def test_official_constants_match_the_file_beside_the_checkout(monkeypatch):
    """Without that folder the constants can only be compared with themselves: their form is checked."""
    monkeypatch.undo()
    file = imagenette.FILE
    assert len(file.sha256) == 64 and file.url.startswith("https://") and file.size == 99_003_388
    path = cache.SHARED_DIR / file.path
    if path.exists():
        assert file.fault(path.read_bytes()) == ""
