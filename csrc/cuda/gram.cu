#include "gram.cuh"
#include "gram_assemble.cuh"
#include "gram_depthwise.cuh"

namespace spade_fast::cuda {

void add_gram(const GramArguments& arguments, const GramLaunch& work, void* stream) {
  run_gram(arguments, work, static_cast<Stream>(stream));
}

void add_depthwise(const DepthwiseArguments& arguments, const DepthwiseLaunch& work, void* stream) {
  run_depthwise(arguments, work, static_cast<Stream>(stream));
}

template <class T>
void assemble_gram(const AssemblyArguments<T>& arguments, bool depthwise, void* stream) {
  run_assemble(arguments, depthwise, static_cast<Stream>(stream));
}
template void assemble_gram(const AssemblyArguments<float>&, bool, void*);
template void assemble_gram(const AssemblyArguments<double>&, bool, void*);

template <class T>
void mirror_upper(T* matrices, int64_t count, int64_t size, void* stream) {
  run_mirror(matrices, count, size, static_cast<Stream>(stream));
}
template void mirror_upper(float*, int64_t, int64_t, void*);
template void mirror_upper(double*, int64_t, int64_t, void*);

}  // namespace spade_fast::cuda
