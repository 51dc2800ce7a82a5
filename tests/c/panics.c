/* A panic is injected into every exported function: it becomes a status, the object it happened in accepts nothing but
 * its free function, everything else lives on, and nothing leaks: panics MODEL */
#include "check.h"

extern void awqua_test_panic(awqua_str name);

struct world {
    awqua_engine *engine;
    awqua_model *model;
    awqua_session *session;
    awqua_batch *batch;
};

enum owner { NOBODY, ENGINE, MODEL, SESSION, BATCH };

static struct world make(const char *path) {
    struct world w;
    w.engine = cpu_engine();
    w.model = loaded_model(w.engine, path);
    w.session = new_session(w.model, 64);
    w.batch = NULL;
    OK(awqua_batch_create(w.model, NULL, 2, &w.batch));
    return w;
}

static void free_world(struct world *w) {
    OK(awqua_batch_free(w->batch));
    OK(awqua_session_free(w->session));
    OK(awqua_model_free(w->model));
    OK(awqua_engine_free(w->engine));
}

static void ignore_log(void *user, uint32_t level, awqua_str text) {
    (void)text;
    *(uint32_t *)user += level;
}

static void *host_alloc(void *user, uint64_t size, uint64_t align) {
    (void)user;
    (void)size;
    (void)align;
    return NULL;
}

static void host_free(void *user, void *memory, uint64_t size, uint64_t align) {
    (void)user;
    (void)memory;
    (void)size;
    (void)align;
}

static void check_poison(struct world *w, enum owner owner) {
    awqua_model *model = NULL;
    awqua_session *session = NULL;
    awqua_model_desc desc = AWQUA_MODEL_DESC_INIT;
    uint32_t id = 1, shares = 0;
    char text[256];
    desc.path = AWQUA_CSTR("x");
    text[0] = 0;
    if (owner == ENGINE) {
        awqua_engine_last_error(w->engine, text, sizeof text, NULL);
    } else if (owner == MODEL) {
        awqua_model_last_error(w->model, text, sizeof text, NULL);
    } else if (owner == SESSION) {
        awqua_session_last_error(w->session, text, sizeof text, NULL);
    } else if (owner == BATCH) {
        awqua_batch_last_error(w->batch, text, sizeof text, NULL);
    }
    CHECK(owner == NOBODY || strstr(text, "injected") != NULL);
    EXPECT(owner == ENGINE ? AWQUA_ERR_POISONED : AWQUA_OK, awqua_model_create(w->engine, &desc, &model));
    OK(awqua_model_free(model));
    EXPECT(owner == MODEL ? AWQUA_ERR_POISONED : AWQUA_OK, awqua_session_create(w->model, NULL, &session));
    OK(awqua_session_free(session));
    EXPECT(owner == BATCH ? AWQUA_ERR_POISONED : AWQUA_OK, awqua_batch_shares(w->batch, &shares));
    EXPECT(owner == SESSION ? AWQUA_ERR_POISONED : AWQUA_OK, awqua_session_truncate(w->session, 0));
    EXPECT(owner == SESSION ? AWQUA_ERR_POISONED : AWQUA_OK, awqua_session_begin_tokens(w->session, &id, 1, NULL));
}

