"""Text from an exported model, with onnxruntime and numpy alone: no torch, nothing of this repository.

    python export.py out/shakespeare_char_small model.onnx
    python examples/onnx_generate.py model.onnx "ROMEO:" --max-tokens 300

The text is that of `python sample.py out/shakespeare_char_small --prompt "ROMEO:" --temperature 0` (docs/export.md).
"""

import argparse
import base64
import json
import re
import sys
import unicodedata

import numpy as np
import onnxruntime


def plain(c: str) -> str:
    """A letter, mark or digit that is not ASCII as one that is: `re` does not know Unicode's classes."""
    return c if c < "\x80" else {"L": "x", "M": "\u0301", "N": "1"}.get(unicodedata.category(c)[0], c)


def words_of(text: str, pattern: str) -> list[str]:
    """The pieces that BPE joins bytes in."""
    pattern = pattern.replace(r"\p{L}", "a-zA-Z").replace(r"\p{M}", "\u0301").replace(r"\p{N}", "0-9")
    pattern = re.sub(r"(a-zA-Z|0-9)(?![^[]*\])", r"[\1]", pattern)  # classes that are in no brackets yet
    return [text[m.start() : m.end()] for m in re.finditer(pattern, "".join(map(plain, text)))]


def encode(text: str, tokenizer: dict) -> list[int]:
    """The tokens of a text: characters, or byte pairs joined in the order of their ranks."""
    if tokenizer["kind"] == "char":
        return [tokenizer["chars"].index(c) for c in text]
    ranks, tokens = {base64.b64decode(t): i for i, t in enumerate(tokenizer["ranks"])}, []
    for word in words_of(text, tokenizer["pattern"]):
        parts = [bytes([b]) for b in word.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
            i = int(np.argmin(pairs))
            if pairs[i] == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        tokens += [ranks[part] for part in parts]
    return tokens


def generate(session: onnxruntime.InferenceSession, tokens: list[int], count: int):
    """The `count` likeliest tokens after `tokens`, one by one: (token, logits)."""
    _, layers, _, heads, _, width = session.get_inputs()[1].shape
    past, seen = np.zeros((2, layers, 1, heads, 0, width), np.float32), 0
    for _ in range(count):
        fed = {"tokens": np.array([tokens], np.int64), "past": past, "seen": np.array(seen, np.int64)}
        logits, past = session.run(["logits", "present"], fed)
        seen, tokens = seen + len(tokens), [int(logits[0, -1].argmax())]
        yield tokens[0], logits[0, -1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=500)
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    tokenizer = json.loads(session.get_modelmeta().custom_metadata_map["nanogft"])["tokenizer"]
    new = [token for token, _ in generate(session, encode(args.prompt, tokenizer), args.max_tokens)]
    table = [c.encode() for c in tokenizer.get("chars", "")] or [base64.b64decode(t) for t in tokenizer["ranks"]]
    sys.stdout.buffer.write(args.prompt.encode() + b"".join(table[t] for t in new) + b"\n")


if __name__ == "__main__":
    main()

# Output for the net of `python train.py shakespeare_char_small --steps 100`, with --max-tokens 60:
#
#     ROMEO:
#     No, the the so the so the the come the sor the so the cour
