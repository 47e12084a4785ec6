"""What a prune costs: Fisher, elimination, memory, a whole ViT-Ti/16, two processes; against the published procedure.

    python scripts/benchmarks/scale.py --json scale.json

All ratios are of times taken in turns within this run, medians of `--repeats`. The published procedure
(`published.py`) costs the same for every gradient and for every step of an elimination, so a share of them is timed
and the time multiplied; `--whole` times all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import published
import torch
from models import make_batches, make_vit
from ours import OurFisher
from results import Results
from torch.nn import functional as F

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.report import reset_peak_memory

# (blocks, block size) of the measured eliminations; the first is the Fisher's too.
SHAPES = ((2048, 192), (256, 768))
NUM_GRADS = 1024
# Gradient samples added at a time, as a batch of the collector brings them.
SAMPLES = 128
DAMP = 1e-3
PARTS = ("fisher", "elimination", "memory", "overhead", "processes")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(calls: dict[str, Callable[[], float]], repeats: int, results: Results) -> dict[str, list[float]]:
    """Return what every call gives, `repeats` times each, taken in turns so that all meet what slows the machine."""
    values: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            values[name].append(call())
            results.advance()
    return values


def against_published(values: dict[str, list[float]]) -> dict[str, object]:
    """Return medians and all values, and how many times as fast as the published procedure we are."""
    medians = {name: statistics.median(each) for name, each in values.items()}
    return {"median_seconds": medians, "speedup": medians["published"] / medians["ours"], "seconds": values}


def make_gradients(num_blocks: int, size: int) -> torch.Tensor:
    """Return gradients `(SAMPLES, num_blocks, size)` whose entries are correlated, as a network's are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    return torch.randn(SAMPLES, num_blocks, size, generator=generator) @ mix


