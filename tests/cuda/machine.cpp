// Fibers, barriers and asynchronous operations of machine.h.
#include "machine.h"

#include <deque>
#include <map>
#include <memory>

namespace machine {

Dim thread_index, block_index, block_dim, grid_dim;
u8* shared;

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> all;
    return all;
}

// Switching stacks: saves what a call has to preserve and returns on the other stack.
extern "C" void machine_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl machine_switch
.type machine_switch, @function
machine_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "the machine has no switch of stacks for this processor"
#endif

namespace {

constexpr size_t STACK = 96 << 10;
constexpr u32 WARP = 32;

struct Copy {
    void* to;
    const void* from;
    bool valid;
    bool done;
    void perform() {
        if (done) return;
        if (valid) {
            std::memcpy(to, from, 16);
        } else {
            std::memset(to, 0, 16);
        }
        done = true;
    }
};
struct Product {
    float* d;
    u32* a;
    u32 early[4];
    bool late;
    u64 b;
    u32 n;
};

struct Fiber {
    std::unique_ptr<u8[]> memory;
    void* stack;
    u32 index;
    bool finished;
    std::deque<std::vector<Copy>> copies;
    std::vector<Copy> open_copies;
    std::deque<std::vector<Product>> products;
    std::vector<Product> open_products;
};
struct Meeting {
    u32 arrived;
    u64 generation;
    void (*all)(void**);
    void* brought[128];
};
struct Gate {
    u32 arrived, threads;
    u64 generation;
};
struct Bulk {
    void* to;
    const void* from;
    u32 bytes;
    u64* barrier;
};
struct Phase {
    i32 bytes;
    u8 missing, arrivals, phase, made;
};
static_assert(sizeof(Phase) == 8);

std::vector<Fiber> fibers;
std::vector<Meeting> warps, groups;
Gate gates[16];
std::vector<Bulk> bulks;
Fiber* current;
void* scheduler_stack;
u64 random_state = 1;
u64 events;
u32 alive;
const void* kernel_args;
void (*kernel_body)(const void*);
const char* failure;
u32 shared_size;

void place(u32 index) {
    thread_index = {index % block_dim.x, index / block_dim.x % block_dim.y, index / block_dim.x / block_dim.y};
}

void leave() {
    u8 here;
    (void)here;
    machine_switch(&current->stack, scheduler_stack);
}

void enter() {
    kernel_body(kernel_args);
    current->finished = true;
    alive--;
    events++;
    leave();
    std::abort();
}

void prepare(Fiber& fiber, u32 index) {
    if (!fiber.memory) fiber.memory.reset(new u8[STACK]);
    fiber.index = index;
    fiber.finished = false;
    fiber.copies.clear();
    fiber.open_copies.clear();
    fiber.products.clear();
    fiber.open_products.clear();
    // Six registers below the address that the first switch returns to; the stack is 8 beyond a multiple of 16 there,
    // as behind a call.
    u64* top = reinterpret_cast<u64*>((reinterpret_cast<uintptr_t>(fiber.memory.get()) + STACK) & ~uintptr_t(15));
    *--top = 0;
    *--top = reinterpret_cast<u64>(&enter);
    for (int i = 0; i < 6; i++) *--top = 0;
    fiber.stack = top;
}

void settle(Phase& phase) {
    if (phase.missing == 0 && phase.bytes == 0) {
        phase.phase ^= 1;
        phase.missing = phase.arrivals;
        events++;
    }
}

void perform(const Bulk& bulk) {
    std::memcpy(bulk.to, bulk.from, bulk.bytes);
    Phase& phase = *reinterpret_cast<Phase*>(bulk.barrier);
    phase.bytes -= i32(bulk.bytes);
    events++;
    settle(phase);
}

bool run_block() {
    const u32 threads = block_dim.x * block_dim.y * block_dim.z;
    if (fibers.size() < threads) fibers.resize(threads);
    for (u32 i = 0; i < threads; i++) prepare(fibers[i], i);
    warps.assign((threads + WARP - 1) / WARP, Meeting{});
    groups.assign((threads + 127) / 128, Meeting{});
    std::memset(gates, 0, sizeof gates);
    bulks.clear();
    alive = threads;
    while (alive > 0) {
        const u64 before = events;
        const u32 start = random_below(threads), step = threads % 2 ? 1 : random_below(threads / 2) * 2 + 1;
        // An odd step visits every thread of a power of two; whole rounds follow for other numbers.
        const bool power = (threads & (threads - 1)) == 0;
        for (u32 i = 0; i < threads; i++) {
            Fiber& fiber = fibers[power ? (start + i * step) % threads : (start + i) % threads];
            if (fiber.finished) continue;
            current = &fiber;
            place(fiber.index);
            machine_switch(&scheduler_stack, fiber.stack);
            if (failure) return false;
        }
        while (!bulks.empty() && (events == before || random_below(2))) {
            const u32 which = random_below(u32(bulks.size()));
            const Bulk bulk = bulks[which];
            bulks.erase(bulks.begin() + which);
            perform(bulk);
        }
        if (events == before) {
            failure = "a deadlock: all threads wait";
            return false;
        }
    }
    return true;
}

}  // namespace

