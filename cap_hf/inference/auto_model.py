"""Load a checkpoint as a model that is optimised for inference: `SparseAutoModel`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from cap_hf.checkpoints.loading import WHERE, load_checkpoint
from cap_hf.checkpoints.processors import find_image_processor
from cap_hf.checkpoints.quantizer import keep_int8
from cap_hf.errors import CAPError
from cap_hf.inference.linear import StoredInt8Linear
from cap_hf.inference.optimize import DTYPES, optimize_for_inference

logger = logging.getLogger(__name__)


class SparseAutoModel:
    """Loads a checkpoint, plain or compressed, of whatever class, as a model that is optimised for inference."""

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        backend: str = "auto",
        example_inputs: Mapping[str, torch.Tensor] | None = None,
        image_size: int | Sequence[int] | None = None,
        runtime: str = "float32",
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Return `optimize_for_inference` of a checkpoint, in float32: a model of the class that its config names.

        Args:
            model_name_or_path: a Hub id or a folder.
            backend: as of `optimize_for_inference`.
            example_inputs: as of `optimize_for_inference`; default: one image of the size that the checkpoint's image
                processor gives.
            image_size: as of `optimize_for_inference`.
            runtime: 'float32' or 'int8', the `dtype` of `optimize_for_inference`. Weights that are stored in int8 then
                go into int8 layers as they are, and dense floats are made of none but those that stay dense.
            kwargs: passed on to transformers, such as `revision`, `token` or another `dtype`.

        Raises:
            CAPError: the checkpoint cannot be loaded or lacks weights; as of `optimize_for_inference`.
        """
        if runtime not in DTYPES:
            raise CAPError(f"runtime {runtime!r} is none of {', '.join(DTYPES)}")
        kwargs.setdefault("dtype", "float32")
        with keep_int8(StoredInt8Linear if runtime == "int8" else None):
            model = load_checkpoint(model_name_or_path, **kwargs)
        image_processor = None
        if backend == "auto" and example_inputs is None and image_size is None:
            source = {name: kwargs[name] for name in ("trust_remote_code", *WHERE) if name in kwargs}
            try:
                image_processor = find_image_processor(model_name_or_path, **source)
            except CAPError as error:
                # It need not be loaded to call the model.
                logger.warning("%s: layers are chosen for images as large as the config says", error)
        return optimize_for_inference(model, backend, example_inputs, image_processor, image_size, runtime)


class SparseModelForImageClassification(SparseAutoModel):
    """Loads an image classifier as `SparseAutoModel` does; the name that cards of earlier versions tell."""
