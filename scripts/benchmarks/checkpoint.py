"""Measure compressed checkpoints: packing and unpacking in bytes of dense tensors per second, and `from_pretrained`
of a pruned ViT-B, plain against compressed, from a cold and from a warm page cache.

    python scripts/benchmarks/checkpoint.py --json checkpoint.json

Each loading is in a new process that begins with everything imported, plain and compressed in turn. Cold: just before,
the files are written back and their pages dropped (fsync, posix_fadvise DONTNEED), which needs no rights; how much was
then read from the disk is in the report. Warm: the files are read to their end first. PyTorch maps a plain file into
memory and reads most of it when a weight is first used, so the first forward pass of one image is timed as well.
Wall time counts what else the machine does, so CPU seconds are given too.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from results import Results
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from cap_hf import find_targets
from cap_hf.checkpoints.compressing import compress_checkpoint
from cap_hf.checkpoints.compression import pack, unpack
from cap_hf.checkpoints.weights import find_weight_files


def load(folder: Path) -> dict[str, float]:
    """Return the times of `from_pretrained` and a first forward pass in this process."""
    logging.disable_progress_bar()
    start = counters()
    model = AutoModelForImageClassification.from_pretrained(folder)
    loaded = counters()
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    used = counters()
    result = {name: loaded[name] - start[name] for name in start}
    result |= {f"{name}_with_forward": used[name] - start[name] for name in start}
    return result | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def counters() -> dict[str, float]:
    """Return times, and what this process has caused to be read from the disk (where the system, Linux, tells)."""
    result = {"wall_seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
    with suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        result["bytes_from_disk"] = int(dict(line.split(": ") for line in lines)["read_bytes"])
    return result


def prune(tensor: torch.Tensor, form: str) -> torch.Tensor:
    """Return a tensor with zeros where the magnitudes are smallest: a share of them, or N:M."""
    if ":" in form:
        n, m = map(int, form.split(":"))
        groups = tensor.reshape(-1, m).clone()
        return groups.scatter_(1, groups.abs().argsort(dim=1)[:, : m - n], 0.0).view(tensor.shape)
    kept = tensor.abs() > tensor.abs().flatten().kthvalue(int(float(form) * tensor.numel())).values
    # A product would turn negative weights into -0.0, which is kept bit for bit.
    return torch.where(kept, tensor, 0.0)


def throughput(form: str, dtype: torch.dtype, threads: int, repeats: int, results: Results) -> dict:
    """Return GB of dense tensors per second, median; `threads` tensors of the size of ViT-B's MLP at a time."""
    results.measuring(f"{form} {dtype}")
    tensors = [prune(torch.randn(3072, 768), form).to(dtype) for _ in range(2 * threads)]
    packed = [pack(tensor) for tensor in tensors]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    result = {"form": form, "dtype": str(dtype), "threads": threads}
    stored = sum(part.numel() * part.element_size() for parts in packed for part in parts.values())
    result["compressed_share"] = stored / size
    with ThreadPoolExecutor(threads) as pool:
        for name, action, items in (("pack", pack, tensors), ("unpack", unpack, packed)):
            walls, cpus = [], []
            for _ in range(repeats):
                wall, cpu = time.perf_counter(), time.process_time()
                list(pool.map(action, items))
                walls.append(time.perf_counter() - wall)
                cpus.append(time.process_time() - cpu)
                results.advance()
            result[f"{name}_gb_per_second"] = size / 1e9 / statistics.median(walls)
            result[f"{name}_gb_per_cpu_second"] = size / 1e9 / statistics.median(cpus)
    return result


def drop_pages(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_pages(folder: Path) -> None:
    """Bring the files of a folder into the page cache."""
    for path in folder.iterdir():
        path.read_bytes()


def spread(runs: list[dict], key: str) -> list[float]:
    """Return median, least and most."""
    values = [run[key] for run in runs]
    return [statistics.median(values), min(values), max(values)]


def new_process_loads(folder: Path) -> dict[str, float]:
    """Return what `load` measures in a process of its own."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(load, (folder,))


def loading(folder: Path, sparsities: list[str], repeats: int, results: Results) -> None:
    """Measure `from_pretrained` of a ViT-B, plain and compressed; ratios are compressed / plain."""
    for sparsity in sparsities:
        results.measuring(f"making a ViT-B, {sparsity} sparse")
        model = ViTForImageClassification(ViTConfig(num_labels=1000))
        for target in find_targets(model):
            target.weight.data = prune(target.weight.data, sparsity)
        folders = {"plain": folder / f"plain-{sparsity}", "compressed": folder / f"compressed-{sparsity}"}
        model.save_pretrained(folders["plain"])
        del model
        start = time.perf_counter()
        compress_checkpoint(folders["plain"], folders["compressed"])
        seconds = time.perf_counter() - start
        row = {"sparsity": sparsity, "compress_checkpoint_seconds": seconds}
        row["file_bytes"] = {name: find_weight_files(path).num_bytes for name, path in folders.items()}
        for cache, prepare in (("cold", drop_pages), ("warm", read_pages)):
            runs: dict[str, list[dict]] = {name: [] for name in folders}
            results.measuring(f"loading {sparsity}, {cache}")
            for _ in range(repeats):
                for name, path in folders.items():
                    prepare(path)
                    runs[name].append(new_process_loads(path))
                    results.advance()
            row[cache] = {name: {key: spread(runs[name], key) for key in runs[name][0]} for name in folders}
            # Of neighbours in time, so that what else the machine does hits both.
            for key in ("wall_seconds", "wall_seconds_with_forward", "cpu_seconds"):
                ratios = [{key: b[key] / a[key]} for a, b in zip(runs["plain"], runs["compressed"], strict=True)]
                row[cache][f"ratio_of_{key}"] = spread(ratios, key)
        results.add(row, "loading")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="gets the figures")
    parser.add_argument("--forms", nargs="*", default=["0.5", "0.75", "0.9", "2:4", "1:4"])
    parser.add_argument("--sparsities", nargs="*", default=["0.75", "0.9"], help="of the loaded ViT-B")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that pack at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=None, help="where the checkpoints are written and read")
    args = parser.parse_args()
    torch.manual_seed(0)
    # New processes are forked from one that has imported these, so imports are not timed.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["cap_hf", "transformers.models.vit.modeling_vit"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = [(dtype, form) for dtype in (torch.float32, torch.bfloat16, torch.float16) for form in args.forms]
    runs = args.repeats * (2 * len(cases) + 4 * len(args.sparsities))
    with Results(args, runs) as results, tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for dtype, form in cases:
            results.add(throughput(form, dtype, args.threads, args.repeats, results), "throughput")
        torch.set_num_threads(threads)
        loading(Path(folder), args.sparsities, args.repeats, results)


if __name__ == "__main__":
    main()
