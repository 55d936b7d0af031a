"""Text from a checkpoint, printed as it is generated.

    python sample.py out/shakespeare_char_small --prompt "ROMEO:"
    python sample.py out/shakespeare_char_small --samples 3 --temperature 0.7 --top-p 0.95
    printf 'First Citizen:\\n' | python sample.py out/shakespeare_char_small --prompt -

The checkpoint is all it needs: no config file, no data. The text is a function of the checkpoint, the
prompt and the options: token t of sample i is drawn by the number Philox(seed, t, SAMPLE, i), through the
inverse of the distribution function, so sample i is the same text whatever --samples is.

torch is imported where it is used: --help and a mistyped option are answered without waiting for it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from run.errors import UserError
from run.keys import closest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from data.tokenizers import Tokenizer

CHECKPOINTS = ("last", "best", "previous")  # run.checkpoint.LOADED
PREFILL = 512  # prompt tokens fed at once: memory grows with its square, not with the prompt's
SEPARATOR = "---"


def probabilities(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution to draw from: logits (V,) on the CPU to float64 (V,), exact zeros where filtered out.

    `top_k` > 0 keeps the k largest logits; `top_p` < 1 then keeps the smallest set of the likeliest tokens whose
    probability reaches it. Of equal logits the lower index goes first. `temperature` > 0.
    """
    import torch

    scaled = logits.to(torch.float64)
    scaled = (scaled - scaled.max()) / temperature  # the maximum first: a tiny temperature must not overflow
    values, order = torch.sort(scaled, descending=True, stable=True)
    if top_k > 0:
        values[top_k:] = -math.inf
    values = torch.softmax(values, 0)
    if top_p < 1:
        before = torch.cumsum(values, 0).roll(1)
        before[0] = 0
        values[before >= top_p] = 0
        values = values / values.sum()
    return torch.empty_like(values).scatter_(0, order, values)


def draw(p: Tensor, u: float) -> int:
    """The token where the distribution function of `p` (V,) passes `u` in [0, 1); never one with p = 0."""
    import torch

    cdf = torch.cumsum(p, 0)
    token = int(torch.searchsorted(cdf, u * cdf[-1], right=True))
    return min(token, int(p.nonzero()[-1]))  # u * total may round up to the total


def _last_logits(net: nn.Module, tokens: list[int], cache: object | None, device: torch.device) -> Tensor:
    """Logits after the last of `tokens`: float32 (V,) on the CPU."""
    import torch

    step = PREFILL if cache is not None else len(tokens)
    with torch.inference_mode():
        for start in range(0, len(tokens), step):
            chunk = torch.tensor([tokens[start : start + step]], device=device)  # (1, T)
            logits = net(chunk) if cache is None else net(chunk, cache=cache)  # (1, T, V)
    return logits[0, -1].float().cpu()


