// The bodies of the ops.
#include "ops.h"

#include <limits>
#include <sstream>

#include "refuse.h"
#include "state.h"

namespace dgls {
namespace {

uint32_t narrow(int64_t value, const char* name) {
  if (value < 0 || value > std::numeric_limits<uint32_t>::max()) {
    refuse(std::string(name) + " must be in 0..2^32-1, got " + std::to_string(value));
  }
  return static_cast<uint32_t>(value);
}

// Bytes from the first to the last element, gaps included.
uint64_t span_bytes(const Tensor& tensor) {
  if (tensor.numel() == 0) return 0;
  uint64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += static_cast<uint64_t>(tensor.size(dim) - 1) * static_cast<uint64_t>(tensor.stride(dim));
  }
  return (last + 1) * tensor.element_size();
}

rust::Vec<uint32_t> blocks_of(const Ints& values, const char* name) {
  rust::Vec<uint32_t> blocks;
  blocks.reserve(values.size());
  for (int64_t value : values) blocks.push_back(narrow(value, name));
  return blocks;
}

std::tuple<Ints, Ints> facts_of(const PlanFacts& plan) {
  Ints resident(plan.resident.begin(), plan.resident.end());
  auto number = [](uint64_t value) { return static_cast<int64_t>(value); };
  auto nanoseconds = [](double seconds) {
    return seconds < 0 ? int64_t{-1} : static_cast<int64_t>(seconds * 1e9);
  };
  Ints facts = {number(plan.resident_bytes), number(plan.streamed_bytes), number(plan.ring_bytes),
                number(plan.arena_bytes),    number(plan.least_bytes),    plan.passes,
                nanoseconds(plan.period_s),  nanoseconds(plan.bound_s)};
  return {std::move(resident), std::move(facts)};
}

void check_bytes(const Tensor& tensor, const std::string& name) {
  int32_t dtype = -1;
  aoti_torch_get_dtype(tensor.get(), &dtype);
  if (tensor.dim() != 1 || dtype != aoti_torch_dtype_uint8() || !tensor.is_contiguous()) {
    refuse(name + " must be a contiguous uint8 tensor of one dimension");
  }
}

void set_decoding(EngineSpec& spec, int64_t encode, const Ints& encodable,
                  const Ints& encodable_fp8, int64_t encoded_bytes, int64_t locked_bytes,
                  const std::optional<Tensor>& buffer, const Tensor& arena) {
  if (encode < 0 || encode > 2) {
    refuse("encode must be 0 (never), 1 (where copies decide) or 2 (always), got " +
           std::to_string(encode));
  }
  spec.encode = static_cast<uint8_t>(encode);
  spec.encodable = blocks_of(encodable, "encodable");
  spec.encodable_fp8 = blocks_of(encodable_fp8, "encodable_fp8");
  spec.encoded_bytes = unsigned_of(encoded_bytes, "encoded_bytes");
  spec.locked_bytes = unsigned_of(locked_bytes, "locked_bytes");
  spec.decode_address = spec.decode_bytes = 0;
  if (!buffer) return;
  check_bytes(*buffer, "decode_buffer");
  if (buffer->is_cpu() != arena.is_cpu() ||
      (!arena.is_cpu() && buffer->get_device_index() != arena.get_device_index())) {
    refuse("decode_buffer must be on the device of the arena");
  }
  spec.decode_address = reinterpret_cast<uint64_t>(buffer->data_ptr());
  spec.decode_bytes = static_cast<uint64_t>(buffer->numel());
}

int32_t probed_device(int64_t device) {
  if (device < -1 || device > std::numeric_limits<int16_t>::max()) {
    refuse("device must be a CUDA ordinal, or -1 for the CPU, got " + std::to_string(device));
  }
  return static_cast<int32_t>(device);
}

// Tensors in memory come first, then those of the files.
rust::Vec<TensorSpec> specs_of(const std::vector<Tensor>& weights, const Ints& file_index,
                               const Ints& file_offset, const Ints& file_bytes,
                               const Ints& tensor_block, size_t file_count) {
  if (file_index.size() != file_offset.size() || file_index.size() != file_bytes.size()) {
    refuse("file_index, file_offset and file_bytes must have the same length");
  }
  if (tensor_block.size() != weights.size() + file_index.size()) {
    refuse("tensor_block must name a block for each of the " +
           std::to_string(weights.size() + file_index.size()) + " tensors, got " +
           std::to_string(tensor_block.size()));
  }
  rust::Vec<TensorSpec> specs;
  specs.reserve(tensor_block.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!weights[i].is_cpu()) refuse("weight " + std::to_string(i) + " must be a CPU tensor");
    specs.push_back(TensorSpec{narrow(tensor_block[i], "tensor_block"), span_bytes(weights[i]), -1,
                               reinterpret_cast<uint64_t>(weights[i].data_ptr())});
  }
  for (size_t i = 0; i < file_index.size(); ++i) {
    if (file_index[i] < 0 || static_cast<size_t>(file_index[i]) >= file_count) {
      refuse("file_index must be in 0.." + std::to_string(file_count) + ", got " +
             std::to_string(file_index[i]));
    }
    specs.push_back(TensorSpec{narrow(tensor_block[weights.size() + i], "tensor_block"),
                               unsigned_of(file_bytes[i], "file_bytes"),
                               static_cast<int32_t>(file_index[i]),
                               unsigned_of(file_offset[i], "file_offset")});
  }
  return specs;
}

