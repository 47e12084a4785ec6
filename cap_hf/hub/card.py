"""The model card: facts from a checkpoint and its report, rendered by `huggingface_hub.ModelCard`.

What a checkpoint or its report does not say is left out of the card.
"""

import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cap_hf.checkpoints.folder import read_cap_config, read_report
from cap_hf.checkpoints.loading import check_folder, load_checkpoint
from cap_hf.checkpoints.metrics import Measured, measured_in
from cap_hf.checkpoints.quantized import dequantize
from cap_hf.checkpoints.weights import measure
from cap_hf.errors import CAPError
from cap_hf.hub.names import code, hub_id, link, one_line, short_name, text
from cap_hf.hub.origin import GRADUAL, PRUNED, RECOVERED, budget_of, command_line, kind_of, run_of, steps_of
from cap_hf.hub.task import CLASSIFICATION, loader_name, pipeline_tag, purpose
from cap_hf.masks import describe_masks, differing_layers, find_pattern, take_masks
from cap_hf.outputs import label_names
from cap_hf.targets import find_targets

CARD_NAME, PICTURE_NAME = "README.md", "sparsity.png"
MAX_LABELS = 12
METHOD_TEXTS = {
    "cap": "Pruned with CAP, the Correlation-Aware Pruner (arXiv 2210.09223), by cap_hf.",
    "obs": "Pruned by cap_hf with a block Fisher but without correlations between weights (as oBERT does).",
    "sparsegpt": "Pruned by cap_hf with one input Hessian per layer (as SparseGPT does).",
    "wanda": "Pruned by cap_hf: in every row the weights with the smallest product of magnitude and input norm were "
    "removed (as Wanda does, arXiv 2306.11695).",
    "magnitude": "Pruned by cap_hf: the weights of the smallest magnitude were removed.",
}


