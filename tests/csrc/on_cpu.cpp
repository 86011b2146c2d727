// The order in which the stand-in runs threads, set from the tests.
#include "on_cpu.h"

extern "C" void on_cpu_order(int order) { on_cpu::device.order = static_cast<on_cpu::Order>(order); }
