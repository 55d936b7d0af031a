"""The GPU's part of RESULTS.md: must, aim and what was measured, or "not measured" where results/gpu/ has nothing."""

from collections.abc import Callable, Sequence
from statistics import mean

import bench
from experiments import steps
from experiments.gpu_plan import Plan
from experiments.rows import Row, finals, settings, tuning_cells
from experiments.sweep import show_quality

MISSING = "not measured"


def final_runs(plan: Plan, row: Row) -> list[dict]:
    """Finished runs of a row's winner on the part that is reported; none before the row is tuned."""
    store = plan.trainings()
    if any(store.get(cell) is None for cell in tuning_cells(row, **plan.short)):
        return []
    return [r for cell in finals(row, store, plan.seeds, **plan.short) if (r := store.get(cell)) is not None]


def training_table(plan: Plan) -> str:
    """The trainings as markdown: winners, then all that was tried."""
    lines = [
        "| row | bits | settings chosen on the held-out part | val loss or accuracy, last step | must / aim | "
        "tokens or images/s | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in plan.rows:
        if runs := final_runs(plan, row):
            lines.append(
                f"| {row.name} | {runs[0]['bits']} | {settings(runs[0])} | {outcome(runs)} | {row.target} | "
                f"{mean(r['tokens_per_second'] or 0 for r in runs):,.0f} | {mean(r['seconds'] for r in runs):.0f} |"
            )
    tuned = [r for r in plan.trainings().done.values() if r["eval_on"] == "tune"]
    tried = [f"| {r['label']} | {settings(r)} | {show_quality([r])} |" for r in tuned]
    return "\n".join([*lines, "", "| row | tried | the same on the held-out part |", "|---|---|---|", *tried])


def outcome(runs: Sequence[dict]) -> str:
    """Their loss, of images accuracy, at the last step, "not measured" of none."""
    return f"{show_quality(runs)} ({len(runs)} seeds)" if runs else MISSING


def targets(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(what, must, aim, measured) of all a GPU is to show; "not measured" where results/gpu/ has nothing."""
    kernels, times = {}, {}
    for record in plan.done("bench").records.values():  # of several, the newest
        if record["label"] == "kernels":
            kernels = {(k["kernel"], tuple(k["shape"])): k for k in record["kernels"]}
        else:
            times[record["model"], record["method"]] = record

    def kernel(name: str, shape: tuple[int, ...], value: Callable[[dict], float], unit: str = "x") -> str:
        row = kernels.get((name, shape))
        if row and row["wrong"]:
            return "wrong result"
        return f"{value(row):.2f}{unit}" if row else MISSING

    def faster(usual: str) -> Callable[[dict], float]:
        return lambda row: row["usual_seconds"][usual] / row["seconds"]

    def step(model: str, method: str, key: str) -> str:
        ours, rival = times.get((model, method)), times.get((model, steps.RIVAL))
        return f"{ours[key] / rival[key]:.2f}x" if ours and rival else MISSING

    sizes, flips, plain, memory = bench.FULL, "contribution_flip spectral", "GFT, no memory", "GFT, int8 memory"
    rows = [
        (f"int8_matmul at {' x '.join(map(str, shape))}, against torch._int_mm", "0.85x its speed", "1.0x",
         kernel("int8_matmul", shape, faster("torch._int_mm")))
        for shape in sizes.products
    ] + [
        (f"quantize with RMSNorm from {dtype}, against the measured copy bandwidth", "0.7", "0.9",
         kernel(f"rmsnorm_quantize {dtype}", sizes.rows, lambda row: row["of_floor"], ""))
        for dtype in ("float32", "bfloat16")
    ] + [
        ("contribution_flip at 768 x 3072 with 65,536 tokens, against the plain int8 matmul of that shape",
         "at most 2x its time", "1.2x", kernel(flips, sizes.learn, lambda row: 1 / faster("torch._int_mm")(row))),
        ("the same, against bf16 weight gradient and fused AdamW step", "2x its speed", "4x",
         kernel(flips, sizes.learn, faster("bf16 weight gradient, fused AdamW"))),
    ]  # fmt: skip
    for model, name in ((steps.CHARACTERS, "of the 10.7 M character model"), (steps.GPT2, "at GPT-2 small shapes")):
        rows += [(f"a training step {name}, {method}: tokens/s against bf16, torch.compile, fused AdamW", "1.3x",
                  "2x", step(model, method, "tokens_per_second")) for method in (plain, memory)]  # fmt: skip
    rows += [(f"peak memory at GPT-2 small shapes, {method}", "0.5x", "0.25x",
              step(steps.GPT2, method, "peak_memory_bytes"))
             for method in (plain, f"{plain}, flips in backward", memory)]  # fmt: skip
    texts, images = (rows_of(plan, start) for start in ("shakespeare", "imagenette"))
    rows += [(f"Tiny Shakespeare, 10.7 M weights, full length, last step, {row.name}", "at most 1.4697",
              "at most 1.3912", outcome(final_runs(plan, row))) for row in texts[1:]]  # fmt: skip
    rival = final_runs(plan, images[0]) if images else []
    must = "1 point less than AdamW" + (f", {outcome(rival)}" if rival else "")
    return rows + [(f"Imagenette, 160 x 160 pixels, 80 epochs, last step, {row.name}",
                    must, "77.1 %, then 85 %", outcome(final_runs(plan, row)))
                   for row in images[1:]]  # fmt: skip


def rows_of(plan: Plan, start: str) -> list[Row]:
    """The plan's rows whose configs' names begin with `start`; the rival is the first."""
    return [row for row in plan.rows if row.cells[0].config.startswith(start)]


def section(plan: Plan) -> list[str]:
    """The GPU's part of RESULTS.md."""
    machines = [r["machine"] for part in ("tests", "bench") for r in plan.done(part).records.values()]
    where = "{device}, torch {torch}, triton {triton}".format(**machines[-1]) if machines else "Not measured yet"
    lines = ["## On a GPU", "", f"`make gpu` ({where})", "", "| | must | aim | measured |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in targets(plan)]
    titles = {"tests": "Kernel tests", "kernels": "bench.py: kernels", "steps": "bench.py: steps and memory"}
    for name, title in titles.items():
        if (path := plan.results / f"{name}.txt").exists():
            lines += ["", f"### {title}", "", "```", path.read_text(encoding="utf-8").rstrip(), "```"]
    if plan.trainings().done:
        lines += ["", "### Trainings", "", training_table(plan)]
    return [*lines, ""]
