"""Write vision models to ONNX files, with their zeros, and check these in ONNX Runtime."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.checkpoints.atomic import atomic_directory
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.inference.optimize import make_example
from cap_hf.models import usable_of_transformers
from cap_hf.outputs import main_output
from cap_hf.towers import MainOutput, see

ONNX_NAME = "model.onnx"
# Of the largest output: what float32 sums in another order may differ by at the end of a model.
TOLERANCE = 1e-3


def export_onnx(
    model: PreTrainedModel, output_dir: str | Path, image_processor: BaseImageProcessor | None = None
) -> Path:
    """Write `model.onnx`, the config and the image processor to a folder; batches may have any size.

    Of a classifier the file gives `logits`, of a backbone `last_hidden_state`: the folder is what Optimum's classes for
    these tasks load. The file is run in ONNX Runtime and compared with the model before the folder takes its name.

    Args:
        model: a vision model, dense or pruned, in float32; not one that was optimised for inference.
        output_dir: replaced if it exists.
        image_processor: written to the folder if given.

    Returns:
        The path of the ONNX file. Large weights lie beside it, in `model.onnx.data`.

    Raises:
        CAPError: a package is missing, the model cannot be used as it is or not be exported, or ONNX Runtime gives
            other results.
    """
    runtime = need("onnxruntime", "export")
    need("onnxscript", "export")
    model = usable_of_transformers(model)
    if model.dtype == torch.bfloat16:
        raise CAPError("ONNX Runtime computes in float32: load the model with dtype='float32'")
    model.eval()
    example = make_example(model, batch_size=2)["pixel_values"]
    with atomic_directory(output_dir) as folder:
        try:
            write_onnx(model, example, folder / ONNX_NAME)
        except Exception as error:  # whatever the exporter meets in a model
            raise CAPError(f"{type(model).__name__} cannot be exported to ONNX: {reason(error)}") from error
        check_onnx(runtime, model, folder / ONNX_NAME, example)
        model.config.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
    return Path(output_dir) / ONNX_NAME


def write_onnx(model: PreTrainedModel, example: torch.Tensor, path: Path) -> None:
    """Export with a batch dimension of any size; `example` has at least two images, as 1 would be taken for fixed."""
    with torch.inference_mode():
        name, _ = main_output(see(model, {"pixel_values": example}))
    with quiet_exporter(), eager_attention(model):
        torch.onnx.export(
            MainOutput(model),
            (example,),
            path,
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=[name],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch_size")}},
        )


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute a model's attention in single steps: the exporter cannot take Swin's fused attention apart."""
    before = getattr(model.config, "_attn_implementation", None)
    if before in (None, "eager"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's progress on stdout and its warnings, such as that there is no torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def check_onnx(runtime: ModuleType, model: PreTrainedModel, path: Path, example: torch.Tensor) -> None:
    """Raise a CAPError if ONNX Runtime and the model differ, on a batch of the example's size or another."""
    for batch in (example, example[:1], torch.cat([example, -example[:1]])):
        try:
            session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {"pixel_values": batch.numpy()})
        except Exception as error:  # the runtime has classes of its own
            raise CAPError(f"ONNX Runtime cannot run a batch of {len(batch)}: {reason(error)}") from error
        with torch.inference_mode():
            expected = MainOutput(model)(batch)
        difference = (torch.from_numpy(found) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise CAPError(f"ONNX Runtime's results differ by {difference:.3g} on a batch of {len(batch)}: not written")
