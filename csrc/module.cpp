// The Python module `spade_fast._C`: importing it loads the operators; its constants say how it was built.
#include <Python.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#define SPADE_FAST_STRING(x) #x
#define SPADE_FAST_EXPANDED(x) SPADE_FAST_STRING(x)

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                        "_C",
                                        "Operators of spade_fast, and how they were built.",
                                        -1,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  std::string capability;
  try {
    capability = spade_fast::cpu_capability();
  } catch (const std::runtime_error& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
#ifdef NDEBUG
  const long debug = 0;
#else
  const long debug = 1;
#endif
#ifdef SPADE_FAST_WITH_CUDA
  const long with_cuda = 1;
#else
  const long with_cuda = 0;
#endif
  if (PyModule_AddStringConstant(module, "compiler", "C++ " __VERSION__) < 0 ||
      PyModule_AddStringConstant(module, "torch_version", SPADE_FAST_EXPANDED(SPADE_FAST_TORCH_VERSION)) < 0 ||
      PyModule_AddStringConstant(module, "cpu_capability", capability.c_str()) < 0 ||
      PyModule_AddStringConstant(module, "cpu_capabilities", spade_fast::cpu_capabilities().c_str()) < 0 ||
      PyModule_AddIntConstant(module, "debug", debug) < 0 ||
      PyModule_AddIntConstant(module, "with_cuda", with_cuda) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
