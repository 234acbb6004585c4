// A module that says who multiplies. The operators register themselves when the library is loaded.
#include <Python.h>

#include "cpu/gemm.h"

static PyObject* products(PyObject*, PyObject*) {
  return PyUnicode_FromString(sslkern::products_of<float>().c_str());
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {{"products", products, METH_NOARGS, "Who multiplies fp32 matrices."},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
