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
from torch import nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from cap_hf import CAPCompressor, CAPConfig
from cap_hf.method.elimination import eliminate, invert
from cap_hf.method.fisher import BlockFisher, damps
from cap_hf.report import versions
from cap_hf.targets import Target

# (blocks, block size) of the measured eliminations; the first is the Fisher's too.
SHAPES = ((2048, 192), (256, 768))
NUM_GRADS = 1024
# Gradient samples added at a time, as a batch of the collector brings them.
SAMPLES = 128
# Blocks solved at a time.
CHUNK = 64
DAMP = 1e-3


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> dict[str, object]:
    """Medians and all values of two timings taken one after the other, and how many times the first is faster."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    values = {"ours": [pair[0] for pair in pairs], "published": [pair[1] for pair in pairs]}
    medians = {name: statistics.median(each) for name, each in values.items()}
    return {"median_seconds": medians, "speedup": medians["published"] / medians["ours"], "seconds": values}


def make_fisher(num_blocks: int, size: int) -> tuple[BlockFisher, Target]:
    target = Target("layer", nn.Linear(size, num_blocks, bias=False), size)
    return BlockFisher([target]), target


class StoredGradients:
    """Gradients that are there already, `(samples, rows, row)`, in the place of a layer's factors."""

    def __init__(self, gradients: torch.Tensor) -> None:
        self.gradients, self.samples = gradients, len(gradients)

    def rows(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self.gradients[:, start:stop])


def damp_of(fisher: BlockFisher, target: Target) -> float:
    return damps(fisher.mean_diagonals(), DAMP, absolute=False)[target.name]


def make_gradients(num_blocks: int, size: int) -> torch.Tensor:
    """Gradients `(SAMPLES, num_blocks, size)` whose entries are correlated, as a network's are."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    return torch.randn(SAMPLES, num_blocks, size, generator=generator) @ mix


def inverses(fisher: BlockFisher, target: Target) -> list[torch.Tensor]:
    damp = damp_of(fisher, target)
    starts = range(0, target.num_blocks, CHUNK)
    return [invert(fisher.damped(target, slice(start, start + CHUNK), damp)) for start in starts]


def measure_fisher(args: argparse.Namespace) -> dict[str, object]:
    num_blocks, size = SHAPES[0]
    gradients = make_gradients(num_blocks, size)

    def ours() -> float:
        def work() -> None:
            fisher, target = make_fisher(num_blocks, size)
            for _ in range(NUM_GRADS // SAMPLES):
                fisher.add(target, StoredGradients(gradients))
                fisher.count += SAMPLES
            # One at a time, as the pruner takes them: nobody holds all inverses.
            damp = damp_of(fisher, target)
            for start in range(0, num_blocks, CHUNK):
                invert(fisher.damped(target, slice(start, start + CHUNK), damp))

        return seconds(work)

    def theirs() -> float:
        fisher = published.WoodburyFisher(num_blocks, size, NUM_GRADS, DAMP)
        count = NUM_GRADS if args.whole else 8
        taken = seconds(lambda: [fisher.add(gradients[index % SAMPLES]) for index in range(count)])
        return taken * NUM_GRADS / count

    return in_turns(ours, theirs, args.repeats)


def measure_elimination(num_blocks: int, size: int, args: argparse.Namespace) -> dict[str, object]:
    fisher, target = make_fisher(num_blocks, size)
    fisher.add(target, StoredGradients(make_gradients(num_blocks, size)))
    fisher.count += SAMPLES
    inverse = torch.cat(inverses(fisher, target))
    weights = torch.randn(num_blocks, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def ours() -> float:
        return seconds(lambda: eliminate(weights, inverse))

    def theirs() -> float:
        copy, single = inverse.float(), weights.float()
        steps = size if args.whole else 16
        return seconds(lambda: published.eliminate(single, copy, steps)) * size / steps

    return in_turns(ours, theirs, args.repeats)


def measure_memory(args: argparse.Namespace) -> dict[str, object]:
    """Peak memory of Fisher and elimination together, each in a process of its own, above what it began with."""
    peaks = {}
    for name in ("ours", "published"):
        command = [sys.executable, __file__, "--memory_of", name]
        values = [int(run(command).split()[-1]) for _ in range(args.repeats)]
        peaks[name] = statistics.median(values)
    return {"median_bytes": peaks, "ratio": peaks["published"] / peaks["ours"]}


def print_memory(name: str) -> None:
    """The child of `measure_memory`. Neither side's peak depends on how many gradients there are."""
    num_blocks, size = SHAPES[0]
    gradients = make_gradients(num_blocks, size)[:16]
    invert(torch.eye(8, dtype=torch.float64)[None])
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(num_blocks, size, generator=generator)
    before = resident("VmRSS")
    if name == "published":
        fisher = published.WoodburyFisher(num_blocks, size, 16, DAMP)
        for gradient in gradients:
            fisher.add(gradient)
        published.eliminate(weights, fisher.inverse)
    else:
        ours, target = make_fisher(num_blocks, size)
        ours.add(target, StoredGradients(gradients))
        ours.count += len(gradients)
        damp = damp_of(ours, target)
        kept = []
        for start in range(0, num_blocks, CHUNK):
            blocks = slice(start, start + CHUNK)
            part = eliminate(weights[blocks].double(), invert(ours.damped(target, blocks, damp)))
            kept.append((part.order.short(), part.losses.float()))
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def tiny_vit() -> ViTForImageClassification:
    """ViT-Ti/16 at 224, random weights."""
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000)
    ).eval()


