"""`cap-hf inspect`: the targets of a checkpoint and how sparse they are."""

from dataclasses import dataclass, field
from pathlib import Path

from cap_hf.commands.arguments import DEFAULT_OUTPUT_DIR, ModelArguments, check_output, parse
from cap_hf.commands.tables import percent, table
from cap_hf.config import CAPConfig


@dataclass
class InspectArguments:
    """What to look at."""

    output_dir: str = field(default=DEFAULT_OUTPUT_DIR, metadata={"help": "Gets inspect.json."})
    include: list[str] | None = field(default=None, metadata={"help": "Only targets that match (fnmatch)."})
    exclude: list[str] | None = field(default=None, metadata={"help": "No targets that match (fnmatch)."})
    fisher_block_size: str = field(default="row", metadata={"help": "Show the blocks that this would give."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, args = parse(
        argv, "inspect", "Show the targets of a checkpoint and how sparse they are.", ModelArguments, InspectArguments
    )
    config = CAPConfig(fisher_block_size=args.fisher_block_size)
    check_output(args.output_dir, overwrite=True)
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.atomic import write_json
    from cap_hf.checkpoints.loading import local_folder

    folder = local_folder(
        model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.token
    )
    report = examine(folder, model_args.trust_remote_code, config.fisher_block_size, args.include, args.exclude)
    report = {"model_name_or_path": model_args.model_name_or_path} | report
    write_json(Path(args.output_dir) / "inspect.json", report)
    show(report)


def examine(
    folder: Path,
    trust_remote_code: bool = False,
    block_size: int | str = "row",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
) -> dict:
    """Return what inspect.json says of a checkpoint, but for its name.

    Args:
        folder: of the checkpoint, plain or compressed.
        trust_remote_code: run the code that it brings along.
        block_size: of the blocks that are shown.
        include: only targets that match one of these.
        exclude: no targets that match one of these.

    Raises:
        CAPError: it cannot be loaded, or has no target.
    """
    from cap_hf.checkpoints.folder import read_report
    from cap_hf.checkpoints.loading import check_folder, load_checkpoint
    from cap_hf.checkpoints.quantized import dequantize
    from cap_hf.checkpoints.weights import measure
    from cap_hf.errors import CAPError, reason
    from cap_hf.inference.example import make_example, size_of
    from cap_hf.inference.positions import count_positions
    from cap_hf.masks import describe_masks, differing_layers, find_pattern, take_masks
    from cap_hf.targets import find_targets, left_alone

    files, stated = check_folder(folder, trust_remote_code), read_report(folder)
    int8 = files.have_int8
    dense_bytes, compressed_bytes = measure(folder)
    model = load_checkpoint(folder, trust_remote_code, "float32")
    quantization = dequantize(model)
    targets = find_targets(model, block_size, include, exclude)
    left = left_alone(model, targets)
    masks = take_masks(targets)
    layers = describe_masks(targets)
    for layer, target in zip(layers, targets, strict=True):
        pattern = find_pattern(target, masks[target.name], rounded=int8)
        layer |= {"block_size": target.block_size, "pattern": str(pattern) if pattern else None}
    image_size, uncounted = None, None
    try:
        example = make_example(model)
        positions = count_positions(model, targets, example)
        image_size = size_of(model, example)
        for layer in layers:
            layer["multiply_adds"] = positions[layer["name"]] * layer["num_weights"]
            layer["kept_multiply_adds"] = positions[layer["name"]] * (layer["num_weights"] - layer["num_zeros"])
    except CAPError as error:  # what the weights are can be told without running the model
        uncounted = reason(error)
    weights, zeros = (sum(layer[key] for layer in layers) for key in ("num_weights", "num_zeros"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    differing = differing_layers(find_targets(model), stated, rounded=int8)
    return {
        "architecture": type(model).__name__,
        "num_parameters": parameters,
        "num_weights": weights,
        "num_zeros": zeros,
        "sparsity": zeros / weights,
        "image_size": image_size,
        "multiply_adds": None if uncounted else sum(layer["multiply_adds"] for layer in layers),
        "kept_multiply_adds": None if uncounted else sum(layer["kept_multiply_adds"] for layer in layers),
        "multiply_adds_uncounted": uncounted,
        "quantization": quantization,
        "compressed": files.compressed,
        "int8": int8,
        "file_bytes": files.num_bytes,
        "dense_bytes": dense_bytes,
        "compressed_bytes": compressed_bytes,
        "digests_checked": files.have_digests,
        "layers_unlike_report": differing,
        "layers": layers,
        "left_alone": left,
    }


def show(report: dict) -> None:
    """Print what `examine` returns."""
    from cap_hf.targets import summarize

    layers, left, differing = report["layers"], report["left_alone"], report["layers_unlike_report"]
    dense_bytes, compressed_bytes = report["dense_bytes"], report["compressed_bytes"]
    rows = [
        [
            layer["name"],
            "x".join(map(str, layer["shape"])),
            str(layer["block_size"]),
            percent(layer["num_zeros"] / layer["num_weights"]),
            percent(4 * layer["zero_blocks"]["1x4"] / layer["num_weights"]) if "1x4" in layer["zero_blocks"] else "-",
            layer["pattern"] or "-",
        ]
        for layer in layers
    ]
    print(table(["target", "shape", "block", "sparsity %", "whole 1x4 %", "pattern"], rows))
    print(
        f"\n{report['architecture']}: {len(layers)} targets with {report['num_weights']:,} of "
        f"{report['num_parameters']:,} parameters, {percent(report['sparsity'])} % of them 0"
    )
    if report["multiply_adds_uncounted"]:
        print(f"Their multiply-adds were not counted: {report['multiply_adds_uncounted']}")
    else:
        print(
            f"Of an image of {'x'.join(map(str, report['image_size']))} they take {report['kept_multiply_adds']:,} "
            f"multiply-adds, {percent(report['kept_multiply_adds'] / report['multiply_adds'])} % of the "
            f"{report['multiply_adds']:,} of dense ones"
        )
    for reason in dict.fromkeys(left.values()):
        print(f"Left alone: {summarize([name for name in left if left[name] == reason], 3)} ({reason})")
    if report["quantization"]:
        print(f"Its weights are quantised with {report['quantization']}; what is 0 is what they stand for")
    int8 = report["int8"]
    form = "compressed, in int8" if int8 else "compressed" if report["compressed"] else "plain"
    print(
        f"Weights take {report['file_bytes']:,} bytes, {form}: "
        f"{dense_bytes:,} dense, {compressed_bytes:,} compressed{' in floats' if int8 else ''} "
        f"({percent(compressed_bytes / dense_bytes)} %)"
    )
    if int8:
        print(
            "After `import cap_hf`, from_pretrained makes floats of the int8 weights; "
            "SparseAutoModel.from_pretrained(..., runtime='int8') computes with them as they are"
        )
    if report["digests_checked"]:
        print("The bytes of every stored tensor are those that were written")
    elif report["compressed"]:
        print("The files have no digests: whether their bytes are those that were written cannot be told")
    if differing is None:
        print("There is no report of its pruning to compare with")
    elif differing:
        print(f"The zeros are NOT those of its report in {summarize(differing)}")
    else:
        more = ", and those that rounding to int8 has made" if int8 else ""
        print(f"The zeros of every layer are those of its report{more}")
