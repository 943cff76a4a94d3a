#include "render.cuh"

namespace spade_fast::cuda {

template <class T>
void render_views(const RenderArguments<T>& arguments, void* stream) {
  run_render(arguments, static_cast<Stream>(stream));
}
template void render_views(const RenderArguments<float>&, void*);
template void render_views(const RenderArguments<double>&, void*);

}  // namespace spade_fast::cuda