void fail(const char* reason) {
    failure = reason;
    leave();
    std::abort();
}

u32 random_below(u32 n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return n ? u32((random_state >> 11) % n) : 0;
}
void seed(u64 value) { random_state = value * 0x9e3779b97f4a7c15ull | 1; }

void yield() {
    leave();
    place(current->index);
}
void progress() { events++; }

void meet(u32 group, void* mine, void (*all)(void**)) {
    const u32 index = current->index;
    Meeting& meeting = group == 32 ? warps[index / 32] : groups[index / 128];
    if (meeting.arrived == 0) {
        meeting.all = all;
    } else if (meeting.all != all) {
        fail("threads of a warp meet for different operations");
    }
    meeting.brought[index % group] = mine;
    if (++meeting.arrived == group) {
        all(meeting.brought);
        meeting.arrived = 0;
        meeting.generation++;
        events++;
        return;
    }
    const u64 generation = meeting.generation;
    while (meeting.generation == generation) yield();
}

void barrier(u32 id, u32 threads) {
    Gate& gate = gates[id];
    gate.threads = threads;
    gate.arrived++;
    const u64 generation = gate.generation;
    for (;;) {
        if (gate.generation != generation) return;
        // Threads that have ended are not waited for.
        if (gate.arrived == (threads ? threads : alive)) {
            gate.arrived = 0;
            gate.generation++;
            events++;
            return;
        }
        yield();
    }
}

void copy(void* to, const void* from, bool valid) {
    check_shared(to, 16);
    if (valid) check_global(from, 16);
    if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) % 16) {
        fail("a misaligned asynchronous copy");
    }
    current->open_copies.push_back({to, from, valid, false});
    if (random_below(2)) current->open_copies.back().perform();
}
void copy_commit() {
    current->copies.push_back(std::move(current->open_copies));
    current->open_copies.clear();
}
void copy_wait(u32 most) {
    while (current->copies.size() > most) {
        for (Copy& copy : current->copies.front()) copy.perform();
        current->copies.pop_front();
    }
}

void phase_init(u64* barrier, u32 arrivals) {
    check_shared(barrier, 8);
    *reinterpret_cast<Phase*>(barrier) = {0, u8(arrivals), u8(arrivals), 0, 0x5a};
}
void phase_arrive(u64* barrier, u32 bytes) {
    Phase& phase = *reinterpret_cast<Phase*>(barrier);
    if (phase.made != 0x5a) fail("a barrier that was not initialised");
    if (phase.missing == 0) fail("more arrivals at a barrier than it expects");
    phase.bytes += i32(bytes);
    phase.missing--;
    events++;
    settle(phase);
}
void phase_wait(u64* barrier, u32 parity) {
    Phase& phase = *reinterpret_cast<Phase*>(barrier);
    if (phase.made != 0x5a) fail("a barrier that was not initialised");
    // The phase of the other parity is under way, or this one has ended.
    while (phase.phase == parity) yield();
}
void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
    check_shared(to, bytes);
    check_global(from, bytes);
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16) {
        fail("a misaligned bulk copy");
    }
    const Bulk bulk{to, from, bytes, barrier};
    bulks.push_back(bulk);
    if (random_below(2)) {
        bulks.pop_back();
        perform(bulk);
    }
}