int32_t device_of(const Tensor& arena, const std::string& driver) {
  if (driver == "auto") return arena.is_cpu() ? -1 : arena.get_device_index();
  if (driver == "host" && arena.is_cpu()) return -1;
  if (driver == "cuda") return arena.is_cpu() ? 0 : arena.get_device_index();
  refuse("driver must be auto, host (with an arena on the CPU) or cuda, got " + driver);
}

}  // namespace

std::tuple<Ints, Ints> op_plan(Ints tensor_bytes, Ints tensor_block, Ints order,
                               int64_t budget_bytes, int64_t min_stream_bytes) {
  if (tensor_bytes.size() != tensor_block.size()) {
    refuse("tensor_bytes and tensor_block must have the same length");
  }
  rust::Vec<TensorSpec> specs;
  for (size_t i = 0; i < tensor_bytes.size(); ++i) {
    specs.push_back(TensorSpec{narrow(tensor_block[i], "tensor_block"),
                               unsigned_of(tensor_bytes[i], "tensor_bytes"), -1, 0});
  }
  return facts_of(make_plan(specs, blocks_of(order, "order"), unsigned_of(budget_bytes, "budget"),
                            unsigned_of(min_stream_bytes, "min_stream_bytes")));
}

std::string op_plan_json(std::string inputs) {
  return std::string(plan_json(inputs));
}

int64_t op_create(Tensor arena, std::vector<Tensor> weights, Ints file_index, Ints file_offset,
                  Ints file_bytes, std::vector<std::string> files, Ints tensor_block, Ints order,
                  int64_t budget_bytes, int64_t min_stream_bytes, int64_t pinned_bytes,
                  int64_t staging_bytes, int64_t trace_uses, int64_t copy_bytes_per_s, bool poison,
                  std::string driver, int64_t faults, bool adapt, bool manual, Ints resident_blocks,
                  int64_t window, int64_t ram_bytes, int64_t page_cache_bytes, bool verify,
                  std::string names, int64_t encode, Ints encodable, int64_t encoded_bytes,
                  int64_t locked_bytes, std::optional<Tensor> decode_buffer, Ints encodable_fp8) {
  check_bytes(arena, "the arena");
  EngineSpec spec;
  spec.device = device_of(arena, driver);
  const int32_t stream_device = arena.is_cpu() ? -1 : spec.device;
  current_stream(stream_device);  // refuses now rather than in the first forward
  spec.arena_address = reinterpret_cast<uint64_t>(arena.data_ptr());
  spec.arena_bytes = static_cast<uint64_t>(arena.numel());
  spec.budget_bytes = unsigned_of(budget_bytes, "budget_bytes");
  spec.tensors = specs_of(weights, file_index, file_offset, file_bytes, tensor_block, files.size());
  spec.order = blocks_of(order, "order");
  for (const std::string& file : files) spec.files.push_back(rust::String(file));
  spec.min_stream_bytes = unsigned_of(min_stream_bytes, "min_stream_bytes");
  spec.pinned_bytes = unsigned_of(pinned_bytes, "pinned_bytes");
  spec.ram_bytes = unsigned_of(ram_bytes, "ram_bytes");
  spec.page_cache_bytes = unsigned_of(page_cache_bytes, "page_cache_bytes");
  spec.staging_bytes = unsigned_of(staging_bytes, "staging_bytes");
  spec.trace_uses = unsigned_of(trace_uses, "trace_uses");
  spec.copy_bytes_per_s = unsigned_of(copy_bytes_per_s, "copy_bytes_per_s");
  spec.poison = poison;
  spec.adapt = adapt;
  spec.manual = manual;
  spec.resident_blocks = blocks_of(resident_blocks, "resident_blocks");
  spec.window = window;
  spec.verify = verify;
  std::istringstream lines(names);
  for (std::string name; std::getline(lines, name);)
    spec.names.push_back(rust::String::lossy(name));
  spec.faults = narrow(faults, "faults");
  set_decoding(spec, encode, encodable, encodable_fp8, encoded_bytes, locked_bytes, decode_buffer,
               arena);
  return add_state(std::make_shared<State>(std::move(arena), std::move(weights),
                                           std::move(decode_buffer), stream_device,
                                           make_engine(spec)));
}

std::tuple<Ints, Ints> op_plan_for(int64_t engine, int64_t budget_bytes) {
  return facts_of(find_state(engine)->engine->plan_for(unsigned_of(budget_bytes, "budget_bytes")));
}

std::tuple<Ints, Ints> op_plan_in_force(int64_t engine) {
  return facts_of(find_state(engine)->engine->plan_in_force());
}

