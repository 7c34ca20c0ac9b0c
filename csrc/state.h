// An engine with the tensors whose memory it uses, and the table of engines by number.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "dgls/src/bridge.rs.h"
#include "fork.h"
#include "rust/cxx.h"
#include "stable.h"

namespace dgls {

struct Block;

// Members are destroyed from the last to the first: the engine ends its work on the device before
// the tensors that it reads and writes are given back.
struct State {
  State(Tensor arena_tensor, std::vector<Tensor> weight_tensors,
        std::optional<Tensor> buffer_tensor, int32_t device, rust::Box<Handle> handle)
      : arena(std::move(arena_tensor)),
        weights(std::move(weight_tensors)),
        decode_buffer(std::move(buffer_tensor)),
        stream_device(device),
        engine(std::move(handle)) {}

  // Whether another process made it, of which this one is a fork: the engine must not be touched,
  // since its threads are not here, and one of them may have had its lock.
  bool is_foreign() const { return born != forks(); }

  Tensor arena;
  std::vector<Tensor> weights;
  std::optional<Tensor> decode_buffer;
  // Device whose current stream torch is asked for; -1: the CPU computes.
  int32_t stream_device;
  // The hook whose tensors are bound to the arena now; guarded by the GIL.
  Block* active = nullptr;
  // Threads in a pre-hook that has asked the engine for weights; guarded by the GIL.
  std::vector<unsigned long> entering;
  // How often the addresses changed: views made for others must not be bound.
  std::atomic<uint64_t> layout{0};
  // How often the hooks themselves moved the version of a tensor; guarded by the GIL.
  std::unordered_map<const PyObject*, uint64_t> bumps;
  // Tensors that an op took for the hooks that are made next. Ops run without the GIL.
  std::mutex handed_mutex;
  std::vector<Tensor> handed;
  const uint64_t born = forks();
  rust::Box<Handle> engine;
};

// What a fork is told.
constexpr const char* kForked =
    "dgls: this process is a fork of the one that streams the model, and the threads that copy its "
    "weights are not here; call detach() in the fork to use the model there without its stream, or "
    "start processes with the method 'spawn'";

// Puts tensors where the next `take_handed` finds them.
void hand_over(State& state, std::vector<Tensor> tensors);
std::vector<Tensor> take_handed(State& state);

// Makes an engine known under a new number.
int64_t add_state(std::shared_ptr<State> state);

// The engine with this number; throws std::runtime_error if there is none, and in a fork.
std::shared_ptr<State> find_state(int64_t number);

// Whether the engine with this number was made before this process was forked off.
bool is_foreign(int64_t number);

// Forgets the number and closes the engine; does nothing for an unknown one, nor in a fork.
void drop_state(int64_t number);

}  // namespace dgls
