"""Text from an exported model, with onnxruntime and numpy alone: no torch, nothing of this repository.

    python export.py out/shakespeare_char_small model.onnx
    python examples/onnx_generate.py model.onnx "ROMEO:"      the text of sample.py --temperature 0 (docs/export.md)
"""

import argparse
import base64
import json
import os
import re
from contextlib import suppress
from unicodedata import category

import numpy as np
import onnxruntime


def words_of(text: str, pattern: str) -> list[str]:
    """The pieces that BPE joins bytes in. `re` does not know Unicode's classes: one letter, mark, digit is for all."""
    plain = re.sub(r"[^\0-\x7f]", lambda c: {"L": "x", "M": "\u0301", "N": "1"}.get(category(c[0])[0], c[0]), text)
    pattern = pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{M}", "\u0301").replace(r"\p{N}", "0-9")
    pattern = re.sub(r"(a-zA-Z|0-9)(?![^[]*\])", r"[\1]", pattern)  # classes that are in no brackets yet
    return [text[m.start() : m.end()] for m in re.finditer(pattern, plain)]


def encode(text: str, tokenizer: dict) -> list[int]:
    """The tokens of a text: characters, or byte pairs joined in the order of their ranks."""
    if tokenizer["kind"] == "char":
        return [tokenizer["chars"].index(c) for c in text]
    ranks, tokens = {base64.b64decode(t): i for i, t in enumerate(tokenizer["ranks"])}, []
    for word in words_of(text, tokenizer["pattern"]):
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        tokens += [ranks[part] for part in parts]
    return tokens


def generate(session: onnxruntime.InferenceSession, tokens: list[int], count: int):
    """The `count` likeliest tokens after `tokens`, one by one: (token, logits)."""
    _, layers, _, heads, _, width = session.get_inputs()[1].shape
    past, seen = np.zeros((2, layers, 1, heads, 0, width), np.float32), 0
    for _ in range(count):
        logits, past = session.run(None, {"tokens": np.int64([tokens]), "past": past, "seen": np.array(seen, np.int64)})
        seen, tokens = seen + len(tokens), [int(logits[0, -1].argmax())]
        yield tokens[0], logits[0, -1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model"), parser.add_argument("prompt", type=lambda text: text or "\n")  # as sample.py begins
    parser.add_argument("--max-tokens", type=int, default=500)
    args = parser.parse_args()
    try:
        session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other base
        parser.exit(2, f"error: {args.model} cannot be read as ONNX: {error}\n")
    tokenizer = json.loads(session.get_modelmeta().custom_metadata_map.get("nanogft", "{}")).get("tokenizer", {})
    if not tokenizer or len(session.get_inputs()) < 3:
        parser.exit(2, f"error: {args.model} is no net for text with a KV cache: export one without --no-cache\n")
    if unknown := set(args.prompt) - set(tokenizer.get("chars", args.prompt)):
        parser.exit(2, f"error: the net does not know {sorted(unknown)}, only {tokenizer['chars']!r}\n")
    args.max_tokens < 0 and parser.exit(2, f"error: --max-tokens {args.max_tokens}: it must be at least 0\n")
    table = [c.encode() for c in tokenizer.get("chars", "")] or [base64.b64decode(t) for t in tokenizer["ranks"]]
    os.write(1, args.prompt.encode())
    for token, _ in generate(session, encode(args.prompt, tokenizer), args.max_tokens):
        os.write(1, table[token])  # unbuffered: each is seen as it comes
    os.write(1, b"\n")


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # whoever reads the text has enough of it
        main()

# Output for the net of `python train.py shakespeare_char_small --steps 100`, with --max-tokens 60, after "ROMEO:":
#
#     No, the the so the so the the come the sor the so the cour
