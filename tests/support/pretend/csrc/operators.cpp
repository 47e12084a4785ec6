// Operators: views and memory are the device's own, all else runs on the CPU, in the same memory.
#include "pretend.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/stack.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <set>

namespace pretend {
namespace {

const c10::DispatchKeySet DEVICE_KEYS(c10::DispatchKey::PrivateUse1);

void keep_alive(void* context) {
  delete static_cast<c10::Storage*>(context);
}

// A tensor with the shape of another one, over some storage.
at::Tensor tensor_over(c10::Storage storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  if (like.is_conj()) {
    tensor._set_conj(true);
  }
  if (like.is_neg()) {
    tensor._set_neg(true);
  }
  return tensor;
}

}  // namespace

at::Tensor lend(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_privateuseone() && tensor.layout() == at::kStrided, "not a dense tensor of the device");
  const c10::Storage& owner = tensor.storage();
  c10::DataPtr data(const_cast<void*>(owner.data()), new c10::Storage(owner), &keep_alive, c10::Device(c10::kCPU));
  // Resizable: an `out` of the wrong size gets other memory, which its owner then takes over.
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner.nbytes(), std::move(data), c10::GetCPUAllocator(), true);
  return tensor_over(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
}

namespace {

// The tensors that one call of an operator was given.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : op_(op), name_(op.schema().name()) {}

  c10::Device device = c10::Device(c10::kCPU);

  // The first tensor of the device says which one it is.
  void see(const c10::IValue& value, const char* argument) {
    each(value, [&](const at::Tensor& tensor) {
      if (!tensor.is_privateuseone()) {
        return;
      }
      if (device.is_privateuseone() && device != tensor.device()) {
        refuse(tensor, argument);
      }
      device = tensor.device();
    });
    if (value.isDevice() && value.toDevice().is_privateuseone() && !device.is_privateuseone()) {
      const auto asked = value.toDevice();
      device = asked.has_index() ? asked : c10::impl::getDeviceGuardImpl(asked.type())->getDevice();
    }
  }

  c10::IValue to_host(const c10::IValue& value, const c10::Argument& argument) {
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (value.isTensor()) {
      return host_of(value.toTensor(), argument, written);
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& tensor : value.toTensorVector()) {
        list.push_back(host_of(tensor, argument, written));
      }
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::make_optional(host_of(*tensor, argument, written)) : std::nullopt);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().is_privateuseone()) {
      return c10::Device(c10::kCPU);
    }
    if (value.isGenerator()) {
      return host_generator(value.toGenerator());
    }
    if (value.isNone() && takes_generator(argument)) {
      return host_generator(default_generator(device.index()));
    }
    return value;
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) {
      return device_of(value.toTensor());
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const auto& tensor : value.toTensorVector()) {
        list.push_back(device_of(tensor));
      }
      return list;
    }
    return value;
  }

  // What a CPU kernel did to the shape or the memory of what it was lent.
  void settle() {
    for (const auto& [owner, lent, memory] : lent_) {
      if (lent.storage().data() != memory) {
        take_memory(owner.storage(), lent.storage(), owner.device());
      }
      if (owner.sizes() != lent.sizes() || owner.strides() != lent.strides()) {
        owner.unsafeGetTensorImpl()->set_sizes_and_strides(lent.sizes(), lent.strides(), lent.storage_offset());
      }
    }
  }

  static bool takes_generator(const c10::Argument& argument) {
    const auto* type = argument.type()->castRaw<c10::OptionalType>();
    return type != nullptr && type->getElementType()->kind() == c10::TypeKind::GeneratorType;
  }

 private:
  struct Lent {
    at::Tensor owner, lent;
    const void* memory;
  };

  template <typename Function>
  static void each(const c10::IValue& value, const Function& function) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) {
        function(value.toTensor());
      }
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) {
        function(tensor);
      }
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (tensor && tensor->defined()) {
          function(*tensor);
        }
      }
    }
  }

  at::Tensor host_of(const at::Tensor& tensor, const c10::Argument& argument, bool written) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!tensor.is_privateuseone()) {
      if (written || !may_be_on_the_cpu(tensor, argument)) {
        refuse(tensor, argument.name().c_str());
      }
      return tensor;
    }
    const at::Tensor host = lend(tensor);
    lent_.push_back({tensor, host, host.storage().data()});
    return host;
  }

  // As CUDA: numbers of pointwise operators, and the indices and the number of an indexing one.
  bool may_be_on_the_cpu(const at::Tensor& tensor, const c10::Argument& argument) const {
    static const std::set<std::string> indexing{"aten::index", "aten::index_put_", "aten::index_put",
                                                "aten::_index_put_impl_", "aten::_unsafe_index"};
    static const std::set<std::string> filling{"aten::fill", "aten::fill_", "aten::masked_fill", "aten::masked_fill_"};
    if (!tensor.is_cpu()) {
      return false;
    }
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
      return true;
    }
    if (indexing.count(name_)) {
      return argument.name() == "indices" || (argument.name() == "values" && tensor.dim() == 0);
    }
    return tensor.dim() == 0 && (op_.hasTag(at::Tag::pointwise) || filling.count(name_));
  }

  [[noreturn]] void refuse(const at::Tensor& tensor, const char* argument) const {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ",
                tensor.device(), "! (when checking argument ", argument, " of ", name_, ")");
  }

  at::Tensor device_of(const at::Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    TORCH_CHECK(tensor.layout() == at::kStrided, name_, " gives a tensor that is not dense");
    const auto* storage = tensor.storage().unsafeGetStorageImpl();
    for (const auto& [owner, lent, memory] : lent_) {
      if (tensor.unsafeGetTensorImpl() == lent.unsafeGetTensorImpl()) {
        return owner;
      }
      if (storage == lent.storage().unsafeGetStorageImpl()) {
        return tensor_over(owner.storage(), DEVICE_KEYS, tensor);
      }
    }
    for (const auto& [made, adopted] : adopted_) {
      if (storage == made.unsafeGetStorageImpl()) {
        return tensor_over(adopted, DEVICE_KEYS, tensor);
      }
    }
    adopted_.emplace_back(tensor.storage(), adopt(tensor.storage(), device));
    return tensor_over(adopted_.back().second, DEVICE_KEYS, tensor);
  }

  const c10::OperatorHandle& op_;
  const std::string name_;
  std::vector<Lent> lent_;
  std::vector<std::pair<c10::Storage, c10::Storage>> adopted_;
};

