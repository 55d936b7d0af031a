"""Every setting of a run: one flat, frozen dataclass, filled from a TOML file and from the command line.

    python train.py shakespeare_char_small --bits 4 --k=0.1     a name from configs/, with overrides
    python train.py my/own.toml --print-config                  the resolved settings, as TOML that can be fed back

A new setting is one line in `Config`: type, default, group, meaning and the values it may take; help, parsing, checks
and TOML follow from that line (run/keys.py). What cannot be said about one key alone is in `_conflicts`. Nothing here
needs torch or touches a file other than the config, so mistakes are reported at once and together.
"""

import dataclasses
import math
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from run.errors import UserError
from run.keys import closest, convert, help_lines, key, known_keys, listed, number, read_argv, refuse, short, show

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
RULES = ("contribution", "gain", "balanced", "spectral")
WITH_FLOATS = "method|int_layers!=gft|all"  # a baseline, or some layers left in fp32
IMAGES = ("imagenette", "mnist")
WITH_IMAGES, WITH_TEXT = f"data={'|'.join(IMAGES)}", f"data!={'|'.join(IMAGES)}"
LAYER_KINDS = ("embedding", "patch", "attention", "mlp", "head")
SAFE_PRODUCTS = 133_144  # of +-127 that an int32 can sum
SMALLEST_SPREAD = 0.2  # of the first weights, in units: one in eighty is then not 0


