"""What `cap-hf prune` is asked for, without a command line."""

from cap_hf import CAPConfig, Resources
from cap_hf.commands.arguments import ModelArguments, ProbeArguments
from cap_hf.commands.healing import HealArguments
from cap_hf.commands.prune_arguments import Asked, PruneArguments
from cap_hf.commands.search_arguments import SearchArguments
from cap_hf.data.arguments import DataArguments


def asked_for(folder, **changes) -> Asked:
    """Return the arguments for pruning a checkpoint for the digits to 50 and 75 %, with some of them changed."""
    parts = {
        "data": DataArguments(max_eval_samples=50),
        "prune": PruneArguments(disable_tqdm=True),
        "search": SearchArguments(),
        "heal": HealArguments(),
        "probe": ProbeArguments(knn_bank_size=30),
        "config": CAPConfig(num_grads=32, refit_examples=16),
        "resources": Resources(),
        "sparsities": [0.5, 0.75],
    }
    return Asked(model=ModelArguments(str(folder)), **(parts | changes))
