"""What each of two processes does on its own pretend device; the first writes what came out of it.

Usage: python -m torch.distributed.run --nproc_per_node 2 -m support.pretend.two_processes FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from cap_hf import SparseTrainer
from cap_hf.commands.main import main
from cap_hf.data.evaluation import evaluate_model
from cap_hf.recovery.healing import heal
from support import pretend
from support.models import build
from support.pretend.runs import (
    CASES,
    INTERRUPTED,
    accelerator_on,
    command_arguments,
    compress,
    compress_interrupted,
    loader,
    weights,
)
from support.recovery import GRADUAL, examples, make_trainer, sparse_vit, tiny_vit

Outcome = tuple[dict[str, torch.Tensor], float | None]


def prune(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    compressor, report = compress(name, accelerator)
    return weights(compressor), report.loss


def interrupt(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    compressor, report = compress_interrupted(name, accelerator, folder / f"{name} state")
    return weights(compressor), report.loss


def save(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    compressor, report = compress("cap", accelerator)
    compressor.save_pretrained(folder / "sparse", compressed=True)
    return {}, report.loss


def evaluate(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    model = build("ViT")
    results = evaluate_model(model, accelerator.prepare(loader(model, 8, examples=22)), accelerator, disable_tqdm=True)
    assert results["num_examples"] == 22
    return {}, results["loss"]


def recover(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    changes = {"max_steps": 3, "distillation_weight": 1.0, "ema_decay": 0.8, "use_cpu": False}
    trainer = make_trainer(folder / name, sparse_vit(), teacher=tiny_vit(seed=1), **changes)
    trainer.train()
    return trained(trainer)


def recover_gradually(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    trainer = make_trainer(folder / name, tiny_vit(), **{**GRADUAL, "max_steps": 6, "use_cpu": False})
    trainer.train()
    return trained(trainer)


def mend(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    """Heal as `cap-hf prune` does, whose own accelerator goes on afterwards."""
    model, teacher = (each.to(accelerator.device) for each in (sparse_vit(), tiny_vit()))
    report = heal(model, teacher, examples(), steps=3, batch_size=8, disable_tqdm=True)
    assert report.loss_start > 0
    assert model.device == accelerator.device
    return same_weights(model, accelerator), report.images


def trained(trainer: SparseTrainer) -> Outcome:
    assert trainer.args.device == torch.device("pretend", trainer.args.process_index)
    return same_weights(trainer.model, trainer.accelerator), None


def same_weights(model: PreTrainedModel, accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The weights, after a check that they are the same on both devices."""
    for name, parameter in model.named_parameters():
        everyone = accelerator.gather(parameter.detach()[None].contiguous())
        assert torch.equal(everyone[0], everyone[1]), name
    return {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}


def command(name: str, accelerator: Accelerator, folder: Path) -> Outcome:
    with accelerator.main_process_first():
        arguments = command_arguments(folder)
    assert main(arguments) == 0
    return load_file(folder / "out" / "sparsity-0.75" / "model.safetensors"), None


TASKS: dict[str, Callable[[str, Accelerator, Path], Outcome]] = {
    **dict.fromkeys(CASES, prune),
    **{f"interrupted {name}": lambda task, *rest, name=name: interrupt(name, *rest) for name in INTERRUPTED},
    "save": save,
    "evaluate": evaluate,
    "recover": recover,
    "recover gradually": recover_gradually,
    "heal": mend,
    # The last: a command ends what connects the processes.
    "command": command,
}


def run() -> None:
    pretend.load()
    folder = Path(sys.argv[1])
    results: dict[str, dict[str, object]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, task in TASKS.items():
        accelerator = accelerator_on("pretend")
        assert accelerator.num_processes == 2
        try:
            found, number = task(name, accelerator, folder)
        except Exception as error:
            # The same on both: the next task finds the processes in step.
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        results[name] = {"number": number}
        tensors |= {f"{name}/{key}": tensor for key, tensor in found.items()}
    if accelerator.is_main_process:
        save_file(tensors, folder / "tensors.safetensors")
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run()
