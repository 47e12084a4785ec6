"""A model is looked at before it is used: unwrapped, or refused with the call that helps."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support.models import build, random_batches
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from cap_hf import CAPCompressor, CAPConfig, CAPError, SparseTrainer, SparseTrainingArguments, optimize_for_inference
from cap_hf.inference.benchmark import benchmark
from cap_hf.inference.export import export_onnx
from cap_hf.inference.quantization import quantize_int8
from cap_hf.models import full_precision, usable
from cap_hf.outputs import main_output
from cap_hf.towers import see

FC1 = "vit.layers.0.mlp.fc1"


def changed(change, name=FC1):
    model = build("ViT")
    change(model.get_submodule(name))
    return model


def with_part(make, name=FC1):
    model = build("ViT")
    model.set_submodule(name, make(model.get_submodule(name)))
    return model


def pruned_everywhere():
    model = build("ViT")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", amount=0.3)
    return model


def told_quantized():
    model = build("ViT")
    model.is_quantized, model.quantization_method = True, "gptq"
    return model


def set_infinite(module):
    module.weight.data.view(-1)[0] = torch.inf


class Doubled(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer


class Held(torch.Tensor):
    """As libraries of quantization hold a weight."""


class Own(nn.Parameter):
    """A user's, or one of a library of quantization, by what it holds."""


def hold(module):
    weight = module.weight.data.as_subclass(Held)
    module.weight = nn.Parameter(weight)


def as_plain_tensor(module, name="weight"):
    value = getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, value)


def named(name):
    """A wrapper that cannot be made here, known by its name."""
    return lambda layer: type(name, (nn.Sequential,), {})(layer)


def optimised(layer):
    layer.inference_only = True
    return layer


REFUSED = {
    "pruned with torch": (
        pruned_everywhere,
        r"vit.layers.0.attention.q_proj.weight \(and 12 more\) is made anew before every forward pass by a hook "
        r"\(L1Unstructured\), .*: call torch.nn.utils.prune.remove\(module, 'weight'\) on the module first",
    ),
    "in a head too": (
        lambda: changed(lambda module: prune.random_unstructured(module, "bias", 0.5), "classifier"),
        r"classifier.bias is made .* torch.nn.utils.prune.remove\(module, 'bias'\)",
    ),
    "weight norm": (
        lambda: changed(parametrizations.weight_norm),
        rf"{FC1}.weight is made .* a parametrization \(WeightNorm\), .*: call torch.nn.utils.parametrize."
        r"remove_parametrizations\(module, 'weight'\)",
    ),
    "orthogonal": (lambda: changed(parametrizations.orthogonal), r"a parametrization \(Orthogonal\)"),
    "old weight norm": (lambda: changed(weight_norm), r"torch.nn.utils.remove_weight_norm\(module, 'weight'\)"),
    "old spectral norm": (lambda: changed(spectral_norm), r"torch.nn.utils.remove_spectral_norm\(module, 'weight'\)"),
    "a plain tensor": (lambda: changed(as_plain_tensor), r"module.weight = torch.nn.Parameter\(weight\)"),
    "adapters": (lambda: with_part(Doubled), r"has adapters \(PEFT\): .* merge_and_unload\(\)"),
    "a compiled part": (
        lambda: with_part(torch.compile),
        rf"{FC1} is wrapped in OptimizedModule inside .*: take it off, model.{FC1} = model.{FC1}._orig_mod",
    ),
    "a shared part": (lambda: with_part(nn.DataParallel), rf"model.{FC1} = model.{FC1}.module"),
    "a split part": (lambda: with_part(named("FullyShardedDataParallel")), "splits its weights: use DDP"),
    "a split whole": (lambda: named("DeepSpeedEngine")(build("ViT")), "DeepSpeedEngine splits the weights"),
    "optimised": (lambda: with_part(optimised), "was optimised for inference, .* load it anew"),
    "an empty part": (lambda: changed(lambda module: module.to("meta")), f"{FC1}.weight is on the device meta"),
    "quantised, transformers says": (told_quantized, r"ViTForImageClassification are quantised \(gptq\): load the .*"),
    "a tensor of its own kind": (lambda: changed(hold), r"are quantised \(Held\)"),
    "whole numbers": (
        lambda: changed(lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.to(torch.int8), False))),
        r"are quantised \(torch.int8\)",
    ),
    "eight bits": (
        lambda: changed(lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.to(torch.float8_e4m3fn), False))),
        r"are quantised \(torch.float8_e4m3fn\)",
    ),
    "infinite": (lambda: changed(set_infinite), f"{FC1}.weight has entries that are NaN or infinite, in torch.float32"),
    "overflown": (
        lambda: changed(lambda module: module.half().weight.data.mul_(1e6)),
        f"{FC1}.weight has entries .* in torch.float16",
    ),
    "a path": (lambda: "some/checkpoint", "'some/checkpoint' is no model but of type str: load one first"),
    "nothing": (lambda: None, "None is no model"),
    "optimised itself": (lambda: optimised(build("ViT")), "and so was ViTForImageClassification: load it anew"),
    "a bias as a plain tensor": (
        lambda: changed(lambda module: as_plain_tensor(module, "bias"), "vit.layernorm"),
        r"vit.layernorm.bias is made .* module.bias = torch.nn.Parameter\(bias\)",
    ),
    "a weight that a module computes": (
        lambda: changed(lambda module: setattr(module, "weight", torch.ones(2, requires_grad=True) * 2), "vit"),
        "vit.weight is made .* by code that sets it as a plain tensor",
    ),
    "a kind of parameter that holds codes": (
        lambda: changed(lambda m: setattr(m, "weight", Own(m.weight.data.to(torch.uint8), False))),
        r"are quantised \(Own\)",
    ),
    "a mask that is no number": (
        lambda: changed(lambda m: m.register_parameter("mask", nn.Parameter(torch.full((2,), torch.nan))), "vit"),
        "vit.mask has entries that are NaN",
    ),
    "an infinite norm": (lambda: changed(set_infinite, "vit.layernorm"), "vit.layernorm.weight has entries"),
    "a lazy layer": (
        lambda: with_part(lambda layer: nn.LazyLinear(4)),
        f"{FC1}.weight has no size yet, since its layer is lazy: call the model on a batch first",
    ),
}


