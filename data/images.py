"""Images as two uint8 arrays, one to train on and one to evaluate on, memory-mapped.

    from data.images import load_images
    images = load_images("imagenette", side=64)
    images.train[0], images.classes[images.train_labels[0]]         # (64, 64, 3) uint8, "tench"
"""

from dataclasses import dataclass

import numpy as np

from data import image_folder, imagenette, mnist
from data.notice import few, notice
from data.prepare_images import HELD_OUT, load_prepared, prepare
from run.errors import UserError

IMAGE_SETS = {"imagenette": imagenette.find, "mnist": mnist.find}


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set of labelled images, decoded, resized and split."""

    name: str
    train: np.ndarray  # (N, H, W, C) uint8, read-only
    train_labels: np.ndarray  # (N,) int64, below len(classes)
    val: np.ndarray  # like train
    val_labels: np.ndarray  # like train_labels
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of the training images / 255 less the tenth held out for tuning
    std: tuple[float, ...]
    skipped: dict[str, int]  # "train" and "val" of the source: how many broken images are left out
    sha256: str  # of the source's bytes
    source: str  # "<where>, because <why>"


def load_images(name: str, side: int, data_dir: str = "", eval_on: str = "val", channels: int = 3) -> ImageData:
    """The images `name` ("imagenette", RGB, or "mnist", one channel; or a folder, "PATH/"), side x side.

    side        pixels; an image is resized by its shorter side and cropped around its middle. MNIST's own is 28
    channels    of the images in a folder: 3 (RGB) or 1 (grey)
    data_dir    where a person keeps the files, empty for the usual search (see data/cache.py)
    eval_on     "val": train on the official training images, evaluate on the official validation or test images.
                "tune": of the training images every tenth of each class is evaluated on, the others are trained on;
                the official validation images are not touched.

    The first call decodes the images and keeps them in the cache. Raises UserError for whatever a person can mend;
    the settings are those of a Config, which has checked them.
    """
    source = image_folder.find(name, data_dir, channels) if name.endswith("/") else IMAGE_SETS[name](data_dir)
    prepared = load_prepared(source, side) or prepare(source, side)
    for split, names in prepared.skipped.items():
        if names:
            notice(f"{len(names)} broken {split} images of {source.name} are left out: {few(names)}.")
    if prepared.blank:
        notice(f"{len(prepared.blank)} images of {source.name} are blank, of one colour: {few(prepared.blank)}.")
    train, train_labels = prepared.train, prepared.train_labels
    val, val_labels = prepared.val, prepared.val_labels
    if eval_on == "tune":
        val, val_labels = train[prepared.kept :], train_labels[prepared.kept :]
        train, train_labels = train[: prepared.kept], train_labels[: prepared.kept]
    if not len(val):
        raise UserError(
            f"{source.source}: eval_on = tune holds out every {HELD_OUT}th training image of a class, and no class has "
            f"{HELD_OUT}. Evaluate on the validation images: --eval_on val.",
            code=2,
        )
    return ImageData(
        name=source.name,
        train=train,
        train_labels=train_labels,
        val=val,
        val_labels=val_labels,
        classes=source.classes,
        mean=prepared.mean,
        std=prepared.std,
        skipped={split: len(names) for split, names in prepared.skipped.items()},
        sha256=source.sha256,
        source=source.source,
    )
