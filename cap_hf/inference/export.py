"""Write vision models to ONNX files, with their zeros, and check these in ONNX Runtime."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from cap_hf.checkpoints.atomic import atomic_directory
from cap_hf.checkpoints.location import check_name
from cap_hf.errors import CAPError, reason
from cap_hf.extras import need
from cap_hf.inference.example import make_example
from cap_hf.inference.runtimes import need_onnxruntime
from cap_hf.models import usable_of_transformers
from cap_hf.notices import only_errors
from cap_hf.outputs import main_output
from cap_hf.towers import MainOutput, see, vision_configs

ONNX_NAME = "model.onnx"
# Of the largest output: what float32 sums in another order may differ by at the end of a model.
TOLERANCE = 1e-3
# What images are made larger by, in height and width, to find out whether their size may be free. The first is what is
# traced, since a square would be taken for a rule; the second is a multiple of nothing, and the third is another ratio.
STEPS = ((32, 64), (1, 3), (64, 0))


def export_onnx(
    model: PreTrainedModel,
    output_dir: str | Path,
    image_processor: BaseImageProcessor | None = None,
    image_size: int | Sequence[int] | None = None,
    free_size: bool = True,
) -> Path:
    """Write `model.onnx`, the config and the image processor to a folder; batches may have any size.

    Of a classifier the file gives `logits`, of a backbone `last_hidden_state`: the folder is what Optimum's classes for
    these tasks load. The file is run in ONNX Runtime and compared with the model before the folder takes its name.

    Args:
        model: a vision model, dense or pruned, in float32 on the CPU; not one that was optimised for inference.
        output_dir: replaced if it is empty or holds a checkpoint or an export and nothing else; not the folder that the
            model was loaded from.
        image_processor: that decides the size of the images, written to the folder if given; default: the size that the
            one beside the checkpoint that the model was loaded from gives, if it is on this machine.
        image_size: height and width, or one number for both, in the place of what the image processor says. Where there
            is neither, the config says it.
        free_size: take images of other sizes too, where the model does (a convolutional network, DINOv2) and ONNX
            Runtime computes the same; a file for one size may be faster.

    Returns:
        The path of the ONNX file. Large weights lie beside it, in `model.onnx.data`.

    Raises:
        CAPError: a package is missing, the model cannot be used as it is (see `cap_hf.models.usable_of_transformers`)
            or not be exported, it fails on images of this size, ONNX Runtime gives other results, or something in the
            folder would be lost.
    """
    check_name(output_dir, "a folder")
    model = usable_of_transformers(model)
    runtime = prepare(model)
    example = make_example(model, 2, image_processor, image_size)
    # The folder that the model was loaded from, if it is one, keeps its weights; a model that was made has no name.
    with atomic_directory(output_dir, model.name_or_path or None) as folder:
        write_checked(runtime, model, example, folder / ONNX_NAME, free_size)
        model.config.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
    return Path(output_dir) / ONNX_NAME


def prepare(model: PreTrainedModel) -> ModuleType:
    """Return ONNX Runtime, if a model can be exported as it is; it is in eval mode then. Errors as of `export_onnx`."""
    runtime = need_onnxruntime()
    need("onnxscript", "export")
    if {each.dtype for each in model.parameters()} != {torch.float32}:
        raise CAPError("ONNX Runtime computes in float32: load the model with dtype='float32'")
    if {each.device.type for each in model.parameters()} != {"cpu"}:
        raise CAPError(f"{type(model).__name__} is not on the CPU, where it is exported: model.cpu()")
    model.eval()
    return runtime


def write_checked(
    runtime: ModuleType,
    model: PreTrainedModel,
    example: dict[str, torch.Tensor],
    path: Path,
    free_size: bool = False,
) -> None:
    """Write an ONNX file that gives what the model gives, of any size if asked and if the model can; else of one.

    Args:
        runtime: ONNX Runtime.
        model: as `prepare` has left it.
        example: two images or more, as 1 would be taken for fixed.
        path: of the file.
        free_size: try height and width that are free, before those of the example.

    Raises:
        CAPError: as of `export_onnx`.
    """
    pixels = example["pixel_values"]
    with torch.inference_mode():
        name, _ = main_output(see(model, example))
    if set(example) != {"pixel_values"}:
        raise CAPError(
            f"{type(model).__name__} takes {' and '.join(example)}, of shapes that differ from image to image: that "
            "has no ONNX form"
        )
    others = other_sizes(model, pixels) if free_size else []
    if others:
        # The exporter fails where a model asks for the size of an image; or what it writes is right for one only.
        with contextlib.suppress(Exception):
            write_onnx(model, others[0], path, name, {0: "batch_size", 2: "height", 3: "width"})
            check_onnx(runtime, model, path, [pixels, *others, others[0][:1]])
            return
        for written in path.parent.glob(f"{path.name}*"):
            written.unlink()
    try:
        write_onnx(model, pixels, path, name, {0: "batch_size"})
    except Exception as error:  # whatever the exporter meets in a model
        raise CAPError(f"{type(model).__name__} cannot be exported to ONNX: {reason(error)}") from error
    check_onnx(runtime, model, path, [pixels, pixels[:1], torch.cat([pixels, -pixels[:1]])])


def other_sizes(model: PreTrainedModel, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return random images of other sizes than these; none where the model takes one size, or sizes are hard to free.

    What attention is limited to a window by, the exporter takes minutes to follow, and ONNX Runtime refuses then.
    """
    if any(getattr(config, "window_size", None) for config in vision_configs(model)):
        return []
    found = []
    for high, wide in STEPS:
        height, width = pixels.shape[-2] + high, pixels.shape[-1] + wide
        images = torch.randn(*pixels.shape[:2], height, width, generator=torch.Generator().manual_seed(1))
        try:
            with torch.inference_mode():
                see(model, {"pixel_values": images})
        except Exception:  # it does not take this size
            return []
        found.append(images)
    return found


def write_onnx(model: PreTrainedModel, example: torch.Tensor, path: Path, name: str, free: dict[int, str]) -> None:
    """Export a model whose output has a name, with names for those dimensions of the example that may have any size."""
    with quiet_exporter(), eager_attention(model):
        torch.onnx.export(
            MainOutput(model),
            (example,),
            path,
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=[name],
            dynamic_shapes={"pixel_values": free},
        )


@contextlib.contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute a model's attention in single steps: the exporter cannot take Swin's fused attention apart."""
    before = getattr(model.config, "_attn_implementation", None)
    if before in (None, "eager"):
        yield
        return
    # Of a config that has a part for text, whose tower is not there, transformers would warn each time.
    with only_errors():
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        with only_errors():
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


def check_onnx(runtime: ModuleType, model: PreTrainedModel, path: Path, batches: Sequence[torch.Tensor]) -> None:
    """Raise a CAPError if ONNX Runtime and the model differ on one of some batches `(b, channels, height, width)`."""
    options = runtime.SessionOptions()
    # What it refuses is an exception, whose words it would also print.
    options.log_severity_level = 4
    for batch in batches:
        size = f"{len(batch)} images of {batch.shape[-2]} x {batch.shape[-1]}"
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {"pixel_values": batch.numpy()})
        except Exception as error:  # the runtime has classes of its own
            raise CAPError(f"ONNX Runtime cannot run {size}: {reason(error)}") from error
        with torch.inference_mode():
            expected = MainOutput(model)(batch)
        difference = (torch.from_numpy(found) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise CAPError(f"ONNX Runtime's results differ by {difference:.3g} on {size}: not written")
