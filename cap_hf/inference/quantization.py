"""int8 on top of sparsity, with torchao through transformers: zeros stay zeros."""

import tempfile

import torch
from torch import nn
from transformers import PreTrainedModel, TorchAoConfig

from cap_hf.errors import CAPError
from cap_hf.extras import need
from cap_hf.inference.linear import SparseWeightLinear
from cap_hf.targets import find_targets


def quantize_int8(model: PreTrainedModel, activations: bool = False) -> PreTrainedModel:
    """A copy of a model with int8 weights in its Linear targets, one scale a row; the head and the rest stay float.

    The scales are symmetric, so that 0 is stored as 0 and comes back as exactly 0. `save_pretrained` of what comes
    back and `from_pretrained` work as for every torchao checkpoint.

    Args:
        model: dense or pruned, in float32 or half precision; not one that was optimised for inference.
        activations: also quantise what goes into these layers, one scale a token, taken anew for each input.

    Raises:
        CAPError: torchao is not installed, or the model was optimised for inference.
    """
    need("torchao", "quantization")
    if any(isinstance(module, SparseWeightLinear) for module in model.modules()):
        raise CAPError("a model that was optimised for inference cannot be quantised: load it anew")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    chosen = {target.name for target in find_targets(model) if not target.is_conv}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in chosen]
    kind = Int8DynamicActivationInt8WeightConfig if activations else Int8WeightOnlyConfig
    # By way of a folder, because transformers quantises when it loads, and then knows how to save it again.
    with tempfile.TemporaryDirectory(prefix="cap_hf-") as folder:
        model.save_pretrained(folder)
        quantized = type(model).from_pretrained(
            folder,
            dtype=model.dtype,
            quantization_config=TorchAoConfig(kind(), modules_to_not_convert=others),
        )
    return quantized.eval()


def dense_values(weight: torch.Tensor) -> torch.Tensor:
    """A weight's numbers as the model uses them, also of an int8 weight."""
    weight = weight.detach()
    return weight.dequantize() if hasattr(weight, "dequantize") and type(weight) is not torch.Tensor else weight


def count_zeros(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Zeros and weights of every target by name, of a float model or an int8 one."""
    counts = {}
    for target in find_targets(model):
        values = dense_values(target.weight)
        counts[target.name] = (int((values == 0).sum()), values.numel())
    return counts


def lost_zeros(sparse: PreTrainedModel, quantized: PreTrainedModel) -> list[str]:
    """The targets in which a weight that was 0 no longer is."""
    after = {target.name: dense_values(target.weight) for target in find_targets(quantized)}
    return [
        target.name
        for target in find_targets(sparse)
        if bool(((dense_values(target.weight) == 0) & (after[target.name] != 0)).any())
    ]
