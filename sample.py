"""Text from a checkpoint, printed as it is generated.

    python sample.py out/shakespeare_char_small --prompt "ROMEO:"
    python sample.py out/shakespeare_char_small --samples 3 --temperature 0.7 --top-p 0.95
    printf 'First Citizen:\\n' | python sample.py out/shakespeare_char_small --prompt -

The checkpoint is all it needs: no config file, no data. The text is a function of the checkpoint, the
prompt and the options: token t of sample i is drawn by the number Philox(seed, t, SAMPLE, i), through the
inverse of the distribution function, so sample i is the same text whatever --samples is.

Nets that are all integer run in numpy on a CPU (decoder.py), others in torch; both, and numpy, are imported where they
are used: --help and a mistyped option are answered without waiting for them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from run.command import Parser, choose_device, emit, exit_status, find_folder
from run.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike
    from torch import nn

    from data.tokenizers import Tokenizer

DRAWN = 256  # tokens whose random numbers are drawn at once
SEPARATOR = "---"


class Source(Protocol):
    """What text is generated from: decoder.Decoder, or NetSource."""

    def feed(self, tokens: ArrayLike) -> np.ndarray:
        """Logits float32 (B, V) after the last of `tokens`, ints (B, T) that follow those fed before."""

    def repeat(self, texts: int) -> None:
        """So many texts go on from the one that has been fed."""


class NetSource:
    """A net in torch, on its own device, in evaluation mode for as long as it computes."""

    def __init__(self, net: nn.Module, use_cache: bool = True):
        """Without the cache every token re-reads the whole text: slow, and the reference for the cache."""
        self.net, self.cache, self.texts = net, net.new_cache() if use_cache else None, None

    def feed(self, tokens: ArrayLike) -> np.ndarray:
        """See Source."""
        import numpy as np
        import torch

        from decoder import CHUNK

        tokens, was_training = np.asarray(tokens), self.net.training
        if self.cache is None:
            self.texts = tokens if self.texts is None else np.concatenate((self.texts, tokens), axis=1)
        text, step = (self.texts, self.texts.shape[1]) if self.cache is None else (tokens, CHUNK)
        device = next((t.device for t in self.net.state_dict().values()), torch.device("cpu"))
        self.net.eval()
        with torch.inference_mode():
            for start in range(0, text.shape[1], step):
                chunk = torch.tensor(text[:, start : start + step], device=device)  # (B, T)
                logits = self.net(chunk) if self.cache is None else self.net(chunk, cache=self.cache)  # (B, T, V)
        self.net.train(was_training)
        return logits[:, -1].float().cpu().numpy()

    def repeat(self, texts: int) -> None:
        """See Source."""
        if self.cache is None:
            self.texts = self.texts.repeat(texts, axis=0)
        else:
            self.cache.repeat(texts)


def probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The distributions to draw from: logits (B, V) to float64 (B, V), exact zeros where filtered out.

    `top_k` > 0 keeps the k largest logits; `top_p` < 1 then keeps the smallest set of the likeliest tokens whose
    probability reaches it. Of equal logits the lower index goes first. `temperature` > 0.
    """
    import numpy as np

    values = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # the maximum first: a tiny temperature must not overflow to NaN
        values = np.exp((values - values.max(axis=1, keepdims=True)) / temperature)
    if top_k > 0 or top_p < 1:
        order = np.argsort(-logits, axis=1, kind="stable")
        ranked = np.take_along_axis(values, order, axis=1)
        if top_k > 0:
            ranked[:, top_k:] = 0
        if top_p < 1:
            ranked /= ranked.sum(axis=1, keepdims=True)
            ranked[np.cumsum(ranked, axis=1) - ranked >= top_p] = 0
        np.put_along_axis(values, order, ranked, axis=1)
    return values / values.sum(axis=1, keepdims=True)