void op_rebuild(int64_t engine, Tensor arena, int64_t budget_bytes) {
  check_bytes(arena, "the arena");
  const auto state = find_state(engine);
  if (arena.is_cpu() != state->arena.is_cpu()) refuse("the new arena is on another device");
  const uint64_t budget = unsigned_of(budget_bytes, "budget_bytes");
  ++state->layout;  // before it changes: another thread may enter a block right afterwards
  try {
    state->engine->rebuild(budget, reinterpret_cast<uint64_t>(arena.data_ptr()),
                           static_cast<uint64_t>(arena.numel()),
                           current_stream(state->stream_device));
  } catch (...) {
    --state->layout;
    throw;
  }
  state->arena = std::move(arena);
}

void op_vacate(int64_t engine, Tensor nothing) {
  const auto state = find_state(engine);
  if (nothing.numel() != 0) refuse("instead of its arena an engine takes an empty tensor");
  if (nothing.is_cpu() != state->arena.is_cpu()) refuse("the empty tensor is on another device");
  state->engine->vacate();
  state->arena = std::move(nothing);
}

Ints op_layout(int64_t engine) {
  Ints flat;
  for (const UseLayout& use : find_state(engine)->engine->layout()) {
    flat.push_back(use.block);
    flat.push_back(static_cast<int64_t>(use.offsets.size()));
    flat.insert(flat.end(), use.offsets.begin(), use.offsets.end());
  }
  return flat;
}

Ints op_order(int64_t engine) {
  const auto order = find_state(engine)->engine->order();
  return Ints(order.begin(), order.end());
}

void op_prefetch(int64_t engine) {
  const auto state = find_state(engine);
  state->engine->prefetch(current_stream(state->stream_device));
}

int64_t op_wait(Tensor, int64_t engine, int64_t block) {
  const auto state = find_state(engine);
  return state->engine->enter(narrow(block, "block"), current_stream(state->stream_device));
}

void op_release(Tensor, int64_t engine, int64_t) {
  const auto state = find_state(engine);
  state->engine->exit(current_stream(state->stream_device));
}

void op_begin_pass(int64_t engine) {
  find_state(engine)->engine->begin_pass();
}

void op_end_pass(int64_t engine) {
  find_state(engine)->engine->end_pass();
}

bool op_wants_rebuild(int64_t engine) {
  return find_state(engine)->engine->wants_rebuild();
}

void op_reload(int64_t engine, int64_t block) {
  find_state(engine)->engine->reload(narrow(block, "block"));
}

Ints op_host(int64_t engine) {
  Ints numbers;
  for (uint64_t value : find_state(engine)->engine->host_facts()) {
    numbers.push_back(static_cast<int64_t>(value));
  }
  return numbers;
}

void op_give_back(int64_t engine, int64_t bytes) {
  find_state(engine)->engine->give_back(unsigned_of(bytes, "bytes"));
}

Ints op_stats(int64_t engine) {
  const StatsFacts stats = find_state(engine)->engine->stats();
  Ints flat;
  for (uint64_t value :
       {stats.uses, stats.on_demand, stats.mispredicted, stats.rebuilds, stats.errors, stats.passes,
        stats.bytes, stats.copies, stats.pinned_bytes, stats.pin_failures, stats.staging_bytes,
        stats.adopted, stats.verified_bytes, stats.mismatches, stats.encoded_bytes,
        stats.decoded_bytes, stats.code_bytes}) {
    flat.push_back(static_cast<int64_t>(value));
  }
  return flat;
}

std::string op_errors(int64_t engine) {
  std::string lines;
  for (const rust::String& error : find_state(engine)->engine->last_errors()) {
    lines.append(error.data(), error.size()).push_back('\n');
  }
  return lines;
}

Ints op_trace(int64_t engine) {
  Ints flat;
  for (const RecordFacts& record : find_state(engine)->engine->records()) {
    for (uint64_t value : {record.number, uint64_t{record.block}, record.bytes,
                           record.stretch_bytes, record.copy_start_ns, record.copy_end_ns,
                           record.wait_ns, record.start_ns, record.end_ns}) {
      flat.push_back(static_cast<int64_t>(value));
    }
  }
  return flat;
}

void op_destroy(int64_t engine) {
  drop_state(engine);
}

int64_t op_driver_version() {
  return cuda_driver_version();
}

double op_measure_copy(int64_t device, int64_t bytes, int64_t repeats, bool page_locked) {
  return measure_copy(probed_device(device), unsigned_of(bytes, "bytes"),
                      narrow(repeats, "repeats"), page_locked);
}

int64_t op_measure_page_lock(int64_t device, int64_t max_bytes) {
  return static_cast<int64_t>(
      measure_page_lock(probed_device(device), unsigned_of(max_bytes, "max_bytes")));
}

int64_t op_current_stream(int64_t device) {
  return static_cast<int64_t>(current_stream(static_cast<int32_t>(device)));
}

// Only an op is given tensors as torch's C functions take them; the hooks are made in Python.
void op_hand_over(int64_t engine, std::vector<Tensor> tensors) {
  hand_over(*find_state(engine), std::move(tensors));
}

void op_panic() {
  panic_for_test();
}

}  // namespace dgls
