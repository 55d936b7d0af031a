"""Your own folder of images becomes a classifier, and that an ONNX file.

    python -m examples.own_images photos                photos/CLASS/*.jpg, any size and format
    python -m examples.own_images                       makes a folder of discs and squares first

The same by hand: train.py with --data, predict.py, export.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import export
import predict
import train
from run import checkpoint

SETTINGS = {
    "image_side": 16, "patch": 4, "n_layer": 2, "n_head": 2, "d_model": 32, "batch_size": 16, "momentum": 0.9,
    "crop_min": 0.6, "eval_every": 10**9, "compile": "false",
}  # fmt: skip


def draw(folder: Path, each: int = 60) -> Path:
    """A folder of two classes: discs and squares of all colours and places."""
    numbers = np.random.default_rng(1)
    for name in ("disc", "square"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            image = Image.fromarray(numbers.integers(0, 90, (24, 24, 3), dtype=np.uint8))
            x, y, size = (int(n) for n in numbers.integers((3, 3, 11), (9, 9, 13)))
            shape = ImageDraw.Draw(image).ellipse if name == "disc" else ImageDraw.Draw(image).rectangle
            shape((x, y, x + size, y + size), fill=tuple(numbers.integers(120, 256, 3).tolist()))
            image.save(folder / name / f"{i}.png")
    return folder


def main(argv: list[str] | None = None) -> int:
    """The exit status of the program that failed, which has said why; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", nargs="?", help="a folder of images in class folders (default: makes one)")
    parser.add_argument("--out", type=Path, default="out/own_images", help="folder of the run (default: %(default)s)")
    parser.add_argument("--model", default="model.onnx", help="name of the exported file (default: %(default)s)")
    parser.add_argument("--steps", default="100", help="updates (default: %(default)s)")
    args = parser.parse_args(argv)
    if checkpoint.exists(args.out, "last"):
        parser.error(f"--out {args.out}: a run is there already; name another folder, or delete that one")
    images = Path(args.images) if args.images else draw(args.out / "photos")
    settings = SETTINGS | {"data": images, "out_dir": args.out, "steps": args.steps}
    if failed := train.main(["imagenette_small", *(f"--{key}={value}" for key, value in settings.items())]):
        return failed
    one_of_each = [next(folder.iterdir()) for folder in sorted(images.iterdir()) if folder.is_dir()]
    failed = predict.main([str(args.out), *map(str, one_of_each), "--top", "1"])
    return failed or export.main([str(args.out), str(args.out / args.model)])


if __name__ == "__main__":
    sys.exit(main())

# Output (some of it; times, sizes and losses vary a little):
#
#     net: 26,208 weights, method gft, 6 bits, rule spectral, momentum 0.9
#     step 100/100  loss 0.07
#     checkpoint best of step 100: 10 integer layers, 26,208 weights
