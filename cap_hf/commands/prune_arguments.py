"""The arguments of `cap-hf prune` that are its own, and their checks, which come before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cap_hf.budget import Budget
from cap_hf.collection.hardware import parse_hardware
from cap_hf.collection.resources import Resources
from cap_hf.commands.arguments import DEFAULT_OUTPUT_DIR, ModelArguments, ProbeArguments, beside
from cap_hf.commands.healing import HealArguments
from cap_hf.commands.search_arguments import SearchArguments, read_sparsities
from cap_hf.commands.watching import NO_TRACKER, TRACKERS, check_report, check_trackers
from cap_hf.config import CAPConfig
from cap_hf.data.arguments import DataArguments
from cap_hf.errors import CAPError


@dataclass
class PruneArguments:
    """What to make of the checkpoint, and where it goes.

    Raises:
        CAPError: `plan_for` names no GPU that is known, or what `report` or `report_to` needs is not installed.
    """

    output_dir: str = field(
        default=DEFAULT_OUTPUT_DIR, metadata={"help": "Gets report.json and a folder per checkpoint."}
    )
    sparsity: list[str] | None = field(
        default=None,
        metadata={
            "help": "Share of the target weights to be 0, in [0, 1); several give a checkpoint each, as numbers or as "
            "begin:end:step, such as 0.5:0.95:0.05."
        },
    )
    budget: list[str] | None = field(
        default=None,
        metadata={
            "help": "In the place of a sparsity, what the model may cost: flops=0.4 (share of the targets' "
            "multiply-adds), bytes=0.25 (of the weights, compressed), latency=0.5 or latency-int8=0.5 (of the dense "
            "latency, measured here); several of one kind give a checkpoint each."
        },
    )
    num_recomputations: int = field(
        default=0,
        metadata={
            "help": "Sparsities on the way to each one at which the Fisher is collected anew. Each takes as long as a "
            "prune of its own; high sparsities may lose less with it."
        },
    )
    per_device_batch_size: int = field(
        default=64, metadata={"help": "Examples per step while gradients are collected."}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Examples per step of evaluation."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate the dense model and each sparse one."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace checkpoints that are there."})
    checkpoint_every: int | None = field(
        default=None,
        metadata={"help": "Gradient samples between two saves of the collection's state, in OUTPUT_DIR-collection."},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the state that a killed run has left."})
    recalibrate_batch_norm: bool | None = field(
        default=None,
        metadata={"help": "Estimate batch norm anew after pruning, from 256 examples; default: where there is any."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print what it would take, memory, disk and time, in 1, 2, 4 and 8 processes; prune nothing."
        },
    )
    plan_for: str | None = field(
        default=None,
        metadata={
            "help": "A dry run for GPUs that are not here, such as gpu=H100,count=8: on paper, from what their makers "
            "state."
        },
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})
    report: bool = field(default=False, metadata={"help": "End with a page of the run, OUTPUT_DIR/report.html."})
    report_to: list[str] = field(
        default_factory=lambda: [NO_TRACKER],
        metadata={
            "help": f"Trackers to tell how the run goes: some of {', '.join(TRACKERS)}, or none. What TensorBoard "
            "reads goes to OUTPUT_DIR-runs."
        },
    )
    # As it was typed, for the page.
    command: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_report(self.report)
        self.trackers = check_trackers(self.report_to)
        if self.plan_for is not None:
            parse_hardware(self.plan_for)
            self.dry_run = True


@dataclass
class Asked:
    """All that the command line says.

    Attributes:
        sparsities: in rising order, or budgets in falling order; none where a sparsity is searched for.
    """

    model: ModelArguments
    data: DataArguments
    prune: PruneArguments
    search: SearchArguments
    heal: HealArguments
    probe: ProbeArguments
    config: CAPConfig
    resources: Resources
    sparsities: list[float | Budget] = field(default_factory=list)


def checkpoint_name(sparsity: float | Budget) -> str:
    """Return the name of the folder for a checkpoint of this sparsity, or of this budget."""
    if isinstance(sparsity, Budget):
        return f"{sparsity.kind}-{sparsity.share:.12g}"
    return f"sparsity-{sparsity:.12g}"


def state_folder(args: PruneArguments) -> Path:
    """Return where the state of a collection lies: beside the output, which is not there before the end."""
    return beside(args.output_dir, "collection")


def check_state(args: PruneArguments) -> None:
    """Check the arguments that keep the state of a collection and go on from it.

    Raises:
        CAPError: `resume` without `checkpoint_every`, `resume` where no state was saved, fewer than one sample between
            two saves, or several collections.
    """
    if args.checkpoint_every is None:
        if args.resume:
            raise CAPError("--resume goes with --checkpoint_every, as the run that was killed had it")
        return
    if args.num_recomputations:
        raise CAPError("--checkpoint_every keeps the state of a single collection: leave out --num_recomputations")
    if args.checkpoint_every < 1:
        raise CAPError(f"checkpoint_every={args.checkpoint_every} must be at least 1")
    if args.resume and not state_folder(args).is_dir():
        raise CAPError(f"--resume: {state_folder(args)} is not there, so nothing was saved: leave --resume out")


def check_sparsities(texts: Sequence[str | float] | None, config: CAPConfig) -> list[float]:
    """Return the sparsities in rising order, each once; the pattern's own where the allocation is N:M.

    Raises:
        CAPError: none is given, one cannot be read or is out of range, or they contradict an N:M allocation.
    """
    pattern, sparsities = config.nm, read_sparsities(texts or ())
    if pattern is not None:
        for sparsity in sparsities:
            pattern.check_sparsity(sparsity)
        return [pattern.sparsity]
    if not sparsities:
        raise CAPError("say how sparse: --sparsity 0.5 0.75 0.9; or what may be lost: --max_accuracy_drop 0.01")
    for sparsity in sparsities:
        if not 0 <= round(sparsity, 12) < 1:
            raise CAPError(f"sparsity {sparsity:g} is not in [0, 1)")
    # Closer than this, two would share a folder.
    return sorted({round(sparsity, 12) for sparsity in sparsities})
