"""CAP for Hugging Face image models: prune, recover, publish, load."""

from cap_hf.checkpoints.quantizer import CompressedConfig
from cap_hf.collection.resources import Resources
from cap_hf.collection.state import Checkpointing
from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig, NMPattern
from cap_hf.errors import CAPError
from cap_hf.hub.publish import push_to_hub
from cap_hf.inference.export import export_onnx
from cap_hf.inference.optimize import SparseModelForImageClassification, optimize_for_inference
from cap_hf.inference.quantization import quantize_int8
from cap_hf.recovery.gradual import GradualPruner
from cap_hf.recovery.schedules import SparsitySchedule
from cap_hf.recovery.trainer import SparseTrainer
from cap_hf.recovery.training_arguments import SparseTrainingArguments
from cap_hf.report import LayerReport, PruneReport
from cap_hf.targets import Target, find_targets

__version__ = "0.1.0"

__all__ = [
    "CAPCompressor",
    "CAPConfig",
    "CAPError",
    "Checkpointing",
    "CompressedConfig",
    "GradualPruner",
    "LayerReport",
    "NMPattern",
    "PruneReport",
    "Resources",
    "SparseModelForImageClassification",
    "SparseTrainer",
    "SparseTrainingArguments",
    "SparsitySchedule",
    "Target",
    "export_onnx",
    "find_targets",
    "optimize_for_inference",
    "push_to_hub",
    "quantize_int8",
]
