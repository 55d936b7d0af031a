"""What a trained net sees in image files.

    python predict.py out/imagenette_small photo.jpg
    python predict.py out/imagenette_small photo.jpg a_folder --top 3
    python predict.py out/mnist digits/ --json

The checkpoint is all it needs: no config file, no data. An image is cut to its middle square and resized as those of
the training were, transparency is composited on white (data/decode.py); a net trained on grey images sees grey (and
MNIST's digits are white on black). A folder is searched for images, whatever they are called, subfolders too, hidden
ones not. Results go to standard output, a line for each image, all else to standard error. An image that cannot be used
is named there and skipped, and the exit status is then 1; files of a folder that are no images are named at the end.

torch and Pillow are imported where they are used: --help and a mistyped option are answered without waiting for them.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from run.command import Parser, choose_device, emit, exit_status, find_folder
from run.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

LARGEST_BATCH, BATCH_PIXELS = 256, 1 << 20  # images at once, and their pixels together unless one image has more


@dataclass(frozen=True, eq=False)
class Classifier:
    """A net and what it needs to know of the images it was trained on."""

    net: nn.Module
    device: torch.device
    classes: tuple[str, ...]
    side: int  # pixels
    channels: int
    mean: tuple[float, ...]  # per channel, of pixels / 255
    std: tuple[float, ...]
    about: str  # which checkpoint it is

    @property
    def batch(self) -> int:
        """How many images to give at once."""
        return min(LARGEST_BATCH, max(1, BATCH_PIXELS // self.side**2))

    def probabilities(self, images: np.ndarray) -> Tensor:
        """Softmax over the classes, float64 (B, classes) on the CPU, of images uint8 (B, side, side, channels).

        Raises UserError where the net gives logits that are not finite.
        """
        import torch

        from data.augment import normalise, pixel_scale

        pixels = torch.from_numpy(images).to(self.device)
        with torch.no_grad():
            logits = self.net(normalise(pixels, pixel_scale(self.mean, self.std, self.device))).double().cpu()
        if not torch.isfinite(logits).all():
            raise UserError("the network's logits are not finite: this checkpoint's training went wrong; use another")
        return logits.softmax(dim=1)


def load(folder: Path, name: str | None, device: str) -> Classifier:
    """The net of checkpoint `name` (None: best, or last where there is no best); UserError if it cannot be used."""
    import torch

    from model import load_net

    net, meta, head = load_net(folder, name or "")
    if "classes" not in meta:
        raise UserError(f"{head} is a net for text, not for images; python sample.py {folder} uses it")
    side, _, channels = meta["image"]
    classes, mean, std = (tuple(meta[key]) for key in ("classes", "mean", "std"))
    about = f"{head.stem} of step {meta['step']}"
    return Classifier(net.to(device).eval(), torch.device(device), classes, side, channels, mean, std, about)


@dataclass
class Skipped:
    """What gets no answer, told on standard error."""

    faults: int = 0
    others: list[str] = field(default_factory=list)  # of a folder, no images and not called so

    def fault(self, file: str, why: str) -> None:
        """Tells of a file or a folder that should have an answer."""
        self.faults += 1
        print(f"skipped: {printable(file)}: {why}", file=sys.stderr)

    def tell_rest(self, answered: int) -> None:
        """Tells of the other files, and how many were skipped beside those `answered`."""
        from data.notice import few

        if self.others:
            print(f"not images: {few(list(map(printable, self.others)))}", file=sys.stderr)
        if self.faults:
            print(f"{self.faults} skipped, {answered} answered", file=sys.stderr)


def images_of(paths: Iterable[str], side: int, channels: int, skipped: Skipped) -> Iterator[tuple[str, np.ndarray]]:
    """Each image among `paths`, and in place of a folder the images in it: uint8 (side, side, channels)."""
    from data.image_folder import files_in

    for path in paths:
        if not os.path.isdir(path):
            yield from _image(path, side, channels, skipped, searched=False)
            continue
        faults, images = skipped.faults, 0
        for file in files_in(path, skipped.fault):
            for image in _image(file, side, channels, skipped, searched=True):
                images += 1
                yield image
        if not images and faults == skipped.faults:
            skipped.fault(path, "a folder without images")


def _image(file: str, side: int, channels: int, skipped: Skipped, searched: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The file and its image, or nothing; `searched` tells that the file was found in a folder."""
    from data.decode import BrokenImage, NotAnImage, decode, is_blank, read_file

    try:
        image = decode(read_file(file), side, channels)
    except BrokenImage as error:
        if searched and isinstance(error, NotAnImage) and not _called_image(file):
            skipped.others.append(file)
        else:
            skipped.fault(file, str(error))
    except OSError as error:
        skipped.fault(file, error.strerror or str(error))
    else:
        if is_blank(image):
            print(f"note: {printable(file)} is blank: all its pixels have one colour (transparency is composited on "
                  "white)", file=sys.stderr)  # fmt: skip
        yield file, image


def _called_image(file: str) -> bool:
    return (mimetypes.guess_type(file, strict=False)[0] or "").startswith("image/")


def classify(
    classifier: Classifier, paths: Iterable[str], top: int, skipped: Skipped
) -> Iterator[list[tuple[str, list[tuple[str, float]]]]]:
    """Batches of files, each with its `top` likeliest classes and their probabilities, the likeliest first.

    Of equally likely classes the one of the lower number goes first.
    """
    import numpy as np

    images = images_of(paths, classifier.side, classifier.channels, skipped)
    while batch := list(islice(images, classifier.batch)):
        files, pixels = zip(*batch, strict=True)
        values, order = classifier.probabilities(np.stack(pixels)).sort(dim=1, descending=True, stable=True)
        yield [
            (file, [(classifier.classes[c], p) for c, p in zip(cs[:top], ps[:top], strict=True)])
            for file, cs, ps in zip(files, order.tolist(), values.tolist(), strict=True)
        ]


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked options. Raises UserError with code 2 for a wrong one."""
    about = "Print what a trained checkpoint sees in image files. Transparency is composited on white."
    parser = Parser("predict.py", about, "out/imagenette_small")
    parser.add_argument("images", nargs="+", metavar="image", help="an image file, or a folder to search for them")
    parser.add_argument("--top", type=int, default=5, help="classes to print for each file (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each file")
    args = parser.read(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: it must be at least 1", code=2)
    return args


def printable(file: str) -> str:
    """A file's name as it can be printed on one line."""
    return file if file.isprintable() else ascii(file)


def line(file: str, likely: list[tuple[str, float]], as_json: bool) -> str:
    """What is printed of a file."""
    if as_json:
        return json.dumps({"file": file, "predictions": [{"class": c, "probability": p} for c, p in likely]}) + "\n"
    return f"{printable(file)}: {', '.join(f'{c} {100 * p:.1f} %' for c, p in likely)}\n"


def run(argv: list[str]) -> int:
    """Everything main does, errors and interruptions aside."""
    args = parse(argv)
    device, reason = choose_device(args.device)
    classifier = load(find_folder(args.folder, args.checkpoint), args.checkpoint, device)
    print(f"checkpoint {classifier.about}; device {device} ({reason})", file=sys.stderr)
    skipped, answered = Skipped(), 0
    for batch in classify(classifier, args.images, args.top, skipped):
        emit("".join(line(file, likely, args.json) for file, likely in batch))
        answered += len(batch)
    skipped.tell_rest(answered)
    return 1 if skipped.faults else 0


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a wrong option, 1 for another error or a file skipped, 130 after Ctrl-C."""
    return exit_status(run, argv, "free some, or use --device cpu")


if __name__ == "__main__":
    sys.exit(main())
