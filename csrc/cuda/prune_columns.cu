#include "prune_columns.cuh"

namespace spade_fast::cuda {

template <class T>
void prune_problems(const PruneProblem<T>* problems, const int32_t* updates, const PrunePlan& plan, void* stream) {
  run_prune(problems, updates, plan, static_cast<Stream>(stream));
}
template void prune_problems(const PruneProblem<float>*, const int32_t*, const PrunePlan&, void*);
template void prune_problems(const PruneProblem<double>*, const int32_t*, const PrunePlan&, void*);

}  // namespace spade_fast::cuda
