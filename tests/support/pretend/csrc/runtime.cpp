// Memory, devices, streams, random numbers and counters.
#include "pretend.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

namespace pretend {
namespace {

thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex checked(c10::DeviceIndex index) {
  const c10::DeviceIndex device = index < 0 ? current : index;
  TORCH_CHECK(device < DEVICES, "pretend has ", int(DEVICES), " devices, there is no number ", int(device));
  return device;
}

struct Usage {
  std::mutex mutex;
  c10::CachingAllocator::Stat bytes, blocks;
  size_t capacity = size_t(8) << 30;

  void take(size_t size, c10::DeviceIndex device) {
    const std::lock_guard<std::mutex> lock(mutex);
    TORCH_CHECK_WITH(OutOfMemoryError, size_t(bytes.current) + size <= capacity, "pretend out of memory. Tried to allocate ",
                     size, " bytes. Device ", int(device), " has ", capacity, " bytes of which ", bytes.current,
                     " are in use");
    bytes.increase(size);
    blocks.increase(1);
  }

  void give(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex);
    bytes.decrease(size);
    blocks.decrease(1);
  }
};

std::array<Usage, DEVICES> usage;

// One piece of memory of a device: its own, or that of a CPU kernel's result.
struct Block {
  void* memory;
  size_t size;
  c10::DeviceIndex device;
  c10::Storage adopted;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  usage[block->device].give(block->size);
  if (!block->adopted) {
    c10::free_cpu(block->memory);
  }
  delete block;
}

c10::DataPtr data_of(Block* block) {
  return {block->memory, block, &release, c10::Device(c10::kPrivateUse1, block->device)};
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    usage[current].take(size, current);
    void* memory = size ? c10::alloc_cpu(size) : nullptr;
    if (size) {
      // NaN in every floating dtype, -1 in every integer: whoever relies on fresh memory sees it.
      std::memset(memory, 0xff, size);
    }
    return data_of(new Block{memory, size, current, c10::Storage()});
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    auto& used = usage[checked(device)];
    const std::lock_guard<std::mutex> lock(used.mutex);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*bytes)[0] = used.bytes;
    }
    for (auto* blocks : {&stats.allocation, &stats.segment, &stats.active}) {
      (*blocks)[0] = used.blocks;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    auto& used = usage[checked(device)];
    const std::lock_guard<std::mutex> lock(used.mutex);
    used.bytes.reset_accumulated();
    used.blocks.reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    auto& used = usage[checked(device)];
    const std::lock_guard<std::mutex> lock(used.mutex);
    used.bytes.reset_peak();
    used.blocks.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    auto& used = usage[checked(device)];
    const std::lock_guard<std::mutex> lock(used.mutex);
    return {used.capacity - size_t(used.bytes.current), used.capacity};
  }
};

Memory memory;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &memory)

// Host memory that is remembered as pinned.
struct Pinned final : c10::Allocator {
  static std::mutex mutex;
  static std::map<const char*, size_t> ranges;

