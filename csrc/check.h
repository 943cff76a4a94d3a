// What every operator asks of its arguments, with messages that show the values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

namespace spade_fast {

// "[2, 3, 4]"
template <class Range>
std::string shape_text(const Range& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

// "Half [2, 3, 4]", and whether it is contiguous where it is not.
inline std::string tensor_text(const torch::stable::Tensor& tensor) {
  const std::string text = torch::headeronly::toString(tensor.scalar_type()) + (' ' + shape_text(tensor.sizes()));
  return tensor.is_contiguous() ? text : text + ", not contiguous";
}

inline bool is_float_or_double(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

// Calls `function` with a null pointer of the tensor's element type, float or double.
template <class Function>
void dispatch_float_or_double(const torch::stable::Tensor& tensor, const Function& function) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Float) {
    function(static_cast<float*>(nullptr));
  } else {
    function(static_cast<double*>(nullptr));
  }
}

}  // namespace spade_fast
