"""The Trainer's own checkpoints, which a run that was killed goes on from."""

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cap_hf.errors import CAPError, reason
from cap_hf.targets import summarize


def last_whole_checkpoint(directory: str | Path) -> str | None:
    """Return the newest `checkpoint-*` that the Trainer finished, or None: it writes `trainer_state.json` last."""
    whole = [path for path in checkpoint_folders(directory) if is_whole(path)]
    return str(whole[-1]) if whole else None


def checkpoint_folders(directory: str | Path) -> list[Path]:
    """Return the folders `checkpoint-<step>` of a folder, by step; none if it does not exist."""
    found = {}
    for path in Path(directory).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def is_whole(checkpoint: Path) -> bool:
    """Return whether the Trainer finished writing a checkpoint."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def choose_checkpoint(directory: str | Path, resume: str | bool | None) -> str | None:
    """Return the checkpoint that a run goes on from, or None to begin anew.

    Args:
        directory: where the run's checkpoints are.
        resume: a checkpoint's folder; `last` or True for the newest whole one; None, False or "" for none.

    Raises:
        CAPError: there is no such checkpoint, or it is not whole.
    """
    if not resume or str(resume).lower() == "false":
        return None
    if str(resume).lower() in ("true", "last"):
        found = last_whole_checkpoint(directory)
        if found is None:
            raise CAPError(f"there is no checkpoint to resume from in {directory}")
        return found
    if not is_whole(Path(str(resume))):
        raise CAPError(f"--resume_from_checkpoint {resume} is not a whole checkpoint: name one, or use last")
    return str(resume)


def remove_checkpoints(directory: str | Path) -> None:
    """Remove an earlier run's checkpoints, so that nobody resumes from them what is another run by now."""
    for path in checkpoint_folders(directory):
        shutil.rmtree(path)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Load a checkpoint's weights into a model, in place, as `from_pretrained` reads them.

    The Trainer's own loading takes the file's names as they are. `save_pretrained` writes many models under older
    names than those of the modules, so that the Trainer of transformers 5.23 leaves their encoders as they were,
    with a warning.

    Raises:
        CAPError: the checkpoint cannot be loaded, or is another model's.
    """
    options: dict[str, Any] = {}
    # A backbone that was loaded without a pooler is saved without one.
    if getattr(model, "pooler", True) is None and "add_pooling_layer" in inspect.signature(type(model)).parameters:
        options["add_pooling_layer"] = False
    try:
        # A pair, which transformers' types do not tell of.
        pair: Any = type(model).from_pretrained(
            checkpoint, dtype=model.dtype, use_safetensors=True, output_loading_info=True, **options
        )
        loaded, info = pair
        lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
        if lost:
            raise ValueError(f"it has no weights for {summarize(lost, 3)}")
        state, own = loaded.state_dict(), model.state_dict()
        # Before load_state_dict, which would load what fits and then complain.
        other = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if other:
            raise ValueError(f"it is another model's: {summarize(other, 3)} differ")
        model.load_state_dict(state)
    except Exception as error:  # file format, names, shapes
        raise CAPError(f"{checkpoint} cannot be loaded: {reason(error)}") from error
