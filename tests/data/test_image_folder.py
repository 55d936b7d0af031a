"""One's own images in class folders: layouts, what is held out, what is left out, and folders that are refused."""

import io
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from data import decode as decoder
from data import image_folder, notice
from data.cache import cache_root
from data.images import load_images
from run.errors import UserError
from tests.data.inputs import error_of


def picture(path, value, kind="PNG", size=(12, 9)):
    """Two greys, a bright one on the left and `value` on the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size[::-1], 3), value, np.uint8)
    pixels[:, : size[0] // 2] = 250
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    path.write_bytes(buffer.getvalue())


def fill(root, cats=10, dogs=4, first=0):
    """Images cats/0 ... of the greys first ..., and dogs/0 ... of 100 + first ..."""
    for name, count, value in (("cats", cats, 0), ("dogs", dogs, 100)):
        for n in range(count):
            picture(root / name / str(n), value + first + n)
    return root


def load(folder, **settings):
    return load_images(f"{folder}/", 8, **settings)


def greys(images):
    """The value of each image."""
    return images[:, 0, -1, 0].tolist()


def refused(folder):
    message = error_of(load, folder, code=2)
    assert not (cache_root() / "prepared").exists()
    return message


def test_train_and_val_become_arrays_labels_and_names(tmp_path):
    top = tmp_path / "pets"
    fill(top / "train"), fill(top / "val", 2, 1, first=50)
    images = load(top)
    assert images.name == "pets" and images.classes == ("cats", "dogs")
    assert images.train.shape == (14, 8, 8, 3) and isinstance(images.train, np.memmap)
    order = [*range(9), 100, 101, 102, 103, 9]  # the tenth cat is held out for tuning and comes last
    assert greys(images.train) == order and images.train_labels.tolist() == [int(n >= 100) for n in order]
    assert greys(images.val) == [50, 51, 150] and images.val_labels.tolist() == [0, 0, 1]
    assert images.source == f"{top}, because data names this folder"
    assert greys(load(top, eval_on="tune").val) == [9]
    grey = load(top, channels=1)
    assert grey.train.shape == (14, 8, 8, 1) and greys(grey.val) == [50, 51, 150]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_other_names_of_the_part_to_evaluate_on(tmp_path, val, capsys):
    fill(tmp_path / "train", 2, 2), fill(tmp_path / val, 1, 1, first=7), fill(tmp_path / "more", 1, 1)
    assert greys(load(tmp_path).val) == [7, 107]
    assert "1 files and folders in" in (said := capsys.readouterr().err) and "more/: not in train/" in said


def test_without_val_a_tenth_of_each_class_is_held_out_by_its_hash(tmp_path):
    top = fill(tmp_path / "pets", 40, 5)
    first = load(top)
    assert len(first.val) == 5 and first.val_labels.tolist() == [0, 0, 0, 0, 1] and len(first.train) == 40
    assert sorted(greys(first.val) + greys(first.train)) == [*range(40), *range(100, 105)]
    assert "one in 10 of each class, chosen by hash" in first.source
    inside = tmp_path / "again" / "train"  # the same images under other names, and a copy of one held out
    shutil.copytree(top, inside)
    for n in range(40):
        (inside / "cats" / str(n)).rename(inside / "cats" / f"{1000 - n}.jpg")
    shutil.copy(inside / "cats" / f"{1000 - greys(first.val)[0]}.jpg", inside / "cats" / "copy")
    again = load(inside.parent)
    assert sorted(greys(again.val)) == sorted(greys(first.val) + greys(first.val)[:1])


def test_any_size_and_format_whatever_its_name(tmp_path):
    fill(tmp_path, 2, 2)
    for n, (kind, size) in enumerate((("JPEG", (900, 700)), ("TIFF", (8, 40)), ("WEBP", (1, 1)), ("GIF", (33, 16)))):
        picture(tmp_path / "cats" / "deep" / f"{n}.txt", 60, kind, size)
    images = load(tmp_path)
    assert len(images.train) + len(images.val) == 8 and images.skipped == {"train": 0, "val": 0}


def test_the_cache_is_used_and_a_change_is_noticed(tmp_path, monkeypatch):
    top = fill(tmp_path / "pets")
    first = load(top)
    shutil.copytree(top, tmp_path / "moved")
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "decode", None)
        assert load(tmp_path / "moved").sha256 == first.sha256, "content counts, and not where it is"
    for change in (lambda: picture(top / "cats" / "0", 77), lambda: (top / "dogs").rename(top / "wolves"),
                   lambda: picture(top / "cats" / "new", 9)):  # fmt: skip
        before = load(top).sha256
        change()
        assert load(top).sha256 != before


def test_what_is_left_out_is_named(tmp_path, capsys):
    fill(tmp_path / "train", 3, 3)
    cats = tmp_path / "train" / "cats"
    (cats / "labels.csv").write_text("0,1")
    (cats / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    picture(tmp_path / "train" / "loose.png", 3)
    (cats / ".DS_Store").touch(), (cats / "._0").touch(), (tmp_path / "__MACOSX").mkdir()
    (cats / "dead").symlink_to("nowhere")
    (tmp_path / "readme").touch(), (tmp_path / "train" / "empty").mkdir()
    images = load(tmp_path)
    assert len(images.train) + len(images.val) == 6 and images.classes == ("cats", "dogs")
    said = capsys.readouterr().err
    assert "5 files and folders in" in said and "readme: in no" in said and "loose.png: in no class's folder" in said
    assert "'train/cats/labels.csv': not an image in JPEG" in said and "'train/cats/dead': No such file" in said
    assert "DS_Store" not in said and "._0" not in said and "MACOSX" not in said


def test_broken_images_are_named_counted_and_left_out(tmp_path, capsys, monkeypatch):
    fill(tmp_path / "train", 3, 3), fill(tmp_path / "val", 2, 2)
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(noise, "PNG")
    (tmp_path / "train" / "cats" / "cut").write_bytes(noise.getvalue()[:3000])
    real = decoder.square

    def square(image, side):
        if image.size == (5, 5):
            raise TypeError("bad operand type for abs(): 'str'")
        return real(image, side)

    monkeypatch.setattr(decoder, "square", square)
    picture(tmp_path / "val" / "dogs" / "odd", 9, size=(5, 5))
    for _ in range(2):  # the second time out of the cache
        images = load(tmp_path)
        assert images.skipped == {"train": 1, "val": 1} and len(images.train) == 6 and len(images.val) == 4
        said = capsys.readouterr().err
        assert f"1 broken train images of {tmp_path.name} are left out: 'train/cats/cut': image file is trunc" in said
        assert "1 broken val images" in said and "'val/dogs/odd': bad operand type for abs()" in said


def test_one_is_told_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(notice, "QUIET", 0)
    load(fill(tmp_path / "pets", 3, 2))
    said = capsys.readouterr().err
    assert f"reading the files in {tmp_path / 'pets'}: 4 so far" in said and "decoding pets: 5 so far" in said


def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    fill(tmp_path, 3, 3)
    real = decoder.read_file

    def read_file(path):
        if path.endswith("cats/1"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(decoder, "read_file", read_file)
    images = load(tmp_path)
    assert len(images.train) + len(images.val) == 5 and "'cats/1': Permission denied" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    fill(tmp_path, 3, 3)
    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(UserError, match="cats cannot be read: Permission denied"):
        load(tmp_path)


def test_folders_that_are_refused(tmp_path):
    assert "there is no such folder" in refused(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "holds no images in class folders: it has no files." in refused(tmp_path / "empty")
    picture(tmp_path / "loose" / "0.png", 1)
    (tmp_path / "loose" / "a.txt").touch()
    said = refused(tmp_path / "loose")
    assert "it has 2 files (0.png; a.txt)" in said and "FOLDER/CLASS/*" in said and ".txt or .jsonl" in said
    fill(tmp_path / "one", 5, 0)
    assert "fewer than two classes: cats" in refused(tmp_path / "one")
    fill(tmp_path / "other" / "train", 2, 2), fill(tmp_path / "other" / "val", 1, 1)
    picture(tmp_path / "other" / "val" / "emu" / "0", 1)
    assert "nothing to train on of emu" in refused(tmp_path / "other")


def test_one_image_of_each_class_leaves_nothing_to_evaluate_on(tmp_path):
    with pytest.raises(UserError, match="no image to evaluate on"):
        load(fill(tmp_path, 1, 1))


def test_names_of_classes(tmp_path):
    """A class may be called train; a Mac's é is everyone's é; a name that a terminal would obey is escaped."""
    for name in ("train", "e\u0301glise", "\x1b[31m"):
        picture(tmp_path / name / "0", 1), picture(tmp_path / name / "1", 2)
    assert load(tmp_path).classes == ("'\\x1b[31m'", "train", "\u00e9glise")


def test_a_folder_is_looked_for_where_data_is(tmp_path, monkeypatch):
    fill(tmp_path / "pets", 2, 2)
    assert load_images("pets/", 8, str(tmp_path)).name == "pets"
    monkeypatch.setenv("NANOGFT_DATA", str(tmp_path))
    assert load_images("pets/", 8).name == "pets"


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "real", 3, 0), fill(tmp_path / "pets", 0, 3)
    (tmp_path / "pets" / "cats").symlink_to(tmp_path / "real" / "cats")
    (tmp_path / "real" / "cats" / "again").symlink_to(tmp_path / "real" / "cats")
    images = load(tmp_path / "pets")
    assert sorted(greys(images.train) + greys(images.val)) == [0, 1, 2, 100, 101, 102]


def test_files_in(tmp_path):
    for name in ("b/1", "a", ".hidden", "b/.x", "__MACOSX/y", "c/d/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dead").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    found = [os.path.relpath(path, tmp_path) for path in image_folder.files_in(tmp_path, pytest.fail)]
    assert found == ["a", "dead", os.path.join("b", "1"), os.path.join("c", "d", "2")]
