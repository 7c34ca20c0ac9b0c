// The bodies of encode and decode, which need no engine: CPU tensors, seen by Rust as slices.
#include <algorithm>

#include "dgls/src/bridge.rs.h"
#include "ops.h"
#include "refuse.h"

namespace dgls {
namespace {

using torch::headeronly::ScalarType;

void check_host(const Tensor& tensor, const std::string& name, ScalarType dtype) {
  if (!tensor.is_cpu()) {
    refuse(name + " must be on the CPU, found another device: weights are encoded on the host, " +
           "and on the device an engine decodes them");
  }
  int32_t layout = -1;
  aoti_torch_get_layout(tensor.get(), &layout);
  if (layout != aoti_torch_layout_strided()) {
    refuse(name + " must be a dense tensor, found another layout");
  }
  if (tensor.scalar_type() != dtype) {
    refuse(name + " must be " + torch::headeronly::toString(dtype) + ", found " +
           torch::headeronly::toString(tensor.scalar_type()));
  }
  if (!tensor.is_contiguous()) refuse(name + " must be contiguous, found strides between elements");
}

size_t bytes_of(const Tensor& tensor) {
  return static_cast<size_t>(tensor.numel()) * tensor.element_size();
}

rust::Slice<const uint8_t> bytes_in(const Tensor& tensor) {
  return {static_cast<const uint8_t*>(tensor.data_ptr()), bytes_of(tensor)};
}

// A new tensor of one dimension, whose bytes nobody wrote yet.
Tensor make(uint64_t elements, int32_t dtype, const std::string& what) {
  const int64_t size = static_cast<int64_t>(elements), stride = 1;
  AtenTensorHandle made = nullptr;
  if (aoti_torch_empty_strided(1, &size, &stride, dtype, aoti_torch_device_type_cpu(), 0, &made) !=
      AOTI_TORCH_SUCCESS) {
    refuse("torch has no memory for " + what + " of " + std::to_string(elements) + " elements");
  }
  return Tensor(made);
}

rust::Slice<uint8_t> room_in(Tensor& tensor) {
  return {static_cast<uint8_t*>(tensor.data_ptr()), bytes_of(tensor)};
}

}  // namespace

Tensor op_encode(Tensor weights) {
  check_host(weights, "weights", ScalarType::BFloat16);
  const rust::Vec<uint8_t> stream = encode_stream(bytes_in(weights));
  Tensor encoded = make(stream.size(), aoti_torch_dtype_uint8(), "an encoded stream");
  std::copy(stream.begin(), stream.end(), room_in(encoded).begin());
  return encoded;
}

Tensor op_decode(Tensor encoded, int64_t elements) {
  check_host(encoded, "encoded", ScalarType::Byte);
  if (encoded.dim() != 1) {
    refuse("encoded must have one dimension, found " + std::to_string(encoded.dim()));
  }
  const uint64_t count = unsigned_of(elements, "elements");
  check_stream(bytes_in(encoded), count);  // before memory is taken for a number that is wrong
  Tensor weights = make(count, aoti_torch_dtype_bfloat16(), "weights");
  decode_stream(bytes_in(encoded), room_in(weights));
  return weights;
}

}  // namespace dgls