class Holding(nn.Module):
    """Has children of the names that wrappers have, and wraps nothing."""

    def __init__(self):
        super().__init__()
        self.module, self._orig_mod = nn.Linear(3, 3), nn.Linear(2, 2)


TAKEN = {
    "names of wrappers": Holding,
    "a parameter of a class of its own": lambda: changed(lambda m: setattr(m, "weight", Own(m.weight.data))),
    "a constant": lambda: changed(lambda module: setattr(module, "weight", torch.ones(3)), "vit"),
    "an infinite mask": lambda: changed(
        lambda m: m.register_parameter("mask", nn.Parameter(torch.full((3,), -torch.inf))), "vit"
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_only_looks_wrong_is_taken(case):
    model = TAKEN[case]()
    assert usable(model) is model


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_would_come_out_wrong_is_refused_in_one_line(case):
    make, message = REFUSED[case]
    with pytest.raises(CAPError, match=message) as caught:
        usable(make())
    assert "\n" not in str(caught.value)


def documented_calls(folder):
    """Every documented call that works on a model, by name."""
    arguments = SparseTrainingArguments(output_dir=str(folder / "run"), use_cpu=True, report_to="none")
    return {
        "CAPCompressor": CAPCompressor,
        "SparseTrainer": lambda model: SparseTrainer(model, arguments),
        "SparseTrainer, teacher": lambda model: SparseTrainer(build("ViT"), arguments, teacher=model),
        "optimize_for_inference": optimize_for_inference,
        "export_onnx": lambda model: export_onnx(model, folder / "onnx"),
        "quantize_int8": quantize_int8,
        "benchmark": lambda model: benchmark(model, ["sparse"], [1], [1], runs=3),
    }


def test_every_documented_call_looks_first(tmp_path):
    for name, call in documented_calls(tmp_path).items():
        model = pruned_everywhere()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CAPError, match="is made anew before every forward pass"):
            call(model)
            pytest.fail(f"{name} took it")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not list(tmp_path.glob("onnx*"))


@pytest.mark.parametrize(
    "end", [lambda module: prune.remove(module, "weight"), lambda module: remove_parametrizations(module, "weight")]
)
def test_what_the_line_says_helps(end):
    pruning = "prune" in end.__code__.co_names
    model = changed(lambda m: prune.l1_unstructured(m, "weight", 0.3) if pruning else parametrizations.weight_norm(m))
    end(model.get_submodule(FC1))
    assert usable(model) is model


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
)
def test_a_wrapped_model_is_pruned_and_saved_as_what_is_in_it(wrap, tmp_path):
    plain, model = build("ViT"), build("ViT")
    wrapped = wrap(model)
    assert usable(wrapped) is model
    for each in (plain, wrapped):
        compressor = CAPCompressor(each, CAPConfig(num_grads=8), disable_tqdm=True)
        compressor.collect(random_batches(plain, 8)).prune(0.5)
        compressor.save_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
    loaded = type(plain).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_hooks_are_called_in_a_model_that_was_compiled_in_place():
    """What is compiled passes over hooks that came later: the Fisher would be that of no gradient."""
    plain, model = build("ViT"), build("ViT")
    model.compile(backend="eager")
    batches = random_batches(plain, 8)
    with torch.no_grad():
        model(pixel_values=batches[0]["pixel_values"])
    for each in (plain, model):
        CAPCompressor(each, CAPConfig(num_grads=8), disable_tqdm=True).collect(batches).prune(0.5)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pruned_by_magnitude_and_refused_where_gradients_are_needed(dtype):
    model = build("ViT").to(dtype)
    report = CAPCompressor(model, CAPConfig(method="magnitude"), disable_tqdm=True).prune(0.5)
    assert report.num_zeros == round(report.num_weights / 2)
    for method in ("cap", "obs", "sparsegpt", "wanda"):
        compressor = CAPCompressor(model, CAPConfig(num_grads=8, method=method), disable_tqdm=True)
        with pytest.raises(CAPError, match=f"the model is in {dtype}: load it in float32"):
            compressor.collect(random_batches(build("ViT"), 8))