  static void unpin(void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    ranges.erase(static_cast<char*>(data));
    c10::free_cpu(data);
  }
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(std::max<size_t>(size, 1));
    const std::lock_guard<std::mutex> lock(mutex);
    ranges[static_cast<char*>(data)] = std::max<size_t>(size, 1);
    return {data, data, &unpin, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
  static bool has(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto after = ranges.upper_bound(static_cast<const char*>(data));
    if (after == ranges.begin()) {
      return false;
    }
    --after;
    return static_cast<const char*>(data) < after->first + after->second;
  }
};

std::mutex Pinned::mutex;
std::map<const char*, size_t> Pinned::ranges;
Pinned pinned;

// Every stream is the default one, and all that was asked for is done at once.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Device here() const {
    return {c10::kPrivateUse1, current};
  }
  c10::Stream stream_of(c10::Device device) const {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kPrivateUse1, checked(device.index())));
  }
  c10::DeviceType type() const override {
    return c10::kPrivateUse1;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = here();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return here();
  }
  void setDevice(c10::Device device) const override {
    current = checked(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < DEVICES) {
      current = device.index();
    }
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream_of(device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_of(device);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream_of(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return stream_of(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream;
  }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void*, void*, c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return DEVICES;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// A generator of the device, whose numbers one of the CPU draws.
struct Generator final : c10::GeneratorImpl {
  at::Generator host;

  Generator(c10::DeviceIndex device, at::Generator drawing)
      : c10::GeneratorImpl(c10::Device(c10::kPrivateUse1, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host(std::move(drawing)) {}

  void set_current_seed(uint64_t seed) override {
    host.set_current_seed(seed);
  }
  void set_offset(uint64_t) override {
    TORCH_CHECK(false, "a pretend generator has no offset");
  }
  uint64_t get_offset() const override {
    TORCH_CHECK(false, "a pretend generator has no offset");
  }
  uint64_t current_seed() const override {
    return host.current_seed();
  }
  uint64_t seed() override {
    return host.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    return new Generator(device().index(), host.clone());
  }
};

at::Generator new_generator(c10::DeviceIndex device) {
  return at::make_generator<Generator>(checked(device), at::detail::createCPUGenerator());
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return DEVICES;
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    current = checked(device);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return std::exchange(current, checked(device));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current : exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return new_generator(device);
  }
  c10::Device getDeviceFromPtr(void*) const override {
    return {c10::kPrivateUse1, current};
  }
  bool isPinnedPtr(const void* data) const override {
    return Pinned::has(data);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    const c10::DeviceGuard guard(storage.device());
    auto fresh = memory.allocate(size);
    const size_t kept = std::min(size, storage.nbytes());
    if (kept) {
      std::memcpy(fresh.get(), storage.data(), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(size);
  }
};

// What was asked for since the count began.
std::mutex counting_mutex;
std::atomic<bool> counting{false};
std::map<std::string, int64_t> launches, transfers;

c10::Dict<std::string, int64_t> as_dict(const std::map<std::string, int64_t>& counts) {
  c10::Dict<std::string, int64_t> dict;
  const std::lock_guard<std::mutex> lock(counting_mutex);
  for (const auto& [name, count] : counts) {
    dict.insert(name, count);
  }
  return dict;
}

void set_counting(bool on) {
  const std::lock_guard<std::mutex> lock(counting_mutex);
  if (on) {
    launches.clear();
    transfers.clear();
  }
  counting = on;
}

void register_device() {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
}

int64_t get_device() {
  return current;
}

void set_device(int64_t device) {
  current = checked(c10::DeviceIndex(device));
}

void set_capacity(int64_t device, int64_t bytes) {
  auto& used = usage[checked(c10::DeviceIndex(device))];
  const std::lock_guard<std::mutex> lock(used.mutex);
  used.capacity = size_t(bytes);
}

void manual_seed(int64_t device, int64_t seed) {
  host_generator(default_generator(c10::DeviceIndex(device))).set_current_seed(uint64_t(seed));
}

at::Tensor get_rng_state(int64_t device) {
  return default_generator(c10::DeviceIndex(device)).get_state();
}

void set_rng_state(int64_t device, const at::Tensor& state) {
  at::Generator generator = default_generator(c10::DeviceIndex(device));
  generator.set_state(state);
}

}  // namespace

c10::Storage adopt(const c10::Storage& storage, c10::Device device) {
  auto* block = new Block{const_cast<void*>(storage.data()), storage.nbytes(), device.index(), storage};
  try {
    usage[device.index()].take(block->size, device.index());
  } catch (...) {
    delete block;
    throw;
  }
  return {c10::Storage::use_byte_size_t(), block->size, data_of(block), &memory, /*resizable=*/true};
}

void take_memory(const c10::Storage& owner, const c10::Storage& from, c10::Device device) {
  c10::Storage adopted = adopt(from, device);
  owner.unsafeGetStorageImpl()->set_nbytes(adopted.nbytes());
  owner.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(adopted.unsafeGetStorageImpl()->mutable_data_ptr()));
}

at::Generator host_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().is_privateuseone(), "Expected a 'pretend' device type for generator but found '",
              generator.device().type(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->host;
}

const at::Generator& default_generator(c10::DeviceIndex device) {
  static const std::array<at::Generator, DEVICES> generators{new_generator(0), new_generator(1)};
  return generators[checked(device)];
}

void count_launch(const std::string& name) {
  if (counting) {
    const std::lock_guard<std::mutex> lock(counting_mutex);
    ++launches[name];
  }
}

void count_transfer(const std::string& name) {
  if (counting) {
    const std::lock_guard<std::mutex> lock(counting_mutex);
    ++transfers[name];
  }
}

TORCH_LIBRARY(pretend, m) {
  m.def("register_device() -> ()", &register_device);
  m.def("get_device() -> int", &get_device);
  m.def("set_device(int device) -> ()", &set_device);
  m.def("set_capacity(int device, int bytes) -> ()", &set_capacity);
  m.def("manual_seed(int device, int seed) -> ()", &manual_seed);
  m.def("get_rng_state(int device) -> Tensor", &get_rng_state);
  m.def("set_rng_state(int device, Tensor state) -> ()", &set_rng_state);
  m.def("set_counting(bool on) -> ()", &set_counting);
  m.def("launches() -> Dict(str, int)", [] { return as_dict(launches); });
  m.def("transfers() -> Dict(str, int)", [] { return as_dict(transfers); });
  m.def("host(Tensor self) -> Tensor", &lend);
}

}  // namespace pretend
