// What the tests set of the stand-in: the order in which threads run, how many of a launch's blocks do, how many
// multiprocessors it says it has, and whether there is code for it in the library. What they ask: the last launch's threads.
#include "on_cpu.h"

extern "C" void on_cpu_order(int order) { on_cpu::device.order = static_cast<on_cpu::Order>(order); }
extern "C" void on_cpu_last_blocks(unsigned count) { on_cpu::device.last_blocks = count; }
extern "C" unsigned on_cpu_threads() { return on_cpu::device.grid.x * on_cpu::device.block.x; }
extern "C" void on_cpu_processors(int count) { on_cpu::device.processors = count; }
extern "C" void on_cpu_has_code(int has) { on_cpu::device.has_code = has; }
