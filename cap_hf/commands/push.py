"""`cap-hf push`: publish a checkpoint with a model card, in one commit."""

from dataclasses import dataclass, field
from pathlib import Path

from cap_hf.commands.arguments import ModelArguments, check_output, parse
from cap_hf.commands.tables import percent
from cap_hf.errors import CAPError


@dataclass
class PushArguments:
    """Where to, and what the card cannot know."""

    hub_model_id: str = field(default="", metadata={"help": "user/name of the repository; created if need be."})
    compressed: bool = field(default=False, metadata={"help": "Publish the weights compressed."})
    private: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    revision: str | None = field(default=None, metadata={"help": "Branch to commit to; created if need be."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str | None = field(default=None, metadata={"help": "Of the commit."})
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the dense model, for the card. Default: the report's."}
    )
    license: str | None = field(default=None, metadata={"help": "For the card. Default: the base model's."})
    dry_run: bool = field(default=False, metadata={"help": "Write the folder to --output_dir and publish nothing."})
    output_dir: str = field(default="cap_hf_push", metadata={"help": "Gets the folder of a dry run."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the folder if it is there."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, args = parse(argv, "push", "Publish a checkpoint on the Hub.", ModelArguments, PushArguments)
    if not args.hub_model_id:
        raise CAPError("say where to: --hub_model_id user/name")
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.loading import local_folder
    from cap_hf.hub.publish import prepare_folder, push_to_hub

    folder = local_folder(
        model_args.model_name_or_path, model_args.model_revision, model_args.cache_dir, model_args.token
    )
    if args.dry_run:
        output = Path(args.output_dir)
        check_output(output, args.overwrite_output_dir)
        facts = prepare_folder(
            folder,
            output,
            args.hub_model_id,
            args.compressed,
            args.base_model,
            args.license,
            model_args.trust_remote_code,
            model_args.token,
        )
        for path in sorted(path for path in output.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>14,}  {path.relative_to(output)}")
        print(f"{output} is what would be pushed to {args.hub_model_id}: sparsity {percent(facts.sparsity)} %")
        return
    address = push_to_hub(
        folder,
        args.hub_model_id,
        compressed=args.compressed,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.commit_message,
        token=model_args.token,
        base_model=args.base_model,
        license=args.license,
        trust_remote_code=model_args.trust_remote_code,
    )
    print(f"{args.hub_model_id} was pushed: {address}")
