// What the tests set of the stand-in: the order in which threads run, and how many of a launch's blocks do.
#include "on_cpu.h"

extern "C" void on_cpu_order(int order) { on_cpu::device.order = static_cast<on_cpu::Order>(order); }
extern "C" void on_cpu_last_blocks(unsigned count) { on_cpu::device.last_blocks = count; }