// Operators without a generator in their arguments draw from the default one: the device's, not the CPU's.
class DrawsFromDevice {
 public:
  DrawsFromDevice(const c10::OperatorHandle& op, c10::Device device) {
    if (!op.hasTag(at::Tag::nondeterministic_seeded)) {
      return;
    }
    for (const auto& argument : op.schema().arguments()) {
      if (Call::takes_generator(argument)) {
        return;
      }
    }
    cpu_ = at::detail::getDefaultCPUGenerator();
    own_ = default_generator(device.index());
    before_ = cpu_.get_state();
    cpu_.set_state(own_.get_state());
  }
  ~DrawsFromDevice() {
    if (cpu_.defined()) {
      own_.set_state(cpu_.get_state());
      cpu_.set_state(before_);
    }
  }
  DrawsFromDevice(const DrawsFromDevice&) = delete;
  DrawsFromDevice& operator=(const DrawsFromDevice&) = delete;

 private:
  at::Generator cpu_, own_;
  at::Tensor before_;
};

// What CUDA has no kernel for, and the CPU has.
void check_kernel(const std::string& name, const torch::jit::Stack& stack, size_t arguments) {
  static const std::set<std::string> products{"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmv",
                                              "aten::addmm_", "aten::baddbmm_", "aten::addmv_", "aten::mv"};
  const bool product = products.count(name) != 0;
  const bool solver = name.rfind("aten::linalg_", 0) == 0 || name.rfind("aten::_linalg_", 0) == 0 ||
      name.rfind("aten::cholesky", 0) == 0 || name == "aten::triangular_solve";
  if (!product && !solver) {
    return;
  }
  static const std::set<std::string> elementwise{"aten::linalg_vector_norm"};
  for (size_t i = stack.size() - arguments; i < stack.size(); ++i) {
    if (!stack[i].isTensor() || !stack[i].toTensor().defined()) {
      continue;
    }
    const auto type = stack[i].toTensor().scalar_type();
    TORCH_CHECK_NOT_IMPLEMENTED(!product || at::isFloatingType(type) || at::isComplexType(type), "\"", name.substr(6),
                                "_pretend\" not implemented for '", type, "'");
    TORCH_CHECK_NOT_IMPLEMENTED(!solver || elementwise.count(name) || !at::isReducedFloatingType(type), "\"",
                                name.substr(6), "_pretend\" not implemented for '", type, "'");
  }
}