@dataclass(frozen=True)
class Config:
    """The settings of one run, hashable. Defaults are configs/shakespeare_char_small.toml.

    A changed copy is `validate(dataclasses.replace(cfg, bits=4))`. The name is a label: it takes no part in comparison.
    """

    data: str = key("tinyshakespeare", "data",
                    "tinyshakespeare, stdlib, or the path of a UTF-8 text file; imagenette or mnist")
    data_dir: str = key("", "data", "folder to look in first for the data; empty: the usual places", free=True)
    tokenizer: str = key("char", "data", "how text becomes tokens", choices=("char", "bpe", "gpt2"), needs=WITH_TEXT)
    vocab_size: int = key(512, "data", "tokens to learn, the 256 bytes included", low=257, high=65536,
                          needs="tokenizer=bpe")
    eval_on: str = key("val", "data", "val: train on the first 90%, evaluate on the last 10%; tune: train on the "
                       "first 81%, evaluate on the next 9%, never touch the last 10%; of images, val is the official "
                       "split and tune a tenth of the training images", choices=("val", "tune"))
    image_side: int = key(64, "data", "images are brought to this many pixels a side (mnist has 28)", low=8, high=512,
                          needs="data=imagenette")
    flip: float = key(0.0, "data", "share of the training images that are mirrored", low=0, high=1, needs=WITH_IMAGES)
    crop_min: float = key(1.0, "data", "training images are cropped to a share of their area between this and 1",
                          above=0, high=1, needs=WITH_IMAGES)
    mix: str = key("none", "data", "training images are mixed two by two", choices=("none", "mixup", "cutmix", "both"),
                   needs=WITH_IMAGES)
    mix_alpha: float = key(1.0, "data",
                           "Beta(this, this) gives the shares; less keeps one of the two images more whole",
                           above=0, high=1, needs=f"{WITH_IMAGES} mix=mixup|cutmix|both")

    model: str = key("transformer", "model", "transformer, or (images) mlp: n_layer hidden layers of d_model",
                     choices=("transformer", "mlp"))
    patch: int = key(8, "model", "side of a ViT's patches in pixels", low=1, high=128,
                     needs=f"{WITH_IMAGES} model=transformer")
    n_layer: int = key(4, "model", "transformer blocks", low=1, high=1000)
    n_head: int = key(4, "model", "attention heads", low=1, high=1024, needs="model=transformer")
    # A block's MLP reduces over 4 d_model products: at most SAFE_PRODUCTS.
    d_model: int = key(128, "model", "width, a multiple of 2 n_head", low=2, high=32768)
    context: int = key(64, "model", "tokens seen at once", low=1, high=1 << 20, needs=WITH_TEXT)
    init_spread: float = key(0.33, "model", "standard deviation of the first weights, as a share of the limit",
                             above=0, high=10, needs="method=gft")
    act_range: float = key(6.0, "model", "activations are rounded to 255 levels in -A..A, A = this", above=0, high=1000,
                           needs="method=gft")

    method: str = key("gft", "method", "integer flips, or a baseline on the same architecture: adamw, muon, sgd "
                      "(momentum 0.9), signsgd, ste (latent weights, straight-through)",
                      choices=("gft", "adamw", "muon", "sgd", "signsgd", "ste"))
    bits: int = key(6, "method", "bits of a weight; 2 is ternary, 1 is -1/+1", low=1, high=8, needs="method=gft|ste")

    int_layers: str = key("all", "method", "kinds of layer that are integer, the others being fp32 under AdamW: all, "
                          f"or some of {', '.join(LAYER_KINDS)}, separated by commas", needs="method=gft")

    rule: str = key("spectral", "gft", "how votes become scores", choices=RULES, needs="method=gft")
    embedding_rule: str = key("balanced", "gft", "the same for the embedding", choices=RULES, needs="method=gft")
    k: float = key(0.5, "gft", "share of the weights selected at a step, at the start", low=0, high=1,
                   needs="method=gft")
    k_end: float = key(0.0, "gft", "the same share at the end", low=0, high=1,
                       needs="method=gft k_schedule=linear|quadratic|cosine")
    k_schedule: str = key("linear", "gft", "the way from k to k_end",
                          choices=("linear", "quadratic", "cosine", "constant"), needs="method=gft")
    k_warmup: int = key(0, "gft", "steps over which k rises from 0", low=0, high=10**9, needs="method=gft")
    step_size: int = key(1, "gft", "largest move of a weight in its units, falling to 1", low=1, high=127,
                         needs="method=gft")
    memory: str = key("none", "gft", "vote memory: none, or one byte a weight", choices=("none", "int8"),
                      needs="method=gft")
    beta: float = key(0.9, "gft", "share of the vote memory kept at a step", low=0, below=1,
                      needs="method=gft memory=int8")
    ortho_tile: int = key(128, "gft", "side of the tiles spectral orthogonalises, a multiple of 16; 0: whole matrix",
                          low=0, high=32768, needs="method=gft rule|embedding_rule=spectral")
    select_tile: int = key(64, "gft", "side of the tiles the top k is taken in, 8 to 256; 0: whole layer",
                           low=0, high=256, needs="method=gft")
    flip_prob: str = key("one", "gft", "a selected weight moves for certain, or with p = (score / largest)^flip_gamma",
                         choices=("one", "score"), needs="method=gft")
    flip_gamma: float = key(1.0, "gft", "the exponent of that probability", above=0, high=100,
                            needs="method=gft flip_prob=score")
    delta: str = key("int8", "gft", "what of the error enters the votes: its int8 value or its sign",
                     choices=("int8", "sign"), needs="method=gft")
    delta_bits: int = key(8, "gft", "bits of the error on its grid, in a byte however few", low=2, high=8,
                          needs="method=gft")
    delta_scale: str = key("step", "gft", "int8 scale of the error from this step, or (delayed) from earlier ones",
                           choices=("step", "delayed"), needs="method=gft")

    flip_at: str = key("step", "gft",
                       "weights flip at the step, or as soon as a layer's delta has passed (less memory)",
                       choices=("step", "backward"), needs="method=gft")

    steps: int = key(1000, "training", "weight updates", low=1, high=10**9)
    batch_size: int = key(48, "training", "sequences a step, over all micro-batches", low=1, high=10**6)
    grad_accum: int = key(1, "training", "micro-batches a step, divides batch_size", low=1, high=10**6)
    lr: float = key(8e-3, "training", "learning rate of float weights", above=0, high=1000, needs=WITH_FLOATS)
    muon_lr: float = key(1.6e-2, "training", "learning rate of Muon, which trains the matrices of the blocks; lr is "
                         "AdamW's, for embedding and head", above=0, high=1000, needs="method=muon")
    beta2: float = key(0.99, "training", "decay of AdamW's second moment", above=0, below=1,
                       needs=f"{WITH_FLOATS} method!=sgd|signsgd")
    weight_decay: float = key(0.0, "training", "weight decay of float weights", low=0, high=1000, needs=WITH_FLOATS)
    warmup: int = key(0, "training", "steps over which lr rises from 0", low=0, high=10**9, needs=WITH_FLOATS)
    lr_end: float = key(0.1, "training", "lr at the end, as a share of lr", low=0, high=1, needs=WITH_FLOATS)
    seed: int = key(1, "training", "the same seed, the same run", low=0, high=2**31 - 1)

    precision: str = key("fp32", "running",
                         "arithmetic of a baseline; with gft, what activations are kept in between layers",
                         choices=("fp32", "bf16"))
    backend: str = key("auto", "running", "what runs the integer kernels", choices=("auto", "torch", "triton"))
    device: str = key("auto", "running", "where it runs", choices=("auto", "cpu", "cuda"))
    compile: str = key("auto", "running", "torch.compile", choices=("auto", "true", "false"))
    threads: int = key(0, "running", "CPU threads; 0: torch's choice", low=0, high=1024)
    out_dir: str = key("", "running", "where checkpoints and metrics go; empty: out/<config name>", free=True)
    resume: str = key("", "running", "go on from this checkpoint of out_dir; --resume alone means last",
                      choices=("", "last", "best", "previous"), bare="last", free=True)
    eval_every: int = key(50, "running", "steps between evaluations", low=1, high=10**9, free=True)
    # Not free: `best` would be chosen among losses measured on different windows.
    eval_windows: int = key(400, "running", "windows of text an evaluation reads", low=1, high=10**7)
    sample_tokens: int = key(120, "running", "length of the sample at an evaluation; 0: none", low=0, high=10**6,
                            free=True)
    save_every: int = key(100, "running", "steps between checkpoints", low=1, high=10**9, free=True)
    monitor_every: int = key(10, "running", "steps between the monitor's measurements", low=1, high=10**9, free=True)

    name: str = field(default="custom", compare=False)

    @property
    def out_path(self) -> Path:
        """The folder of this run's checkpoints and metrics."""
        return Path(self.out_dir or Path("out", self.name))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_head

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kinds of layer this net has, in the order of LAYER_KINDS."""
        if self.model == "mlp":
            return ("mlp", "head")
        return tuple(kind for kind in LAYER_KINDS if kind != ("embedding" if self.data in IMAGES else "patch"))

    @property
    def integer_kinds(self) -> tuple[str, ...]:
        """Those that are integer, in the same order."""
        if self.method != "gft":
            return ()
        asked = self.int_layers.split(",")
        return tuple(kind for kind in self.layer_kinds if self.int_layers == "all" or kind in asked)


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name != "name"}


def load(argv: Sequence[str], prog: str = "train.py", notes: bool = True) -> Config:
    """The checked Config that a command line asks for; argv without the program's name.

    Without a config the defaults are used and a line on stderr says so. --help and --print-config print to stdout and
    raise SystemExit(0). With `notes`, keys given that have no effect are named on stderr. Raises UserError(code=2)
    naming every problem found.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(prog))
        raise SystemExit(0)
    target, given, flags, problems = read_argv(argv, FIELDS)
    settings, name = {}, "custom"
    if target is not None:
        try:
            path = find(target)
            table = _read_toml(path)
        except UserError as error:
            refuse([*problems, str(error)])
            raise
        name = path.stem
        known, unknown = known_keys(table, FIELDS, f" in {path}")
        problems += unknown
        settings = {k: (v, f"{k} = {short(show(v))} in {path}") for k, v in known.items() if k not in given}
    settings |= {k: (number(FIELDS[k], text), f"--{k} {short(text) or show(text)}") for k, text in given.items()}

    values = {}
    for k, (value, shown) in settings.items():
        try:
            values[k] = convert(FIELDS[k], value)
        except ValueError as error:
            problems.append(f"{shown}: {error}")
    refuse(problems)
    cfg = validate(Config(name=name, **values))

    if notes and target is None:
        print("note: no config named, so the defaults are used; --help lists the configs there are", file=sys.stderr)
    for k in given if notes else ():
        if needs := unmet(cfg, FIELDS[k]):
            print(f"note: --{k} has no effect here: it needs {needs}", file=sys.stderr)
    if flags:
        print(to_toml(cfg), end="")
        raise SystemExit(0)
    return cfg