void group_mma(float* d, u32* a, u64 b, u32 n) {
    Product product{d, a, {a[0], a[1], a[2], a[3]}, random_below(2) == 1, b, n};
    current->open_products.push_back(product);
}
void group_commit() {
    current->products.push_back(std::move(current->open_products));
    current->open_products.clear();
}
void group_wait(u32 most) {
    while (current->products.size() > most) {
        std::vector<Product> products = std::move(current->products.front());
        current->products.pop_front();
        for (Product& product : products) {
            meet(128, &product, [](void** all) {
                const Product& first = *static_cast<Product*>(all[0]);
                const u32 start = u32(first.b & 0x3fff) << 4;
                std::vector<float> b(first.n * 16);
                for (u32 column = 0; column < first.n; column++) {
                    for (u32 k = 0; k < 16; k++) {
                        // Address bits 4 to 6 are exchanged by bits 7 to 9.
                        u32 at = start + column / 8 * 1024 + column % 8 * 128 + k * 2;
                        at ^= (at >> 7 & 7) << 4;
                        u16 bits;
                        if (at + 2 > shared_size) fail("an operand beyond shared memory");
                        std::memcpy(&bits, shared + at, 2);
                        b[column * 16 + k] = half_to_float(bits);
                    }
                }
                for (u32 row = 0; row < 64; row++) {
                    float a[16];
                    for (u32 k = 0; k < 16; k++) {
                        Product& from = *static_cast<Product*>(all[row / 16 * 32 + row % 8 * 4 + k % 8 / 2]);
                        if (from.b != first.b) fail("lanes give different operands");
                        const u32* registers = from.late ? from.a : from.early;
                        const u32 pair = registers[row % 16 / 8 + k / 8 * 2];
                        a[k] = half_to_float(u16(k % 2 ? pair >> 16 : pair));
                    }
                    for (u32 column = 0; column < first.n; column++) {
                        float sum = 0;
                        for (u32 k = 0; k < 16; k++) sum += a[k] * b[column * 16 + k];
                        Product& to = *static_cast<Product*>(all[row / 16 * 32 + row % 8 * 4 + column % 8 / 2]);
                        to.d[column / 8 * 4 + row % 16 / 8 * 2 + column % 2] += sum;
                    }
                }
            });
        }
    }
}

float half_to_float(u16 bits) {
    static const std::vector<float> table = [] {
        std::vector<float> all(65536);
        for (u32 i = 0; i < 65536; i++) {
            const u32 exponent = i >> 10 & 31, mantissa = i & 1023;
            double v = exponent == 31 ? (mantissa ? NAN : INFINITY)
                       : exponent     ? std::ldexp(1024.0 + mantissa, int(exponent) - 25)
                                      : std::ldexp(double(mantissa), -24);
            all[i] = float(i >> 15 ? -v : v);
        }
        return all;
    }();
    return table[bits];
}

u16 half_from_double(double value) {
    if (std::isnan(value)) return 0x7fff;
    const u16 sign = std::signbit(value) ? 0x8000 : 0;
    double v = std::fabs(value);
    if (v >= 65520.0) return sign | 0x7c00;
    int exponent;
    std::frexp(v, &exponent);
    // The last place: 2^-24 for values below 2^-14.
    const int place = exponent - 11 < -24 ? -24 : exponent - 11;
    const double units = std::nearbyint(std::ldexp(v, -place));
    v = std::ldexp(units, place);
    if (v == 0) return sign;
    std::frexp(v, &exponent);
    if (exponent - 11 < -24) return sign | u16(std::ldexp(v, 24));
    return sign | u16((exponent + 14) << 10) | u16(u32(std::ldexp(v, 11 - exponent)) & 1023);
}

void check_shared(const void* p, u64 bytes) {
    const u8* at = static_cast<const u8*>(p);
    if (at < shared || at + bytes > shared + shared_size) fail("an address outside shared memory");
}

bool run(const Kernel& kernel, const void* args, Dim grid, Dim block, u32 shared_bytes, const char** error) {
    static std::vector<u8> arena;
    const u32 threads = block.x * block.y * block.z;
    failure = nullptr;
    if (threads == 0 || threads > kernel.threads || threads % WARP) {
        *error = "a block of a size that the kernel is not compiled for";
        return false;
    }
    arena.resize(shared_bytes + 2048);
    shared = reinterpret_cast<u8*>((reinterpret_cast<uintptr_t>(arena.data()) + 1023) & ~uintptr_t(1023));
    shared_size = shared_bytes;
    kernel_args = args;
    kernel_body = kernel.body;
    block_dim = block;
    grid_dim = grid;
    for (u32 z = 0; z < grid.z; z++) {
        for (u32 y = 0; y < grid.y; y++) {
            for (u32 x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
                // Half precision NaNs, so that unwritten memory shows.
                std::memset(shared, 0x7e, shared_bytes);
                if (!run_block()) {
                    *error = failure;
                    return false;
                }
            }
        }
    }
    return true;
}

}  // namespace machine