// What the host waits for: its size or its value depends on what the device computes.
bool waits(const std::string& name) {
  static const std::set<std::string> waiting{"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
                                             "aten::masked_select", "aten::_unique2", "aten::is_nonzero",
                                             "aten::unique_dim", "aten::unique_consecutive"};
  return waiting.count(name) != 0;
}

void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const std::string& name = schema.name();
  TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("aten::", 0) == 0, "Could not run '", name,
                              "' with arguments from the 'pretend' backend.");
  check_kernel(name, *stack, arguments.size());
  const size_t begin = stack->size() - arguments.size();
  Call call(op);
  for (size_t i = 0; i < arguments.size(); ++i) {
    call.see((*stack)[begin + i], arguments[i].name().c_str());
  }
  TORCH_CHECK(call.device.is_privateuseone(), name, " was sent to the device without any tensor of it");
  for (size_t i = 0; i < arguments.size(); ++i) {
    (*stack)[begin + i] = call.to_host((*stack)[begin + i], arguments[i]);
  }
  if (waits(name)) {
    count_transfer(name);
  } else {
    count_launch(name);
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
    const DrawsFromDevice draws(op, call.device);
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.settle();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = call.to_device((*stack)[i]);
  }
}

void check_options(std::optional<at::Layout> layout, std::optional<bool> pin_memory) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided, "pretend has dense tensors alone");
  TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory), "Only dense CPU tensors can be pinned");
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device> device, std::optional<bool> pin_memory,
                 std::optional<at::MemoryFormat> format) {
  check_options(layout, pin_memory);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, c10::GetAllocator(c10::kPrivateUse1), DEVICE_KEYS,
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device> device,
                         std::optional<bool> pin_memory) {
  check_options(layout, pin_memory);
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, c10::GetAllocator(c10::kPrivateUse1), DEVICE_KEYS,
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

at::Tensor& set_(at::Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, c10::GetAllocator(c10::kPrivateUse1), true);
  return at::native::set_storage_cpu_(self, none, 0, {0}, {});
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool) {
  if (self.is_privateuseone() && dst.is_privateuseone()) {
    count_launch("aten::copy_");
  } else {
    count_transfer(dst.is_cpu() ? "device to host" : "host to device");
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  (dst.is_cpu() ? dst : lend(dst)).copy_(self.is_cpu() ? self : lend(self));
  return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}

// So that `module.to(device)` keeps the parameters it has, as with CUDA.
bool compatible(const at::Tensor& self, const at::Tensor& from) {
  const auto dense = [](const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && (tensor.is_cpu() || tensor.is_privateuseone());
  };
  return dense(self) && dense(from);
}

at::Tensor on_device(const at::Tensor& made, c10::Device device) {
  return made.defined() ? tensor_over(adopt(made.storage(), device), DEVICE_KEYS, made) : made;
}

void check_same(const at::Tensor& first, const at::Tensor& other) {
  TORCH_CHECK(!other.defined() || first.device() == other.device(),
              "Expected all tensors to be on the same device, but found at least two devices, ", first.device(), " and ",
              other.device(), "! (in a convolution)");
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  check_same(input, weight);
  std::optional<at::Tensor> host_bias;
  if (bias && bias->defined()) {
    check_same(input, *bias);
    host_bias = lend(*bias);
  }
  count_launch("aten::convolution");
  const at::AutoDispatchBelowADInplaceOrView below;
  return on_device(at::convolution(lend(input), lend(weight), host_bias, stride, padding, dilation, transposed,
                                   output_padding, groups),
                   input.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  check_same(gradient, input);
  check_same(gradient, weight);
  count_launch("aten::convolution_backward");
  const at::AutoDispatchBelowADInplaceOrView below;
  const int64_t outputs = transposed ? weight.size(1) * groups : weight.size(0);
  auto [to_input, to_weight, to_bias] =
      at::convolution_backward(lend(gradient), lend(input), lend(weight), at::IntArrayRef{outputs}, stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  return {on_device(to_input, input.device()), on_device(to_weight, input.device()),
          on_device(to_bias, input.device())};
}

void record_stream(at::Tensor&, at::Stream) {}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("set_", set_);
  m.impl("set_.source_Storage", TORCH_FN(static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(at::native::set_)));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_has_compatible_shallow_copy_type", compatible);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("record_stream", record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

}  // namespace pretend
