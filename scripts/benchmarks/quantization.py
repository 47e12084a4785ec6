"""Accuracy of a dense and of pruned checkpoints in float32, with int8 weights, and with int8 weights and activations.

    python scripts/benchmarks/quantization.py --json quantization.json --dataset_name D \
        --model_name_or_path dense pruned/sparsity-0.75 pruned/sparsity-0.9

Also checked: that no zero is lost. Needs `pip install 'cap_hf[quantization]'`.
"""

import argparse
import logging
from pathlib import Path

import transformers
from accelerate import Accelerator

from cap_hf.checkpoints.atomic import write_json
from cap_hf.commands.arguments import ModelArguments
from cap_hf.commands.common import eval_dataset, load_all
from cap_hf.commands.tables import percent, table
from cap_hf.data.arguments import DataArguments
from cap_hf.data.evaluation import evaluate_model
from cap_hf.data.images import make_dataloader
from cap_hf.inference.quantization import count_zeros, lost_zeros, quantize_int8
from cap_hf.report import versions


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
    results = []
    for name in args.model_name_or_path:
        model, image_processor, splits = load_all(ModelArguments(name), data, 42, ["eval"])
        loader = make_dataloader(eval_dataset(splits, image_processor, model, data), args.batch_size, 0)
        forms = {
            "float32": lambda model=model: model.eval(),
            "int8 weights": lambda model=model: quantize_int8(model),
            "int8 weights and activations": lambda model=model: quantize_int8(model, activations=True),
        }
        for form, make in forms.items():
            made = make()
            counts = count_zeros(made).values()
            metrics = evaluate_model(made, accelerator.prepare(loader), accelerator, disable_tqdm=True)
            results.append(
                {
                    "model": name,
                    "form": form,
                    "sparsity": sum(zeros for zeros, _ in counts) / sum(weights for _, weights in counts),
                    "layers_that_lost_zeros": lost_zeros(model, made),
                    **metrics,
                }
            )
            print(f"{name}, {form}: top-1 {percent(metrics['top1'])} %", flush=True)
    write_json(args.json, {"results": results, "dataset_name": args.dataset_name, "versions": versions()})
    rows = [
        [each["model"], each["form"], percent(each["sparsity"]), percent(each["top1"]), f"{each['loss']:.4f}"]
        for each in results
    ]
    print(table(["model", "form", "zeros %", "top-1 %", "loss"], rows))


if __name__ == "__main__":
    main()