def batches(examples: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(batch_size, 3, 224, 224, generator=generator),
            "labels": torch.randint(0, 1000, (batch_size,), generator=generator),
        }
        for _ in range(examples // batch_size)
    ]


def prune_tiny(data: list[dict[str, torch.Tensor]], num_grads: int) -> float:
    model = tiny_vit()
    config = CAPConfig(num_grads=num_grads, fisher_block_size=192)
    compressor = CAPCompressor(model, config, disable_tqdm=True)
    start = time.perf_counter()
    compressor.collect(data).prune(0.75)
    return time.perf_counter() - start


def measure_overhead(args: argparse.Namespace) -> dict[str, object]:
    data = batches(args.examples, args.batch_size)

    def bare() -> float:
        model = tiny_vit()

        def work() -> None:
            for batch in data:
                F.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"]).backward()
                model.zero_grad()

        return seconds(work)

    pairs = [(prune_tiny(data, args.examples), bare()) for _ in range(args.whole_repeats)]
    prune, forward_backward = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {
        "median_seconds": {"prune": prune, "forward_backward": forward_backward},
        "overhead": prune / forward_backward - 1,
        "seconds": pairs,
        "examples": args.examples,
    }


def measure_processes(args: argparse.Namespace) -> dict[str, object]:
    """A whole prune by two processes with one thread each against one process with one thread."""

    def prune(processes: int) -> float:
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
        command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
        # Several processes on CPUs are what accelerate starts under this name where there is no GPU.
        command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
        command += [__file__, "--prune_of", str(args.process_examples), "--batch_size", str(args.batch_size)]
        return float(run(command, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true").split()[-1])

    pairs = [(prune(1), prune(2)) for _ in range(args.whole_repeats)]
    one, two = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {"median_seconds": {"1": one, "2": two}, "speedup": one / two, "seconds": pairs}


def print_prune(examples: int, batch_size: int) -> None:
    """The child of `measure_processes`: each process takes its share of the same examples."""
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    taken = prune_tiny(batches(examples, batch_size)[rank::world], examples)
    if rank == 0:
        print(taken)


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the result there as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--whole_repeats", type=int, default=5, help="repeats of the whole prunes, minutes each")
    parser.add_argument("--examples", type=int, default=1024, help="examples of the whole prune")
    parser.add_argument("--process_examples", type=int, default=1024, help="examples with one and two processes")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--whole", action="store_true", help="time every step of the published procedure")
    parser.add_argument("--only", nargs="*", help="some of: fisher elimination memory overhead processes")
    parser.add_argument("--memory_of", choices=("ours", "published"), help=argparse.SUPPRESS)
    parser.add_argument("--prune_of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return print_memory(args.memory_of)
    if args.prune_of:
        return print_prune(args.prune_of, args.batch_size)

    torch.set_num_threads(args.threads)
    result: dict[str, object] = {"threads": args.threads, "repeats": args.repeats, "versions": versions()}
    wanted = args.only or ("fisher", "elimination", "memory", "overhead", "processes")
    if "fisher" in wanted:
        result["fisher"] = measure_fisher(args)
        result["fisher_speedup"] = result["fisher"]["speedup"]
    if "elimination" in wanted:
        each = {f"{n} x {size}": measure_elimination(n, size, args) for n, size in SHAPES}
        result["elimination"] = each
        result["elimination_speedup"] = min(value["speedup"] for value in each.values())
    if "memory" in wanted:
        result["memory"] = measure_memory(args)
        result["memory_ratio"] = result["memory"]["ratio"]
    if "overhead" in wanted:
        result["overhead"] = measure_overhead(args)
        result["overhead_over_forward_backward"] = result["overhead"]["overhead"]
    if "processes" in wanted:
        result["processes"] = measure_processes(args)
        result["two_process_speedup"] = result["processes"]["speedup"]
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
