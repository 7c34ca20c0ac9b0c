// How an argument is refused: with what was needed and what was found.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dgls {

[[noreturn]] inline void refuse(const std::string& message) {
  throw std::runtime_error("dgls: " + message);
}

inline uint64_t unsigned_of(int64_t value, const char* name) {
  if (value < 0) refuse(std::string(name) + " must not be negative, got " + std::to_string(value));
  return static_cast<uint64_t>(value);
}

}  // namespace dgls
