"""`cap-hf evaluate`: accuracy and loss of a checkpoint."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from cap_hf.commands.arguments import DEFAULT_OUTPUT_DIR, ModelArguments, parse
from cap_hf.commands.tables import percent
from cap_hf.data.arguments import DataArguments


@dataclass
class EvaluateArguments:
    """How to evaluate."""

    output_dir: str = field(default=DEFAULT_OUTPUT_DIR, metadata={"help": "Gets eval_results.json."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples per step."})
    seed: int = field(default=42, metadata={"help": "Seed of a held-out split."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, data_args, args = parse(
        argv, "evaluate", "Measure an image classifier.", ModelArguments, DataArguments, EvaluateArguments
    )
    evaluate(model_args, data_args, args)


def evaluate(model_args: ModelArguments, data_args: DataArguments, args: EvaluateArguments) -> None:
    """Do the work, once nothing is wrong with the arguments."""
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.atomic import write_json
    from cap_hf.commands.common import eval_dataset, load_all
    from cap_hf.data.evaluation import evaluate_model
    from cap_hf.data.images import make_dataloader
    from cap_hf.distributed.accelerator import make_accelerator
    from cap_hf.report import versions

    accelerator = make_accelerator()
    model, image_processor, splits = load_all(model_args, data_args, args.seed, ["eval"])
    dataset = eval_dataset(splits, image_processor, model, data_args)
    loader = make_dataloader(dataset, args.per_device_eval_batch_size, data_args.dataloader_num_workers)
    metrics = evaluate_model(model, accelerator.prepare(loader), accelerator, args.disable_tqdm)
    if accelerator.is_main_process:
        report = {
            "model_name_or_path": model_args.model_name_or_path,
            "data": asdict(data_args),
            "metrics": metrics,
            "versions": versions(),
        }
        path = Path(args.output_dir) / "eval_results.json"
        write_json(path, report)
        print(
            f"{model_args.model_name_or_path}: top-1 {percent(metrics['top1'])} %, "
            f"top-5 {percent(metrics.get('top5'))} %, loss {metrics['loss']:.4f} "
            f"on {metrics['num_examples']} examples ({path})"
        )
    accelerator.end_training()
