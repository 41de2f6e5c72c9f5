// The Python module `_native`: runs programs made of the structs in op.h. Limited C API.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <exception>
#include <vector>

#include "cpu.h"
#include "draws.h"
#include "op.h"
#include "pool.h"

namespace skimp {

void run_rope_append(const void*, const StepInfo&, const Team&);
void run_attend(const void*, const StepInfo&, const Team&);

}  // namespace skimp

namespace {

using namespace skimp;

struct Kind {
  const char* name;
  OpFn fn;
  size_t size;
};

// Indexed by OpKind.
const Kind KINDS[] = {
    {nullptr, nullptr, 0},
    {"embed", run_embed, sizeof(EmbedOp)},
    {"norm", run_norm, sizeof(NormOp)},
    {"matmul", run_matmul, sizeof(MatmulOp)},
    {"rope_append", run_rope_append, sizeof(RopeAppendOp)},
    {"attend", run_attend, sizeof(AttendOp)},
    {"pack", run_pack, sizeof(PackOp)},
    {"experts", run_experts, sizeof(ExpertsOp)},
    {"add", run_add, sizeof(AddOp)},
    {"latent_append", run_latent_append, sizeof(LatentAppendOp)},
    {"head_products", run_head_products, sizeof(HeadProductsOp)},
};
constexpr long NUM_KINDS = sizeof(KINDS) / sizeof(KINDS[0]);

// Converts up to `count` integer arguments; the rest keep their values.
bool integers(PyObject* const* args, Py_ssize_t given, Py_ssize_t least, Py_ssize_t count,
              long long* out) {
  if (given < least || given > count) {
    PyErr_Format(PyExc_TypeError, "expected %zd to %zd arguments, got %zd", least, count, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < given; ++i) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[7] = {};
  if (!integers(args, given, 5, 7, a)) return nullptr;
  const auto* ops = reinterpret_cast<const void* const*>(static_cast<intptr_t>(a[0]));
  const int num_ops = static_cast<int>(a[1]);
  const StepInfo step{static_cast<int32_t>(a[2]), static_cast<int32_t>(a[3]),
                      static_cast<int32_t>(a[4]), a[6] != 0};
  const char* failure = nullptr;
  int32_t unknown = 0;
  PyThreadState* state = PyEval_SaveThread();
  try {
    thread_local std::vector<OpFn> fns;
    fns.resize(num_ops);
    for (int i = 0; i < num_ops && !unknown; ++i) {
      const int32_t kind = static_cast<const OpHeader*>(ops[i])->kind;
      if (kind <= 0 || kind >= NUM_KINDS || !KINDS[kind].fn)
        unknown = kind ? kind : -1;
      else
        fns[i] = KINDS[kind].fn;
    }
    if (!unknown)
      run_program(ops, fns.data(), num_ops, step, static_cast<int>(a[5]));
  } catch (const std::exception& error) {
    failure = "cannot start the threads of the native kernels (out of memory or of threads)";
  }
  PyEval_RestoreThread(state);
  if (unknown) return PyErr_Format(PyExc_RuntimeError, "native op %d is not built", unknown);
  if (failure) {
    PyErr_SetString(PyExc_RuntimeError, failure);
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* size_of(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long kind = 0;
  if (!integers(args, given, 1, 1, &kind)) return nullptr;
  if (kind <= 0 || kind >= NUM_KINDS) {
    PyErr_SetString(PyExc_ValueError, "unknown op kind");
    return nullptr;
  }
  return PyLong_FromSize_t(KINDS[kind].size);
}

PyObject* threads_set(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long threads = 0;
  if (!integers(args, given, 1, 1, &threads)) return nullptr;
  if (threads < 1 || threads > 1024) {
    PyErr_SetString(PyExc_ValueError, "threads must be from 1 to 1024");
    return nullptr;
  }
  set_threads(static_cast<int>(threads));
  Py_RETURN_NONE;
}

PyObject* threads_get(PyObject*, PyObject*) { return PyLong_FromLong(get_threads()); }

PyObject* isa_get(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(current_isa())); }

PyObject* isa_best(PyObject*, PyObject*) { return PyUnicode_FromString(isa_name(best_isa())); }

PyObject* isa_set(PyObject*, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (!text) return nullptr;
  Isa isa;
  if (!parse_isa(text, &isa))
    return PyErr_Format(PyExc_ValueError,
                        "unknown instruction set %R: use scalar, avx2, avx512, avx512bf16 or amx",
                        name);
  if (!set_isa(isa))
    return PyErr_Format(PyExc_ValueError, "this CPU has no %R, its best is %s", name,
                        isa_name(best_isa()));
  Py_RETURN_NONE;
}

// Large pages make streaming through gigabytes of weights cheaper. Only advice: it may fail.
PyObject* advise_huge(PyObject*, PyObject* const* args, Py_ssize_t given) {
  long long a[2] = {};
  if (!integers(args, given, 2, 2, a)) return nullptr;
  int failed = 1;
#if defined(__linux__)
  constexpr long long HUGE = 2 << 20;
  const long long first = (a[0] + HUGE - 1) / HUGE * HUGE, last = (a[0] + a[1]) / HUGE * HUGE;
  if (first < last)
    failed = madvise(reinterpret_cast<void*>(static_cast<intptr_t>(first)),
                     static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
  return PyBool_FromLong(!failed);
}

// Arguments of the functions of draws.h: integers, and arrays as addresses or as objects with a
// buffer, which stays where it is until the call is over.
template <class T>
T* pointer(long long address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

template <Py_ssize_t COUNT>
PyObject* with_arrays(PyObject* const* args, Py_ssize_t given, void (*call)(const long long*)) {
  if (given != COUNT)
    return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", COUNT, given);
  long long a[COUNT];
  Py_buffer held[COUNT];
  Py_ssize_t count = 0;
  bool right = true;
  for (Py_ssize_t i = 0; i < COUNT && right; ++i) {
    if (PyLong_Check(args[i])) {
      a[i] = PyLong_AsLongLong(args[i]);
      right = a[i] != -1 || !PyErr_Occurred();
    } else if ((right = PyObject_GetBuffer(args[i], &held[count], PyBUF_SIMPLE) == 0)) {
      a[i] = static_cast<long long>(reinterpret_cast<intptr_t>(held[count++].buf));
    }
  }
  if (right) {
    PyThreadState* state = PyEval_SaveThread();
    call(a);
    PyEval_RestoreThread(state);
  }
  while (count) PyBuffer_Release(&held[--count]);
  if (!right) return nullptr;
  Py_RETURN_NONE;
}

PyObject* law_temper(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<7>(args, given, [](const long long* a) {
    temper(pointer<float>(a[0]), a[1], pointer<float>(a[2]), pointer<double>(a[3]), a[4], a[5],
           pointer<double>(a[6]));
  });
}

PyObject* law_find(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<8>(args, given, [](const long long* a) {
    find_laws(pointer<float>(a[0]), a[1], pointer<double>(a[2]), a[3], a[4],
              pointer<double>(a[5]), pointer<int64_t>(a[6]), pointer<double>(a[7]));
  });
}

PyObject* law_guess(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<11>(args, given, [](const long long* a) {
    guess_tokens(pointer<float>(a[0]), a[1], pointer<int64_t>(a[2]), pointer<double>(a[3]),
                 pointer<double>(a[4]), a[5], a[6], a[7], pointer<double*>(a[8]),
                 pointer<double>(a[9]), pointer<int64_t>(a[10]));
  });
}

PyObject* law_numbers(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<6>(args, given, [](const long long* a) {
    random_numbers(pointer<uint64_t>(a[0]), pointer<int64_t>(a[1]), pointer<int64_t>(a[2]), a[3],
                   a[4], pointer<double>(a[5]));
  });
}

PyObject* law_normalise(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<4>(args, given, [](const long long* a) {
    normalise(pointer<const double*>(a[0]), a[1], a[2], pointer<double*>(a[3]));
  });
}

PyObject* law_pick(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<4>(args, given, [](const long long* a) {
    pick_weights(pointer<const double*>(a[0]), pointer<int64_t>(a[1]), a[2],
                 pointer<double>(a[3]));
  });
}

PyObject* law_sums(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<4>(args, given, [](const long long* a) {
    sum_weights(pointer<const double*>(a[0]), a[1], a[2], pointer<double>(a[3]));
  });
}

PyObject* law_draw(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<5>(args, given, [](const long long* a) {
    draw_tokens(pointer<const double*>(a[0]), pointer<double>(a[1]), a[2], a[3],
                pointer<int64_t>(a[4]));
  });
}

PyObject* law_sums_left(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<6>(args, given, [](const long long* a) {
    sum_left(pointer<const double*>(a[0]), pointer<const double*>(a[1]), pointer<double>(a[2]),
             a[3], a[4], pointer<double>(a[5]));
  });
}

PyObject* law_draw_left(PyObject*, PyObject* const* args, Py_ssize_t given) {
  return with_arrays<7>(args, given, [](const long long* a) {
    draw_left(pointer<const double*>(a[0]), pointer<const double*>(a[1]), pointer<double>(a[2]),
              pointer<double>(a[3]), a[4], a[5], pointer<int64_t>(a[6]));
  });
}

#define FAST(fn) reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fn)), METH_FASTCALL

PyMethodDef METHODS[] = {
    {"run", FAST(run),
     "run(program, num_ops, rows, num_seqs, num_logits, threads=0, deterministic=0)\n\nRun a "
     "program: the address of an array of pointers to op structs. threads=0: as set by "
     "set_threads. deterministic: results of a row do not depend on the number of rows."},
    {"sizeof", FAST(size_of), "sizeof(kind): bytes of that op's struct"},
    {"set_threads", FAST(threads_set), "set_threads(n): threads of later runs"},
    {"get_threads", threads_get, METH_NOARGS, "get_threads(): threads of a run"},
    {"isa", isa_get, METH_NOARGS, "isa(): name of the instruction set in use"},
    {"best_isa", isa_best, METH_NOARGS, "best_isa(): name of the best this CPU has"},
    {"set_isa", isa_set, METH_O, "set_isa(name): use a lower instruction set"},
    {"advise_huge", FAST(advise_huge), "advise_huge(address, bytes): ask for large pages"},
    {"temper", FAST(law_temper), "temper(logits, stride, tops, scales, rows, width, weights)"},
    {"find_laws", FAST(law_find),
     "find_laws(logits, stride, scales, rows, width, tops, best, weights)"},
    {"guess_tokens", FAST(law_guess),
     "guess_tokens(logits, stride, words, scales, numbers, rows, width, law_width, laws, tops, "
     "tokens)"},
    {"random_numbers", FAST(law_numbers),
     "random_numbers(keys, positions, leads, purpose, count, numbers)"},
    {"normalise", FAST(law_normalise), "normalise(weights, rows, width, laws)"},
    {"pick_weights", FAST(law_pick), "pick_weights(weights, ids, rows, found)"},
    {"sum_weights", FAST(law_sums), "sum_weights(weights, rows, width, sums)"},
    {"draw_tokens", FAST(law_draw), "draw_tokens(weights, numbers, rows, width, tokens)"},
    {"sum_left", FAST(law_sums_left), "sum_left(weights, laws, scales, rows, width, sums)"},
    {"draw_left", FAST(law_draw_left),
     "draw_left(weights, laws, scales, numbers, rows, width, tokens)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", "Native CPU kernels of skimp.", -1,
                      METHODS,               nullptr,   nullptr,                        nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&MODULE); }
