// An empty Python module: importing fastkd._C loads the library, whose static initialisers register the operators.
#if !defined(Py_LIMITED_API)
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
