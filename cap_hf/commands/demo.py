"""`cap-hf demo`: train, prune, recover on the embedded digits, in minutes on a CPU and without a network."""

from dataclasses import asdict, dataclass, field

from cap_hf.commands.arguments import ModelArguments, check_output, parse
from cap_hf.commands.tables import percent, table
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.98)
SAVED = 0.9
METHODS = {
    "CAP": "cap",
    "OBS without correlations": "obs",
    "magnitude, global": "magnitude",
}


@dataclass
class DemoArguments:
    """Where the demo works."""

    output_dir: str = field(default="cap-hf-demo", metadata={"help": "Gets the dense and the pruned checkpoint."})
    num_train_epochs: int = field(default=30, metadata={"help": "Of the dense model."})
    num_recovery_epochs: int = field(default=3, metadata={"help": "Of the sparsest model, with the dense as teacher."})
    num_grads: int = field(default=512, metadata={"help": "Gradient samples of the Fisher."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    (args,) = parse(argv, "demo", "Train, prune, recover, evaluate, save and load a small ViT.", DemoArguments)
    demo(args)


def demo(args: DemoArguments) -> None:
    """Do the work: one dense model, every method at every sparsity, the sparsest model recovered."""
    # Imported here, because the arguments are checked before these take their seconds.
    import transformers
    from transformers.utils import logging as transformers_logging

    from cap_hf.checkpoints.atomic import check_place, write_json
    from cap_hf.checkpoints.places import real_path
    from cap_hf.checkpoints.saving import save_checkpoint
    from cap_hf.commands.common import load_image_processor, load_model
    from cap_hf.commands.digits import check_loaded, recover, train_dense
    from cap_hf.compressor import CAPCompressor
    from cap_hf.data.evaluation import evaluate_model
    from cap_hf.data.images import ImageDataset, calibration_split, make_dataloader
    from cap_hf.data.splits import load_splits
    from cap_hf.distributed.accelerator import make_accelerator
    from cap_hf.report import Phases, versions

    check_output(args.output_dir, overwrite=True)
    output = real_path(args.output_dir)
    dense_folder, saved_folder = output / "dense", output / f"sparsity-{SAVED:g}"
    recovered_folder = output / f"recovered-{SPARSITIES[-1]:g}"
    # Now, and not only after the work.
    for folder in (dense_folder, saved_folder, recovered_folder):
        check_place(folder)
    transformers_logging.disable_progress_bar()
    transformers.set_seed(args.seed)
    phases, accelerator = Phases(), make_accelerator()
    data_args = DataArguments()
    splits = load_splits(data_args, args.seed)
    if (dense_folder / "config.json").exists():
        print(f"Using the dense model of an earlier run in {dense_folder}")
    else:
        print("Training a small ViT on scikit-learn's digits ...", flush=True)
        with phases("train"):
            train_dense(dense_folder, splits["train"], data_args, args.num_train_epochs, args.seed)
    model_args = ModelArguments(model_name_or_path=str(dense_folder))
    image_processor = load_image_processor(model_args)
    dense = load_model(model_args)
    test = ImageDataset(splits["eval"], image_processor, dense.config, data_args)
    test_loader = make_dataloader(test, 64)
    with phases("evaluate dense"):
        dense_metrics = evaluate_model(dense, test_loader, accelerator)
    calibration = calibration_split(splits["train"], args.num_grads, args.seed)
    train_loader = make_dataloader(ImageDataset(calibration, image_processor, dense.config, data_args), 64)

    facts = {"data": asdict(data_args), "seed": args.seed, "dense": dense_metrics, "versions": versions()}
    accuracies: dict[str, list[float]] = {}
    reports = {}
    for label, method in METHODS.items():
        print(f"Pruning with {label} ...", flush=True)
        model = load_model(model_args)
        compressor = CAPCompressor(
            model, CAPConfig(method=method, num_grads=args.num_grads, seed=args.seed), accelerator
        )
        with phases(f"{method}: collect"):
            compressor.collect(train_loader)
        accuracies[label] = []
        for sparsity in SPARSITIES:
            with phases(f"{method}: prune {sparsity:g}"):
                report = compressor.prune(sparsity)
            metrics = evaluate_model(model, test_loader, accelerator)
            accuracies[label].append(metrics["top1"])
            reports[f"{method} {sparsity:g}"] = {"sparse": metrics, "pruning": report.to_dict()}
            if method == "cap" and sparsity == SAVED:
                sparse = facts | {"sparse": metrics, "pruning": report.to_dict()}
                save_checkpoint(saved_folder, model, compressor.config, sparse, image_processor)
                check_loaded(saved_folder, model, test_loader)
        if method == "cap":
            sparsest, config = model, compressor.config
    print(f"Recovering CAP's {100 * SPARSITIES[-1]:g} % model with the dense one as teacher ...", flush=True)
    with phases("recover"):
        dataset = ImageDataset(splits["train"], image_processor, sparsest.config, data_args)
        recover(output, sparsest, dense, dataset, args.num_recovery_epochs, args.seed)
    recovered = evaluate_model(sparsest, test_loader, accelerator)
    save_checkpoint(recovered_folder, sparsest, config, facts | {"recovered": recovered}, image_processor)
    check_loaded(recovered_folder, sparsest, test_loader)
    reports[f"cap {SPARSITIES[-1]:g} recovered"] = {"recovered": recovered}
    write_json(output / "report.json", {"dense": dense_metrics, "results": reports, "phases": phases.records})
    header = ["top-1 % at sparsity", *(f"{100 * sparsity:g} %" for sparsity in SPARSITIES)]
    rows = [["dense", *([percent(dense_metrics["top1"])] * len(SPARSITIES))]]
    rows += [[label, *map(percent, values)] for label, values in accuracies.items()]
    rows.insert(2, ["CAP, recovered", *(["-"] * (len(SPARSITIES) - 1)), percent(recovered["top1"])])
    print(f"\n{table(header, rows)}\n")
    print(f"{saved_folder} and {recovered_folder} were loaded again with from_pretrained and predict the same.")
