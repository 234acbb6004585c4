// Python module that describes the binary. The operators register themselves when the library is loaded.
#include <Python.h>

#include "cpu/gemm.h"
#include "cuda_note.h"  // written by setup.py

static PyObject* products(PyObject*, PyObject*) {
  return PyUnicode_FromString(sslkern::products_of<float>().c_str());
}

static PyObject* vendor(PyObject*, PyObject*) {
  return PyUnicode_FromString(sslkern::use_onednn() ? "oneDNN" : "");
}

static PyObject* cuda(PyObject*, PyObject*) {
  return PyUnicode_FromString(SSLKERN_CUDA_NOTE);
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"products", products, METH_NOARGS, "The implementation of fp32 matrix products."},
      {"vendor", vendor, METH_NOARGS,
       "The library that runs large fp32 products in place of torch.mm, or an empty string."},
      {"cuda", cuda, METH_NOARGS, "The architectures of the CUDA kernels, or why there are none."},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
