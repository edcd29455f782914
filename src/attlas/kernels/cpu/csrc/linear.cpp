// The exported functions of the dense steps: choose the instruction set, cut the work into tasks.
#include <string.h>

#include "linear_api.h"
#include "pool.h"

namespace {

const DenseTable* table(int64_t isa) {
  const char* best = attlas_cpu_isa();
  int have = strcmp(best, "avx512_bf16") == 0 ? 3 : strcmp(best, "avx512") == 0 ? 2 : strcmp(best, "avx2") == 0 ? 1 : 0;
  if (!have || isa > have) return nullptr;
  switch (isa ? isa : have) {
    case 1: return &attlas_dense_avx2;
    case 2: return &attlas_dense_avx512;
    default: return &attlas_dense_avx512_bf16;
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A> struct Rows {  // a job over rows, some at a time
  const A* a;
  void (*row)(const A*, int64_t, char*);
  int64_t per_task;
};
template <class A> void rows_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const Rows<A>*>(c);
  int64_t end = (task + 1) * j->per_task < j->a->rows ? (task + 1) * j->per_task : j->a->rows;
  for (int64_t r = task * j->per_task; r < end; r++) j->row(j->a, r, scratch);
}
template <class A> int run_rows(const A* a, void (*row)(const A*, int64_t, char*), int64_t width) {
  int64_t per_task = ceil_div(16384, width);  // less is not worth waking a thread for
  Rows<A> j = {a, row, per_task};
  return attlas::parallel_for(ceil_div(a->rows, per_task), a->threads, 0, rows_step<A>, &j) ? 0 : 2;
}

struct Job {
  LinearPlan plan;
  const DenseTable* t;
};
void pack_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const Job*>(c);
  j->t->pack_task(&j->plan, task, scratch);
}
void linear_step(const void* c, int64_t task, char* scratch) {
  auto* j = static_cast<const Job*>(c);
  j->t->linear_task(&j->plan, task, scratch);
}

}  // namespace

extern "C" {

int64_t attlas_cpu_linear_bytes(const AttlasLinear* a) {
  const DenseTable* t = table(a->isa);
  return t ? t->linear_bytes(a) : -1;
}

int attlas_cpu_linear_pack(const AttlasLinear* a) {
  Job j;
  j.t = table(a->isa);
  if (!j.t) return 1;
  j.plan = {a, ceil_div(a->out, j.t->panel), 1, 1, 1};
  return attlas::parallel_for(j.plan.panels, a->threads, 0, pack_step, &j) ? 0 : 2;
}

int attlas_cpu_linear(const AttlasLinear* a) {
  Job j;
  j.t = table(a->isa);
  if (!j.t) return 1;
  if (a->in < 1 || a->out < 1) return 3;
  int64_t panels = ceil_div(a->out, j.t->panel), rows_per_task = a->rows < 192 ? a->rows : 192;
  int64_t threads = a->threads < 1 ? 1 : a->threads, row_tasks = ceil_div(a->rows, rows_per_task < 1 ? 1 : rows_per_task);
  int64_t spread = panels * row_tasks / (4 * threads), per_task = spread < 1 ? 1 : spread > panels ? panels : spread;
  j.plan = {a, panels, per_task, rows_per_task, ceil_div(panels, per_task)};
  return attlas::parallel_for(row_tasks * j.plan.column_tasks, a->threads, j.t->linear_scratch(&j.plan), linear_step, &j) ? 0 : 2;
}

int attlas_cpu_program(const AttlasOp* ops, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const void* a = ops[i].args;
    int code = 3;
    switch (ops[i].op) {
      case ATTLAS_OP_LINEAR: code = attlas_cpu_linear(static_cast<const AttlasLinear*>(a)); break;
      case ATTLAS_OP_NORM: code = attlas_cpu_norm(static_cast<const AttlasNorm*>(a)); break;
      case ATTLAS_OP_GATE: code = attlas_cpu_gate(static_cast<const AttlasGate*>(a)); break;
      case ATTLAS_OP_ROTATE: code = attlas_cpu_rotate(static_cast<const AttlasRotate*>(a)); break;
      case ATTLAS_OP_DECODE: code = attlas_cpu_decode(static_cast<const AttlasDecode*>(a)); break;
    }
    if (code) return code;
  }
  return 0;
}

int attlas_cpu_norm(const AttlasNorm* a) {
  const DenseTable* t = table(a->isa);
  return t ? run_rows(a, t->norm_row, a->dim) : 1;
}
int attlas_cpu_gate(const AttlasGate* a) {
  const DenseTable* t = table(a->isa);
  return t ? run_rows(a, t->gate_row, 2 * a->dim) : 1;
}
int attlas_cpu_rotate(const AttlasRotate* a) {
  const DenseTable* t = table(a->isa);
  return t ? run_rows(a, t->rotate_row, (a->heads + 2 * a->kv_heads) * a->dim) : 1;
}
}
