"""Makes `from_pretrained` load compressed checkpoints; importing this module registers it with transformers.

transformers calls a way of storing weights a quantization method. This one stores nothing differently but zeros, and
where that was asked for rounds weights to int8: what is loaded is a plain dense model in the dtype asked for, and
saving it again gives a plain checkpoint. Only inside `keep_int8` int8 weights stay what they are.

Loading checks that a file is whole, and compares no digests: hashing the bytes takes 13 to 17 % of the time of loading
a ViT-B. `cap-hf inspect` compares them.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cap_hf.checkpoints.compression import (
    COMPRESSED_INDEX_NAME,
    COMPRESSED_NAME,
    FORMAT_VERSION,
    INT8_FORMAT_VERSION,
    PARTS,
    QUANT_METHOD,
    SCALES,
)
from cap_hf.checkpoints.files import check_file, check_memory, digest_names
from cap_hf.checkpoints.int8 import unpack_any, unpack_int8
from cap_hf.errors import CAPError

# Makes what stands in a Linear's place, of the Linear, whose weight is on the meta device, its int8 weight
# `(rows, cols)` and its scales `(rows,)`. The bias is taken over: it is loaded by then, or will be into what is made.
Builder = Callable[[nn.Linear, torch.Tensor, torch.Tensor], nn.Module]
# Nothing in a checkpoint can set it.
BUILDER: ContextVar[Builder | None] = ContextVar("BUILDER", default=None)


@contextmanager
def keep_int8(build: Builder | None) -> Iterator[None]:
    """Let `from_pretrained` put what `build` makes in the place of each Linear whose weight is stored in int8.

    Dense floats are made of the other int8 weights: those of subclasses of Linear, those that are tied or that the
    model splits, and all of them without `build`, or where a part of the model goes to another device than the CPU.
    """
    token = BUILDER.set(build)
    try:
        yield
    finally:
        BUILDER.reset(token)


@register_quantization_config(QUANT_METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """`quantization_config` in the config.json of a compressed checkpoint.

    Args:
        weights_file: the safetensors file or its index, one of two fixed names.
        format_version: of the compressed format.
        names_digest: `digest_names` of all tensors that the files hold.

    Raises:
        CAPError: the file has another name, or a newer cap_hf wrote the checkpoint.
    """

    # Tells transformers to drop this config from the model once it is loaded.
    dequantize = True

    def __init__(
        self,
        weights_file: str = COMPRESSED_NAME,
        format_version: int = FORMAT_VERSION,
        names_digest: str = "",
        **_: Any,
    ) -> None:
        if weights_file not in (COMPRESSED_NAME, COMPRESSED_INDEX_NAME):
            raise CAPError(f"config.json names the compressed weights {weights_file!r}, not {COMPRESSED_NAME!r}")
        if format_version not in (FORMAT_VERSION, INT8_FORMAT_VERSION):
            raise CAPError(f"the checkpoint has format version {format_version!r}: update cap_hf to load it")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers types its own methods only
        self.weights_file = weights_file
        self.format_version = format_version
        self.names_digest = names_digest


class Unpack(ConversionOps):
    """Puts the parts of a packed weight together; a weight that is stored dense passes through.

    Args:
        quantizer: that it is of.
        build: what to put in the place of a Linear with an int8 weight; None to make dense floats of that.
    """

    # The model's own converter may then split the weight, as that of DINOv2 splits the two halves of its SwiGLU.
    supports_many_to_many = True

    def __init__(self, quantizer: HfQuantizer, build: Builder | None = None) -> None:
        # The quantizer is not kept: transformers takes an operation that has one to cast the dtype by itself.
        self.build = build

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        parts: dict[str, dict[str, list[torch.Tensor]]] = {}
        weights = {}
        for pattern, tensors in input_dict.items():
            tensors = tensors if isinstance(tensors, list) else [tensors]
            pattern = pattern.removesuffix("$")
            base, _, suffix = pattern.rpartition(".")
            if suffix in PARTS:
                parts.setdefault(base, {})[suffix] = tensors
            else:
                weights[pattern] = tensors
        for base, lists in parts.items():
            if self.build is not None and SCALES in lists and self.replace_linear(lists, build=self.build, **kwargs):
                continue
            # One converter may gather the weights of many layers, each part a list in the same order.
            if base in weights or len({len(tensors) for tensors in lists.values()}) != 1:
                raise CAPError(f"{kwargs.get('full_layer_name', base)} is stored in part dense and in part compressed")
            count = len(next(iter(lists.values())))
            weights[base] = [unpack_any({part: lists[part][index] for part in lists}) for index in range(count)]
        return weights

    def replace_linear(
        self,
        lists: dict[str, list[torch.Tensor]],
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str],
        build: Builder,
        **kwargs: Any,
    ) -> bool:
        """Put what `build` makes in the place of the Linear that a weight is of; return False if it is of none.

        Args:
            lists: the parts of the weight.
            model: that is loaded.
            full_layer_name: of the weight in the model.
            missing_keys: names of all weights that the model still lacks; what is put in place is taken out.
            build: as of `keep_int8`.
        """
        path, _, name = full_layer_name.rpartition(".")
        linear = model.get_submodule(path)
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        if type(linear) is not nn.Linear or name != "weight" or full_layer_name in tied:
            return False
        quantized, scales = unpack_int8({part: tensors[0] for part, tensors in lists.items()})
        if quantized.shape != linear.weight.shape or any(len(tensors) != 1 for tensors in lists.values()):
            return False
        built = build(linear, quantized, scales)
        built._is_hf_initialized = True  # type: ignore[assignment]  # transformers fills in what is not
        model.set_submodule(path, built)
        missing_keys.discard(full_layer_name)
        return True

    @property
    def reverse_op(self) -> ConversionOps:
        return Keep()


class Keep(ConversionOps):
    """The way back: a loaded weight is saved as it is."""

    supports_many_to_many = True

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return input_dict


class Converter(WeightConverter):
    """A converter that transformers' copies of it, one for each tensor of a file, share all but the tensors with."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Converter":
        # Full copies of what never changes add up over hundreds of tensors.
        converter = copy.copy(self)
        converter.collected_tensors, converter.layer_targets = defaultdict(list), defaultdict(set)
        return converter


