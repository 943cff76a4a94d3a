// What the operators need of a GPU beside its kernels.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../check.h"

namespace spade_fast::cuda {

// While it lives, the device of `tensor` is the current one.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& tensor) : index_(checked_index(tensor)), guard_(index_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  // torch's current stream there.
  void* stream() const { return stream_; }

  int multiprocessors() const {
    int count = 0;
    check_status(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), "asking for multiprocessors");
    return count;
  }

  // Bytes of its memory that nobody has, torch's allocator among them.
  int64_t free_memory() const {
    size_t free = 0, total = 0;
    check_status(cudaMemGetInfo(&free, &total), "asking for free memory");
    return static_cast<int64_t>(free);
  }

  // Refuses a tensor that lies elsewhere: kernels get plain pointers.
  void check_here(const char* what, const torch::stable::Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index_, what, " must be on cuda:", index_,
                    ", as the first tensor is");
  }

  // A copy of a table in device memory, in the order of the stream.
  template <class Entry>
  torch::stable::Tensor upload(const std::vector<Entry>& table, const torch::stable::Tensor& like) const {
    const auto bytes = static_cast<int64_t>(table.size() * sizeof(Entry));
    torch::stable::Tensor copy = torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
    if (bytes > 0) {
      cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
      check_status(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream_), &capture), "asking for a capture");
      STD_TORCH_CHECK(capture == cudaStreamCaptureStatusNone,
                      "operators of spade_fast cannot be captured in a CUDA graph: they copy tables from the host");
      // From pageable memory: the table has been read when this returns.
      check_status(cudaMemcpyAsync(copy.mutable_data_ptr(), table.data(), bytes, cudaMemcpyHostToDevice,
                                   static_cast<cudaStream_t>(stream_)),
                   "copying a table");
    }
    return copy;
  }

 private:
  static int32_t checked_index(const torch::stable::Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "all tensors must be on one GPU, but the first is on the CPU");
    return tensor.get_device_index();
  }

  static void check_status(cudaError_t status, const char* what) {
    STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

template <class T>
constexpr torch::headeronly::ScalarType kScalarType =
    sizeof(T) == 4 ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::Double;

}  // namespace spade_fast::cuda
