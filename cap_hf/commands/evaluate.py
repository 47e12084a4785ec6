"""`cap-hf evaluate`: accuracy and loss of a classifier, features of a backbone."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cap_hf.checkpoints.location import check_location
from cap_hf.commands.arguments import DEFAULT_OUTPUT_DIR, ModelArguments, ProbeArguments, check_output, parse
from cap_hf.commands.tables import Row, results_table
from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class EvaluateArguments:
    """How to evaluate.

    Raises:
        CAPError: the dense model's name is a path, and nothing is there.
    """

    dense_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Hub id or a folder with the dense model, to compare with."}
    )
    output_dir: str = field(default=DEFAULT_OUTPUT_DIR, metadata={"help": "Gets eval_results.json."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples per step."})
    seed: int = field(default=42, metadata={"help": "Seed of a held-out split, and of what is drawn from the data."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        if self.dense_model_name_or_path is not None:
            check_location(self.dense_model_name_or_path)


def main(argv: list[str]) -> None:
    """Run the command with these arguments."""
    model_args, data_args, args, probe_args = parse(
        argv, "evaluate", "Measure a vision model.", ModelArguments, DataArguments, EvaluateArguments, ProbeArguments
    )
    evaluate(model_args, data_args, args, probe_args)


def evaluate(
    model_args: ModelArguments, data_args: DataArguments, args: EvaluateArguments, probe_args: ProbeArguments
) -> None:
    """Do the work, once nothing is wrong with the arguments."""
    # Imported here, because the arguments are checked before these take their seconds.
    from cap_hf.checkpoints.atomic import write_json
    from cap_hf.commands.common import hide_bars, load_all, load_model
    from cap_hf.commands.evaluation import Evaluation
    from cap_hf.data.images import collate
    from cap_hf.distributed.accelerator import make_accelerator
    from cap_hf.inference.example import size_of
    from cap_hf.report import versions

    check_output(args.output_dir, overwrite=True)
    if args.disable_tqdm:
        hide_bars()
    accelerator = make_accelerator()
    model, image_processor, splits = load_all(
        model_args, data_args, args.seed, ["eval"], bank_size=probe_args.knn_bank_size
    )
    evaluation = Evaluation(
        model,
        splits,
        image_processor,
        data_args,
        args.per_device_eval_batch_size,
        accelerator,
        args.disable_tqdm,
        "load it in Python with from_pretrained, and measure it with a metric of that task",
    )
    dense = sparsity_dense = None
    if args.dense_model_name_or_path is None:
        evaluation.check_alone()
    else:
        # A revision is one of the model that is measured.
        where = replace(model_args, model_name_or_path=args.dense_model_name_or_path, model_revision="main")
        dense_model = load_model(where)
        dense, sparsity_dense = evaluation.measure_dense(dense_model), known_sparsity(dense_model)
    metrics, sparsity = evaluation.measure(model), known_sparsity(model)
    if accelerator.is_main_process:
        report = {
            "model_name_or_path": model_args.model_name_or_path,
            "dense_model_name_or_path": args.dense_model_name_or_path,
            "data": asdict(data_args),
            "image_size": size_of(model, collate([evaluation.dataset[0]])),
            "dense": dense,
            "metrics": metrics,
            "sparsity_dense": sparsity_dense,
            "sparsity": sparsity,
            "versions": versions(),
        }
        path = Path(args.output_dir) / "eval_results.json"
        write_json(path, report)
        rows: list[Row] = [(model_args.model_name_or_path, sparsity, metrics)]
        if dense is not None:
            rows.insert(0, (f"{args.dense_model_name_or_path} (dense)", sparsity_dense, dense))
        print(results_table(rows, dense))
        print(f"\nMeasured on {metrics['num_examples']} examples ({path})")
    accelerator.end_training()


def known_sparsity(model: "PreTrainedModel") -> float | None:
    """Return the share of a model's target weights that are 0; None where it has none of plain floats."""
    from cap_hf.masks import target_sparsity
    from cap_hf.targets import find_targets

    try:
        return target_sparsity(find_targets(model))
    except (CAPError, NotImplementedError, RuntimeError):  # measured all the same, as it can be called
        return None