def generate(
    net: nn.Module,
    prompt_ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    use_cache: bool = True,
    sample_index: int = 0,
) -> Iterator[int]:
    """Yield `max_tokens` tokens that continue `prompt_ids` (at least one), each as soon as it is known.

    `temperature` 0 is greedy: the likeliest token, of equal ones the lowest. `top_k` 0 and `top_p` 1 filter
    nothing. Without the cache every token re-reads the whole text: slow, and the reference for the cache. The net is in
    evaluation mode until the last token is drawn.
    Raises UserError where the net gives logits that are not finite.
    """
    import torch

    from kernels.philox import Stream, uniform

    if not prompt_ids:
        raise ValueError("prompt_ids is empty: give at least one token (see start_ids)")
    device = next((t.device for t in net.state_dict().values()), torch.device("cpu"))
    cache = net.new_cache(1) if use_cache else None
    text = list(prompt_ids)
    fresh, was_training = text, net.training
    net.eval()
    try:
        for index in range(max_tokens):
            logits = _last_logits(net, fresh, cache, device)
            if not torch.isfinite(logits).all():
                raise UserError(
                    "the network's logits are not finite: this checkpoint's training went wrong; use another"
                )
            if temperature == 0:
                token = int(logits.argmax())
            else:
                u = float(uniform(seed, index, Stream.SAMPLE, 1, start=sample_index))
                token = draw(probabilities(logits, temperature, top_k, top_p), u)
            yield token
            text.append(token)
            fresh = [token] if use_cache else text
    finally:
        net.train(was_training)


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; python sample.py --help lists the options", code=2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description="Print text generated by a trained checkpoint.")
    parser.add_argument("folder", help="the run's folder, e.g. out/shakespeare_char_small")
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
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, help="default: best, or last where there is no best")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--no-cache", action="store_true", help="re-read the whole text for every token (slow)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The checked options; UserError with code 2 says which one is wrong, the rule, and the closest name."""
    parser = _parser()
    argv = [_dashes(word) for word in argv]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        hint = closest(unknown[0].split("=")[0], names, "; did you mean {}?")
        raise UserError(f"unknown argument {unknown[0]!r}{hint}; python sample.py --help lists the options", code=2)
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


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def find_folder(given: str) -> Path:
    """The run's folder: as given, or of that name in out/."""
    for path in (Path(given), Path("out") / given):
        if path.is_dir():
            return path
    runs = [str(path) for path in Path("out").glob("*") if path.is_dir()]
    hint = closest(given, runs, "did you mean {}?") or "give the folder that train.py wrote, e.g. out/NAME"
    raise UserError(f"{given} is not a folder: {hint}", code=2)


def choose_device(wanted: str) -> tuple[str, str]:
    """The device and why it is this one."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu or auto", code=2)
    if wanted != "auto":
        return wanted, "as asked"
    return ("cuda", "a GPU is there") if torch.cuda.is_available() else ("cpu", "torch sees no CUDA GPU")


def load(folder: Path, name: str | None, device: str) -> tuple[nn.Module, Tokenizer, str]:
    """The net, its tokenizer and a line that says which checkpoint they are; UserError if it cannot be used."""
    from data.tokenizers import tokenizer_from_json
    from model import load_net

    net, meta, head = load_net(folder, name or "")
    if "tokenizer" not in meta:
        raise UserError(f"{head} is a net for images; python predict.py {folder} IMAGE... uses it")
    tokenizer = tokenizer_from_json(meta["tokenizer"])
    if tokenizer.vocab_size != meta["vocab_size"]:
        raise UserError(f"{head} has {tokenizer.vocab_size} tokens for a net of {meta['vocab_size']}; train again")
    return net.to(device).eval(), tokenizer, f"{head.stem} of step {meta['step']}"


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


def emit(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it exits
        if isinstance(exc, BrokenPipeError):
            raise
        raise UserError(f"cannot write the text to standard output: {exc.strerror or exc}") from exc


def out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, on a GPU or beside it. Only torch, once imported, raises its own error."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def run(argv: list[str]) -> None:
    """Everything main does, errors and interruptions aside."""
    args = parse(argv)
    device, reason = choose_device(args.device)
    net, tokenizer, name = load(find_folder(args.folder), args.checkpoint, device)
    prompt = _prompt(args.prompt)
    prompt_ids = start_ids(tokenizer, prompt)
    print(f"checkpoint {name}; device {device} ({reason})", file=sys.stderr)
    for index in range(args.samples):
        emit(f"{SEPARATOR}\n" * (index > 0) + prompt)
        options = (args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed, not args.no_cache, index)
        for piece in decoded(tokenizer, generate(net, prompt_ids, *options)):
            emit(piece)
        emit("\n")


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 2 for a wrong option, 1 for another error, 130 after Ctrl-C."""
    if sys.stdout is None:
        print("error: standard output is closed; give the results a place to go", file=sys.stderr)
        return 1
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        try:
            run(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            emit("\n")
            return 130
    except UserError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.code
    except BrokenPipeError:  # whoever reads the text has enough of it
        return 0
    except (MemoryError, RuntimeError) as exc:
        if not out_of_memory(exc):
            raise
        reason = str(exc) or "none is left"
        print(f"error: out of memory ({reason}); use --device cpu or a shorter prompt", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
