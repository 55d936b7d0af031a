"""run/checkpoint.py: what is saved comes back bit for bit, or an error names the file that is wrong."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from run import checkpoint
from run.config import Config, to_dict
from run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((7, 13), step, dtype=torch.int32), "s": torch.tensor(float(step))}


def save(folder: Path, step: int, name: str = "last") -> None:
    checkpoint.save(folder, name, tensors_of(step), {"step": step})


def assert_holds(folder: Path, name: str, step: int) -> None:
    tensors, meta = checkpoint.load(folder, name)
    assert meta["step"] == step
    assert all(torch.equal(tensors[key], value) for key, value in tensors_of(step).items())


def body(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["file"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.arange(-128, 128).to(torch.int8),
        torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32),
        torch.tensor([[2**63 - 1, -(2**63)]]),
        torch.tensor([True, False, True]),
        torch.randn(1, 7).to(torch.bfloat16),
        torch.tensor(1.5),
        torch.empty(0, 4, dtype=torch.int8),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=["fp32", "int8", "int32", "int64", "bool", "bf16", "scalar", "empty", "strided", "not finite"],
)
def test_tensors_come_back_bit_for_bit(tmp_path, tensor):
    checkpoint.save(tmp_path / "new" / "run", "best", {"x": tensor}, {"step": 0})
    loaded = checkpoint.load(tmp_path / "new" / "run", "best")[0]["x"]
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
    assert checkpoint.weights_sha256({"x": loaded}) == checkpoint.weights_sha256({"x": tensor})


def test_shared_memory_and_parameters_are_stored_as_copies(tmp_path):
    shared = torch.nn.Parameter(torch.randn(4))
    checkpoint.save(tmp_path, "last", {"a": shared, "b": shared, "c": shared[1:3]}, {"step": 1})
    loaded, _ = checkpoint.load(tmp_path, "last")
    loaded["a"].zero_()
    assert torch.equal(loaded["b"], shared) and torch.equal(loaded["c"], shared[1:3])


def test_meta_comes_back(tmp_path):
    meta = {"step": 3, "config": {"k": 0.1}, "tokenizer": {"chars": "aé\n\U0001f600\udc80"}, "x": [None]}
    checkpoint.save(tmp_path, "last", {}, meta)
    assert checkpoint.load(tmp_path, "last") == ({}, meta | {"program": checkpoint.PROGRAM})


def test_the_program_has_one_version():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert checkpoint.PROGRAM == project["version"]


@pytest.mark.parametrize("meta", [{}, {"config": None}, {"config": [1]}], ids=str)
def test_a_meta_without_config_is_named(meta):
    with pytest.raises(UserError, match=r"best\.json was not written by this program, .*: its config\."):
        checkpoint.config_of(meta, Path("out/x/best.json"))


def test_a_checkpoint_of_before_keep_bits_is_read_as_it_was():
    """Its weights of 4 bits would otherwise be read as the coarse part of 6."""
    config = to_dict(Config(bits=4))
    del config["keep_bits"]
    old = checkpoint.config_of({"config": config}, Path("last.json"))
    assert old.kept_bits == old.bits == 4
    assert checkpoint.config_of({"config": to_dict(Config(bits=4))}, "").kept_bits == 6


@pytest.mark.parametrize("setting, said", [
    ({"layer_drop": 0.1}, "unknown key layer_drop"), ({"method": "lion"}, "method = lion: must be one of gft"),
    ({"bits": 16}, "bits = 16: must be a whole number from 1 to 8"),
], ids=["key", "choice", "number"])  # fmt: skip
@pytest.mark.parametrize("program", ["9.1.2", None])
def test_settings_of_a_newer_version_name_the_file_and_the_versions(setting, said, program):
    meta = {"config": to_dict(Config()) | setting} | ({"program": program} if program else {})
    with pytest.raises(UserError) as caught:
        checkpoint.config_of(meta, Path("out/x/best.json"))
    text = str(caught.value)
    assert f"out/x/best.json was written by version {program or 'unknown'} of this program, format 2" in text
    assert f"this version, {checkpoint.PROGRAM}, does not have: {said}" in text and caught.value.code == 1
    assert "Update this program (git pull), or use the version that wrote the file" in text


def test_join_and_group():
    one, two = torch.zeros(1), torch.ones(1)
    joined = checkpoint.join(model={"a.b": one}, optimizer={"a.b": two})
    assert joined == {"model.a.b": one, "optimizer.a.b": two}
    assert checkpoint.group(joined, "model") == {"a.b": one}


def test_the_state_of_an_optimizer_comes_back(tmp_path):
    """Resumed from a file, AdamW makes the same steps as one that went on."""
    def made() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    def step(net, optimizer):
        net(torch.ones(3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    net, optimizer = made()
    step(net, optimizer)
    state = optimizer.state_dict()["state"]
    saved = checkpoint.join(model=net.state_dict(), optimizer=checkpoint.flatten(state))
    checkpoint.save(tmp_path, "last", saved, {"step": 1})
    tensors, _ = checkpoint.load(tmp_path, "last")
    again, resumed = made()
    again.load_state_dict(checkpoint.group(tensors, "model"))
    state = checkpoint.unflatten(checkpoint.group(tensors, "optimizer"))
    resumed.load_state_dict({"state": state, "param_groups": resumed.state_dict()["param_groups"]})
    for _ in range(3):
        step(net, optimizer)
        step(again, resumed)
    assert checkpoint.weights_sha256(again.state_dict()) == checkpoint.weights_sha256(net.state_dict())


def test_flatten_keeps_numbers_exactly():
    state = {0: {"step": 3, "decay": 0.1, "m": torch.ones(2)}, "rng": {"seed": {"high": 2**62 + 1}}, "on": True}
    flat = checkpoint.flatten(state)
    assert sorted(flat) == ["0.decay", "0.m", "0.step", "on", "rng.seed.high"]
    assert flat["0.decay"].item() == 0.1 and flat["rng.seed.high"].item() == 2**62 + 1 and flat["on"].item() is True
    back = checkpoint.unflatten(flat)
    assert back[0]["m"] is state[0]["m"] and back[0]["step"].dtype == torch.int64 and back.keys() == state.keys()
    for foreign in (None, "text", [1.0]):
        with pytest.raises(TypeError, match="x: a .* is neither a tensor nor a number"):
            checkpoint.flatten({"x": foreign})


def test_previous_is_the_last_but_one_and_older_files_go(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step)
        save(tmp_path, step, "best")
    for name in ("last", "previous", "best"):
        assert checkpoint.exists(tmp_path, name)
        assert_holds(tmp_path, name, 200 if name == "previous" else 300)
    stems = ("best-00000300", "last-00000200", "last-00000300")
    expected = {"last.json", "previous.json", "best.json"} | {f"{stem}.safetensors" for stem in stems}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_saving_a_step_again_never_writes_over_a_committed_file(tmp_path):
    save(tmp_path, 5)
    first = body(tmp_path, "last")
    before = first.read_bytes()
    checkpoint.save(tmp_path, "last", {"w": torch.zeros(2)}, {"step": 5})
    assert body(tmp_path, "last") != first and first.read_bytes() == before
    assert_holds(tmp_path, "previous", 5)


def test_leftovers_of_killed_saves_go_with_the_next_commit_and_other_files_stay(tmp_path):
    leftovers = ["last-00000001.safetensors.tmp", "last-00000001.safetensors", "last.json.tmp", "previous.json.tmp"]
    others = ["metrics.jsonl", "mine.safetensors", "last-notes.txt", "notes.tmp"]
    for name in leftovers + others:
        (tmp_path / name).write_text("x", encoding="utf-8")
    save(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "last.json", "last-00000002.safetensors"}


def test_kept_checkpoints_outlive_last_and_are_limited(tmp_path, monkeypatch):
    for step in (98, 99, 99_999_999, 100_000_000):
        save(tmp_path, step)
        checkpoint.keep(tmp_path, 3)
        checkpoint.keep(tmp_path, 3)  # a resumed run comes by again
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-00000099", "step-100000000", "step-99999999"]
    save(tmp_path, 7)
    assert_holds(tmp_path / "step-00000099", "last", 99)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    checkpoint.keep(tmp_path, 0)
    assert_holds(tmp_path / "step-00000007", "last", 7)
    assert len(list(tmp_path.glob("step-*"))) == 4
    save(tmp_path, 1000)  # resumed from an earlier one: the new one stays, and what was left behind goes first
    checkpoint.keep(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000007", "step-00000099", "step-00001000"]


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit_step(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"step": 200', '"step": 999'), encoding="utf-8")


def new_version(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"version": 2', '"version": 3'), encoding="utf-8")


def old_version(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"version": 2', '"version": 1'), encoding="utf-8")


def signed(**changes: object):
    """Edits the JSON and gives it a hash that fits."""

    def damage(head: Path) -> None:
        record = json.loads(head.read_text()) | changes
        head.write_text(json.dumps(record | {"content_sha256": checkpoint._content_sha256(record)}))

    return damage


def signed_tensors(content: bytes):
    """Replaces the tensors and gives the JSON a hash that fits."""

    def damage(path: Path) -> None:
        path.write_bytes(content)
        signed(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())(path.with_name("last.json"))

    return damage


DAMAGE = {
    "tensors flipped": ("body", flip_byte, "damaged: its SHA-256 is"),
    "tensors truncated": ("body", truncate, "bytes and last.json says"),
    "tensors empty": ("body", lambda path: path.write_bytes(b""), "it has 0 bytes"),
    "tensors missing": ("body", Path.unlink, "is missing"),
    "json truncated": ("head", truncate, "not JSON"),
    "json empty": ("head", lambda path: path.write_bytes(b""), "0 bytes that are not JSON"),
    "json not text": ("head", lambda path: path.write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "json edited": ("head", edit_step, "damaged or was edited"),
    "json of another program": ("head", lambda path: path.write_text('{"format": "pt"}'), "\"format\" is 'pt'"),
    "json without format": ("head", lambda path: path.write_text("[1, 2]"), "\"format\" is 'list'"),
    "json of a new version": ("head", new_version, "format version 3; this program reads 2: update this program (git"),
    "json of an old version": ("head", old_version, "was written by format version 1; this program reads 2: use the"),
    "json missing": ("head", Path.unlink, "is missing"),
    "json nested": ("head", lambda path: path.write_text('{"format": ' + "[" * 100_000), "not JSON"),
    "signed, a file elsewhere": ("head", signed(file="../x.safetensors"), "hash is right: its file."),
    "signed, no file": ("head", signed(file=None, bytes="1"), "its hash is right: its file, bytes."),
    "signed, no step": ("head", signed(meta={}), "hash is right: its step."),
    "signed, header of 2^60": ("body", signed_tensors(b"\0\0\0\0\0\0\0\x10{}"), "though its hash is right"),
    "signed, no tensors": ("body", signed_tensors(b"\2\0\0\0\0\0\0\0[]"), "though its hash is right"),
}


@pytest.mark.parametrize("part, damage, says", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_good_previous_is_offered(tmp_path, part, damage, says):
    save(tmp_path, 100)
    save(tmp_path, 200)
    path = tmp_path / "last.json" if part == "head" else body(tmp_path, "last")
    damage(path)
    with pytest.raises(UserError) as caught:
        checkpoint.load(tmp_path, "last")
    message = str(caught.value)
    assert str(path) in message and says in message
    assert "step 100" in message and "--resume previous" in message
    assert_holds(tmp_path, "previous", 100)


@pytest.mark.parametrize("part", ["head", "body"])
def test_cut_at_every_kilobyte_the_newest_good_one_is_named(tmp_path, part):
    """And used only as asked; a failed load changes nothing."""
    for name, step in (("last", 100), ("best", 150), ("last", 200)):
        tensors = {"w": torch.full((60, 1000), step, dtype=torch.uint8)}
        checkpoint.save(tmp_path, name, tensors, {"step": step, "losses": [0.1] * 7000})
    path = tmp_path / "last.json" if part == "head" else body(tmp_path, "last")
    whole, files = path.read_bytes(), {p.name for p in tmp_path.iterdir()}
    assert len(whole) > 50_000
    for size in range(0, len(whole), 1024):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError) as caught:
            checkpoint.load(tmp_path, "last")
        message = str(caught.value)
        assert message.startswith(f"{path} is damaged: ") and f"{size:,} bytes" in message
        assert message.endswith("A good checkpoint of step 150 is there as 'best': to use it, give --resume best.")
        assert path.read_bytes() == whole[:size] and {p.name for p in tmp_path.iterdir()} == files
        assert [checkpoint.load(tmp_path, name)[1]["step"] for name in ("best", "previous")] == [150, 100]
    (tmp_path / "best.json").unlink()
    with pytest.raises(UserError, match="of step 100 is there as 'previous': to use it, give --resume previous"):
        checkpoint.load(tmp_path, "last")


@pytest.mark.parametrize("year", [1971, 2100])
def test_a_clock_that_was_set_does_not_matter(tmp_path, year):
    """Steps decide, not the times of files: those of the checkpoints are later, or much earlier, than what follows."""
    for step in (1, 2):
        save(tmp_path, step)
        for path in tmp_path.iterdir():
            os.utime(path, ((year - 1970) * 365 * 86400,) * 2)
    save(tmp_path, 3)
    assert_holds(tmp_path, "last", 3)
    assert_holds(tmp_path, "previous", 2)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_last_never_pushes_out_a_good_previous(tmp_path):
    save(tmp_path, 100)
    save(tmp_path, 200)
    flip_byte(body(tmp_path, "last"))
    save(tmp_path, 200)
    assert_holds(tmp_path, "last", 200)
    assert_holds(tmp_path, "previous", 100)


def test_a_copied_json_keeps_its_tensors(tmp_path):
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
        if step == 200:
            (tmp_path / "best.json").write_bytes((tmp_path / "previous.json").read_bytes())
    assert_holds(tmp_path, "best", 100)


def test_the_error_says_where_nothing_good_is_left_and_uses_the_callers_option(tmp_path):
    with pytest.raises(UserError, match=r"last\.json is missing\. There is no other good checkpoint in"):
        checkpoint.load(tmp_path / "nowhere", "last")
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip_byte(body(tmp_path, "last"))
    flip_byte(body(tmp_path, "previous"))
    with pytest.raises(UserError, match="no other good checkpoint"):
        checkpoint.load(tmp_path, "last")
    save(tmp_path, 3, "best")
    with pytest.raises(UserError, match="step 3 .* give --checkpoint best"):
        checkpoint.load(tmp_path, "last", option="--checkpoint {}")


def test_a_reader_takes_the_new_checkpoint_when_a_training_run_replaces_it_midway(tmp_path, monkeypatch):
    save(tmp_path, 1, "best")
    read, pending = checkpoint._read, [2]

    def read_while_training_saves(path):
        if path.suffix == ".safetensors" and pending:
            save(tmp_path, pending.pop(), "best")
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", read_while_training_saves)
    assert_holds(tmp_path, "best", 2)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_full_disk_leaves_earlier_checkpoints_and_no_rubbish(tmp_path, monkeypatch, call, nth):
    save(tmp_path, 100)
    save(tmp_path, 200)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = getattr(os, call), []

    def full(*args):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(UserError) as caught:
        save(tmp_path, 300)
    monkeypatch.undo()
    message = str(caught.value)
    assert all(part in message for part in (str(tmp_path / "last.json"), "No space left", "intact", "--out_dir"))
    if (call, nth) != ("replace", 3):  # the third rename comes after the commit: the new checkpoint is there then
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_holds(tmp_path, "previous", 100)


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("in the way", encoding="utf-8")
    for folder in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(UserError, match=r"run.*last\.json.*move the file that stands where a folder is needed"):
            save(folder, 1)
    assert (tmp_path / "run").read_text(encoding="utf-8") == "in the way"


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(checkpoint, "_write", refuse)  # root, who may run the tests, writes anywhere
    with pytest.raises(UserError, match="Permission denied.*make the folder writable"):
        save(tmp_path, 1)


def test_weights_sha256_depends_on_everything_but_order():
    base = {"a": torch.zeros(2, 3, dtype=torch.int8), "b": torch.ones(2)}
    others = [
        base | {"b": torch.tensor([1.0, -1.0])},
        base | {"b": torch.ones(2).view(torch.int32)},
        base | {"a": torch.zeros(3, 2, dtype=torch.int8)},
        {"a": base["a"], "c": base["b"]},
    ]
    hashes = {checkpoint.weights_sha256(one) for one in [base, *others]}
    assert len(hashes) == 5
    assert checkpoint.weights_sha256(dict(reversed(base.items()))) == checkpoint.weights_sha256(base)
    assert checkpoint.weights_sha256({"b": torch.ones(4)[::2], "a": base["a"]}) == checkpoint.weights_sha256(base)


CRASHES = r'''
import os, random, resource, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/tests/run")
from run import checkpoint
from run.config import Config, to_dict
from run.errors import UserError
from test_checkpoint import assert_holds, save

folder = Path(sys.argv[2])

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid

def steps_present():
    found = {}
    for name in ("last", "previous", "best"):
        if checkpoint.exists(folder, name):
            found[name] = checkpoint.load(folder, name)[1]["step"]
            assert_holds(folder, name, found[name])
    return found

def die_before_call(n, step, name):
    """Save once and die on reaching call n to the file system (system calls patched); exit 0 if there are fewer."""
    calls = [0]
    def dying(real):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for function in ("replace", "fsync", "unlink", "open"):
        setattr(os, function, dying(getattr(os, function)))
    checkpoint.open = dying(open)
    save(folder, step, name)

for name in ("last", "best"):
    save(folder, 1)
    save(folder, 2, name)
    step, n, status = 2, 0, -1
    while status != 0:
        n, step = n + 1, step + 1
        before = steps_present()
        _, status = os.waitpid(child(lambda: die_before_call(n, step, name)), 0)
        after = steps_present()
        assert after.keys() >= before.keys() and after[name] in (before[name], step), (n, before, after)
    print(name, "calls:", n - 1)

rng = random.Random(0)
reports, report = os.pipe()
os.set_blocking(reports, False)

def loop():
    step = checkpoint.load(folder, "last")[1]["step"]
    while True:
        step += 1
        save(folder, step)
        os.write(report, b"%d " % step)

for _ in range(30):
    pid = child(loop)
    time.sleep(rng.uniform(0.0, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        reported = max(map(int, os.read(reports, 1 << 20).split()))
    except BlockingIOError:
        reported = 0
    assert steps_present()["last"] >= reported
print("steps:", steps_present()["last"])

def over_the_limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    try:
        save(folder, 10**6)
    except UserError as exc:
        assert "File too large" in str(exc) and "ulimit -f" in str(exc) and "intact" in str(exc), exc
        os._exit(7)

before = steps_present(), sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")
_, status = os.waitpid(child(over_the_limit), 0)
assert os.waitstatus_to_exitcode(status) == 7
after = steps_present(), sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")
assert before == after, (before, after)
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and RLIMIT_FSIZE are POSIX")
def test_killed_anywhere_or_over_the_file_size_limit_a_good_checkpoint_remains(tmp_path):
    """Killed before every single file-system call in turn, then 30 times at a random moment of a tight loop."""
    result = subprocess.run(
        [sys.executable, "-c", CRASHES, str(ROOT), str(tmp_path)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [int(line.split()[-1]) for line in result.stdout.splitlines() if "calls:" in line]
    assert len(calls) == 2 and min(calls) >= 9, result.stdout  # the crash points were really visited
