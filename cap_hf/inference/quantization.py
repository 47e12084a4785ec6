"""int8 on top of sparsity, with torchao through transformers: zeros stay zeros."""

from torch import nn
from transformers import PreTrainedModel, TorchAoConfig

from cap_hf.checkpoints.places import writing
from cap_hf.distributed.temporary import TemporaryFolder
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.models import usable_of_transformers
from cap_hf.targets import find_targets


def quantize_int8(model: PreTrainedModel, activations: bool = False) -> PreTrainedModel:
    """Return a copy of a model with int8 weights in its Linear targets, one scale per row; all else stays float.

    The scales are symmetric, so that 0 is stored as 0 and comes back as exactly 0. The copy's
    `save_pretrained` and `from_pretrained` work as for every torchao checkpoint.

    Args:
        model: dense or pruned, in float32 or half precision; not one that was optimised for inference.
        activations: also quantise what goes into these layers, one scale per token, found for each input anew.

    Raises:
        CAPError: torchao is not installed or fails, the model cannot be used as it is, see
            `cap_hf.models.usable_of_transformers`, or it has no Linear layer among its targets.
    """
    torchao = need("torchao.quantization", "quantization")
    model = usable_of_transformers(model)
    chosen = {target.name for target in find_targets(model) if not target.is_conv}
    if not chosen:
        raise CAPError(f"{type(model).__name__} has no Linear layer to quantise: its targets are convolutions")
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in chosen]
    kind = torchao.Int8DynamicActivationInt8WeightConfig if activations else torchao.Int8WeightOnlyConfig
    # By way of a folder, because transformers quantises when it loads, and then knows how to save it again.
    with TemporaryFolder() as folder, writing(folder):
        model.save_pretrained(folder)
        try:
            quantized = type(model).from_pretrained(
                folder,
                dtype=model.dtype,
                quantization_config=TorchAoConfig(kind(), modules_to_not_convert=others),
            )
        except Exception as error:  # whatever torchao meets in a model
            raise CAPError(f"{type(model).__name__} cannot be quantised: {reason(error)}") from error
    return quantized.eval()