def validate(cfg: Config) -> Config:
    """cfg itself, numbers in their declared types. Raises UserError(code=2) naming every problem."""
    return from_dict(to_dict(cfg))


def check_against_data(cfg: Config, n_train: int, n_val: int) -> None:
    """Raises UserError(code=2) if a part of the text (lengths in tokens) is too short for windows of this context."""
    refuse([f"context = {cfg.context}: the {part} part of {cfg.data} has {n:,} tokens and must have more than "
            f"context + 1 = {cfg.context + 1:,}; use a longer text" + (f" or --context {n - 2}" if n > 2 else "")
            for part, n in (("training", n_train), ("evaluation", n_val)) if n <= cfg.context + 1])


def to_dict(cfg: Config) -> dict[str, Any]:
    """Every key and the name, as plain values for JSON."""
    return dataclasses.asdict(cfg)


def from_dict(values: Mapping[str, Any]) -> Config:
    """The Config that `to_dict` wrote. A key that is missing (written before the key existed) takes its default.

    Raises UserError(code=2) on unknown keys, bad values and conflicts. What only concerns this machine is left to
    `validate`, so that a checkpoint made on another one can be read.
    """
    known, problems = known_keys({k: v for k, v in values.items() if k != "name"}, FIELDS)
    for k, value in known.items():
        try:
            known[k] = convert(FIELDS[k], value)
        except ValueError as error:
            problems.append(f"{k} = {short(show(value))}: {error}")
    refuse(problems)
    cfg = Config(name=str(values.get("name", "custom")), **known)
    refuse(_conflicts(cfg))
    return cfg


