// The bodies of torch.ops.dgls.*: check the tensors, turn them into addresses, one call to Rust.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "stable.h"

namespace dgls {

using Ints = std::vector<int64_t>;

std::tuple<Ints, Ints> op_plan(Ints tensor_bytes, Ints tensor_block, Ints order,
                               int64_t budget_bytes, int64_t min_stream_bytes);

std::string op_plan_json(std::string inputs);
int64_t op_create(Tensor arena, std::vector<Tensor> weights, Ints file_index, Ints file_offset,
                  Ints file_bytes, std::vector<std::string> files, Ints tensor_block, Ints order,
                  int64_t budget_bytes, int64_t min_stream_bytes, int64_t pinned_bytes,
                  int64_t staging_bytes, int64_t trace_uses, int64_t copy_bytes_per_s, bool poison,
                  std::string driver, int64_t faults, bool adapt, bool manual, Ints resident_blocks,
                  int64_t window, int64_t ram_bytes, int64_t page_cache_bytes, bool verify,
                  std::string names, int64_t encode, Ints encodable, int64_t encoded_bytes,
                  int64_t locked_bytes, std::optional<Tensor> decode_buffer, Ints encodable_fp8);

std::tuple<Ints, Ints> op_plan_for(int64_t engine, int64_t budget_bytes);
std::tuple<Ints, Ints> op_plan_in_force(int64_t engine);
void op_rebuild(int64_t engine, Tensor arena, int64_t budget_bytes);
void op_vacate(int64_t engine, Tensor nothing);
Ints op_layout(int64_t engine);
Ints op_order(int64_t engine);
void op_prefetch(int64_t engine);
int64_t op_wait(Tensor x, int64_t engine, int64_t block);
void op_release(Tensor x, int64_t engine, int64_t block);
void op_begin_pass(int64_t engine);
void op_end_pass(int64_t engine);
bool op_wants_rebuild(int64_t engine);
void op_reload(int64_t engine, int64_t block);
Ints op_stats(int64_t engine);
Ints op_host(int64_t engine);
void op_give_back(int64_t engine, int64_t bytes);
std::string op_errors(int64_t engine);
Ints op_trace(int64_t engine);
void op_destroy(int64_t engine);
int64_t op_driver_version();
double op_measure_copy(int64_t device, int64_t bytes, int64_t repeats, bool page_locked);
int64_t op_measure_page_lock(int64_t device, int64_t max_bytes);
Tensor op_encode(Tensor weights);
Tensor op_decode(Tensor encoded, int64_t elements);
int64_t op_current_stream(int64_t device);
void op_hand_over(int64_t engine, std::vector<Tensor> tensors);
void op_panic();

}  // namespace dgls
