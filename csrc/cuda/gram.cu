#include "gram.cuh"
#include "gram_assemble.cuh"
#include "gram_depthwise.cuh"

namespace spade_fast::cuda {

void add_gram(const GramArguments& arguments, const GramLaunch& launch, void* stream) {
  run_gram(arguments, launch, static_cast<Stream>(stream));
}

void add_depthwise(const DepthwiseArguments& arguments, const DepthwiseLaunch& launch, void* stream) {
  run_depthwise(arguments, launch, static_cast<Stream>(stream));
}

void assemble_gram(const AssemblyArguments& arguments, bool depthwise, void* stream) {
  const auto run = arguments.is_double ? run_assemble<double> : run_assemble<float>;
  run(arguments, depthwise, static_cast<Stream>(stream));
}

void mirror_upper(bool is_double, void* matrices, int64_t count, int64_t size, void* stream) {
  const auto run = is_double ? run_mirror<double> : run_mirror<float>;
  run(matrices, count, size, static_cast<Stream>(stream));
}

}  // namespace spade_fast::cuda
