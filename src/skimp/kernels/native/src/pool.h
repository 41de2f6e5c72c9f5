// A persistent team of threads that runs programs (see op.h).
#pragma once
#include "op.h"

namespace skimp {

// Runs every op of a program in order, all members of the team on each, with a barrier after
// each. Calls from several threads take turns. ``threads`` 0 means the configured number.
void run_program(const void* const* ops, const OpFn* fns, int num_ops, const StepInfo& step,
                 int threads);

void set_threads(int threads);
int get_threads();

}  // namespace skimp
