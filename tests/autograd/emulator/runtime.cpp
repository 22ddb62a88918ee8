// The scheduler, a fiber for each thread of a block, and, with -DCHECK, the checker of memory accesses.
//
// The checker is called at every load and store of a kernel, because the kernel is compiled with g++'s instrumentation
// for a thread sanitizer, whose hooks are here. It keeps the last write and up to three reads of every element. Two
// accesses, one of them a write, are ordered if a barrier, a __syncwarp of both lanes, or for shared memory the end of a
// block lies between them; anything else is a race. Events are numbered, later is larger.
#include "cuda.h"
#include <cstdarg>
#include <cstdlib>
#include <link.h>
#include <numeric>
#include <sys/mman.h>
#include <vector>
#include <xmmintrin.h>
using namespace emulator;

Thread *current;
uint3 block_index, block_size, grid_size;

namespace {
enum State : unsigned char { NEW, READY, AT_BARRIER, AT_WARP, DONE };
constexpr size_t STACK = 256 << 10, PAGE = 4096, MOST = 1024;
const char *const NAMES[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or",
                             "shuffle", "ballot", "__syncwarp"};
Thread threads[MOST];
unsigned count, done, waiting;
char *stacks;
void *main_sp;
void (*kernel)(void **);
void **arguments;
bool failed, strict;
char *error;
size_t error_size;
unsigned random_state;

extern "C" char __start_shared[] __attribute__((visibility("hidden")));
extern "C" char __stop_shared[] __attribute__((visibility("hidden")));
// cuda.h puts 4096 bytes into this section: in front of a kernel's variables, and here, linked last, behind them.
char *const shared_from = __start_shared + 4096, *const shared_to = __stop_shared - 4096;

HIDDEN void switch_stack(void **save, void *to);
asm(".text\n.p2align 4\n.hidden switch_stack\n.globl switch_stack\nswitch_stack:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

void to_scheduler() { switch_stack(&current->sp, main_sp); }

void thread_body() {
  kernel(arguments);
  current->state = DONE;
  done++;
  to_scheduler();
}

void resume(Thread &t) {
  current = &t;
  if (t.state == NEW) {
    void **top = (void **)((char *)t.stack + STACK - 64);
    *--top = nullptr;
    *--top = (void *)thread_body;  // where ret goes; keeps rsp % 16 == 8 at entry
    t.sp = top - 6;
    t.state = READY;
  }
  switch_stack(&main_sp, t.sp);
}

void say(const char *format, ...) {
  if (failed) return;
  failed = true;
  va_list rest;
  va_start(rest, format);
  vsnprintf(error, error_size, format, rest);
  va_end(rest);
}
#define LINE(site) ((site) & 0xffff)
#define BLOCK "block (%u,%u,%u)"
#define BLOCK_OF block_index.x, block_index.y, block_index.z
#define FAIL(format, ...) do { say(format " [" BLOCK " thread %u]", ##__VA_ARGS__, BLOCK_OF, current->number); \
                               to_scheduler(); __builtin_unreachable(); } while (0)

unsigned random_below(unsigned n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state % n;
}

// -- the checker --------------------------------------------------------------------------------------------------------
struct Access { uint64_t when; uint32_t thread, place; };
struct Cell { Access write, reads[3]; };
struct Range { char *from, *to; unsigned item; bool shared; std::vector<Cell> cells; };
uint64_t now, launch_began, block_began, barrier_at;
struct { uint64_t at; unsigned mask; } warp_synced[MOST];  // the last __syncwarp of each thread
std::vector<Range> ranges;
char *code_from, *code_to;
constexpr uint32_t ATOMIC = 1u << 31;

#ifdef CHECK
int find_code(dl_phdr_info *info, size_t, void *) {
  uintptr_t from = ~0ul, to = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) if (info->dlpi_phdr[i].p_type == PT_LOAD) {
    uintptr_t a = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, b = a + info->dlpi_phdr[i].p_memsz;
    from = a < from ? a : from;
    to = b > to ? b : to;
  }
  if ((uintptr_t)&current < from || (uintptr_t)&current >= to) return 0;
  code_from = (char *)from;
  code_to = (char *)to;
  return 1;
}

