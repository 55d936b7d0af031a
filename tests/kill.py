"""Kill trainings with SIGKILL at random moments, resume them until the end, and compare their weights.

    python -m tests.kill --runs 100               about 10 minutes on one core; prints a line a run and a summary
    python -m tests.kill --runs 100 --seed 7      other moments
    python -m tests.kill --disk                   as root, Linux: on file systems of 8, 16, ..., 320 KiB, which fill up

Each run is killed up to three times: anywhere, in its first step, or while it saves. After every kill all checkpoints
must be whole, and none may be of an earlier step than before; at the end the weights must be, bit for bit, those of a
run that was never killed, and the log must hold every step once. A run that finds its disk full must end with exit
status 1 and one line, and be resumed, once there is room, to the same weights. Children are forked from a process that
has imported torch, so that a start costs little. The exit status is 1 if anything differs.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import train
from run import checkpoint

STEPS, MOST_KILLS = 40, 3
TINY = {
    "data": "stdlib", "n_layer": 1, "n_head": 2, "d_model": 32, "context": 16, "batch_size": 4, "steps": STEPS,
    "log_every": 1, "eval_every": 20, "save_every": 2, "eval_windows": 8, "sample_tokens": 8, "compile": "false",
    "threads": 1, "ortho_tile": 32, "topk_tile": 32,
}  # fmt: skip
VARIANTS = {
    "momentum, delayed scale": {"n_layer": 2, "momentum": 0.9, "delta_scale": "delayed", "grad_accum": 2},
    "update in backward": {"update": "backward", "momentum": 0.9},
    "hybrid": {"int_layers": "attention,mlp"},
    "muon": {"method": "muon"},
}
MOMENTS = ("anywhere", "in the first step", "while saving")


class Failed(Exception):
    """A run did not end as it must."""


def start(out: Path, log: Path, settings: dict, resume: bool) -> int:
    """A training in a process of its own, whose output goes to `log`. Returns its number."""
    keys = TINY | settings | {"out_dir": out} | ({"resume": "last"} if resume else {})
    argv = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 70
    try:
        status = train.main(argv)
        sys.stdout.flush()
    finally:
        os._exit(status)


def ended(pid: int, wait: bool = False) -> int | None:
    """The exit status, negative for a signal; None if the process still runs."""
    done, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_for(moment: str, pid: int, out: Path, rng: random.Random, whole: float) -> int | None:
    """Wait for a random moment of this kind. Returns the exit status if the process ends before it, else None."""
    begun, saves = time.monotonic(), rng.randint(0, 20)
    delay = rng.uniform(0, {"anywhere": whole, "in the first step": 0.06, "while saving": 0.01}[moment])  # seconds
    seen, before = None, False
    while True:
        status = ended(pid)
        if status is not None:
            return status
        if seen is None:
            if moment == "while saving":  # the temporary file of save number `saves`
                now = any(name.endswith(".json.tmp") or name.endswith(".safetensors.tmp") for name in listed(out))
                saves -= now and not before
                before = now
                seen = time.monotonic() if saves < 0 else None
            elif moment == "anywhere" or (out / "metrics.jsonl").exists():
                seen = begun if moment == "anywhere" else time.monotonic()
        if seen is not None and time.monotonic() >= seen + delay:
            return None
        time.sleep(0.0002)


def listed(folder: Path) -> list[str]:
    """The names in a folder that may not be there."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def saved_steps(out: Path) -> dict[str, int]:
    """The step of each checkpoint there is. Raises UserError if one is damaged."""
    return {name: checkpoint.load(out, name)[1]["step"] for name in checkpoint.LOADED if checkpoint.exists(out, name)}


def final(log: Path) -> str:
    """weights_sha256 of a run that has ended well."""
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["weights_sha256"]


def killed_run(out: Path, settings: dict, rng: random.Random, whole: float) -> tuple[str, list[str]]:
    """The hash of a run's last weights, and the moments at which it was killed. Raises Failed."""
    log, kills, steps, kills_left = out.with_suffix(".log"), [], {}, rng.randint(1, MOST_KILLS)
    while True:
        pid = start(out, log, settings, resume=checkpoint.exists(out, "last"))
        moment = rng.choice(MOMENTS)
        status = wait_for(moment, pid, out, rng, whole) if kills_left else ended(pid, wait=True)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            ended(pid, wait=True)
            kills_left -= 1
            before, steps = steps, saved_steps(out)
            kills.append(f"killed {moment}, saved {steps.get('last', 'nothing')}")
            if any(steps.get(name, -1) < step for name, step in before.items()):
                raise Failed(f"checkpoints of steps {before} became {steps}; killed: {kills}")
        elif status:
            raise Failed(f"exit status {status} after {kills}: {log.read_text(encoding='utf-8')[-2000:]}")
        else:
            recorded = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            if recorded != list(range(1, STEPS + 1)):
                raise Failed(f"the log has steps {recorded}; killed: {kills}")
            return final(log), kills


def full_disk(folder: Path, kibibytes: int, settings: dict) -> tuple[str, str]:
    """The hash of a run that began on a disk of this size, and what it said when that was full. Raises Failed."""
    disk, log, said = folder / "disk", folder / "disk.log", ""
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", disk], check=True)
    try:
        status = ended(start(disk / "out", log, settings, resume=False), wait=True)
        if status == 1:
            said = log.read_text(encoding="utf-8").splitlines()[-1]
            steps = saved_steps(disk / "out")
            subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
            status = ended(start(disk / "out", log, settings, resume="last" in steps), wait=True)
        if status or said and not (said.startswith("error: ") and "No space left on device" in said):
            raise Failed(f"exit status {status} on {kibibytes} KiB: {said or log.read_text(encoding='utf-8')[-2000:]}")
        return final(log), said and f"full, saved {steps.get('last', 'nothing')}"
    finally:
        subprocess.run(["umount", disk], check=True)


def main(argv: list[str]) -> int:
    """Run the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--disk", action="store_true")
    args = parser.parse_args(argv)
    counts, failed = collections.Counter(), 0
    with tempfile.TemporaryDirectory(prefix="nanogft-kill-") as folder:
        expected, whole = {}, 0.0
        for number, (name, settings) in enumerate(list(VARIANTS.items())[: args.runs]):
            log, begun = Path(folder, f"whole{number}.log"), time.monotonic()
            if status := ended(start(log.with_suffix(""), log, settings, resume=False), wait=True):
                raise SystemExit(f"{name}: exit status {status}: {log.read_text(encoding='utf-8')}")
            expected[name], whole = final(log), max(whole, time.monotonic() - begun)
        runs = 40 if args.disk else args.runs
        for number in range(runs):
            name = list(expected)[number % len(expected)]
            try:
                if args.disk:
                    found, said = full_disk(Path(folder), 8 * (number + 1), VARIANTS[name])
                    met = [said or "room enough"]
                else:
                    rng = random.Random(1000 * args.seed + number)
                    found, met = killed_run(Path(folder, f"run{number}"), VARIANTS[name], rng, whole)
                same = found == expected[name]
            except Failed as error:
                found, met, same = str(error), [], False
            counts.update(event.partition(",")[0] for event in met)
            failed += not same
            print(f"{number + 1:4} {name}: {'same weights' if same else f'DIFFERENT: {found}'}; {'; '.join(met)}",
                  flush=True)  # fmt: skip
    print(f"{runs} runs ({', '.join(f'{n} {event}' for event, n in counts.items())}): {runs - failed} ended with the "
          f"weights of a run that met nothing, {failed} did not")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