@dataclass
class CardFacts:
    """What a card says. None and empty mean unknown.

    Attributes:
        repo_id: the name to load the model by.
        sparsity: share of the targets' weights that are 0, in [0, 1].
        pipeline_tag: of the Hub, by what the model is for.
        loader: the class of transformers to load it with.
        pattern: N:M, if every target keeps to it.
        layers: of each target what `describe_masks` says.
        labels: the names of the classes that it tells apart, where it does.
        kind: how it was made, as `kind_of` says; run: with what, as `run_of` does, in `num_processes`.
        base_model: the dense model that it was pruned from; else, of a recovered one, the sparse model.
        dense, before, sparse: what was measured, accuracies in [0, 1], of the dense model, of the one that a training
            began with, and of this one.
        quantization: of the weights, where they are no floats.
        int8: whether cap_hf has rounded weights to int8; pruned_zeros: how many were 0 before, if the report says it.
        file_bytes: of the weight files; dense_bytes, compressed_bytes: of their tensors in either form.
    """

    repo_id: str
    architecture: str
    pipeline_tag: str
    loader: str
    num_parameters: int
    layers: list[dict]
    pattern: str | None
    labels: list[str]
    compressed: bool
    file_bytes: int
    dense_bytes: int
    compressed_bytes: int
    quantization: str | None = None
    int8: bool = False
    pruned_zeros: int | None = None
    kind: str = PRUNED
    run: dict = field(default_factory=dict)
    num_processes: int | None = None
    base_model: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    dense: Measured = field(default_factory=Measured)
    before: Measured = field(default_factory=Measured)
    sparse: Measured = field(default_factory=Measured)
    config: dict = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def num_weights(self) -> int:
        return sum(layer["num_weights"] for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return sum(layer["num_zeros"] for layer in self.layers) / self.num_weights

    @classmethod
    def gather(
        cls,
        folder: str | Path,
        repo_id: str,
        base_model: str | None = None,
        license: str | None = None,
        trust_remote_code: bool = False,
    ) -> "CardFacts":
        """Read a checkpoint folder, plain or compressed.

        Args:
            folder: with config.json, safetensors weights, and report.json and cap_config.json if there are.
            repo_id: the name the card tells to load.
            base_model: Hub id of the dense model; None for the one in the report.
            license: of the model; None for the base model's.
            trust_remote_code: run the code that the checkpoint brings along.

        Raises:
            CAPError: the checkpoint cannot be read or loaded, a file of it is damaged, or its weights are not the ones
                that its report describes.
        """
        folder = Path(folder)
        report, settings = read_report(folder), read_cap_config(folder)
        files = check_folder(folder, trust_remote_code)
        int8 = files.have_int8
        dense_bytes, compressed_bytes = measure(folder)
        config = settings.to_dict() if settings else {}
        model = load_checkpoint(folder, trust_remote_code, "float32")
        quantization = dequantize(model)
        targets = find_targets(model, "row", config.get("include"), config.get("exclude"))
        masks = take_masks(targets)
        wrong = differing_layers(find_targets(model), report, rounded=int8)
        if wrong:
            raise CAPError(
                f"{folder / 'report.json'} is not about these weights ({wrong[0]} has other zeros): "
                "evaluate and save the checkpoint again, or remove its report"
            )
        patterns = {str(find_pattern(target, masks[target.name], rounded=int8) or "") for target in targets}
        data, kind = report.get("data") or {}, kind_of(report)
        zeros = [layer.get("num_zeros", 0) for layer in (report.get("pruning") or report).get("layers") or ()]
        tag = pipeline_tag(model)
        own_base = base_model or report.get("model_name_or_path")
        return cls(
            repo_id=repo_id,
            architecture=type(model).__name__,
            pipeline_tag=tag,
            loader=loader_name(model),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=describe_masks(targets),
            pattern=(patterns.pop() or None) if len(patterns) == 1 else None,
            # Without a head a config still has transformers' own names of two classes.
            labels=list(label_names(model.config).values()) if tag == CLASSIFICATION else [],
            compressed=files.compressed,
            file_bytes=files.num_bytes,
            dense_bytes=dense_bytes,
            compressed_bytes=compressed_bytes,
            quantization=quantization,
            int8=int8,
            pruned_zeros=sum(zeros) if int8 and zeros else None,
            kind=kind,
            run=run_of(report, base_model),
            num_processes=report.get("num_processes"),
            base_model=own_base,
            license={"license": license} if license else base_license(own_base),
            dataset=data.get("dataset_name"),
            dataset_config=data.get("dataset_config_name"),
            dataset_split=data.get("eval_split_name"),
            dense=report.get("dense") or {},
            # Of what was trained the report also says how accurate it was before.
            before={} if kind == PRUNED else report.get("sparse") or {},
            sparse=(report.get("sparse") if kind == PRUNED else report.get("recovered")) or {},
            config=config,
            # A recovery has another seed than the pruning that its config tells of.
            seed=report.get("seed", None if kind == RECOVERED else config.get("seed")),
            versions=report.get("versions") or {},
        )

    def metadata(self) -> ModelCardData:
        """Return the card's YAML block, for the Hub."""
        tags = ["sparse", "pruned", f"sparsity-{100 * self.sparsity:.0f}", self.pattern or "unstructured"]
        method = self.config.get("method")
        if method:
            tags.insert(2, method)
        if self.int8:
            tags.append("int8")
        dataset, name = hub_id(self.dataset), short_name(self.dataset)
        results = [
            EvalResult(
                task_type=self.pipeline_tag,
                dataset_type=dataset or name,
                dataset_name=name,
                dataset_config=self.dataset_config and one_line(self.dataset_config),
                dataset_split=self.dataset_split and one_line(self.dataset_split),
                metric_type="accuracy",
                metric_name=metric.accuracy,
                metric_value=self.sparse[metric.key],
            )
            for metric in measured_in([self.sparse])
            # What was measured before the weights were rounded is not this model's.
            if name and metric.accuracy and not self.int8
        ]
        base_model = hub_id(self.base_model)
        return ModelCardData(
            library_name="transformers",
            pipeline_tag=self.pipeline_tag,
            base_model=base_model,
            # The Hub knows adapter, finetune, merge and quantized: pruned weights have moved, as trained ones have.
            base_model_relation=("quantized" if self.int8 else "finetune") if base_model else None,
            datasets=[dataset] if dataset else None,
            tags=tags,
            metrics=["accuracy"] if results else None,
            model_name=one_line(self.repo_id.split("/")[-1]) if results else None,
            eval_results=results or None,
            license=self.license.get("license"),
            license_name=self.license.get("license_name"),
            license_link=self.license.get("license_link"),
        )

    def render(self) -> ModelCard:
        """Return the card, as `huggingface_hub` and the Hub read it."""
        facts: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        method: str | None = self.config.get("method")
        is_classifier, training = self.pipeline_tag == CLASSIFICATION, self.run.get("training_arguments") or {}
        pruned = self.sparsity if self.pruned_zeros is None else self.pruned_zeros / self.num_weights
        model, teacher = self.run.get("model_name_or_path"), self.run.get("teacher_model_name_or_path")
        return ModelCard.from_template(
            self.metadata(),
            template_str=template_path().read_text(encoding="utf-8"),
            **facts
            | {
                "title": text(self.repo_id.split("/")[-1]),
                "layers": [layer | {"name": text(layer["name"])} for layer in self.layers],
                "labels": [text(label) for label in self.labels[:MAX_LABELS]],
                "num_labels": len(self.labels),
                "sparsity": self.sparsity,
                "num_weights": self.num_weights,
                # A recovery begins with a model that is sparse already.
                "pruned_from": link(None if self.kind == RECOVERED and self.base_model == model else self.base_model),
                "trained_from": link(model),
                "teacher": link(teacher),
                "dataset_name": self.dataset and text(short_name(self.dataset)),
                "dataset_split": self.dataset_split and text(self.dataset_split),
                "purpose": purpose(self.pipeline_tag),
                "is_classifier": is_classifier,
                "refit": self.run.get("refit") if self.kind == PRUNED else None,
                "steps": steps_of(self.run) if self.kind == PRUNED else [],
                "budget": budget_of(self.run) if self.kind == PRUNED else None,
                "healing": self.run.get("healing") if self.kind == PRUNED else None,
                # Without a head there is nothing that could learn labels.
                "unlabelled": bool(teacher) and (not is_classifier or training.get("hard_label_weight") == 0),
                "metrics": measured_in([self.sparse]),
                "columns": self.columns(),
                "with_errors": any(name.endswith("_se") for name in self.sparse),
                "with_drops": any(name.endswith("_drop_se") for name in self.sparse),
                "method": method,
                "method_text": METHOD_TEXTS.get(method or ""),
                "command": code(command_line(self.kind, self.run, self.config, pruned) if self.run else None),
                "config": code(json.dumps(self.config, indent=2)) if self.config else None,
                "versions": [text(f"{name} {version}") for name, version in self.versions.items()],
                "picture": PICTURE_NAME,
                "percent": lambda value: f"{100 * value:.2f}",
            },
        )

    def columns(self) -> list[tuple[str, Measured]]:
        """Return the models that were measured, each with the heading of its column; this one is the last."""
        before = "before pruning" if self.kind == GRADUAL else "sparse"
        this = "recovered (this model)" if self.kind == RECOVERED else "this model"
        metrics = measured_in([self.sparse])
        others = [("dense", self.dense), (before, self.before)]
        return [each for each in others if all(metric.key in each[1] for metric in metrics)] + [(this, self.sparse)]


def template_path() -> Path:
    """Return the path of the card's template, which lies beside what fills it."""
    return Path(__file__).with_name("template.md")


def base_license(base_model: str | None) -> dict[str, str]:
    """Return the license fields of the base model's own card, or none if it has no card within reach."""
    if not base_model:
        return {}
    path = Path(base_model) / CARD_NAME
    try:
        if os.path.isdir(base_model):
            data = ModelCard.load(path, ignore_metadata_errors=True).data if path.is_file() else None
        else:
            name = hub_id(base_model)
            data = ModelCard.load(name, ignore_metadata_errors=True).data if name else None
    except Exception:  # no network, no card, a card that is no YAML: the license is unknown then
        return {}
    found = {name: getattr(data, name, None) for name in ("license", "license_name", "license_link")}
    if not isinstance(found["license"], str) or not re.fullmatch(r"[\w.+-]+", found["license"]):
        return {}
    return {name: one_line(value) for name, value in found.items() if isinstance(value, str)}