void watch(void *from, size_t size, unsigned item, bool shared) {
  if (size) ranges.push_back({(char *)from, (char *)from + size, item, shared, std::vector<Cell>((size + item - 1) / item)});
}

// Whether an earlier access by another thread is ordered before one that happens now.
bool ordered(const Access &a, const Range &range) {
  if (a.when < (range.shared ? block_began : launch_began)) return true;
  if (a.when < block_began) return false;  // another block of this launch
  unsigned thread = a.thread & ~ATOMIC;
  if (thread == current->number || a.when < barrier_at) return true;
  auto &synced = warp_synced[current->number];
  return thread / 32 == current->warp && a.when < synced.at && (synced.mask >> (thread % 32) & 1);
}

void touch(void *address, unsigned size, bool writes, bool atomic, void *caller) {
  if (failed || !current) return;
  char *a = (char *)address, *stack = (char *)current->stack;
  if (a >= stack && a + size <= stack + STACK) return;
  unsigned place = (unsigned)((char *)caller - code_from);
  const char *what = atomic ? "atomic" : writes ? "write" : "read";
  for (Range &range : ranges) {
    if (a < range.from || a >= range.to) continue;
    if (a + size > range.to)
      FAIL("out-of-bounds %s of %u bytes runs past the end of %s @%x", what, size, range.shared ? "shared memory" : "an array",
           place);
    if ((uintptr_t)a % size && size <= 16) FAIL("misaligned %s of %u bytes @%x", what, size, place);
    size_t first = (a - range.from) / range.item, last = (a + size - 1 - range.from) / range.item;
    for (Cell *c = &range.cells[first], *end = &range.cells[last]; c <= end; c++) {
      if (!writes && range.shared && c->write.when < block_began)
        FAIL("read of shared memory nobody wrote in this block @%x", place);
      auto race = [&](const Access &other, const char *was) {
        if ((atomic && (other.thread & ATOMIC)) || ordered(other, range)) return;
        FAIL("race: %s @%x against an unordered %s @%x by %s thread %u", what, place, was, other.place,
             other.when >= block_began ? "this block's" : "another block's", other.thread & ~ATOMIC);
      };
      race(c->write, "write");
      if (writes) for (Access &r : c->reads) race(r, "read");
      Access mine = {now, current->number | (atomic ? ATOMIC : 0), place};
      if (writes) c->write = mine;
      else if (c->reads[0].when < (range.shared ? block_began : launch_began)) c->reads[0] = mine;  // the first reader
      else {
        if ((c->reads[1].thread & ~ATOMIC) != current->number) c->reads[2] = c->reads[1];
        c->reads[1] = mine;
      }
    }
    return;
  }
  if (a >= stacks && a < stacks + STACK * MOST) FAIL("%s of another thread's local memory @%x", what, place);
  if (a >= __start_shared && a < __stop_shared)
    FAIL("out-of-bounds %s of %u bytes outside shared memory @%x", what, size, place);
  if (a >= code_from && a < code_to) return;  // constants, and the emulator's own
  FAIL("out-of-bounds %s of %u bytes @%x", what, size, place);
}
#endif

// -- the scheduler ------------------------------------------------------------------------------------------------------
bool release_barrier() {
  int site = -1, kind = 0, sum = 0;
  unsigned here = 0;
  for (unsigned i = 0; i < count; i++) if (threads[i].state == AT_BARRIER) {
    if (site < 0) site = threads[i].site, kind = threads[i].kind;
    if (threads[i].site != site) {
      say("divergent barrier: some threads wait at line %d, others at line %d [" BLOCK " thread %u]", LINE(site),
          LINE(threads[i].site), BLOCK_OF, i);
      return false;
    }
    here++;
    sum += (int)threads[i].value;
  }
  if (strict && done) {
    say("barrier at line %d reached by %u of %u threads: the others have returned [" BLOCK "]", LINE(site), here, count,
        BLOCK_OF);
    return false;
  }
  uint64_t result = kind == COUNT ? sum : kind == AND ? sum == (int)here : sum > 0;
  for (unsigned i = 0; i < count; i++) if (threads[i].state == AT_BARRIER) {
    threads[i].state = READY;
    threads[i].result = result;
  }
  waiting = 0;
  barrier_at = ++now;
  ++now;
  return true;
}