/* Injects into `function`, makes `call` in a fresh world `w`, and checks what it left. */
#define PANIC(function, owner, call)                                       \
    do {                                                                   \
        struct world w = make(path);                                       \
        awqua_test_panic(AWQUA_CSTR(#function));                           \
        EXPECT(AWQUA_ERR_PANIC, call);                                     \
        check_poison(&w, owner);                                           \
        free_world(&w);                                                    \
    } while (0)

/* As PANIC for a free function: the object is gone, its relatives are not. */
#define PANIC_FREE(function, member)                                       \
    do {                                                                   \
        struct world w = make(path);                                       \
        awqua_test_panic(AWQUA_CSTR(#function));                           \
        EXPECT(AWQUA_ERR_PANIC, function(w.member));                       \
        w.member = NULL;                                                   \
        free_world(&w);                                                    \
    } while (0)

int main(int argc, char **argv) {
    const char *path = argv[1];
    awqua_engine_desc engine_desc = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model_desc = AWQUA_MODEL_DESC_INIT;
    awqua_session_desc session_desc = AWQUA_SESSION_DESC_INIT;
    awqua_allocator allocator = AWQUA_ALLOCATOR_INIT;
    awqua_memory_stats stats = AWQUA_MEMORY_STATS_INIT;
    awqua_device_info device = AWQUA_DEVICE_INFO_INIT;
    awqua_model_info model_info = AWQUA_MODEL_INFO_INIT;
    awqua_session_info session_info = AWQUA_SESSION_INFO_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_event event = AWQUA_EVENT_INIT;
    awqua_engine_info engine_info = AWQUA_ENGINE_INFO_INIT;
    awqua_estimate estimate = AWQUA_ESTIMATE_INIT;
    float values[4];
    awqua_message message = { AWQUA_STR("user"), AWQUA_STR("hi") };
    awqua_engine *engine = NULL;
    awqua_model *model = NULL;
    awqua_session *session = NULL;
    awqua_batch *batch = NULL;
    const awqua_api *api = NULL;
    uint32_t ids[4] = { 1, 2, 3, 4 }, heard = 0, number = 0;
    uint64_t n = 0;
    char text[64];
    CHECK(argc == 2);
    model_desc.path = AWQUA_CSTR(path);
    allocator.alloc = host_alloc;
    allocator.free = host_free;
    /* First, because it works only while nothing is allocated. */
    awqua_test_panic(AWQUA_CSTR("awqua_set_allocator"));
    EXPECT(AWQUA_ERR_PANIC, awqua_set_allocator(&allocator));
    OK(awqua_set_log(ignore_log, &heard, AWQUA_LOG_ERROR));

    PANIC(awqua_get_api, NOBODY, awqua_get_api(AWQUA_ABI_VERSION, sizeof *api, &api));
    PANIC(awqua_memory, NOBODY, awqua_memory(&stats));
    PANIC(awqua_set_log, NOBODY, awqua_set_log(NULL, NULL, 0));
    PANIC(awqua_last_error, NOBODY, awqua_last_error(text, sizeof text, &n));
    PANIC(awqua_engine_desc_init, NOBODY, awqua_engine_desc_init(&engine_desc));
    PANIC(awqua_engine_create, NOBODY, awqua_engine_create(&engine_desc, &engine));
    PANIC(awqua_engine_last_error, NOBODY, awqua_engine_last_error(w.engine, text, sizeof text, &n));
    PANIC(awqua_engine_get_info, ENGINE, awqua_engine_get_info(w.engine, &engine_info));
    PANIC(awqua_engine_recover, ENGINE, awqua_engine_recover(w.engine));
    PANIC(awqua_engine_recover_vulkan, ENGINE, awqua_engine_recover_vulkan(w.engine, NULL));
    PANIC(awqua_engine_debug_lose_device, ENGINE, awqua_engine_debug_lose_device(w.engine));
    PANIC(awqua_engine_trim, ENGINE, awqua_engine_trim(w.engine, AWQUA_TRIM_PAGES));
    PANIC(awqua_engine_get_pipeline_cache, ENGINE, awqua_engine_get_pipeline_cache(w.engine, text, sizeof text, &n));
    PANIC(awqua_device_count, NOBODY, awqua_device_count(&number));
    PANIC(awqua_device_get, NOBODY, awqua_device_get(0, &device));
    PANIC(awqua_budget_init, NOBODY, awqua_budget_init(&budget));
    PANIC(awqua_model_desc_init, NOBODY, awqua_model_desc_init(&model_desc));
    PANIC(awqua_model_create, ENGINE, awqua_model_create(w.engine, &model_desc, &model));
    PANIC(awqua_model_tick, MODEL, awqua_model_tick(w.model, NULL, NULL));
    PANIC(awqua_model_run, MODEL, awqua_model_run(w.model));
    PANIC(awqua_model_estimate, MODEL, awqua_model_estimate(w.model, &session_desc, &estimate));
    PANIC(awqua_model_evict, MODEL, awqua_model_evict(w.model));
    PANIC(awqua_model_restore, MODEL, awqua_model_restore(w.model));
    PANIC(awqua_model_cancel, MODEL, awqua_model_cancel(w.model));
    PANIC(awqua_model_last_error, NOBODY, awqua_model_last_error(w.model, text, sizeof text, &n));
    PANIC(awqua_model_get_info, MODEL, awqua_model_get_info(w.model, &model_info));
    PANIC(awqua_model_tokenize, MODEL, awqua_model_tokenize(w.model, AWQUA_CSTR("a"), 0, ids, 4, &n));
    PANIC(awqua_model_detokenize, MODEL, awqua_model_detokenize(w.model, ids, 4, 0, text, sizeof text, &n));
    PANIC(awqua_model_render_chat, MODEL, awqua_model_render_chat(w.model, &message, 1, 0, text, sizeof text, &n));
    PANIC(awqua_session_desc_init, NOBODY, awqua_session_desc_init(&session_desc));
    PANIC(awqua_request_init, NOBODY, awqua_request_init(&request));
    PANIC(awqua_session_create, MODEL, awqua_session_create(w.model, &session_desc, &session));
    PANIC(awqua_session_last_error, NOBODY, awqua_session_last_error(w.session, text, sizeof text, &n));
    PANIC(awqua_session_get_info, SESSION, awqua_session_get_info(w.session, &session_info));
    PANIC(awqua_session_begin_tokens, SESSION, awqua_session_begin_tokens(w.session, ids, 4, &request));
    PANIC(awqua_session_begin_text, SESSION, awqua_session_begin_text(w.session, AWQUA_CSTR("a"), &request));
    PANIC(awqua_session_begin_chat, SESSION, awqua_session_begin_chat(w.session, &message, 1, &request));
    PANIC(awqua_session_tick, SESSION, awqua_session_tick(w.session, NULL, NULL));
    PANIC(awqua_session_poll, SESSION, awqua_session_poll(w.session, &event));
    PANIC(awqua_session_cancel, SESSION, awqua_session_cancel(w.session));
    PANIC(awqua_session_run, SESSION, awqua_session_run(w.session));
    PANIC(awqua_session_truncate, SESSION, awqua_session_truncate(w.session, 0));
    PANIC(awqua_session_fork, SESSION, awqua_session_fork(w.session, &session));
    PANIC(awqua_session_save, SESSION, awqua_session_save(w.session, text, sizeof text, &n));
    PANIC(awqua_session_restore, SESSION, awqua_session_restore(w.session, text, sizeof text));
    PANIC(awqua_session_trim, SESSION, awqua_session_trim(w.session));
    PANIC(awqua_session_begin_embedding_tokens, SESSION, awqua_session_begin_embedding_tokens(w.session, ids, 4));
    PANIC(awqua_session_begin_embedding_text, SESSION, awqua_session_begin_embedding_text(w.session, AWQUA_CSTR("a")));
    PANIC(awqua_session_get_embedding, SESSION, awqua_session_get_embedding(w.session, values, 4, &n));
    PANIC(awqua_batch_create, MODEL, awqua_batch_create(w.model, NULL, 2, &batch));
    PANIC(awqua_batch_tick, BATCH, awqua_batch_tick(w.batch, &w.session, 1, NULL, NULL));
    PANIC(awqua_batch_run, BATCH, awqua_batch_run(w.batch, &w.session, 1));
    PANIC(awqua_batch_shares, BATCH, awqua_batch_shares(w.batch, &number));
    PANIC(awqua_batch_last_error, NOBODY, awqua_batch_last_error(w.batch, text, sizeof text, &n));
    PANIC_FREE(awqua_batch_free, batch);
    PANIC_FREE(awqua_session_free, session);
    PANIC_FREE(awqua_model_free, model);
    PANIC_FREE(awqua_engine_free, engine);
    CHECK(engine == NULL && model == NULL && session == NULL && batch == NULL && heard > 0);
    OK(awqua_set_log(NULL, NULL, AWQUA_LOG_OFF));
    return 0;
}