def measure_fisher(args: argparse.Namespace, results: Results) -> dict[str, object]:
    num_blocks, size = SHAPES[0]
    gradients = make_gradients(num_blocks, size)

    def ours() -> float:
        def work() -> None:
            fisher = OurFisher(num_blocks, size, DAMP)
            for _ in range(NUM_GRADS // SAMPLES):
                fisher.add(gradients)
            # One part after the other, as the pruner takes them: nobody holds all inverses.
            damp = fisher.resolved_damp()
            for part in fisher.parts():
                fisher.inverse(part, damp)

        return seconds(work)

    def theirs() -> float:
        fisher = published.WoodburyFisher(num_blocks, size, NUM_GRADS, DAMP)
        count = NUM_GRADS if args.whole else 8
        taken = seconds(lambda: [fisher.add(gradients[index % SAMPLES]) for index in range(count)])
        return taken * NUM_GRADS / count

    return against_published(in_turns({"ours": ours, "published": theirs}, args.repeats, results))


def measure_elimination(num_blocks: int, size: int, args: argparse.Namespace, results: Results) -> dict[str, object]:
    fisher = OurFisher(num_blocks, size, DAMP)
    fisher.add(make_gradients(num_blocks, size))
    damp = fisher.resolved_damp()
    inverse = torch.cat([fisher.inverse(part, damp) for part in fisher.parts()])
    weights = torch.randn(num_blocks, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def ours() -> float:
        return seconds(lambda: fisher.eliminate(weights, inverse))

    def theirs() -> float:
        copy, single = inverse.float(), weights.float()
        steps = size if args.whole else 16
        return seconds(lambda: published.eliminate(single, copy, steps)) * size / steps

    return against_published(in_turns({"ours": ours, "published": theirs}, args.repeats, results))


def measure_memory(args: argparse.Namespace, results: Results) -> dict[str, object]:
    """Return the peak of Fisher and elimination together, each in a process of its own, above what it began with."""

    def peak(name: str) -> int:
        return int(run([sys.executable, __file__, "--memory_of", name]).split()[-1])

    calls = {name: lambda name=name: peak(name) for name in ("ours", "published")}
    values = in_turns(calls, args.repeats, results)
    medians = {name: statistics.median(each) for name, each in values.items()}
    return {"median_bytes": medians, "ratio": medians["published"] / medians["ours"], "bytes": values}


def print_memory(name: str) -> None:
    """Be the child of `measure_memory`. Neither side's peak depends on how many gradients there are."""
    num_blocks, size = SHAPES[0]
    gradients = make_gradients(num_blocks, size)[:16]
    warm_up = OurFisher(1, 8, DAMP)
    warm_up.add(torch.randn(8, 1, 8))
    warm_up.inverse(slice(0, 1), DAMP)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(num_blocks, size, generator=generator)
    # What the imports took for a moment is no part of it.
    reset_peak_memory()
    before = resident("VmRSS")
    if name == "published":
        fisher = published.WoodburyFisher(num_blocks, size, 16, DAMP)
        for gradient in gradients:
            fisher.add(gradient)
        published.eliminate(weights, fisher.inverse)
    else:
        ours = OurFisher(num_blocks, size, DAMP)
        ours.add(gradients)
        damp, kept = ours.resolved_damp(), []
        for part in ours.parts():
            found = ours.eliminate(weights[part].double(), ours.inverse(part, damp))
            kept.append((found.order.short(), found.losses.float()))
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Return bytes of this process's memory: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def prune_tiny(data: list[dict[str, torch.Tensor]], num_grads: int) -> float:
    model = make_vit("vit-tiny")
    config = CAPConfig(num_grads=num_grads, fisher_block_size=192)
    compressor = CAPCompressor(model, config, disable_tqdm=True)
    start = time.perf_counter()
    compressor.collect(data).prune(0.75)
    return time.perf_counter() - start


def measure_overhead(args: argparse.Namespace, results: Results) -> dict[str, object]:
    """Return how much longer a whole prune takes than a bare forward and backward pass over the same examples."""
    data = make_batches(args.examples, args.batch_size)

    def bare() -> float:
        model = make_vit("vit-tiny")

        def work() -> None:
            for batch in data:
                F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
                model.zero_grad()

        return seconds(work)

    calls = {"prune": lambda: prune_tiny(data, args.examples), "forward_backward": bare}
    values = in_turns(calls, args.whole_repeats, results)
    medians = {name: statistics.median(each) for name, each in values.items()}
    overhead = medians["prune"] / medians["forward_backward"] - 1
    return {"median_seconds": medians, "overhead": overhead, "seconds": values, "examples": args.examples}


def measure_processes(args: argparse.Namespace, results: Results) -> dict[str, object]:
    """Return the times of a whole prune by two processes with one thread each, and by one process with one thread."""

    def prune(processes: int) -> float:
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
        # Several processes on CPUs are what accelerate starts under this name where there is no GPU.
        command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
        command += [__file__, "--prune_of", str(args.process_examples), "--batch_size", str(args.batch_size)]
        return float(run(command, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true").split()[-1])

    values = in_turns({"1": lambda: prune(1), "2": lambda: prune(2)}, args.whole_repeats, results)
    medians = {name: statistics.median(each) for name, each in values.items()}
    return {"median_seconds": medians, "speedup": medians["1"] / medians["2"], "seconds": values}


def print_prune(examples: int, batch_size: int) -> None:
    """Be the child of `measure_processes`: each process takes its share of the same examples."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    taken = prune_tiny(make_batches(examples, batch_size)[rank::world], examples)
    if rank == 0:
        print(taken)


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="gets the figures, each as soon as it is there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole_repeats", type=int, default=5, help="repeats of the whole prunes, minutes each")
    parser.add_argument("--examples", type=int, default=1024, help="examples of the whole prune")
    parser.add_argument("--process_examples", type=int, default=1024, help="examples with one and two processes")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--whole", action="store_true", help="time every step of the published procedure")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
    parser.add_argument("--memory_of", choices=("ours", "published"), help=argparse.SUPPRESS)
    parser.add_argument("--prune_of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_memory(args.memory_of)
    if args.prune_of:
        return print_prune(args.prune_of, args.batch_size)

    torch.set_num_threads(args.threads)
    with Results(args, total=2 * sum(repeats_of(part, args) for part in args.only)) as results:
        for part in args.only:
            results.measuring(part)
            measure_part(part, args, results)
    print(json.dumps(results.content, indent=2))
    return None


def repeats_of(part: str, args: argparse.Namespace) -> int:
    """Return how often each of a part's two sides is measured."""
    if part in ("overhead", "processes"):
        return args.whole_repeats
    return args.repeats * (len(SHAPES) if part == "elimination" else 1)


def measure_part(part: str, args: argparse.Namespace, results: Results) -> None:
    """Measure one of `PARTS` and write it down."""
    if part == "fisher":
        found = measure_fisher(args, results)
        results.set(fisher=found, fisher_speedup=found["speedup"])
    elif part == "elimination":
        each: dict[str, dict] = {}
        for n, size in SHAPES:
            each[f"{n} x {size}"] = measure_elimination(n, size, args, results)
            results.set(elimination=each, elimination_speedup=min(value["speedup"] for value in each.values()))
    elif part == "memory":
        found = measure_memory(args, results)
        results.set(memory=found, memory_ratio=found["ratio"])
    elif part == "overhead":
        found = measure_overhead(args, results)
        results.set(overhead=found, overhead_over_forward_backward=found["overhead"])
    else:
        found = measure_processes(args, results)
        results.set(processes=found, two_process_speedup=found["speedup"])


if __name__ == "__main__":
    main()
