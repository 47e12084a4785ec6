"""Accuracy of a dense and of pruned checkpoints in float32, with int8 weights, and with int8 weights and activations.

    python scripts/benchmarks/quantization.py --json quantization.json --dataset_name D \
        --model_name_or_path dense pruned/sparsity-0.75 pruned/sparsity-0.9

Also checked: that no zero is lost. Needs `pip install 'cap_hf[quantization]'`.
"""

import argparse
import logging
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from results import Results
from transformers import PreTrainedModel

from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import image_dataset, load_all
from cap_hf.commands.tables import percent, table
from cap_hf.data.arguments import DataArguments
from cap_hf.data.evaluation import evaluate_model
from cap_hf.data.images import make_dataloader
from cap_hf.inference.quantization import quantize_int8
from cap_hf.targets import find_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--model_name_or_path", nargs="+", required=True, help="checkpoints, dense and pruned")
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    accelerator = Accelerator()
    data = DataArguments(dataset_name=args.dataset_name)
    forms = {
        "float32": lambda model: model.eval(),
        "int8 weights": quantize_int8,
        "int8 weights and activations": lambda model: quantize_int8(model, activations=True),
    }
    with Results(args, len(args.model_name_or_path) * len(forms)) as results:
        for name in args.model_name_or_path:
            model, image_processor, splits = load_all(ModelArguments(name), data, 42, ["eval"])
            loader = make_dataloader(
                image_dataset(splits["eval"], image_processor, model, data).need_labels(), args.batch_size, 0
            )
            for form, make in forms.items():
                results.measuring(f"{name}, {form}")
                made = make(model)
                counts = count_zeros(made).values()
                metrics = evaluate_model(made, accelerator.prepare(loader), accelerator, disable_tqdm=True)
                row = {
                    "model": name,
                    "form": form,
                    "sparsity": sum(zeros for zeros, _ in counts) / sum(weights for _, weights in counts),
                    "layers_that_lost_zeros": lost_zeros(model, made),
                }
                results.add(row | metrics)
                results.advance()
    rows = [
        [each["model"], each["form"], percent(each["sparsity"]), percent(each["top1"]), f"{each['loss']:.4f}"]
        for each in results.content["results"]
    ]
    print(table(["model", "form", "zeros %", "top-1 %", "loss"], rows))


def dense_values(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight's numbers as the model uses them, also of an int8 weight."""
    weight = weight.detach()
    return weight.dequantize() if hasattr(weight, "dequantize") and type(weight) is not torch.Tensor else weight


def count_zeros(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return how many weights of every target are 0, and how many there are, of a float model or an int8 one."""
    counts = {}
    for target in find_targets(model):
        values = dense_values(target.weight)
        counts[target.name] = (int((values == 0).sum()), values.numel())
    return counts


def lost_zeros(sparse: PreTrainedModel, quantized: PreTrainedModel) -> list[str]:
    """Return the targets in which a weight that was 0 no longer is."""
    after = {target.name: dense_values(target.weight) for target in find_targets(quantized)}
    return [
        target.name
        for target in find_targets(sparse)
        if bool(((dense_values(target.weight) == 0) & (after[target.name] != 0)).any())
    ]


if __name__ == "__main__":
    main()
