"""CAP for Hugging Face image models: prune, recover, publish, load.

`import cap_hf` makes `from_pretrained` load compressed checkpoints and imports nothing heavy: a public name is imported
when it is first used, torch and transformers with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cap_hf.checkpoints.registration import register

if TYPE_CHECKING:
    from cap_hf.budget import Budget
    from cap_hf.checkpoints.quantizer import CompressedConfig
    from cap_hf.collection.resources import Resources
    from cap_hf.collection.scores import Score
    from cap_hf.collection.state import Checkpointing
    from cap_hf.compressor import CAPCompressor
    from cap_hf.config import CAPConfig
    from cap_hf.errors import CAPError
    from cap_hf.hub.publish import push_to_hub
    from cap_hf.inference.auto_model import SparseAutoModel, SparseModelForImageClassification
    from cap_hf.inference.export import export_onnx
    from cap_hf.inference.optimize import optimize_for_inference
    from cap_hf.inference.quantization import quantize_int8
    from cap_hf.patterns import BlockPattern, NMPattern
    from cap_hf.recovery.gradual import GradualPruner
    from cap_hf.recovery.healing import heal
    from cap_hf.recovery.schedules import SparsitySchedule
    from cap_hf.recovery.trainer import SparseTrainer
    from cap_hf.recovery.training_arguments import SparseTrainingArguments
    from cap_hf.report import Evaluated, LayerReport, PruneReport, SearchReport
    from cap_hf.stepwise import prune_in_steps
    from cap_hf.targets import Target, find_targets

__version__ = "0.1.0"

# Where each public name is, for those who run the code; the imports above say the same to editors and type checkers.
_HOMES = {
    "BlockPattern": "cap_hf.patterns",
    "Budget": "cap_hf.budget",
    "CAPCompressor": "cap_hf.compressor",
    "CAPConfig": "cap_hf.config",
    "CAPError": "cap_hf.errors",
    "Checkpointing": "cap_hf.collection.state",
    "CompressedConfig": "cap_hf.checkpoints.quantizer",
    "Evaluated": "cap_hf.report",
    "GradualPruner": "cap_hf.recovery.gradual",
    "LayerReport": "cap_hf.report",
    "NMPattern": "cap_hf.patterns",
    "PruneReport": "cap_hf.report",
    "Resources": "cap_hf.collection.resources",
    "Score": "cap_hf.collection.scores",
    "SearchReport": "cap_hf.report",
    "SparseAutoModel": "cap_hf.inference.auto_model",
    "SparseModelForImageClassification": "cap_hf.inference.auto_model",
    "SparseTrainer": "cap_hf.recovery.trainer",
    "SparseTrainingArguments": "cap_hf.recovery.training_arguments",
    "SparsitySchedule": "cap_hf.recovery.schedules",
    "Target": "cap_hf.targets",
    "export_onnx": "cap_hf.inference.export",
    "find_targets": "cap_hf.targets",
    "heal": "cap_hf.recovery.healing",
    "optimize_for_inference": "cap_hf.inference.optimize",
    "prune_in_steps": "cap_hf.stepwise",
    "push_to_hub": "cap_hf.hub.publish",
    "quantize_int8": "cap_hf.inference.quantization",
}

__all__ = [
    "BlockPattern",
    "Budget",
    "CAPCompressor",
    "CAPConfig",
    "CAPError",
    "Checkpointing",
    "CompressedConfig",
    "Evaluated",
    "GradualPruner",
    "LayerReport",
    "NMPattern",
    "PruneReport",
    "Resources",
    "Score",
    "SearchReport",
    "SparseAutoModel",
    "SparseModelForImageClassification",
    "SparseTrainer",
    "SparseTrainingArguments",
    "SparsitySchedule",
    "Target",
    "export_onnx",
    "find_targets",
    "heal",
    "optimize_for_inference",
    "prune_in_steps",
    "push_to_hub",
    "quantize_int8",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