def differences(a: Config, b: Config) -> list[str]:
    """The keys in which b (now) would not continue a (the checkpoint's) exactly, one readable line each.

    backend, device, compile and threads are compared as written: they can change the last bits of the float parts.
    """
    return [f"{k} = {show(getattr(a, k))} in the checkpoint, {show(getattr(b, k))} now" for k, f in FIELDS.items()
            if not f.metadata.get("free") and getattr(a, k) != getattr(b, k)]


def to_toml(cfg: Config) -> str:
    """cfg as TOML; `load` of a file with this text gives an equal Config."""
    lines, group = [f"# {cfg.name}: every key, as resolved"], ""
    for k, f in FIELDS.items():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# {group}"]
        lines.append(f"{k} = {show(getattr(cfg, k))}")
    return "\n".join(lines) + "\n"


def help_text(prog: str) -> str:
    """What --help prints."""
    return "\n".join([
        f"usage: python {prog} [NAME_OR_PATH] [--key value | --key=value ...]", "",
        *textwrap.wrap(f"NAME_OR_PATH      a TOML file, or a name from configs/: {', '.join(available())}", 112,
                       subsequent_indent=" " * 18),
        "                  (none: the defaults, which are shakespeare_char_small)",
        "--print-config    print the resolved settings as TOML and exit",
        "-h, --help        print this and exit", "",
        "A TOML file has lines `key = value` with the keys below; the command line overrides it.",
        "Dashes and underscores in keys are the same. Defaults in [brackets].", *help_lines(FIELDS)])


def available() -> dict[str, Path]:
    """Name -> file of every config beside the code, in alphabetical order."""
    return dict(sorted((path.stem, path) for path in CONFIG_DIR.rglob("*.toml")))


def find(target: str) -> Path:
    """The file meant by a name or a path, relative to the working directory where it lies below it.

    A name is looked up in configs/ first, a path (with a slash or .toml) where it says first. Raises UserError(code=2),
    with the closest name, if there is none.
    """
    name = target.removesuffix(".toml")
    named = [CONFIG_DIR / f"{name}.toml", available().get(name, CONFIG_DIR)]
    is_path = name != target or "/" in target or "\\" in target
    for path in [Path(target), *named] if is_path else [*named, Path(target)]:
        if path.exists() and not path.is_dir():
            return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    close = closest(Path(name).name, available(), "did you mean {}? ")
    raise UserError(f"{short(target)!r} is neither a TOML file nor a name in configs/; {close}There are "
                    f"{', '.join(available())}", code=2)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions", code=2) from None
    except (ValueError, RecursionError) as error:  # syntax, encoding, numbers of thousands of digits
        raise UserError(f'{path} is not valid TOML: {error}; write `key = value` lines, texts in "quotes"',
                        code=2) from None


