"""What `cap-hf finetune` is told: its arguments, those of transformers' training among them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass

from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import ModelArguments, ProbeArguments, parse
from cap_hf.commands.watching import TRACKERS, as_typed, check_report, check_trackers
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError, reason
from cap_hf.recovery.presets import TRAINING_PRESETS, defaults_beside
from cap_hf.recovery.training_arguments import SparseTrainingArguments


@dataclass
class FinetuneArguments:
    """What to learn from, with which defaults, and what may be replaced.

    Raises:
        CAPError: a preset is without the teacher that it learns from, or what draws the page is not installed.
    """

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Hub id or a folder with a dense model to learn from."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Defaults that belong together: heal takes a few hundred steps of images without labels towards "
            "the hidden states and logits of the dense model. What is given beside it goes before it.",
            "choices": tuple(TRAINING_PRESETS),
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a checkpoint that is there."})
    report: bool = field(default=False, metadata={"help": "End with a page of the run, OUTPUT_DIR/report.html."})
    # As it was typed, for the page.
    command: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_report(self.report)
        if self.preset is not None and self.teacher_model_name_or_path is None:
            raise CAPError(
                f"--preset {self.preset} learns from the dense model alone: name it with --teacher_model_name_or_path"
            )


def read_arguments(argv: list[str]) -> tuple:
    """Return the dataclasses of the command, with what two of them have in common taken from the training's.

    Raises:
        CAPError: an argument is wrong, or says how to prune in a run that does not.
    """
    description = "Finetune a sparse vision model with its zeros held; with a schedule, prune it gradually."
    with one_line():
        model_args, data_args, args, training_args, probe_args, config, resources = parse(
            argv,
            "finetune",
            description,
            ModelArguments,
            without_fields(DataArguments, "dataloader_num_workers"),
            FinetuneArguments,
            SparseTrainingArguments,
            ProbeArguments,
            without_fields(CAPConfig, "seed"),
            Resources,
            defaults=defaults_beside,
        )
    args.command = as_typed("finetune", argv, [model_args.token, training_args.hub_token])
    # In one line, and before the model is loaded; of others the Trainer knows more.
    check_trackers([name for name in training_args.report_to or () if name in TRACKERS] or ["none"])
    data_args = DataArguments(**asdict(data_args), dataloader_num_workers=training_args.dataloader_num_workers)
    config = CAPConfig(**asdict(config), seed=training_args.seed)
    usual = CAPConfig(seed=config.seed).to_dict()
    changed = [name for name, value in config.to_dict().items() if value != usual[name]]
    refitting = [f"--{name}" for name in changed if name.startswith("refit")]
    if refitting and config.refit is not False:
        raise CAPError(f"{', '.join(refitting)} is for cap-hf prune: here training moves what is left; leave it out")
    if training_args.schedule is None:
        unused = [f"--{name}" for name in changed]
        if unused:
            raise CAPError(f"{', '.join(unused)} without --sparsity_schedule prunes nothing: give one, such as 0.9")
    return model_args, data_args, args, training_args, probe_args, config, resources


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what the Trainer says of its arguments into a CAPError: such as a package that is missing."""
    try:
        yield
    except CAPError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CAPError(reason(error)) from error


def without_fields(kind: type, *names: str) -> type:
    """Return a dataclass with a dataclass's fields except some, for a parser where another one has those."""
    kept = [(each.name, each.type, copy.copy(each)) for each in fields(kind) if each.name not in names]
    return make_dataclass(kind.__name__, kept, namespace={"__doc__": kind.__doc__})
