"""Every setting of a run: one flat, frozen dataclass, filled from a TOML file and from the command line.

    python train.py shakespeare_char_small --bits 4 --k=0.1     a name from configs/, with overrides
    python train.py my/own.toml --print-config                  the resolved settings, as TOML that can be fed back

A new setting is one declaration in `Config`: help, conversion and checks follow from it (run/keys.py). What cannot be
said about one key alone is in CONFLICTS. Nothing here imports torch, so that mistakes are answered at once.
"""

import dataclasses
import importlib.util
import itertools
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kernels.limits import MAX_REDUCTION, RULES, kept_bits
from run.errors import UserError, closest, refuse
from run.keys import brief, convert, key, read_argv, show

CONFIGS = {path.stem: path for path in sorted(Path(__file__).resolve().parents[1].joinpath("configs").rglob("*.toml"))}
LARGEST_FILE = 20_000  # characters: much more than all keys need; tomllib's time can grow with their square
IMAGES = ("imagenette", "mnist")
SETS = ("tinyshakespeare", "stdlib", *IMAGES)  # data by name
LAYER_KINDS = ("embedding", "patch", "attention", "mlp", "head")
METHODS = ("gft", "adamw", "muon", "sgd", "signsgd", "ste")  # sgd has momentum 0.9, ste latent weights
TEXT_NAME = re.compile(r"\.(txt|jsonl)(\.(gz|xz|bz2))?$", re.I)  # files that are texts where a folder is named
IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif|ppm|jp2|jfif)$", re.I)
LOOKED = 1000  # so many files are looked at to see what a folder holds
FOLDER = "data.endswith('/')"  # of images; `load` adds the slash
IMAGE = f"(data in {IMAGES} or {FOLDER})"  # conditions under which keys have an effect
TEXT = f"not {IMAGE}"
GFT, FLOATS = "method == 'gft'", "(method != 'gft' or int_layers != 'all')"
MUON = "(method == 'muon' or method == 'ste' and ste_optimizer == 'muon')"
CONFLICTS = {  # what must hold where all its keys have an effect: the rule and the remedy
    "not set(data + data_dir + out_dir + init_from) & set(map(chr, range(32)))":
        "control characters are not allowed; remove them",
    f"d_model % (n_head * (4 if {IMAGE} else 2)) == 0": "d_model must be a multiple of 2 n_head (images: 4)",
    f"model == 'transformer' or {IMAGE}": "the mlp reads images; use model = transformer, or data = mnist",
    "method != 'gft' or model != 'mlp' or image_side <= 210": "int32 sums over more pixels overflow; use 210 or less",
    f"eval_on != 'test' or {TEXT}": "the images to evaluate on are those of val; use eval_on = val",
    "image_side % patch == 0": "patch must divide image_side; change one of them",
    "data != 'mnist' or 28 % patch == 0": "patch must divide 28; use patch = 1, 2, 4, 7, 14 or 28",
    "set(int_layers.split(',')) <= {'all', *LAYER_KINDS}": f"must be all, or some of {','.join(LAYER_KINDS)}",
    "int_layers and integer_kinds": "this net has no such layer, so nothing would be integer; name others, or all",
    "batch_size % grad_accum == 0": "grad_accum must divide batch_size; change one of them",
    "warmup < steps": "the warm-up must end before the run does; lower warmup or raise steps",
    "k_warmup <= steps": "the warm-up must fit into the run; lower k_warmup or raise steps",
    "k_end <= k": "k falls to k_end, which must not be larger; lower k_end, or keep k with k_schedule = constant",
    "keep_bits in (0, *range(bits, 9))": "a weight keeps at least the bits that are read; raise keep_bits, or give 0",
    "levels == 3 or keep_bits != 2": "weights that keep two bits have 3 levels; use levels = 3, or keep more bits",
    "step_size <= max(1, 2**kept_bits(bits, keep_bits) - 2)":
        "no weight has room for such a move; lower step_size or raise keep_bits",
    # One and two bits are read by a weight's sign and a threshold, more by rounding.
    "max(bits, keep_bits) == 1 or init_std * (2**((bits if bits > 2 else kept_bits(bits, keep_bits)) - 1) - 1) >= 0.2":
        "99% of the first weights would be 0; raise init_std or bits",
    "update == 'step' or grad_accum == 1": "micro-batches are for update = step; or use grad_accum = 1",
    "ortho_tile % 16 == 0": "must be a multiple of 16, or 0 (whole matrix)",
    "topk_tile == 0 or topk_tile >= 8": "must be from 8 to 256, or 0 (whole layer)",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run, hashable. Defaults are configs/shakespeare_char_small.toml; `name` is not compared."""

    data: str = key("tinyshakespeare", "or stdlib, wikipedia_en, imagenette, mnist; a text, several (a folder, a glob, "
                    "a list with commas), or a folder of images", also="dataset", free=True, group="data")
    data_dir: str = key("", "folder to look in first for the data; empty: the usual places", free=True)
    eval_on: str = key("val", "val: last 10% of a text, or its files val*; official images; tune: a tenth of the rest; "
                       "test: a text's files test*", ("val", "tune", "test"))
    tokenizer: str = key("char", "how text becomes tokens", ("char", "bpe", "gpt2"), needs=TEXT)
    vocab_size: int = key(512, "tokens to learn, the 256 bytes included", (257, 65536), needs="tokenizer == 'bpe'")
    image_side: int = key(64, "pixels on each side of an image", (8, 512), needs=f"data == 'imagenette' or {FOLDER}")
    color: str = key("rgb", "what is seen of the images in a folder", ("rgb", "grey"), needs=FOLDER)
    hflip: float = key(0.0, "share of the training images that are mirrored", (0, 1), needs=IMAGE, also="flip")
    crop_min: float = key(1.0, "smallest share of a training image that cropping keeps", (0.01, 1), needs=IMAGE)
    mix: str = key("none", "how training images are mixed in pairs", ("none", "mixup", "cutmix", "both"), needs=IMAGE)
    mix_alpha: float = key(1.0, "shares are drawn from Beta(this, this)", (0.01, 1), needs=f"{IMAGE} and mix != 'none'")

    model: str = key("transformer", "mlp is for images: n_layer hidden layers", ("transformer", "mlp"), group="model")
    n_layer: int = key(4, "transformer blocks", (1, 1000))
    n_head: int = key(4, "attention heads", (1, 1024), needs="model == 'transformer'")
    d_model: int = key(128, "width, a multiple of 2 n_head", (2, MAX_REDUCTION // 4), also="n_embd")  # MLPs have 4 x
    context: int = key(64, "tokens seen at once", (1, 1 << 20), needs=TEXT, also="block_size seq_len")
    patch: int = key(8, "side of a ViT's patches in pixels", (1, 128), needs=f"{IMAGE} and model != 'mlp'")
    dropout: float = key(0.0, "share of values, and of what a branch adds, that is 0 in training", (0, 0.99),
                         needs="model == 'transformer'")  # fmt: skip
    init_std: float = key(0.33, "of the first weights, 1 being the limit", (0.001, 10), needs=GFT, also="init_spread")
    act_range: float = key(6.0, "activations are rounded to 255 levels in -A..A, A = this", (0.001, 1000), needs=GFT)

    method: str = key("gft", "integer flips, or a baseline", METHODS, also="optimizer", group="method")
    bits: int = key(6, "bits of a weight as it is read; 2: ternary, 1: -1/+1", (1, 8), needs="method in ('gft', 'ste')")
    keep_bits: int = key(0, "bits a weight keeps; 0: those that are read, at least 6", (0, 8), needs=GFT)
    levels: int = key(3, "of two bits: 3 reads -1, 0, 1 and 4 reads -3, -1, 1, 3", (3, 4), needs=f"{GFT} and bits == 2")
    int_layers: str = key("all", f"integer layers: all, or some of {','.join(LAYER_KINDS)}; others are fp32", needs=GFT)
    rule: str = key("spectral", "how votes become scores", RULES, needs=GFT)
    embedding_rule: str = key("balanced", "the same for the embedding", RULES, needs=GFT)
    k: float = key(0.5, "share of the weights selected at a step, at the start", (0, 1), needs=GFT)
    k_end: float = key(0.0, "the same share at the end", (0, 1), needs=f"{GFT} and k_schedule != 'constant'")
    k_schedule: str = key("linear", "from k to k_end", ("linear", "quadratic", "cosine", "constant"), needs=GFT)
    k_warmup: int = key(0, "steps over which k rises from 0", (0, 10**9), needs=GFT)
    step_size: int = key(1, "largest move of a weight in its units, falling to 1", (1, 127), needs=GFT)
    momentum: float = key(0.0, "decay of the momentum of votes; 0: none", (0, 0.9999), needs=GFT, also="memory beta")
    ortho_tile: int = key(128, "side of the tiles spectral orthogonalises; 0: whole matrix", (0, 32768),
                          needs=f"{GFT} and 'spectral' in (rule, embedding_rule)")
    topk_tile: int = key(64, "side of the tiles of the top k; 0: the layer", (0, 256), needs=GFT, also="select_tile")
    flip_prob: str = key("one", "score: moves have p = (score / largest)^flip_gamma", ("one", "score"), needs=GFT)
    flip_gamma: float = key(1.0, "exponent of that probability", (0.001, 100), needs=f"{GFT} and flip_prob == 'score'")
    delta: str = key("int8", "what of the error enters the votes", ("int8", "sign"), needs=GFT)
    delta_bits: int = key(8, "bits of the error on its grid, with a power of two for each 32 values if below 8; a byte "
                             "each", (2, 8), needs=GFT)  # fmt: skip
    delta_scale: str = key("step", "delayed: the error's scale is from earlier steps", ("step", "delayed"), needs=GFT)
    update: str = key("step", "when weights move; backward saves room", ("step", "backward"), needs=GFT, also="flip_at")

    steps: int = key(1000, "weight updates", (1, 10**9), also="max_iters", group="training")
    batch_size: int = key(48, "sequences a step, over all micro-batches", (1, 10**6))
    grad_accum: int = key(1, "micro-batches a step, divides batch_size", (1, 10**6))
    lr: float = key(8e-3, "learning rate of float weights", (1e-9, 1000), needs=FLOATS, also="learning_rate")
    ste_optimizer: str = key("adamw", "of the latent weights", ("adamw", "muon"), needs="method == 'ste'")
    muon_lr: float = key(1.6e-2, "Muon's learning rate, for the blocks", (1e-9, 1000), needs=MUON)
    muon_state: str = key("fp32", "of Muon's momentum; none: SWAN", ("fp32", "int8", "none"), needs=MUON)
    beta2: float = key(0.99, "decay of AdamW's second moment", (0.001, 0.999999),
                       needs=f"{FLOATS} and 'sgd' not in method")
    weight_decay: float = key(0.0, "weight decay of float weights", (0, 1000), needs=FLOATS, also="wd")
    warmup: int = key(0, "steps over which lr rises from 0", (0, 10**9), needs=FLOATS)
    lr_end: float = key(0.1, "lr at the end, as a share of lr", (0, 1), needs=FLOATS)
    seed: int = key(1, "the same seed, the same run", (0, 2**31 - 1))

    precision: str = key("fp32", "of a baseline, of gft's activations", ("fp32", "bf16"), also="dtype", group="running")
    backend: str = key("auto", "what runs the integer kernels", ("auto", "torch", "triton"), free=True)
    device: str = key("auto", "where it runs", ("auto", "cpu", "cuda"), free=True)
    compile: str = key("auto", "torch.compile", ("auto", "true", "false"), free=True)
    cuda_graph: str = key("auto", "each step one CUDA graph", ("auto", "true", "false"), free=True)
    threads: int = key(0, "CPU threads; 0: torch's choice", (0, 1024), free=True)
    rank_timeout: int = key(600, "seconds until a rank of torchrun that is silent is named", (1, 10**6), free=True)
    out_dir: str = key("", "where checkpoints and metrics go; empty: out/<config name>", free=True)
    init_from: str = key("", "a run to take the first weights from: its folder (best), or its last.json", free=True)
    resume: str = key("", "checkpoint to go on from", ("", "last", "best", "previous"), bare="last", free=True)
    log_every: int = key(10, "steps between reads of the loss and the flips", (1, 10**9), free=True)
    eval_every: int = key(50, "steps between evaluations", (1, 10**9), free=True)
    eval_share: float = key(1.0, "largest share of the time that evaluations take; the last is always made", (0.001, 1),
                            free=True)
    # Not free: `best` would be chosen among losses measured on different windows.
    eval_windows: int = key(400, "windows of text an evaluation reads", (1, 10**7))
    sample_tokens: int = key(120, "length of the sample at an evaluation; 0: none", (0, 10**6), free=True)
    save_every: int = key(100, "steps between checkpoints", (1, 10**9), free=True)
    keep_every: int = key(0, "steps between checkpoints that stay, in step-NUMBER/; 0: none", (0, 10**9), free=True)
    keep_last: int = key(0, "so many of them stay, the newest; 0: all", (0, 10**6), needs="keep_every > 0", free=True)
    logger: str = key("", "tensorboard: write its curves beside metrics.jsonl", ("", "tensorboard"), free=True)
    monitor_every: int = key(10, "steps between the monitor's measurements", (1, 10**9), free=True)

    name: str = dataclasses.field(default="custom", compare=False)

    @property
    def of_images(self) -> bool:
        """Whether data names images: a data set, or a folder."""
        return eval(IMAGE, {}, vars(self))

    @property
    def under_muon(self) -> bool:
        """Whether Muon trains the matrices of the blocks."""
        return eval(MUON, {}, vars(self))

    @property
    def kept_bits(self) -> int:
        """The bits a weight keeps."""
        return kept_bits(self.bits, self.keep_bits)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kinds of layer this net has, in the order of LAYER_KINDS."""
        absent = "embedding" if self.of_images else "patch"
        return ("mlp", "head") if self.model == "mlp" else tuple(kind for kind in LAYER_KINDS if kind != absent)

    @property
    def integer_kinds(self) -> tuple[str, ...]:
        """Those that are integer, in the same order."""
        wanted = LAYER_KINDS if self.int_layers == "all" else self.int_layers.split(",")
        return tuple(kind for kind in self.layer_kinds if kind in wanted and self.method == "gft")


FIELDS = {f.name: f for f in dataclasses.fields(Config) if f.name != "name"}
OTHER_NAMES = {other: k for k, f in FIELDS.items() for other in f.metadata.get("also", "").split()}


def load(argv: Sequence[str], prog: str = "train.py", notes: bool = True) -> Config:
    """The checked Config that a command line asks for; argv without the program's name.

    --help and --print-config print and raise SystemExit(0). With `notes`, stderr names keys given without effect.
    Raises UserError(code=2) naming every problem found.
    """
    given, words = read_argv(argv, FIELDS, prog, f"CONFIG is a TOML file, or one of {', '.join(CONFIGS)}.")
    printing = given.pop("print_config", False)
    problems = [f"{word!r} is one config too many, after {words[0]!r}; name one" for word in words[1:]]
    name, table = read_file(words[0], problems) if words else ("custom", {})
    values = table | given
    if folder := is_folder(values.get("data"), values.get("data_dir", "")):
        values["data"] = values["data"].rstrip("/") + ("" if holds_texts(folder) else "/")
    if table.get("data") == "mnist" and str(values["data"]).endswith("/"):
        values = {"image_side": 28, "color": "grey"} | values  # the net of MNIST sees others as MNIST is
    cfg = build(values, name, problems, {k: f" in {name}.toml" for k in table.keys() - given.keys()})
    if cfg.logger == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise UserError("logger = tensorboard needs the package tensorboard: pip install tensorboard", code=2)
    if notes and not words:
        print("note: no config named, so the defaults are used; --help lists the configs there are", file=sys.stderr)
    for k in given if notes else ():
        if needs := unmet(cfg, FIELDS[k]):
            print(f"note: --{k} has no effect here: it needs {needs}", file=sys.stderr)
    if printing:
        print(to_toml(cfg).encode("utf-8", "backslashreplace").decode(), end="")  # a file's name may be any bytes
        raise SystemExit(0)
    return cfg


def read_file(target: str, problems: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and content of the TOML file that a config's name or a path means; what is wrong is added to `problems`."""
    path = CONFIGS.get(target) or Path(target)
    try:
        path = path if path.is_file() else CONFIGS.get(target.removesuffix(".toml"), path)
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} characters, and a config a few thousand")
        return path.stem, tomllib.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        near = closest(path.stem, CONFIGS, "did you mean {}? ")
        problems.append(f"{target!r} is neither a TOML file nor a name in configs/; {near}--help lists the names")
    except (OSError, ValueError, RecursionError) as error:  # permissions, encoding, syntax
        problems.append(f"{path} is not readable TOML: {error}; it needs lines `key = value`, texts in quotes")
    return "custom", {}


def build(values: Mapping[str, Any], name: str, problems: Sequence[str] = (), where: Mapping[str, str] = {}) -> Config:
    """The Config of `values`; `where` says where a key was read. Raises UserError(code=2) with every problem."""
    known, problems = {}, list(problems)
    for k, value in values.items():
        try:
            known[k] = convert(FIELDS[k], value)
        except KeyError:
            near = closest(OTHER_NAMES.get(k, k), FIELDS, "did you mean {}?") or "--help lists every key"
            problems.append(f"unknown key {k}{where.get(k, '')}; {near}")
        except ValueError as error:
            problems.append(f"{k} = {brief(value)}{where.get(k, '')}: {error}")
    refuse(problems)
    cfg = Config(**known, name=name)
    scope = vars(cfg) | {"integer_kinds": cfg.integer_kinds}
    for must, remedy in CONFLICTS.items():
        keys = [k for k in dict.fromkeys(re.findall(r"\w+", must)) if k in FIELDS]
        if not eval(must, globals(), scope) and not any(unmet(cfg, FIELDS[k]) for k in keys):
            problems.append(f"{', '.join(f'{k} = {show(getattr(cfg, k))}' for k in keys)}: {remedy}")
    refuse(problems)
    return cfg


def is_folder(data: Any, data_dir: Any) -> str:
    """The folder whose path data is, wherever data is looked for; empty if there is none."""
    if not isinstance(data, str) or not isinstance(data_dir, str) or not data.strip("/") or data in SETS:
        return ""
    from data.cache import places  # brings urllib, which takes as long to import as all of this

    return next(filter(os.path.isdir, map(str, places(data, data_dir))), "")


def holds_texts(folder: str) -> bool:
    """Whether its files are named as texts or as nanoGPT's tokens are, and none as an image; a few are looked at."""
    files = itertools.islice((name for _, _, names in os.walk(folder, followlinks=True) for name in names), LOOKED)
    names = [name for name in files if not name.startswith(".")]
    texts = any(TEXT_NAME.search(name) or name == "train.bin" for name in names)
    return texts and not any(map(IMAGE_NAME.search, names))


def unmet(cfg: Config, f: dataclasses.Field) -> str:
    """The condition under which f has an effect, if cfg does not meet it; else empty."""
    return "" if eval(f.metadata["needs"], {}, vars(cfg)) else f.metadata["needs"]


def from_dict(values: Mapping[str, Any]) -> Config:
    """The Config that `to_dict` wrote; a missing key takes its default. Raises UserError(code=2) like `load`."""
    return build({k: v for k, v in values.items() if k != "name"}, values.get("name", "custom"))


to_dict = dataclasses.asdict  # every key and the name, as plain values for JSON


def to_toml(cfg: Config) -> str:
    """cfg as TOML; `load` of a file with this text gives an equal Config."""
    return "".join(f"{k} = {show(getattr(cfg, k))}\n" for k in FIELDS)


def differences(a: Config, b: Config) -> list[str]:
    """The keys in which b (now) would not continue a (the checkpoint's) exactly, one readable line each.

    What `int_layers` and `keep_bits` come to is compared, and what a key says that has no effect in either is not.
    """
    different = {k: f for k, f in FIELDS.items() if not f.metadata.get("free") and getattr(a, k) != getattr(b, k)}
    for k, came_to in (("int_layers", "integer_kinds"), ("keep_bits", "kept_bits")):
        if getattr(a, came_to) == getattr(b, came_to):
            different.pop(k, None)
    return [f"{k} = {show(getattr(a, k))} in the checkpoint, {show(getattr(b, k))} now" for k, f in different.items()
            if not (unmet(a, f) and unmet(b, f))]
