"""A process that makes one training run after another, for sweeps of many short runs.

A new process spends seconds on importing torch and on tracing the net, which is longer than some runs last. Graphs
traced for one run serve the next one of the same shapes, and the weights at its end are the same, bit for bit, as in a
process of its own. What a process has of its own is not: a run's peak memory would be that of all before it.

    worker = Worker(threads=1)
    code, out, err = worker.run(["mnist", "--steps", "100"])
"""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = 256  # of one function, before torch.compile gives up on it: runs of a sweep have many shapes


class Worker:
    """The parent's end: a process of `threads` CPU threads, 0 for torch's choice. It is started when it has work.

    `variant` names a change of the code (experiments/variants.py) that holds for all of its runs, "" none.
    """

    def __init__(self, threads: int = 0, variant: str = ""):
        self.threads, self.variant = threads, variant
        self.command = [sys.executable, "-m", "experiments.worker", *([variant] if variant else [])]
        self.environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        self.process: subprocess.Popen | None = None

    def run(self, arguments: Sequence[str]) -> tuple[int, str, str]:
        """Exit status, output and error output of `train.py ARGUMENTS`. A process that died is replaced at the next
        run."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        try:
            self.process.stdin.write(json.dumps(list(arguments)) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self.process.wait()
            self.close()
            return status or 1, "", f"its process ended with status {status}"
        return tuple(json.loads(answer))

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def main() -> int:
    """The worker's end: a run for every line of JSON on stdin, its outcome as a line on stdout.

    An argument names a variant.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints past sys.stdout

    import torch._dynamo

    import train
    from experiments import variants

    if sys.argv[1:]:
        variants.use(sys.argv[1])
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # not on, uncompiled, to other last digits
    # Ctrl-C reaches all processes of a terminal; a run hears it, see run/stop.py.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = train.main(json.loads(line))
            except Exception as error:  # as a process of its own would end, which must not end the next run
                print(f"{type(error).__name__}: {error}", file=err)
                code = 1
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        gc.collect()  # layers are in cycles, and their numbers are those of compiled graphs
    return 0


if __name__ == "__main__":
    sys.exit(main())