void deadlock() {
  char text[512] = "";
  int n = 0;
  for (unsigned i = 0, shown = 0; i < count && shown < 6; i++) {
    Thread &t = threads[i], &before = threads[i ? i - 1 : 0];
    if (t.state == DONE || (i && t.state == before.state && t.site == before.site && t.mask == before.mask)) continue;
    n += snprintf(text + n, sizeof text - n, "; thread %u on waits in %s at line %d mask %08x", i, NAMES[t.kind], LINE(t.site),
                  t.state == AT_WARP ? t.mask : 0);
    shown++;
  }
  say("deadlock: %u threads returned, %u at a barrier, %u in a warp operation%s [" BLOCK "]", done, waiting,
      count - done - waiting, text, BLOCK_OF);
}

void run_block(bool shuffled) {
  static unsigned order[MOST];
  done = waiting = 0;
  for (unsigned i = 0; i < count; i++) {
    Thread &t = threads[i];
    t = {};
    t.index = {i, 0, 0};
    t.stack = stacks + i * STACK;
    t.number = i;
    t.lane = i % 32;
    t.warp = i / 32;
    warp_synced[i] = {0, 0};
    order[i] = i;
  }
  memset(shared_from, 0xff, shared_to - shared_from);  // shared memory starts as garbage
  block_began = barrier_at = ++now;
  ++now;
  while (done < count && !failed) {
    if (shuffled) for (unsigned i = count - 1; i > 0; i--) std::swap(order[i], order[random_below(i + 1)]);
    bool moved = false;
    for (unsigned i = 0; i < count && !failed; i++) if (threads[order[i]].state <= READY) {
      resume(threads[order[i]]);
      moved = true;
    }
    if (failed || done == count) break;
    if (waiting && waiting + done == count) {
      if (!release_barrier()) break;
    } else if (!moved) {
      deadlock();
    }
  }
  current = nullptr;
}
}  // namespace

uint64_t block_barrier(int site, int kind, int predicate) {
  current->site = site;
  current->kind = kind;
  current->value = predicate;
  current->state = AT_BARRIER;
  waiting++;
  to_scheduler();
  return current->result;
}

uint64_t warp_operation(int site, int kind, unsigned mask, uint64_t value, int source) {
  Thread &me = *current, *lanes = threads + me.warp * 32;
  if (!(mask >> me.lane & 1)) FAIL("%s at line %d: the calling lane is not in mask %08x", NAMES[kind], LINE(site), mask);
  me.site = site;
  me.kind = kind;
  me.mask = mask;
  me.value = value;
  me.source = source;
  me.state = AT_WARP;
  for (unsigned i = 0; i < 32; i++) if ((mask >> i & 1) && lanes[i].state == DONE && strict)
    FAIL("%s at line %d: mask %08x names lane %u, which has returned", NAMES[kind], LINE(site), mask, i);
  for (unsigned i = 0; i < 32; i++) {
    Thread &t = lanes[i];
    bool arrived = t.state == AT_WARP && t.kind == kind && t.mask == mask && t.site == site;
    if ((mask >> i & 1) && t.state != DONE && !arrived) {
      to_scheduler();
      return me.result;
    }
  }
  unsigned here = 0, votes = 0;  // the last lane to arrive does the exchange for all
  for (unsigned i = 0; i < 32; i++) if ((mask >> i & 1) && lanes[i].state == AT_WARP) {
    here |= 1u << i;
    votes |= (unsigned)(lanes[i].value & 1) << i;
  }
  ++now;
  for (unsigned i = 0; i < 32; i++) if (here >> i & 1) {
    Thread &t = lanes[i];
    t.state = READY;
    t.result = votes;
    if (kind == SYNCWARP) warp_synced[t.number] = {now, mask};  // a shuffle orders no memory, as CUDA says
    if (kind == SHUFFLE) {
      if (!(here >> (t.source & 31) & 1)) {
        current = &t;
        FAIL("shuffle at line %d reads lane %d, which takes no part (mask %08x)", LINE(site), t.source, mask);
      }
      t.result = lanes[t.source & 31].value;
    }
  }
  ++now;
  return me.result;
}

