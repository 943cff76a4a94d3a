// The GPU's kernels on the CPU for pytest: numpy arrays in place of device memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "emulated.h"

namespace py = pybind11;

namespace spade_fast::cuda {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Pair = std::array<int64_t, 2>;

class Convolution {
 public:
  Convolution(int64_t channels, int64_t height, int64_t width, Pair kernel, Pair stride, Pair padding, Pair dilation,
              int64_t groups)
      : plan_({channels / groups,
               height,
               width,
               {kernel[0], kernel[1]},
               {stride[0], stride[1]},
               {padding[0], padding[1]},
               {dilation[0], dilation[1]},
               groups}) {}

  std::vector<int64_t> sums_shape() const { return plan_.shape(); }

  // maps [images, height, width, channels], channels side by side; bfloat16 as uint16.
  template <class Sum>
  void add(Array<Sum> sums, const py::array& maps, const std::string& precision) const {
    const Precision kind = precision == "float64"   ? Precision::kFloat64
                           : precision == "float32" ? Precision::kFloat32
                           : precision == "tf32"    ? Precision::kTf32
                                                    : Precision::kBFloat16;
    emulated::add_sums(plan_, maps.data(), maps.shape(0), kind, sums.mutable_data());
  }

  template <class T>
  Array<T> gram(const Array<T>& sums) const {
    const int64_t groups = plan_.geometry.groups, d = plan_.geometry.columns();
    Array<T> gram({groups, d, d});
    std::fill_n(gram.mutable_data(), gram.size(), std::numeric_limits<T>::quiet_NaN());
    if (plan_.flat) std::copy_n(sums.data(), sums.size(), gram.mutable_data());
    emulated::make_gram(plan_, sums.data(), gram.mutable_data());
    return gram;
  }

 private:
  GramPlan plan_;
};

// Factors of matrices [size, size] and their backward errors.
template <class T>
std::tuple<std::vector<Array<T>>, std::vector<double>> factor(const std::vector<Array<T>>& hessians, double damping) {
  std::vector<Array<T>> factors;
  std::vector<double> errors(hessians.size());
  std::vector<FactorMatrix<T>> matrices;
  for (size_t i = 0; i < hessians.size(); ++i) {
    const int64_t size = hessians[i].shape(0);
    factors.push_back(Array<T>({size, size}));
    matrices.push_back({hessians[i].data(), factors[i].mutable_data(), &errors[i], size});
  }
  emulated::factor(matrices, damping);
  return {factors, errors};
}

// Prunes weights [groups, columns, rows] in place; returns masks of that shape and losses.
template <class T>
std::tuple<std::vector<Array<bool>>, std::vector<double>> prune(std::vector<Array<T>> weights,
                                                                const std::vector<Array<T>>& factors,
                                                                const std::vector<double>& sparsities,
                                                                const std::vector<int64_t>& block_sizes,
                                                                bool published_count) {
  std::vector<Array<bool>> masks;
  std::vector<double> losses(weights.size());
  std::vector<PruneProblem<T>> problems;
  for (size_t i = 0; i < weights.size(); ++i) {
    Array<T>& weight = weights[i];
    masks.push_back(Array<bool>({weight.shape(0), weight.shape(1), weight.shape(2)}));
    PruneProblem<T> problem{};
    problem.factor = factors[i].data();
    problem.weight = weight.mutable_data();
    problem.kept = masks[i].mutable_data();
    problem.loss = &losses[i];
    problem.groups = static_cast<int32_t>(weight.shape(0));
    problem.rows = static_cast<int32_t>(weight.shape(2));
    problem.columns = static_cast<int32_t>(weight.shape(1));
    problem.block_size = static_cast<int32_t>(std::min<int64_t>(block_sizes[i], weight.shape(1)));
    problem.published_count = published_count;
    problem.sparsity = sparsities[i];
    problems.push_back(problem);
  }
  emulated::prune(problems);
  return {masks, losses};
}

// The order in which every row of weights [groups, rows, columns] is pruned, given inverses [groups, columns, columns],
// and its losses.
template <class T>
std::tuple<std::vector<Array<int32_t>>, std::vector<Array<T>>> eliminate(const std::vector<Array<T>>& weights,
                                                                         const std::vector<Array<T>>& inverses,
                                                                         const std::vector<int64_t>& block_sizes) {
  std::vector<Array<int32_t>> orders;
  std::vector<Array<T>> losses;
  std::vector<EliminationProblem<T>> problems;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Array<T>& weight = weights[i];
    const std::vector<py::ssize_t> shape{weight.shape(0), weight.shape(1), weight.shape(2) / block_sizes[i]};
    orders.push_back(Array<int32_t>(shape));
    losses.push_back(Array<T>(shape));
    EliminationProblem<T> problem{};
    problem.weight = weight.data();
    problem.inverse = inverses[i].data();
    problem.order = orders[i].mutable_data();
    problem.losses = losses[i].mutable_data();
    problem.groups = static_cast<int32_t>(weight.shape(0));
    problem.rows = static_cast<int32_t>(weight.shape(1));
    problem.columns = static_cast<int32_t>(weight.shape(2));
    problem.block_size = static_cast<int32_t>(block_sizes[i]);
    problems.push_back(problem);
  }
  emulated::eliminate(problems);
  return {orders, losses};
}

