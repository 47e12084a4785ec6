"""`cap-hf finetune --push_to_hub`: the recovered checkpoint is published, and nothing else.

The Trainer's own push would publish what lies in its folder: a pickle of its arguments with the paths of this machine,
while it trains and afterwards. So the push is taken out of its hands.
"""

from pathlib import Path

from transformers.trainer_utils import HubStrategy

from cap_hf.errors import CAPError
from cap_hf.extras import need
from cap_hf.hub.publish import open_repository, push_to_hub
from cap_hf.recovery.training_arguments import SparseTrainingArguments

# The others publish the Trainer's checkpoints. EVERY_SAVE is the Trainer's default, so it may not have been asked for.
AT_THE_END = (HubStrategy.END, HubStrategy.EVERY_SAVE)


def open_push(args: SparseTrainingArguments) -> str | None:
    """Return the repository that a run will be pushed to, made ready, or None; from here on the Trainer pushes nothing.

    Raises:
        CAPError: a package is missing, the strategy publishes what is private, or the Hub refuses. It is said before
            the hours of training.
    """
    if not args.push_to_hub:
        return None
    strategy = HubStrategy(args.hub_strategy)
    if strategy not in AT_THE_END:
        raise CAPError(
            f"--hub_strategy {strategy.value} would publish the Trainer's checkpoints, which hold pickles and paths of "
            "this machine: leave it out, and the recovered checkpoint is pushed at the end"
        )
    if args.hub_always_push:
        raise CAPError("--hub_always_push has nothing to push while it trains: leave it out")
    need("matplotlib", "plots")
    args.push_to_hub = False
    if args.process_index != 0:
        return args.hub_model_id
    return open_repository(str(args.hub_model_id), args.hub_private_repo, args.hub_token)


def push(folder: Path, repo_id: str, args: SparseTrainingArguments, trust_remote_code: bool = False) -> str:
    """Publish the recovered checkpoint as `push_to_hub` does; return the address of the commit.

    Raises:
        CAPError: the Hub refuses; it says where the checkpoint is.
    """
    try:
        return push_to_hub(
            folder,
            repo_id,
            private=args.hub_private_repo,
            revision=args.hub_revision,
            token=args.hub_token,
            trust_remote_code=trust_remote_code,
        )
    except CAPError as error:
        raise CAPError(f"the checkpoint is in {folder}, but was not pushed: {error}") from error
