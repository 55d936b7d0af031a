"""Your own text becomes your own model, and that an ONNX file that runs without torch.

    python -m examples.own_text book.txt --steps 1000       any UTF-8 file
    python -m examples.own_text                             a text that comes with Python

The same by hand: train.py with --data, then export.py, then examples/onnx_generate.py.
"""

import argparse
import pydoc_data.topics
import sys
from pathlib import Path

import export
import train
from run import checkpoint

WORDS = ("lambda", "if", "while", "for", "class", "with", "try", "import", "strings", "exprlists")
SETTINGS = {
    "n_layer": 2, "d_model": 64, "context": 32, "batch_size": 16, "momentum": 0.9, "k": 0.3, "log_every": 10,
    "eval_every": 10**9, "eval_windows": 20, "sample_tokens": 0, "compile": "false",
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The exit status of the program that failed, which has said why; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", nargs="?", help="a text file (default: some of Python's documentation)")
    parser.add_argument("--out", type=Path, default="out/own_text", help="folder of the run (default: %(default)s)")
    parser.add_argument("--model", default="model.onnx", help="name of the exported file (default: %(default)s)")
    parser.add_argument("--steps", default="40", help="updates; a good model takes 1000 (default: %(default)s)")
    args = parser.parse_args(argv)
    if checkpoint.exists(args.out, "last"):
        parser.error(f"--out {args.out}: a run is there already; name another folder, or delete that one")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.text is None:
        args.text = args.out / "text.txt"
        args.text.write_text("".join(pydoc_data.topics.topics[word] for word in WORDS), encoding="utf-8")
    settings = SETTINGS | {"data": args.text, "out_dir": args.out, "steps": args.steps}
    trained = train.main(["shakespeare_char_small", *(f"--{key}={value}" for key, value in settings.items())])
    return trained or export.main([str(args.out), str(args.out / args.model)])


if __name__ == "__main__":
    sys.exit(main())

# Output (some of it; times, sizes and losses vary a little):
#
#     net: 109,952 weights, method gft, 6 bits, rule spectral, momentum 0.9
#     step 40/40  loss 2.298  val 2.603  flips 0.041
#     checkpoint best of step 40: 10 integer layers, 109,952 weights
