"""`cap-hf compress`: a checkpoint in as few bytes as its zeros allow, bit for bit or rounded to int8."""

from dataclasses import dataclass, field
from pathlib import Path

from cap_hf.commands.arguments import ModelArguments, check_output, parse
from cap_hf.commands.tables import percent

DTYPES = ("float", "int8")


@dataclass
class CompressArguments:
    """Where the compressed checkpoint goes, and whether its weights are rounded."""

    dtype: str = field(
        default="float",
        metadata={
            "help": "float keeps every bit; int8 rounds the weights of sparse Linear layers, with a scale per row.",
            "choices": DTYPES,
        },
    )
    output_dir: str = field(default="compressed", metadata={"help": "Gets the compressed checkpoint."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the folder if it is there."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, args = parse(
        argv, "compress", "Store a pruned checkpoint in few bytes.", ModelArguments, CompressArguments
    )
    output = Path(args.output_dir)
    check_output(output, args.overwrite_output_dir)
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.compressing import compress_checkpoint
    from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, read_json
    from cap_hf.checkpoints.loading import check_names, local_folder
    from cap_hf.checkpoints.weights import count_negative_zeros, find_weight_files

    source = local_folder(
        model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.token
    )
    int8 = args.dtype == "int8"
    # For int8 the model has to be known, and is checked there.
    if not int8 and "quantization_config" not in read_json(source / MODEL_CONFIG_NAME):
        check_names(source, model_args.trust_remote_code)
    compress_checkpoint(source, output, int8, model_args.trust_remote_code)
    before, after = find_weight_files(source).num_bytes, find_weight_files(output).num_bytes
    print(
        f"{output}: {after:,} bytes of weights, {percent(after / before)} % of {before:,}; "
        "load it with `import cap_hf` and from_pretrained"
    )
    if int8:
        print(
            "Weights were rounded, so evaluate it; SparseAutoModel.from_pretrained(..., runtime='int8') computes with "
            "the int8 weights as they are stored"
        )
    if negative := count_negative_zeros(output):
        print(
            f"{negative:,} zeros are -0.0, as multiplying weights with a mask of 0 and 1 makes them; these are stored "
            "like any other value: set `weight[weight == 0] = 0` before saving to store fewer bytes"
        )
