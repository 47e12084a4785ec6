"""What each of two processes does on its own pretend device; the first writes what came out of it.

Usage: python -m torch.distributed.run --nproc_per_node 2 -m support.pretend.two_processes FOLDER
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from support import pretend

pretend.load()

from accelerate import Accelerator
from safetensors.torch import save_file
from support.models import build
from support.pretend.runs import CASES, INTERRUPTED, accelerator_on, compress, compress_interrupted, loader, weights
from support.recovery import GRADUAL, make_trainer, sparse_vit, tiny_vit

from cap_hf.data.evaluation import evaluate_model

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


def trained(trainer) -> Outcome:
    """The weights, after a check that they are the same on both devices."""
    assert trainer.args.device == torch.device("pretend", trainer.args.process_index)
    for name, parameter in trainer.model.named_parameters():
        everyone = trainer.accelerator.gather(parameter.detach()[None].contiguous())
        assert torch.equal(everyone[0], everyone[1]), name
    return {name: tensor.cpu().contiguous() for name, tensor in trainer.model.state_dict().items()}, None


TASKS: dict[str, Callable[[str, Accelerator, Path], Outcome]] = {
    **dict.fromkeys(CASES, prune),
    **{f"interrupted {name}": lambda task, *rest, name=name: interrupt(name, *rest) for name in INTERRUPTED},
    "save": save,
    "evaluate": evaluate,
    "recover": recover,
    "recover gradually": recover_gradually,
}


def main() -> None:
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
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
