// The exported functions of the linear recurrence: choose the instruction set, one task per (batch row, head).
#include <stdint.h>
#include <string.h>

#include "pool.h"
#include "scan_api.h"

namespace {

struct Job {
  const AttlasScan* a;
  const ScanTable* t;
};
void forward_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const Job*>(c);
  j->t->forward_task(j->a, task, scratch);
}
void backward_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const Job*>(c);
  j->t->backward_task(j->a, task, scratch);
}

const ScanTable* table(int64_t isa) {
  bool wide = strncmp(attlas_cpu_isa(), "avx512", 6) == 0;
  if (strcmp(attlas_cpu_isa(), "none") == 0 || (isa > 1 && !wide)) return nullptr;
  return wide && isa != 1 ? &attlas_scan_avx512 : &attlas_scan_avx2;
}

bool sizes_fit(const AttlasScan* a) {
  return a->dim_k >= 1 && a->dim_k <= ATTLAS_MAX_DIM && a->dim_v >= 1 && a->dim_v <= ATTLAS_MAX_DIM &&
         (a->decay_dim == 0 || a->decay_dim == 1 || a->decay_dim == a->dim_k);
}

int run(const AttlasScan* a, int backward) {
  Job j = {a, table(a->isa)};
  if (!j.t) return 1;
  if (!sizes_fit(a)) return 3;
  size_t scratch = j.t->scratch(a, backward);
  return attlas::parallel_for(a->batch * a->heads, a->threads, scratch, backward ? backward_step : forward_step, &j) ? 0 : 2;
}

}  // namespace

extern "C" {
int64_t attlas_cpu_scan_state(const AttlasScan* a) {  // enough for either instruction set: vectors of 16
  return ((a->dim_k + 15) / 16 * 16) * ((a->dim_v + 15) / 16 * 16);
}
int attlas_cpu_scan_forward(const AttlasScan* a) { return run(a, 0); }
int attlas_cpu_scan_backward(const AttlasScan* a) { return run(a, 1); }
}
