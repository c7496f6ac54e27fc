// A Python module of nothing but a number: importing fastkd._C loads the library, whose static initialisers register the
// operators. The number is that of their arguments, which fastkd/backend.py compares with its own.
#if !defined(Py_LIMITED_API)
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* extension = PyModule_Create(&module);
  if (extension != nullptr) PyModule_AddIntConstant(extension, "interface", 8);
  return extension;
}
