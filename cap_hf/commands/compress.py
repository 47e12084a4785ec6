"""`cap-hf compress`: a checkpoint in as few bytes as its zeros allow."""

from dataclasses import dataclass, field
from pathlib import Path

from cap_hf.commands.arguments import ModelArguments, check_output, parse
from cap_hf.commands.tables import percent


@dataclass
class CompressArguments:
    """Where the compressed checkpoint goes."""

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
    from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, read_json
    from cap_hf.checkpoints.loading import check_names, local_folder
    from cap_hf.checkpoints.saving import compress_checkpoint
    from cap_hf.checkpoints.weights import count_negative_zeros, find_weight_files

    source = local_folder(
        model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.token
    )
    if "quantization_config" not in read_json(source / MODEL_CONFIG_NAME):
        check_names(source, model_args.trust_remote_code)
    compress_checkpoint(source, output)
    before, after = find_weight_files(source).num_bytes, find_weight_files(output).num_bytes
    print(
        f"{output}: {after:,} bytes of weights, {percent(after / before)} % of {before:,}; "
        "load it with `import cap_hf` and from_pretrained"
    )
    if negative := count_negative_zeros(output):
        print(
            f"{negative:,} zeros are -0.0, as multiplying weights with a mask of 0 and 1 makes them; these are stored "
            "like any other value: set `weight[weight == 0] = 0` before saving to store fewer bytes"
        )
