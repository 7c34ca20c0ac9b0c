// The table of engines.
#include "state.h"

#include <stdexcept>
#include <string>

namespace dgls {
namespace {

struct Table {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<State>> states;
  int64_t next = 1;
};

// Never destroyed: at process exit the driver may be gone before static objects are.
Table& table() {
  static Table* const instance = [] {
    Table* const made = new Table;
    watch_forks(made->mutex);
    return made;
  }();
  return *instance;
}

}  // namespace

void hand_over(State& state, std::vector<Tensor> tensors) {
  std::lock_guard<std::mutex> lock(state.handed_mutex);
  state.handed.swap(tensors);
}

std::vector<Tensor> take_handed(State& state) {
  std::vector<Tensor> taken;
  std::lock_guard<std::mutex> lock(state.handed_mutex);
  taken.swap(state.handed);
  return taken;
}

int64_t add_state(std::shared_ptr<State> state) {
  std::lock_guard<std::mutex> lock(table().mutex);
  const int64_t number = table().next++;
  table().states.emplace(number, std::move(state));
  return number;
}

std::shared_ptr<State> find_state(int64_t number) {
  std::lock_guard<std::mutex> lock(table().mutex);
  const auto found = table().states.find(number);
  if (found == table().states.end()) {
    throw std::runtime_error("dgls engine " + std::to_string(number) +
                             " does not exist; it was never created, or was destroyed");
  }
  if (found->second->is_foreign()) throw std::runtime_error(kForked);
  return found->second;
}

bool is_foreign(int64_t number) {
  std::lock_guard<std::mutex> lock(table().mutex);
  const auto found = table().states.find(number);
  return found != table().states.end() && found->second->is_foreign();
}

void drop_state(int64_t number) {
  std::shared_ptr<State> state;
  {
    std::lock_guard<std::mutex> lock(table().mutex);
    const auto found = table().states.find(number);
    // In a fork it stays for good: to destroy it would join threads that are not there.
    if (found == table().states.end() || found->second->is_foreign()) return;
    state = std::move(found->second);
    table().states.erase(found);
  }
  // Hooks may still hold the state; closed, it refuses their calls.
  state->engine->close();
}

}  // namespace dgls
