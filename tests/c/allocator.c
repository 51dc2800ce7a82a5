/* The host's memory functions: all memory comes from them and returns to them, and making tokens takes none:
 * allocator MODEL */
#define _POSIX_C_SOURCE 200112L
#include <pthread.h>

#include "check.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t blocks, bytes, calls;

static void *count_alloc(void *user, uint64_t size, uint64_t align) {
    void *memory = NULL;
    CHECK(user == &blocks && size > 0 && align > 0 && (align & (align - 1)) == 0);
    if (posix_memalign(&memory, align < sizeof(void *) ? sizeof(void *) : (size_t)align, (size_t)size) != 0) {
        return NULL;
    }
    pthread_mutex_lock(&lock);
    blocks++;
    calls++;
    bytes += size;
    pthread_mutex_unlock(&lock);
    return memory;
}

static void count_free(void *user, void *memory, uint64_t size, uint64_t align) {
    CHECK(user == &blocks && memory != NULL && align > 0);
    pthread_mutex_lock(&lock);
    blocks--;
    bytes -= size;
    pthread_mutex_unlock(&lock);
    free(memory);
}

/* An answer of which 200 tokens, and many more ticks, are watched: not one allocation. Everything is given back. */
static void play(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = loaded_model(engine, path);
    awqua_session *session = new_session(model, 512);
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    awqua_str stop = AWQUA_STR("a text that never comes");
    uint64_t before;
    uint32_t tokens = 0, ticks = 0;
    /* What costs most: chosen at random, with penalties and stop texts. */
    request.max_tokens = 400;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    request.repetition_penalty = 1.05f;
    request.stops = &stop;
    request.n_stops = 1;
    budget.cpu_us = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning, and Emma"), &request));
    do {
        EXPECT(AWQUA_PENDING, awqua_session_tick(session, &budget, &result));
    } while (result.answer_tokens < 10);
    CHECK(result.phase == AWQUA_PHASE_DECODE);
    before = calls;
    while (tokens < 200 || ticks < 200) {
        char text[64];
        awqua_event event = AWQUA_EVENT_INIT;
        event.text = text;
        event.text_capacity = sizeof text;
        EXPECT(AWQUA_PENDING, awqua_session_tick(session, &budget, &result));
        tokens += result.new_tokens;
        ticks++;
        while (awqua_session_poll(session, &event) == AWQUA_OK) {
        }
    }
    CHECK(calls == before);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

/* On a GPU wgpu allocates for every submission: how much is printed, and none of it stays. */
static void play_on_gpu(const char *path) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_session *session;
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    awqua_memory_stats stats = AWQUA_MEMORY_STATS_INIT;
    uint64_t before, live, peak;
    uint32_t tokens = 0, ticks = 0;
    awqua_status status;
    desc.backend = AWQUA_BACKEND_GPU;
    OK(awqua_engine_create(&desc, &engine));
    model = new_model(engine, path);
    status = awqua_model_run(model);
    if (status == AWQUA_ERR_NO_DEVICE) {
        printf("no GPU\n");
        return;
    }
    OK(status);
    session = new_session(model, 256);
    request.max_tokens = 100;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    OK(awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning, and Emma"), &request));
    do {
        EXPECT(AWQUA_PENDING, awqua_session_tick(session, &budget, &result));
    } while (result.answer_tokens < 4);
    before = calls;
    live = peak = bytes;
    while (tokens < 20) {
        char text[64];
        awqua_event event = AWQUA_EVENT_INIT;
        event.text = text;
        event.text_capacity = sizeof text;
        EXPECT(AWQUA_PENDING, awqua_session_tick(session, &budget, &result));
        tokens += result.new_tokens;
        ticks++;
        peak = bytes > peak ? bytes : peak;
        while (awqua_session_poll(session, &event) == AWQUA_OK) {
        }
    }
    OK(awqua_memory(&stats));
    printf("wgpu: %.1f allocations a token, %.1f a tick; at most %llu bytes more than before, %lld in the end\n",
           (double)(calls - before) / tokens, (double)(calls - before) / ticks, (unsigned long long)(peak - live),
           (long long)bytes - (long long)live);
    CHECK(bytes < live + (256u << 10));
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

int main(int argc, char **argv) {
    awqua_allocator allocator = AWQUA_ALLOCATOR_INIT;
    awqua_memory_stats stats = AWQUA_MEMORY_STATS_INIT;
    uint64_t earlier, settled;
    CHECK(argc == 2);
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_set_allocator(NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_set_allocator(&allocator));
    /* What the failed calls above allocated, and gave back. */
    OK(awqua_memory(&stats));
    CHECK(stats.bytes == 0);
    earlier = stats.allocations;
    allocator.user = &blocks;
    allocator.alloc = count_alloc;
    allocator.free = count_free;
    OK(awqua_set_allocator(&allocator));
    EXPECT(AWQUA_ERR_STATE, awqua_set_allocator(&allocator));
    play(argv[1]);
    /* Tables that are made once per process stay; nothing else does. */
    settled = blocks;
    play(argv[1]);
    CHECK(blocks == settled);
    OK(awqua_memory(&stats));
    CHECK(stats.bytes == bytes && stats.allocations == calls + earlier && stats.peak_bytes >= bytes);
    CHECK(calls > 10);
    play_on_gpu(argv[1]);
    return 0;
}