@register_quantizer(QUANT_METHOD)
class CompressedQuantizer(HfQuantizer):
    """Finds the compressed files, checks them, and has each weight unpacked on the device it goes to.

    Raises:
        CAPError: a file is damaged (from `from_pretrained`, before any weight is allocated).
    """

    quantization_config: CompressedConfig
    build: Builder | None = None
    # The first name is the one that a loaded weight is saved under.
    serialized_names = {"weight": ["weight", *(f"weight.{part}" for part in PARTS)]}  # noqa: RUF012

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Put the weight file's name in the place of the hint; transformers calls this before it looks for files."""
        config.transformers_weights = self.quantization_config.weights_file
        return config

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        device_map: dict[str, Any] | str | None = None,
        **kwargs: Any,
    ) -> None:
        del model.config.transformers_weights
        checkpoint_files = checkpoint_files or []
        files = [check_file(file) for file in checkpoint_files]
        # A weight that is missing or has another name would come up random, with a warning.
        names = {name for file in files for name in file.names}
        if files and digest_names(names) != self.quantization_config.names_digest:
            raise CAPError(
                f"the tensors in {checkpoint_files[0]} are not those that config.json tells of: the file is damaged"
            )
        # On other devices and on the disk there is room for weights that memory has none for.
        devices = device_map.values() if isinstance(device_map, dict) else [device_map or "cpu"]
        if {str(device) for device in devices} == {"cpu"}:
            self.build = BUILDER.get()
            kept = 0 if self.build is None else sum(file.int8_bytes for file in files)
            check_memory(sum(file.dense_bytes for file in files) - kept, (checkpoint_files or [""])[0])
        self.dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        # transformers 5.20 loads renamed weights of any pre-quantized model in the dtype of the file.
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes.get(name, parameter.dtype))

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"dequantize": Unpack}

    def get_weight_conversions(self) -> list[WeightConverter]:
        # transformers 5.21 makes its own of the two above; 5.20 makes none, and takes the first pattern that fits.
        end = "" if super().get_weight_conversions() else "$"
        return [
            Converter([f"{name}{end}", *parts], name, [Unpack(self, self.build)])
            for name, (_, *parts) in self.serialized_names.items()
        ]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
