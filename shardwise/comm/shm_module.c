/* The kernel's functions that are called for every operation, for Python: a call through ctypes takes a microsecond,
 * which is as long as a small operation. Where Python's headers are missing ctypes has to do. */

#if defined(__has_include)
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#include "kernel.h"

static int numbers(PyObject *const *given, Py_ssize_t n, Py_ssize_t wanted, uint64_t *found) {
    if (n != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments were given for %zd.", n, wanted);
        return 0;
    }
    for (Py_ssize_t i = 0; i < n; i++) found[i] = PyLong_AsUnsignedLongLong(given[i]);
    return !PyErr_Occurred();
}
static PyObject *handle(Op *o) {
    if (!o) Py_RETURN_NONE;
    return PyLong_FromVoidPtr(o);
}

static PyObject *start(PyObject *const *given, Py_ssize_t n, Op *(*how)(Context *, uint64_t, char *, char *, uint64_t)) {
    uint64_t v[5];
    Op *o;
    if (!numbers(given, n, 5, v)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    o = how((Context *)v[0], v[1], (char *)v[2], (char *)v[3], v[4]);
    Py_END_ALLOW_THREADS
    return handle(o);
}
static PyObject *begin(PyObject *module, PyObject *const *given, Py_ssize_t n) {
    (void)module;
    return start(given, n, shm_begin);
}
static PyObject *post(PyObject *module, PyObject *const *given, Py_ssize_t n) {
    (void)module;
    return start(given, n, shm_post);
}
static PyObject *wait_by(PyObject *const *given, Py_ssize_t n, int (*how)(Context *, Op *, double)) {
    uint64_t v[2];
    double slice_s = n == 3 ? PyFloat_AsDouble(given[2]) : 0;
    int outcome;
    if (!numbers(given, n - 1, 2, v)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    outcome = how((Context *)v[0], (Op *)v[1], slice_s);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(outcome);
}
static PyObject *wait_for(PyObject *module, PyObject *const *given, Py_ssize_t n) {
    (void)module;
    return wait_by(given, n, shm_wait);
}
static PyObject *end(PyObject *module, PyObject *const *given, Py_ssize_t n) {
    (void)module;
    return wait_by(given, n, shm_end);
}
static PyObject *release(PyObject *module, PyObject *const *given, Py_ssize_t n) {
    uint64_t v[2];
    (void)module;
    if (!numbers(given, n, 2, v)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    shm_release((Context *)v[0], (Op *)v[1]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"shm_begin", (PyCFunction)(void (*)(void))begin, METH_FASTCALL, NULL},
    {"shm_post", (PyCFunction)(void (*)(void))post, METH_FASTCALL, NULL},
    {"shm_end", (PyCFunction)(void (*)(void))end, METH_FASTCALL, NULL},
    {"shm_wait", (PyCFunction)(void (*)(void))wait_for, METH_FASTCALL, NULL},
    {"shm_release", (PyCFunction)(void (*)(void))release, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_shm", NULL, 0, methods, NULL, NULL, NULL, NULL};
PyMODINIT_FUNC PyInit__shm(void) { return PyModuleDef_Init(&definition); }

#endif
#endif
