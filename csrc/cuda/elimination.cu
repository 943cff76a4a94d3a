#include "elimination.cuh"

namespace spade_fast::cuda {

template <class T>
void eliminate_problems(const EliminationWorkspace<T>& workspace, const EliminationPlan& plan, void* stream) {
  run_eliminate(workspace, plan, static_cast<Stream>(stream));
}
template void eliminate_problems(const EliminationWorkspace<float>&, const EliminationPlan&, void*);
template void eliminate_problems(const EliminationWorkspace<double>&, const EliminationPlan&, void*);

}  // namespace spade_fast::cuda