template <class T>
Array<T> render(const Array<T>& image, const Array<int64_t>& row_starts, const Array<T>& row_weights,
                const Array<int64_t>& column_starts, const Array<T>& column_weights, const Array<T>& colours) {
  Array<T> out({colours.shape(0), py::ssize_t{3}, row_weights.shape(2), column_weights.shape(2)});
  run_render(RenderArguments<T>{image.data(), row_starts.data(), column_starts.data(), row_weights.data(),
                                column_weights.data(), colours.data(), out.mutable_data(), image.shape(1),
                                image.shape(2), colours.shape(0), row_weights.shape(2), column_weights.shape(2),
                                row_weights.shape(1), column_weights.shape(1)},
             nullptr);
  return out;
}

template <class T>
void bind_type(py::module_& m, py::class_<Convolution>& convolution) {
  convolution.def("add", &Convolution::add<T>, py::arg("sums").noconvert(), py::arg("maps"), py::arg("precision"));
  convolution.def("gram", &Convolution::gram<T>, py::arg("sums").noconvert());
  m.def("factor", &factor<T>, py::arg("hessians").noconvert(), py::arg("damping"));
  m.def("prune", &prune<T>, py::arg("weights").noconvert(), py::arg("factors").noconvert(), py::arg("sparsities"),
        py::arg("block_sizes"), py::arg("published_count"));
  m.def("eliminate", &eliminate<T>, py::arg("weights").noconvert(), py::arg("inverses").noconvert(),
        py::arg("block_sizes"));
  m.def("render", &render<T>, py::arg("image").noconvert(), py::arg("row_starts"), py::arg("row_weights").noconvert(),
        py::arg("column_starts"), py::arg("column_weights").noconvert(), py::arg("colours").noconvert());
}

}  // namespace
}  // namespace spade_fast::cuda

PYBIND11_MODULE(spade_fast_simt, m) {
  using spade_fast::cuda::Convolution;
  using spade_fast::cuda::Pair;
  m.doc() = "The CUDA kernels of spade_fast, run on the CPU.";
  m.def("set_thread_order", &spade_fast::simt::set_thread_order, py::arg("seed"));
  auto convolution = py::class_<Convolution>(m, "Convolution")
                         .def(py::init<int64_t, int64_t, int64_t, Pair, Pair, Pair, Pair, int64_t>(),
                              py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("kernel_size"),
                              py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"))
                         .def_property_readonly("sums_shape", &Convolution::sums_shape);
  spade_fast::cuda::bind_type<float>(m, convolution);
  spade_fast::cuda::bind_type<double>(m, convolution);
}
