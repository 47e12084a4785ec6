"""When a gradual run prunes and to which sparsity, and the learning rate that restarts with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cap_hf.errors import CAPError

# Share of the way from the start to the end sparsity after the share t of the pruning steps; cubic removes much
# early, where it costs little (Zhu and Gupta, arXiv 1710.01878, eq. 1).
SHAPES: dict[str, Callable[[float], float]] = {"linear": lambda t: t, "cubic": lambda t: 1 - (1 - t) ** 3}

FORMATS = "'start,end,steps,shape' such as 0.5,0.9,4,cubic, or 'epoch:sparsity,...' such as 0:0.5,2:0.8,4:0.9"


@dataclass(frozen=True)
class SparsitySchedule:
    """The pruning steps of a run (arXiv 2210.09223, gradual pruning); one-shot is a schedule with one step.

    Attributes:
        steps: (time, sparsity) of each pruning step, both rising.
        in_epochs: whether the times are epochs; else they are shares of the run, in [0, 1).

    Raises:
        CAPError: there is no step, a sparsity is outside [0, 1), or times or sparsities do not rise.
    """

    steps: tuple[tuple[float, float], ...]
    in_epochs: bool = False

    def __post_init__(self) -> None:
        if not self.steps:
            raise CAPError("the sparsity schedule has no step")
        for time, sparsity in self.steps:
            if not 0 <= sparsity < 1:
                raise CAPError(f"sparsity {sparsity:g} of the schedule is not in [0, 1)")
            if not 0 <= time < (float("inf") if self.in_epochs else 1):
                raise CAPError(f"the schedule prunes at {time:g}: use times from 0, before the end of training")
        for (time, sparsity), (next_time, next_sparsity) in zip(self.steps, self.steps[1:], strict=False):
            if next_sparsity <= sparsity:
                raise CAPError(
                    f"the sparsity schedule goes from {sparsity:g} to {next_sparsity:g}: "
                    "pruned weights stay 0, so it can only rise"
                )
            if next_time <= time:
                raise CAPError(f"the sparsity schedule has epoch {next_time:g} after epoch {time:g}: sort it")

    @classmethod
    def shaped(cls, start: float, end: float, steps: int, shape: str = "cubic") -> "SparsitySchedule":
        """Pruning steps evenly over the run, the first at its beginning; a single one goes to `end` at once."""
        if shape not in SHAPES:
            raise CAPError(f"schedule shape {shape!r} is not one of {', '.join(SHAPES)}")
        if steps < 1:
            raise CAPError(f"a schedule of {steps} steps prunes nothing: use at least 1")
        if start > end:
            raise CAPError(f"the sparsity schedule goes down, from {start:g} to {end:g}: it can only rise")
        if steps == 1:
            return cls(((0.0, end),))
        curve = SHAPES[shape]
        # The last step is exactly what was asked for, whatever the curve rounds to.
        rising = [start + (end - start) * curve(index / (steps - 1)) for index in range(steps - 1)]
        return cls(tuple((index / steps, sparsity) for index, sparsity in enumerate([*rising, end])))

    @classmethod
    def parse(cls, text: str) -> "SparsitySchedule":
        """Return a schedule from `start,end,steps,shape`, from `epoch:sparsity,...`, or from one sparsity (one-shot).

        Raises:
            CAPError: the text is none of these, or its numbers make no schedule.
        """
        parts = [part.strip() for part in str(text).split(",")]
        try:
            if all(":" in part for part in parts):
                pairs = [part.split(":") for part in parts]
                return cls(tuple((float(epoch), float(sparsity)) for epoch, sparsity in pairs), in_epochs=True)
            if len(parts) == 1:
                return cls(((0.0, float(parts[0])),))
            start, end, steps, shape = parts
            return cls.shaped(float(start), float(end), int(steps), shape)
        except CAPError:
            raise
        except ValueError as error:
            raise CAPError(f"--sparsity_schedule {text!r} is not {FORMATS}") from error

    def check_start(self, num_zeros: int, num_weights: int) -> None:
        """Raise a CAPError if the first step leaves fewer zeros than the model's target weights have already."""
        first = self.steps[0][1]
        if round(first * num_weights) < num_zeros:
            raise CAPError(
                f"the schedule starts at sparsity {first:g}, but the model is {num_zeros / num_weights:.4%} sparse "
                "already: start there or above"
            )

    def at_steps(self, max_steps: int, num_train_epochs: float) -> dict[int, float]:
        """Return the optimizer step before which each pruning step happens, with its sparsity.

        Args:
            max_steps: optimizer steps of the whole run.
            num_train_epochs: epochs of the whole run, for times in epochs.

        Raises:
            CAPError: a step lies behind the end of training, or two fall on the same optimizer step.
        """
        length = num_train_epochs if self.in_epochs else 1
        found: dict[int, float] = {}
        for time, sparsity in self.steps:
            step = round(time / length * max_steps)
            if step >= max_steps:
                raise CAPError(f"the schedule prunes at epoch {time:g}, but training ends at {length:g}: train longer")
            if step in found:
                raise CAPError(
                    f"the schedule prunes twice at optimizer step {step} of {max_steps}: "
                    "train longer or prune in fewer steps"
                )
            found[step] = sparsity
        return found


def cyclic_linear(
    starts: Sequence[int],
    num_training_steps: int,
    num_warmup_steps: int = 0,
    peak_decay: float = 1.0,
    end: float = 0.0,
) -> Callable[[int], float]:
    """Return a linear decay that restarts at every pruning step (arXiv 2210.09223, learning-rate schedule).

    Args:
        starts: optimizer steps at which a cycle begins; 0 is one of them or is added.
        num_training_steps: where the last cycle ends.
        num_warmup_steps: a linear rise at the beginning of the run, in place of the decay.
        peak_decay: factor of the peak from one cycle to the next.
        end: where each cycle ends, as a factor; no peak is below it.

    Returns:
        The factor of the learning rate at an optimizer step, for `torch.optim.lr_scheduler.LambdaLR`.
    """
    edges = [*sorted({0, *starts}), num_training_steps]

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        cycle = max(index for index, start in enumerate(edges[:-1]) if start <= step)
        start, stop = max(edges[cycle], num_warmup_steps if cycle == 0 else 0), edges[cycle + 1]
        return end + max(0.0, peak_decay**cycle - end) * max(0.0, (stop - step) / max(1, stop - start))

    return factor