def test_a_module_that_is_none_of_transformers_is_pruned_and_saved_by_its_owner(tmp_path):
    compressor = CAPCompressor(nn.Sequential(nn.Linear(8, 8)), CAPConfig(method="magnitude"), disable_tqdm=True)
    assert compressor.prune(0.5).num_zeros == 32
    for call in (compressor.save_pretrained, lambda folder: export_onnx(compressor.model, folder)):
        with pytest.raises(CAPError, match="Sequential is no model of transformers: load it with AutoModelFor"):
            call(tmp_path / "out")
    with pytest.raises(CAPError, match="Sequential takes no pixel_values"):
        CAPCompressor(compressor.model).collect([{"pixel_values": torch.zeros(2, 8)}])
    assert not list(tmp_path.iterdir())


def test_what_quantize_int8_makes_is_no_input_of_what_works_on_weights(tmp_path):
    pytest.importorskip("torchao")
    quantize_int8(build("ViT")).save_pretrained(tmp_path / "int8")
    model = type(build("ViT")).from_pretrained(tmp_path / "int8")
    for name, call in documented_calls(tmp_path).items():
        with pytest.raises(CAPError, match=r"are quantised \(torchao\): load the checkpoint in floating point"):
            call(model)
            pytest.fail(f"{name} took it")


def test_onnx_is_in_float32(tmp_path):
    with pytest.raises(CAPError, match="ONNX Runtime computes in float32: load the model with"):
        export_onnx(build("ViT").bfloat16(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_in_half_precision_is_found():
    """The model's own dtype is that of its first parameter."""
    model = build("ViT")
    model.vit.layers.half()
    compressor = CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True)
    with pytest.raises(CAPError, match="the model is in torch.float16"):
        compressor.collect(random_batches(model, 8))


def prepare(model, times=1):
    """Return a model as accelerate has it in a run in bfloat16; other tests of this process have runs in float32."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for _ in range(times):
        model = accelerator.prepare_model(model)
    AcceleratorState._reset_state()
    return model


@pytest.mark.parametrize("times", [1, 2])
def test_full_precision_is_the_models_own_and_autocast_comes_back(times):
    model, batch = build("ViT").eval(), {"pixel_values": torch.randn(8, 3, 8, 8)}
    with torch.no_grad():
        expected = model(**batch).logits
        # A trainer that evaluates before it trains prepares the model twice.
        prepare(model, times)
        rounded = model(**batch).logits
        with full_precision(model):
            assert torch.equal(model(**batch).logits, expected)
        assert not torch.equal(rounded, expected)
        assert torch.equal(model(**batch).logits, rounded)
        with pytest.raises(KeyboardInterrupt), full_precision(model):
            raise KeyboardInterrupt
        assert torch.equal(model(**batch).logits, rounded)


def test_full_precision_of_a_model_that_was_never_prepared_changes_nothing():
    model = build("ViT")
    with full_precision(model):
        assert "forward" not in vars(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("method", ["cap", "obs", "sparsegpt"])
def test_autocast_does_not_reach_the_gradients(method):
    """Neither the user's own around it nor what accelerate has put on the model."""
    weights = []
    for prepared, around in ((False, False), (False, True), (True, False), (True, True)):
        model = build("ViT")
        batches = random_batches(model, 8)
        given = prepare(model) if prepared else model
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            CAPCompressor(given, CAPConfig(num_grads=8, method=method), disable_tqdm=True).collect(batches).prune(0.5)
        weights.append(model.state_dict())
    for other in weights[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights[0].items())


def test_a_forward_of_the_users_own_stays():
    model = build("ViT")
    plain, pixels = model.forward, torch.randn(2, 3, 8, 8)
    model.forward = torch.autocast("cpu", torch.bfloat16)(lambda *args, **kwargs: plain(*args, **kwargs).to_tuple())
    before = model.forward
    with full_precision(model):
        (logits,) = model(pixel_values=pixels)
        assert torch.equal(logits, main_output(see(build("ViT"), {"pixel_values": pixels}))[1])
    assert model.forward is before


def test_autocast_in_the_models_own_code_is_refused():
    class Rounding(nn.Sequential):
        def forward(self, inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(inputs)

    model = with_part(Rounding)
    with pytest.raises(CAPError, match="computes in torch.bfloat16 with a weight in torch.float32, .* autocast out"):
        CAPCompressor(model, CAPConfig(num_grads=8), disable_tqdm=True).collect(random_batches(model, 8))
