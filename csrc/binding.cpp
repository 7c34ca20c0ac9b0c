// Schemas of torch.ops.dgls.*, the table of their bodies, and the module with the hooks.
#include "hooks.h"
#include "ops.h"

// Sizes are bytes. `order` lists blocks in order of use in one pass. Docs:
// torch_ext/dgls_torch/ops.py
STABLE_TORCH_LIBRARY(dgls, m) {
  m.def(
      "plan(int[] tensor_bytes, int[] tensor_block, int[] order, int budget_bytes, "
      "int min_stream_bytes=0) -> (int[], int[])");
  m.def("plan.json(str inputs) -> str");
  m.def(
      "create(Tensor arena, Tensor[] weights, int[] file_index, int[] file_offset, "
      "int[] file_bytes, str[] files, int[] tensor_block, int[] order, int budget_bytes, "
      "int min_stream_bytes=0, int pinned_bytes=0, int staging_bytes=67108864, "
      "int trace_uses=0, int copy_bytes_per_s=0, bool poison=False, str driver='auto', "
      "int faults=0, bool adapt=False, bool manual=False, int[] resident_blocks=[], "
      "int window=-1, int ram_bytes=0, int page_cache_bytes=0, bool verify=False, "
      "str names='', int encode=0, int[] encodable=[], int encoded_bytes=0, "
      "int locked_bytes=0, Tensor? decode_buffer=None, int[] encodable_fp8=[]) -> int");
  m.def("plan_for(int engine, int budget_bytes) -> (int[], int[])");
  m.def("plan_in_force(int engine) -> (int[], int[])");
  m.def("rebuild(int engine, Tensor arena, int budget_bytes) -> ()");
  m.def("vacate(int engine, Tensor nothing) -> ()");
  m.def("layout(int engine) -> int[]");
  m.def("order(int engine) -> int[]");
  m.def("prefetch(int engine) -> ()");
  m.def("wait(Tensor(a!) x, int engine, int block) -> int");
  m.def("release(Tensor(a!) x, int engine, int block) -> ()");
  m.def("begin_pass(int engine) -> ()");
  m.def("end_pass(int engine) -> ()");
  m.def("wants_rebuild(int engine) -> bool");
  m.def("reload(int engine, int block) -> ()");
  m.def("stats(int engine) -> int[]");
  m.def("host(int engine) -> int[]");
  m.def("give_back(int engine, int bytes) -> ()");
  m.def("errors(int engine) -> str");
  m.def("trace(int engine) -> int[]");
  m.def("destroy(int engine) -> ()");
  m.def("driver_version() -> int");
  m.def("measure_copy(int device, int bytes, int repeats, bool page_locked) -> float");
  m.def("measure_page_lock(int device, int max_bytes) -> int");
  m.def("encode(Tensor weights) -> Tensor");
  m.def("decode(Tensor encoded, int elements) -> Tensor");
  m.def("_current_stream(int device) -> int");
  m.def("_hand_over(int engine, Tensor[] tensors) -> ()");
  m.def("_panic() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dgls, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&dgls::op_plan));
  m.impl("plan.json", TORCH_BOX(&dgls::op_plan_json));
  m.impl("create", TORCH_BOX(&dgls::op_create));
  m.impl("plan_for", TORCH_BOX(&dgls::op_plan_for));
  m.impl("plan_in_force", TORCH_BOX(&dgls::op_plan_in_force));
  m.impl("rebuild", TORCH_BOX(&dgls::op_rebuild));
  m.impl("vacate", TORCH_BOX(&dgls::op_vacate));
  m.impl("layout", TORCH_BOX(&dgls::op_layout));
  m.impl("order", TORCH_BOX(&dgls::op_order));
  m.impl("prefetch", TORCH_BOX(&dgls::op_prefetch));
  m.impl("wait", TORCH_BOX(&dgls::op_wait));
  m.impl("release", TORCH_BOX(&dgls::op_release));
  m.impl("begin_pass", TORCH_BOX(&dgls::op_begin_pass));
  m.impl("end_pass", TORCH_BOX(&dgls::op_end_pass));
  m.impl("wants_rebuild", TORCH_BOX(&dgls::op_wants_rebuild));
  m.impl("reload", TORCH_BOX(&dgls::op_reload));
  m.impl("stats", TORCH_BOX(&dgls::op_stats));
  m.impl("host", TORCH_BOX(&dgls::op_host));
  m.impl("give_back", TORCH_BOX(&dgls::op_give_back));
  m.impl("errors", TORCH_BOX(&dgls::op_errors));
  m.impl("trace", TORCH_BOX(&dgls::op_trace));
  m.impl("destroy", TORCH_BOX(&dgls::op_destroy));
  m.impl("driver_version", TORCH_BOX(&dgls::op_driver_version));
  m.impl("measure_copy", TORCH_BOX(&dgls::op_measure_copy));
  m.impl("measure_page_lock", TORCH_BOX(&dgls::op_measure_page_lock));
  m.impl("encode", TORCH_BOX(&dgls::op_encode));
  m.impl("decode", TORCH_BOX(&dgls::op_decode));
  m.impl("_current_stream", TORCH_BOX(&dgls::op_current_stream));
  m.impl("_hand_over", TORCH_BOX(&dgls::op_hand_over));
  m.impl("_panic", TORCH_BOX(&dgls::op_panic));
}

PyMODINIT_FUNC PyInit__C() {
  return dgls::make_module();
}
