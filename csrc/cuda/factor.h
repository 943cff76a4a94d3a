// Reversed Cholesky factors of many matrices at once on a GPU: what is launched, worked out on the host.
#pragma once

#include <cstdint>
#include <vector>

#include "ragged.h"

namespace spade_fast::cuda {

constexpr int kFactorBlock = 64;   // rows and columns of a block
constexpr int kFactorStrip = 128;  // columns that a block of threads finishes at a time

// One matrix.
template <class T>
struct FactorMatrix {
  const T* hessian;  // [size, size]
  T* factor;         // [size, size]
  double* error;
  int64_t size;
};

// Launches that factor matrices, which are brought into order: the largest first. In step t the matrices that have a
// block left finish their last but t-th one.
struct FactorPlan {
  RaggedGrids strips;           // one grid: kFactorBlock rows of every matrix
  RaggedGrids rows;             // by step: kFactorStrip columns left of the block
  RaggedGrids updates;          // by step: tiles of what is left of the matrix
  std::vector<int32_t> active;  // by step: matrices

  template <class T>
  explicit FactorPlan(std::vector<FactorMatrix<T>>& matrices);
};

// Device memory that the launches need beside the matrices.
template <class T>
struct FactorWorkspace {
  const FactorMatrix<T>* matrices;
  const int32_t *strips, *rows, *updates;  // the plan's tables
  T* damping;                              // [matrices]
  int32_t* failed;                         // [matrices], zero at first
  T* images;                               // [strips, kFactorBlock]
  T* worst;                                // [strips, 3]
};

// Implemented in factor.cu: queues everything on the CUDA stream.
template <class T>
void factor_matrices(const FactorWorkspace<T>& workspace, const FactorPlan& plan, double damping, void* stream);

}  // namespace spade_fast::cuda