def draw(p: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The tokens (B,) where the distribution functions of p (B, V) pass u (B,) in [0, 1); never one with p = 0."""
    import numpy as np

    cdf = np.cumsum(p, axis=1)
    passed = (cdf <= (u * cdf[:, -1])[:, None]).sum(axis=1)
    last = p.shape[1] - 1 - (p[:, ::-1] > 0).argmax(axis=1)  # u * total may round up to the total
    return np.minimum(passed, last)


def uniform(seed: int, first: int, tokens: int, samples: Sequence[int]) -> np.ndarray:
    """The numbers that draw tokens first, first + 1, ... of `samples`: float64 (tokens, samples) in [0, 1)."""
    import numpy as np

    from kernels.philox_words import MASK, Stream, philox4x32

    group, steps = np.array(samples, dtype=np.uint64) >> 2, np.arange(first, first + tokens, dtype=np.uint64)[:, None]
    counter = (group & MASK, group >> 32, steps & MASK, Stream.SAMPLE)
    four = np.stack(philox4x32(counter, (seed & MASK, seed >> 32 & MASK)))  # (4, tokens, samples)
    return four[np.array(samples) % 4, :, np.arange(len(samples))].T * 2.0**-32


def generate(
    source: Source,
    prompt_ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    samples: Sequence[int] = (0,),
) -> Iterator[list[int]]:
    """Yield `max_tokens` times the next token of every one of `samples`, which continue `prompt_ids` (at least one).

    `temperature` 0 is greedy: the likeliest token, of equal ones the lowest. `top_k` 0 and `top_p` 1 filter
    nothing. Raises UserError where the net gives logits that are not finite.
    """
    import numpy as np

    fresh = np.array([prompt_ids])
    for index in range(max_tokens):
        logits = source.feed(fresh)
        if not np.isfinite(logits).all():
            raise UserError("the network's logits are not finite: this checkpoint's training went wrong; use another")
        if index == 0 and len(samples) > 1:
            source.repeat(len(samples))
            logits = logits.repeat(len(samples), axis=0)
        if temperature == 0:
            tokens = logits.argmax(axis=1)
        else:
            if index % DRAWN == 0:
                numbers = uniform(seed, index, min(DRAWN, max_tokens - index), samples)
            tokens = draw(probabilities(logits, temperature, top_k, top_p), numbers[index % DRAWN])
        yield tokens.tolist()
        fresh = tokens[:, None]


def start_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt's tokens; for an empty prompt the newline's, or token 0 where the tokenizer has no newline."""
    if text:
        return tokenizer.encode(text)
    try:
        return tokenizer.encode("\n")
    except UserError:
        return [0]


def decoded(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text as the tokens arrive; a token that ends inside a character waits for the rest of it."""
    stream = tokenizer.stream()
    for token in tokens:
        yield stream.push(token)
    yield stream.flush()


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked options. Raises UserError with code 2 for a wrong one."""
    parser = Parser("sample.py", "Print text generated by a trained checkpoint.", "out/shakespeare_char_small")
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from standard input (default: none)")
    parser.add_argument("--max-tokens", type=int, default=500, help="tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="below 1 tamer, above 1 wilder, 0 greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="only the k likeliest; 0 = all (default: %(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="only the likeliest tokens that make up p (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="another seed, another text (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="texts to print (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto",
        help="auto: the CPU for nets that are all integer, a GPU for others where there is one (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-cache", action="store_true", help="re-read the whole text for every token (slow)")
    args = parser.read(argv)
    rules = {
        "max_tokens": (args.max_tokens >= 0, "at least 0"),
        "temperature": (0 <= args.temperature < math.inf, "at least 0 and finite; 0 is greedy"),
        "top_k": (args.top_k >= 0, "at least 0; 0 keeps every token"),
        "top_p": (0 < args.top_p <= 1, "above 0 and at most 1; 1 keeps every token"),
        "seed": (0 <= args.seed < 2**64, "from 0 to 2^64 - 1"),
        "samples": (args.samples >= 1, "at least 1"),
    }
    for key, (good, rule) in rules.items():
        if not good:
            raise UserError(f"--{key.replace('_', '-')} {getattr(args, key)}: it must be {rule}", code=2)
    return args


def load(folder: Path, name: str | None, device: str, use_cache: bool = True) -> tuple[Source, Tokenizer, str]:
    """What generates text, its tokenizer and a line that says what they are; UserError if it cannot be used."""
    from data.tokenizers import tokenizer_from_json
    from decoder import Decoder, supports
    from run import checkpoint
    from run.packed import load_packed

    if folder.is_file():
        name, head = "", folder
        tensors, meta = load_packed(folder)
    else:
        name = name or ("best" if checkpoint.exists(folder, "best") else "last")
        tensors, meta = checkpoint.load_arrays(folder, name, "--checkpoint {}")
        head = folder / f"{name}.json"
    if "tokenizer" not in meta:
        raise UserError(f"{head} is a net for images; python predict.py {folder} IMAGE... uses it")
    checkpoint.require(meta, head, vocab_size=int)
    tokenizer, cfg = tokenizer_from_json(meta["tokenizer"]), checkpoint.config_of(meta, head)
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"{head} has {tokenizer.vocab_size} tokens for a net of {meta['vocab_size']}; train again")
    about = f"checkpoint {name or folder} of step {meta['step']}"
    if device != "cuda" and use_cache and supports(cfg):
        try:
            source = Decoder(checkpoint.group(tensors, "model"), cfg, meta["vocab_size"])
        except ValueError as error:
            raise UserError(f"{head} does not fit this version's network: {error}") from None
        return source, tokenizer, f"{about}; in numpy, on the CPU"
    from model import load_net

    device, reason = choose_device(device)
    net, *_ = load_net(folder, name)
    return NetSource(net.to(device), use_cache), tokenizer, f"{about}; in torch, device {device} ({reason})"


def _prompt(given: str) -> str:
    """The prompt, without the byte-order marks that editors and shells put in."""
    return (_read_prompt() if given == "-" else given).replace("\ufeff", "")


def _read_prompt() -> str:
    if sys.stdin is None:
        raise UserError("--prompt -: standard input is closed; pipe a text in, or give it as --prompt TEXT", code=2)
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise UserError(f"standard input is not UTF-8 at byte {exc.start}: convert it with iconv", code=2) from None


def run(argv: list[str]) -> None:
    """Everything main does, errors aside."""
    args = parse(argv)
    folder = find_folder(args.folder, args.checkpoint)
    source, tokenizer, about = load(folder, args.checkpoint, args.device, not args.no_cache)
    prompt = _prompt(args.prompt)
    prompt_ids = start_ids(tokenizer, prompt)
    print(about, file=sys.stderr)
    options = (args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed, range(args.samples))
    others: list[list[int]] = []  # of the samples after the first, which alone is printed as it is generated

    def first_of_all() -> Iterator[int]:
        for first, *rest in generate(source, prompt_ids, *options):
            if rest:
                others.append(rest)
            yield first

    begun = time.perf_counter()
    try:
        emit(prompt)
        for piece in decoded(tokenizer, first_of_all()):
            emit(piece)
    except KeyboardInterrupt:
        emit("\n")
        raise
    seconds = time.perf_counter() - begun
    for tokens in zip(*others, strict=True) if others else [()] * (args.samples - 1):
        emit(f"\n{SEPARATOR}\n{prompt}{''.join(decoded(tokenizer, tokens))}")
    emit("\n")
    if made := args.max_tokens * args.samples:
        print(f"{made:,} tokens in {seconds:.2f} s, {1000 * seconds / made:.3g} ms each", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a wrong option, 1 for another error, 130 after Ctrl-C."""
    return exit_status(run, argv, "use --device cpu or a shorter prompt")


if __name__ == "__main__":
    # Products of one row gain nothing from threads, which wait for one another where another process runs.
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
    sys.exit(main())