def _conflicts(c: Config) -> list[str]:
    """What cannot work although every key by itself is allowed."""
    found = []
    if c.model == "transformer" and c.d_model % (2 * c.n_head):
        heads = [n for n in range(1, min(c.d_model, 1024) + 1) if c.d_model % (2 * n) == 0]
        why = "n_head must divide d_model" if c.d_model % c.n_head else (
            f"the width of a head, d_model / n_head = {c.head_dim}, must be even (rotary positions turn pairs)")
        found.append(f"d_model = {c.d_model}, n_head = {c.n_head}: {why}; " + (
            f"use n_head = {listed(heads, near=c.n_head)}" if heads else "use an even d_model"))
    if c.data in IMAGES:
        found += _image_conflicts(c)
    elif c.model == "mlp":
        found.append(f'model = mlp, data = {c.data}: the mlp reads images; use model = transformer, or data = mnist')
    unknown = [kind for kind in c.int_layers.split(",") if kind not in LAYER_KINDS]
    if c.int_layers != "all" and unknown:
        found.append(f"int_layers = {c.int_layers}: there is no {unknown[0] or 'empty'!r} layer; write all, or some of "
                     f"{', '.join(LAYER_KINDS)}, separated by commas")
    elif c.method == "gft" and not c.integer_kinds:
        found.append(f"int_layers = {c.int_layers}: this net has no such layer, so nothing would be integer; write "
                     f"all, or some of {', '.join(c.layer_kinds)}, separated by commas")
    if c.batch_size % c.grad_accum:
        parts = [n for n in range(1, min(c.batch_size, 1024) + 1) if c.batch_size % n == 0]
        found.append(f"batch_size = {c.batch_size}, grad_accum = {c.grad_accum}: grad_accum must divide batch_size; "
                     f"use grad_accum = {listed(parts, near=c.grad_accum)}")
    if c.warmup >= c.steps and (c.method != "gft" or c.integer_kinds != c.layer_kinds):
        found.append(f"warmup = {c.warmup}, steps = {c.steps}: warm-up must end before the run does; lower warmup "
                     "or raise steps")
    if c.method != "gft":
        return found
    largest = 1 if c.bits == 1 else 2 * (2 ** (c.bits - 1) - 1)
    if c.step_size > largest:
        found.append(f"step_size = {c.step_size}, bits = {c.bits}: a weight of {c.bits} bits has room for moves of at "
                     f"most {largest}; lower step_size or raise bits")
    limit = 2 ** (c.bits - 1) - 1
    if c.bits > 1 and c.init_spread * limit < SMALLEST_SPREAD:
        found.append(f"init_spread = {c.init_spread}, bits = {c.bits}: all first weights would round to 0; use "
                     f"init_spread = {SMALLEST_SPREAD / limit:.2g} or more")
    if c.k_schedule != "constant" and c.k_end > c.k:
        found.append(f"k_end = {c.k_end}, k = {c.k}: k falls to k_end, which must not be larger; lower k_end, or keep "
                     'k with k_schedule = "constant"')
    if c.k_warmup > c.steps:
        found.append(f"k_warmup = {c.k_warmup}, steps = {c.steps}: the warm-up must fit into the run; lower k_warmup "
                     "or raise steps")
    if c.flip_at == "backward" and c.grad_accum > 1:
        found.append(f"flip_at = backward, grad_accum = {c.grad_accum}: weights would move before the step's other "
                     "micro-batches have voted; use flip_at = step or grad_accum = 1")
    if "spectral" in (c.rule, c.embedding_rule) and c.ortho_tile % 16:
        found.append(f"ortho_tile = {c.ortho_tile}: must be 0 (whole matrix) or a multiple of 16; use "
                     f"{c.ortho_tile // 16 * 16 + 16}")
    if 0 < c.select_tile < 8:
        found.append(f"select_tile = {c.select_tile}: must be 0 (whole layer) or from 8 to 256; use 8")
    return found


def _image_conflicts(c: Config) -> list[str]:
    """What cannot work with images."""
    found = []
    side, channels = (28, 1) if c.data == "mnist" else (c.image_side, 3)
    if c.model == "mlp" and "mlp" in c.integer_kinds and channels * side**2 > SAFE_PRODUCTS:
        found.append(f"image_side = {side}: an integer layer over {channels * side**2:,} pixels can overflow int32, "
                     f"which holds {SAFE_PRODUCTS:,} products; use image_side = "
                     f"{math.isqrt(SAFE_PRODUCTS // channels)} or less")
    if c.model == "transformer":
        if side % c.patch:
            fitting = [n for n in range(1, side + 1) if side % n == 0]
            found.append(f"patch = {c.patch}: must divide the images' side, {side}; use patch = "
                         f"{listed(fitting, near=c.patch)}")
        if c.d_model % (4 * c.n_head) and c.d_model % (2 * c.n_head) == 0:
            found.append(f"d_model = {c.d_model}, n_head = {c.n_head}: the width of a head, {c.head_dim}, must be a "
                         "multiple of 4 (rotary positions turn pairs by row and by column); use d_model = "
                         f"{4 * c.n_head * (c.head_dim // 4 + 1)}")
    return found


def unmet(cfg: Config, f: dataclasses.Field) -> str:
    """The conditions under which f has an effect and that cfg does not meet, readable; empty if there are none."""
    unmet = []
    for condition in f.metadata.get("needs", "").split():
        keys, _, values = condition.partition("=")
        if keys.endswith("!"):
            if all(getattr(cfg, k) in values.split("|") for k in keys[:-1].split("|")):
                unmet.append(f"{keys[:-1].replace('|', ' or ')} other than {values.replace('|', ' or ')}")
        elif not any(getattr(cfg, k) in values.split("|") for k in keys.split("|")):
            unmet.append(f"{keys.replace('|', ' or ')} = {values.replace('|', ' or ')}")
    return " and ".join(unmet)
