"""`cap-hf convert`: a plain checkpoint of what another library's pruning has written."""

from dataclasses import dataclass, field
from pathlib import Path

from cap_hf.commands.arguments import ModelArguments, check_output, parse


@dataclass
class ConvertArguments:
    """Where the plain checkpoint goes."""

    output_dir: str = field(default="converted", metadata={"help": "Gets the plain checkpoint."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the folder if it is there."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    description = "Make a plain checkpoint of one of compressed-tensors, or with masks of torch.nn.utils.prune or NNCF."
    model_args, args = parse(argv, "convert", description, ModelArguments, ConvertArguments)
    output = Path(args.output_dir)
    check_output(output, args.overwrite_output_dir)
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.converting import convert_checkpoint
    from cap_hf.checkpoints.loading import local_folder
    from cap_hf.commands.inspect import examine, show

    source = local_folder(
        model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.token
    )
    found = convert_checkpoint(source, output, model_args.trust_remote_code)
    show(examine(output, model_args.trust_remote_code))
    parts = [
        f"{count} {what}"
        for count, what in (
            (found.num_packed, "weights of compressed-tensors"),
            (found.num_masked, "weights and biases with masks"),
        )
        if count
    ]
    print(f"\n{output} is a plain checkpoint: {' and '.join(parts) or 'all weights were whole'}")
    if found.sections:
        print(f"Taken out of config.json: {', '.join(found.sections)}")
