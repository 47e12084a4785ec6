// A pretend accelerator: PyTorch's PrivateUse1 device with memory of its own that is really the host's.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <string>

namespace pretend {

constexpr c10::DeviceIndex DEVICES = 2;

// Memory of a result that a CPU kernel has made, as memory of a device.
c10::Storage adopt(const c10::Storage& storage, c10::Device device);
// The same for a storage that was lent to a CPU kernel and got other memory there.
void take_memory(const c10::Storage& owner, const c10::Storage& from, c10::Device device);

// The CPU's generator that draws for one of the device.
at::Generator host_generator(const at::Generator& generator);
const at::Generator& default_generator(c10::DeviceIndex device);

// What the device is asked to do, while somebody counts.
void count_launch(const std::string& name);
void count_transfer(const std::string& name);

// A CPU tensor in the same memory as a tensor of the device.
at::Tensor lend(const at::Tensor& tensor);

}  // namespace pretend