void failed_assertion(int site, const char *what) { FAIL("assert(%s) failed at line %d", what, LINE(site)); }

#ifdef CHECK
#define CALLER __builtin_return_address(0)
#define HOOKS(N) \
  HIDDEN void __tsan_read##N(void *a) { touch(a, N, false, false, CALLER); } \
  HIDDEN void __tsan_write##N(void *a) { touch(a, N, true, false, CALLER); } \
  HIDDEN void __tsan_unaligned_read##N(void *a) { touch(a, N, false, false, CALLER); } \
  HIDDEN void __tsan_unaligned_write##N(void *a) { touch(a, N, true, false, CALLER); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
HIDDEN void __tsan_read_range(void *a, size_t n) { touch(a, (unsigned)n, false, false, CALLER); }
HIDDEN void __tsan_write_range(void *a, size_t n) { touch(a, (unsigned)n, true, false, CALLER); }
HIDDEN void __tsan_func_entry(void *) {}
HIDDEN void __tsan_func_exit() {}
HIDDEN void __tsan_init() {}
void atomic_access(const void *p, unsigned size) { touch((void *)p, size, true, true, CALLER); }

struct Where { const char *file; unsigned line, column; };  // of -fsanitize=alignment,bounds,shift,...
#define UNDEFINED(NAME, TEXT, ...) \
  HIDDEN void __ubsan_handle_##NAME(Where *w, ##__VA_ARGS__) { \
    if (current && !failed) FAIL(TEXT " at %s:%u", w->file, w->line); \
  }
UNDEFINED(type_mismatch_v1, "misaligned access", void *)
UNDEFINED(out_of_bounds, "array index out of bounds", void *)
UNDEFINED(shift_out_of_bounds, "shift by too much", void *, void *)
UNDEFINED(add_overflow, "signed overflow in +", void *, void *)
UNDEFINED(sub_overflow, "signed overflow in -", void *, void *)
UNDEFINED(mul_overflow, "signed overflow in *", void *, void *)
UNDEFINED(negate_overflow, "signed overflow in -", void *)
UNDEFINED(divrem_overflow, "division by zero or overflow", void *, void *)
#else
void atomic_access(const void *, unsigned) {}
#endif

// One region for all libraries of the process: guard pages make two mappings a stack, and Linux allows 65530.
VISIBLE void *make_stacks() {
  char *p = (char *)mmap(nullptr, STACK * MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  for (size_t i = 0; i < MOST; i++) mprotect(p + i * STACK, PAGE, PROT_NONE);
  return p;
}

int run(void (*function)(void **), const Launch *l) {
  stacks = (char *)l->stacks;
  kernel = function;
  arguments = l->arguments;
  error = l->error;
  error_size = l->error_size;
  failed = false;
  strict = l->strict;
  random_state = l->seed * 2654435761u | 1;
  grid_size = {l->grid[0], l->grid[1], l->grid[2]};
  block_size = {count = l->block, 1, 1};
  launch_began = ++now;
  ++now;
  ranges.clear();
#ifdef CHECK
  if (!code_from) dl_iterate_phdr(find_code, nullptr);
  watch(shared_from, shared_to - shared_from, 1, true);
  for (int i = 0; i < l->arrays; i++) watch(l->starts[i], l->sizes[i], l->items[i], false);
#endif
  unsigned control = _mm_getcsr();
  _mm_setcsr(control | 0x8040);  // subnormals count as zero, as CuPy's -ftz=true has it
  size_t blocks = (size_t)grid_size.x * grid_size.y * grid_size.z, at = 0, step = 1;
  if (l->seed && blocks > 1) {
    at = random_below(blocks);
    do step = 1 + random_below(blocks - 1); while (std::gcd(step, blocks) != 1);
  }
  for (size_t i = 0; i < blocks && !failed; i++, at = (at + step) % blocks) {
    block_index = {(unsigned)(at % grid_size.x), (unsigned)(at / grid_size.x % grid_size.y),
                   (unsigned)(at / grid_size.x / grid_size.y)};
    run_block(l->seed != 0);
  }
  _mm_setcsr(control);
  return failed;
}
