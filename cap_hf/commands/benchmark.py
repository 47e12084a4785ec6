"""`cap-hf benchmark`: how fast a checkpoint runs, dense and sparse, side by side."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cap_hf.commands.arguments import DEFAULT_OUTPUT_DIR, ModelArguments, check_output, parse
from cap_hf.commands.tables import percent, table
from cap_hf.errors import CAPError
from cap_hf.extras import need

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cap_hf.inference.benchmark import Measurement
    from cap_hf.inference.example import Inputs

# The names in cap_hf.inference.backends.BACKENDS, whose classes need torch.
BACKENDS = (
    "dense",
    "dense_compile",
    "dense_bf16",
    "sparse",
    "sparse_int8",
    "sparse_compile",
    "sparse_int8_compile",
    "onnxruntime",
    "onnxruntime_int8",
    "openvino",
    "openvino_bf16",
    "openvino_int8",
)


@dataclass
class BenchmarkArguments:
    """What to measure."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Images per batch."})
    image_size: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Height and width of the images, or one number for both. Default: what the image processor makes, "
            "or else what the config says."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A Hub id, a folder of images or parquet files, or 'digits': int8 is calibrated on its images, and "
            "outputs are compared on them. Default: random images."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_split_name: str = field(default="train", metadata={"help": "Split to take the images from."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    num_images: int = field(default=64, metadata={"help": "Images to take from the dataset, at least 2."})
    seed: int = field(default=42, metadata={"help": "Seed of which images are taken."})
    threads: list[int] = field(default_factory=list, metadata={"help": "Numbers of threads. Default: PyTorch's."})
    backends: list[str] = field(
        default_factory=lambda: list(BACKENDS),
        metadata={"help": f"Which of {', '.join(BACKENDS)}. Default: all.", "choices": BACKENDS},
    )
    runs: int = field(default=15, metadata={"help": "Runs of each backend in each setting; they take turns."})
    max_seconds: float = field(default=60.0, metadata={"help": "End a setting earlier after this long (3 runs)."})
    output_dir: str = field(default=DEFAULT_OUTPUT_DIR, metadata={"help": "Gets benchmark.json and benchmark.png."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, args = parse(
        argv, "benchmark", "Measure how fast a checkpoint runs on the CPU.", ModelArguments, BenchmarkArguments
    )
    for name, values in (("batch_sizes", args.batch_sizes), ("threads", args.threads), ("runs", [args.runs])):
        if any(value < 1 for value in values):
            raise CAPError(f"--{name} must be at least 1")
    if len(args.image_size) > 2 or any(value < 1 for value in args.image_size):
        raise CAPError("--image_size takes one number, or two, height and width, of at least 1")
    if args.dataset_name is not None and args.image_size:
        raise CAPError("--image_size is for random images: those of a dataset are as large as the image processor says")
    if args.num_images < 2:
        raise CAPError("--num_images must be at least 2")
    measure(model_args, args)


def measure(model_args: ModelArguments, args: BenchmarkArguments) -> None:
    """Do the work, once nothing is wrong with the arguments."""
    # The picture comes last, after minutes of measuring: what draws it is asked for first.
    need("matplotlib", "plots")
    # Imported here, because the arguments are checked before these take their seconds.
    import torch
    from tqdm import tqdm

    from cap_hf.checkpoints.atomic import atomic_file, write_json
    from cap_hf.checkpoints.processors import find_image_processor
    from cap_hf.checkpoints.quantized import quantization_of
    from cap_hf.commands.common import load_model, where_to_load
    from cap_hf.inference.benchmark import benchmark, losses, winners
    from cap_hf.inference.plot import draw_benchmark
    from cap_hf.masks import target_sparsity
    from cap_hf.models import usable_of_transformers
    from cap_hf.report import versions
    from cap_hf.targets import find_targets

    check_output(args.output_dir, overwrite=True)
    threads = args.threads or [torch.get_num_threads()]
    model = load_model(model_args)
    quantization = quantization_of(model)
    if quantization is not None:
        raise CAPError(
            f"{model_args.model_name_or_path} is quantised with {quantization}, and benchmark measures models in "
            "floats: name the checkpoint that it was made from (cap-hf evaluate measures the accuracy of this one)"
        )
    model = usable_of_transformers(model)
    image_processor = None
    if not args.image_size:
        image_processor = find_image_processor(
            model_args.model_name_or_path, model_args.trust_remote_code, **where_to_load(model_args)
        )
    images = load_images(model, model_args, args)
    sparsity = target_sparsity(find_targets(model))
    with tqdm(desc="Benchmark", bar_format="{desc}: {postfix} [{elapsed}]", disable=args.disable_tqdm) as bar:
        found, missing = benchmark(
            model,
            args.backends,
            args.batch_sizes,
            threads,
            max(args.runs, 3),
            args.max_seconds,
            bar.set_postfix_str,
            image_processor=image_processor,
            image_size=args.image_size or None,
            images=images,
        )
    height, width = found[0].image_size
    lost, won = losses(found), winners(found)
    folder = Path(args.output_dir)
    report = {
        "model_name_or_path": model_args.model_name_or_path,
        "architecture": type(model).__name__,
        "sparsity": sparsity,
        "image_size": [height, width],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "measurements": [each.to_dict() for each in found],
        "not_measured": missing,
        "sparse_loses": lost,
        "fastest": won,
        "dataset_name": args.dataset_name,
        "versions": versions(),
    }
    write_json(folder / "benchmark.json", report)
    title = f"{model_args.model_name_or_path}, {percent(sparsity, 1)} % sparse, images of {height} x {width}"
    with atomic_file(folder / "benchmark.png") as path:
        draw_benchmark(found, title, path)
    print(format_table(found))
    for name, reason in missing.items():
        print(f"{name} was not measured: {reason}")
    if args.dataset_name is None and any("int8" in each.backend for each in found):
        print(
            "int8 was calibrated and outputs were compared on random images: speeds are right, differences are not "
            "those on photographs (--dataset_name)"
        )
    for line in (*lost, *won):
        print(line)
    print(f"{title} ({folder / 'benchmark.json'}, {folder / 'benchmark.png'})")


def load_images(model: "PreTrainedModel", model_args: ModelArguments, args: BenchmarkArguments) -> "Inputs | None":
    """Return images of the dataset as the model takes them, or None where no dataset is named."""
    if args.dataset_name is None:
        return None
    import datasets

    from cap_hf.commands.common import image_dataset, load_image_processor
    from cap_hf.data.arguments import DataArguments
    from cap_hf.data.images import calibration_split, collate
    from cap_hf.data.labels import find_column
    from cap_hf.data.splits import load_splits
    from cap_hf.inference.example import make_example

    data_args = DataArguments(
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        train_split_name=args.train_split_name,
        image_column_name=args.image_column_name,
    )
    image_processor = load_image_processor(model_args)
    split = load_splits(data_args, args.seed, model_args.token, ["train"], args.num_images)["train"]
    # Labels play no part, and need not be the model's.
    column = find_column(split.features, args.image_column_name, datasets.Image, "image")
    assert column is not None
    split = calibration_split(split, args.num_images, args.seed).select_columns([column])
    data_args = replace(data_args, image_column_name=column)
    batch = collate(image_dataset(split, image_processor, model, data_args).__getitems__(range(len(split))))
    return {name: batch[name] for name in make_example(model, 1, image_processor) if name in batch}


def format_table(found: "list[Measurement]") -> str:
    """Return one row per backend and setting."""
    rows = [
        [
            each.backend,
            str(each.batch_size),
            str(each.threads),
            f"{1000 * each.seconds:.1f}",
            f"{1000 * each.low_seconds:.1f}-{1000 * each.high_seconds:.1f}",
            f"{each.images_per_second:.1f}",
            f"{each.speedup:.2f}",
            f"{each.weight_bytes / 2**20:.1f}",
            f"{each.max_difference:.0e}",
            percent(each.same_top1, 1),
        ]
        for each in found
    ]
    header = [
        "backend",
        "batch",
        "threads",
        "ms",
        "quartiles",
        "images/s",
        "speedup",
        "weights MiB",
        "difference",
        "same top-1 %",
    ]
    return table(header, rows)
