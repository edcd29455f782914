// parallel_for over numbered tasks with dynamic assignment.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace attlas {
typedef void (*TaskFn)(const void* context, int64_t task, char* scratch);
// Runs fn(context, 0 ... tasks - 1) on up to `threads` threads (the caller is one of them), each with its own 64-byte aligned scratch memory.
// Results never depend on which thread runs a task. Returns false when scratch memory cannot be allocated (nothing has run then on this thread).
bool parallel_for(int64_t tasks, int64_t threads, size_t scratch_bytes, TaskFn fn, const void* context);
// The address of GOMP_parallel in the OpenMP runtime that the caller's own code uses, or null: work is then shared out among that team.
void use_openmp(void* gomp_parallel);
}  // namespace attlas
