"""CAP for Hugging Face image models: prune, recover, publish, load."""

from cap_hf.compressor import CAPCompressor
from cap_hf.config import CAPConfig, NMPattern
from cap_hf.errors import CAPError
from cap_hf.gradual import GradualPruner
from cap_hf.hub import push_to_hub
from cap_hf.inference.export import export_onnx
from cap_hf.inference.optimize import SparseModelForImageClassification, optimize_for_inference
from cap_hf.inference.quantization import quantize_int8
from cap_hf.plan import Resources
from cap_hf.quantizer import CompressedConfig
from cap_hf.report import LayerReport, PruneReport
from cap_hf.schedules import SparsitySchedule
from cap_hf.state import Checkpointing
from cap_hf.targets import Target, find_targets
from cap_hf.trainer import SparseTrainer
from cap_hf.training_arguments import SparseTrainingArguments

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
