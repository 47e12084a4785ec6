"""Save models, plain or compressed, so that a final name never holds half of one."""

from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from cap_hf.checkpoints.atomic import atomic_directory, write_json
from cap_hf.checkpoints.compressing import int8_names, write_compressed
from cap_hf.checkpoints.folder import MODEL_CONFIG_NAME, REPORT_NAME, copy_file, read_json
from cap_hf.checkpoints.form import StoredForm, stored_in
from cap_hf.checkpoints.location import check_name
from cap_hf.checkpoints.places import check_space
from cap_hf.checkpoints.weights import count_bytes
from cap_hf.config import CAPConfig
from cap_hf.errors import CAPError

# Of the tensors in one file; transformers' own default.
SHARD_SIZE = "50GB"


def save_checkpoint(
    directory: str | Path,
    model: PreTrainedModel,
    config: CAPConfig | None = None,
    report: dict | None = None,
    image_processor: BaseImageProcessor | None = None,
    compressed: bool | str = False,
    companions: Sequence[Path] = (),
    form: StoredForm | None = None,
) -> None:
    """Save a model as safetensors with what belongs to it, atomically; another checkpoint there is replaced.

    Args:
        directory: where to.
        model: what `from_pretrained` will load.
        config: written as `cap_config.json`.
        report: written as `report.json`.
        image_processor: saved beside the model.
        compressed: store only what is non-zero; then `import cap_hf` is needed before `from_pretrained`. 'int8': round
            the weights of sparse Linear layers too, with a scale per row.
        companions: files to copy beside the model, such as its tokenizer's, see `find_companions`.
        form: the dtype and the size of the files; None for the model's dtype and transformers' size.

    Raises:
        CAPError: there is too little space, the folder cannot be written or holds something else than a checkpoint,
            the model cannot be compressed, or a companion is a link out of its folder or is called JSON and is none.
    """
    check_name(directory, "a folder")
    if compressed not in (False, True, "int8"):
        raise CAPError(f"compressed is {compressed!r}, and may be False, True or 'int8'")
    check_shared(model)
    form = form or StoredForm()
    with stored_in(model, form.dtype):
        if not compressed:
            # Before a folder is made that the other would be in.
            check_space(Path(directory), count_bytes(model.state_dict()))
        with atomic_directory(directory) as folder:
            for path in companions:
                copy_file(path, path.parent, folder)
            if compressed:
                save_compressed(model, folder, form.max_shard_size or SHARD_SIZE, compressed == "int8")
            else:
                model.save_pretrained(folder, max_shard_size=form.max_shard_size or SHARD_SIZE)
            if image_processor is not None:
                image_processor.save_pretrained(folder)
            if config is not None:
                config.save(folder)
            if report is not None:
                write_json(folder / REPORT_NAME, report)


def check_shared(model: PreTrainedModel) -> None:
    """Raise a CAPError if parts of a model share a weight in a way that `save_pretrained` cannot write down.

    `from_pretrained` could not tie them again: a model may share what its class says it ties, and nothing else.
    """
    state = saved_state(model)
    try:
        remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        users: dict[int, list[str]] = {}
        for name, tensor in state.items():
            users.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        first, second, *_ = next(names for names in users.values() if len(names) > 1)
        raise CAPError(
            f"{first} and {second} are one weight, which {type(model).__name__} does not say of them, so that "
            "from_pretrained could not load what is saved: give each layer a weight of its own, such as with "
            "copy.deepcopy(layer)"
        ) from error


def saved_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the tensors that `save_pretrained` saves of a model, those that its class ties several times."""
    ignored = model._keys_to_ignore_on_save or ()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}


def save_compressed(
    model: PreTrainedModel, folder: Path, max_shard_size: int | str = SHARD_SIZE, int8: bool = False
) -> None:
    """Write what `model.save_pretrained` writes, the weights compressed; no dense file is ever there.

    Args:
        model: of transformers; on any device, its weights in memory.
        folder: that exists.
        max_shard_size: of the tensors in one file, before they are compressed.
        int8: round the sparse weights of Linear layers to int8.

    Raises:
        CAPError: the model is quantized, or a part of it is offloaded to the disk; for int8, as `compress_checkpoint`.
    """
    state = saved_state(model)
    if any(tensor.is_meta for tensor in state.values()):
        raise CAPError("a part of the model is offloaded to the disk: load it into memory to save it compressed")
    # Without weights this writes all that belongs to them: the config, and code that the checkpoint brought along.
    model.save_pretrained(folder, state_dict={})
    # What save_pretrained does to a state dict before it writes it (transformers 5.20 to 5.23).
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    write_compressed(
        [(names, lambda name: state[name].detach().cpu()) for names in split.filename_to_tensors.values()],
        read_json(folder / MODEL_CONFIG_NAME),
        folder,
        type(model).__name__,
        int8_names(model) if int8 else None,
    )
