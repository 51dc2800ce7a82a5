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

/* The same of two sessions in one batch. */
static void play_together(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = loaded_model(engine, path);
    awqua_session *sessions[2];
    awqua_batch *batch = NULL;
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result results[2] = { AWQUA_TICK_RESULT_INIT, AWQUA_TICK_RESULT_INIT };
    uint64_t before = 0;
    uint32_t tokens = 0, i;
    int shared = 0;
    request.max_tokens = 400;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    budget.cpu_us = 100;
    OK(awqua_batch_create(model, NULL, 2, &batch));
    for (i = 0; i < 2; i++) {
        sessions[i] = new_session(model, 512);
        request.seed = i;
        OK(awqua_session_begin_text(sessions[i], AWQUA_CSTR("It was a fine morning, and Emma"), &request));
    }
    while (tokens < 200) {
        EXPECT(AWQUA_PENDING, awqua_batch_tick(batch, sessions, 2, &budget, results));
        if (!shared && results[0].answer_tokens > 10 && results[1].answer_tokens > 10) {
            shared = 1;
            before = calls;
        }
        for (i = 0; i < 2; i++) {
            char text[64];
            awqua_event event = AWQUA_EVENT_INIT;
            event.text = text;
            event.text_capacity = sizeof text;
            tokens += shared ? results[i].new_tokens : 0;
            while (awqua_session_poll(sessions[i], &event) == AWQUA_OK) {
            }
        }
    }
    CHECK(calls == before);
    OK(awqua_batch_free(batch));
    OK(awqua_session_free(sessions[0]));
    OK(awqua_session_free(sessions[1]));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

/* On a GPU wgpu allocates for every submission, and to look whether one has ended: how much is printed, and none of it
 * stays. */
static void play_on_gpu(const char *path) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_session *session;
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    uint64_t before = 0, live = 0, of_run, of_looks = 0;
    uint32_t looks = 0;
    char text[1024];
    awqua_status status;
    int run;
    desc.backend = AWQUA_BACKEND_GPU;
    OK(awqua_engine_create(&desc, &engine));
    model = new_model(engine, path);
    status = awqua_model_run(model);
    if (status == AWQUA_ERR_NO_DEVICE) {
        printf("no GPU\n");
        OK(awqua_model_free(model));
        OK(awqua_engine_free(engine));
        return;
    }
    OK(status);
    session = new_session(model, 256);
    request.max_tokens = 16;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    for (run = 0; run < 2; run++) {
        before = calls;
        live = bytes;
        OK(awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning, and Emma"), &request));
        OK(awqua_session_run(session));
        text[0] = 0;
        CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS);
    }
    of_run = calls - before;
    CHECK(bytes < live + (256u << 10));
    OK(awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning, and Emma"), &request));
    while (looks < 50 && awqua_session_tick(session, &budget, &result) == AWQUA_PENDING) {
        before = calls;
        CHECK((int)awqua_session_tick(session, &budget, &result) >= 0);
        if (result.new_tokens == 0) {
            looks++;
            of_looks += calls - before;
        }
    }
    printf("wgpu: %.1f allocations a token of an answer of 16, %.1f a tick without a new token; %lld bytes left\n",
           (double)of_run / 16, looks ? (double)of_looks / looks : 0.0, (long long)(bytes - live));
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
    play_together(argv[1]);
    CHECK(blocks == settled);
    OK(awqua_memory(&stats));
    CHECK(stats.bytes == bytes && stats.allocations == calls + earlier && stats.peak_bytes >= bytes);
    CHECK(calls > 10);
    play_on_gpu(argv[1]);
    return 0;
}
