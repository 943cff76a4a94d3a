#include "factor.cuh"

namespace spade_fast::cuda {

template <class T>
void factor_matrices(const FactorWorkspace<T>& workspace, const FactorPlan& plan, double damping, void* stream) {
  run_factor(workspace, plan, damping, static_cast<Stream>(stream));
}
template void factor_matrices(const FactorWorkspace<float>&, const FactorPlan&, double, void*);
template void factor_matrices(const FactorWorkspace<double>&, const FactorPlan&, double, void*);

}  // namespace spade_fast::cuda
