/* The contract of the header, kept and broken on purpose: contract MODEL */
#include "check.h"

static const char PROMPT[] = "It was a fine morning, and Emma";

static void statuses(void) {
    CHECK(strcmp(awqua_status_name(AWQUA_ERR_PANIC), "AWQUA_ERR_PANIC") == 0);
    CHECK(strcmp(awqua_status_name(12345), "AWQUA_UNKNOWN") == 0);
    CHECK(awqua_version()[0] != 0);
}

static void sizes(const char *path) {
    awqua_engine *engine = NULL;
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    struct { awqua_engine_desc desc; uint32_t newer[4]; } grown;
    awqua_model *model;
    uint32_t bad[] = { 0, 1, 7, 12, 33, 4096, 0xffffffffu };
    size_t i;
    for (i = 0; i < sizeof bad / sizeof *bad; i++) {
        desc.struct_size = bad[i];
        EXPECT(AWQUA_ERR_STRUCT_SIZE, awqua_engine_create(&desc, &engine));
        CHECK(engine == NULL);
    }
    /* A newer program: fine while it does not use what is new. */
    memset(&grown, 0, sizeof grown);
    grown.desc.struct_size = sizeof grown;
    grown.desc.backend = AWQUA_BACKEND_CPU;
    OK(awqua_engine_create(&grown.desc, &engine));
    OK(awqua_engine_free(engine));
    engine = NULL;
    grown.newer[2] = 1;
    EXPECT(AWQUA_ERR_STRUCT_SIZE, awqua_engine_create(&grown.desc, &engine));
    CHECK(engine == NULL);
    /* A structure that is filled in keeps its size, and what lies behind it is not touched. */
    engine = cpu_engine();
    model = loaded_model(engine, path);
    {
        struct { awqua_model_info info; uint8_t guard[64]; } out;
        memset(&out, 0x5a, sizeof out);
        out.info.struct_size = sizeof out.info;
        OK(awqua_model_get_info(model, &out.info));
        CHECK(out.info.struct_size == sizeof out.info && out.guard[0] == 0x5a && out.info.vocab_size > 0);
        CHECK(strcmp(out.info.backend, "cpu") == 0);
        out.info.struct_size = 20;
        EXPECT(AWQUA_ERR_STRUCT_SIZE, awqua_model_get_info(model, &out.info));
    }
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

static void nulls(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = new_model(engine, path);
    awqua_session *session = NULL;
    awqua_model_desc no_path = AWQUA_MODEL_DESC_INIT;
    awqua_message message = { { NULL, 0 }, { NULL, 3 } };
    awqua_str not_utf8 = AWQUA_STR("\xff\xfe");
    awqua_event event = AWQUA_EVENT_INIT;
    awqua_request request = greedy(4);
    uint64_t n = 77;
    uint32_t id = 0;
    OK(awqua_engine_free(NULL));
    OK(awqua_model_free(NULL));
    OK(awqua_session_free(NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_engine_create(NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_create(NULL, NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_create(engine, NULL, &model));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_create(engine, &no_path, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_tick(NULL, NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_tick(NULL, NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_poll(NULL, &event));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_cancel(NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_cancel(NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_get_api(AWQUA_ABI_VERSION, sizeof(awqua_api), NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_set_log(NULL, NULL, 9));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_device_count(NULL));
    /* The wrong kind of object, as a language without types would hand it over. */
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_tick((awqua_model *)(void *)engine, NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_free((awqua_session *)(void *)engine));
    /* Not loaded yet. */
    EXPECT(AWQUA_ERR_STATE, awqua_session_create(model, NULL, &session));
    CHECK(session == NULL);
    while (awqua_model_tick(model, NULL, NULL) == AWQUA_PENDING) {
    }
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_create(model, NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_tokenize(model, not_utf8, 0, &id, 1, &n));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_tokenize(model, AWQUA_CSTR("a"), 0, NULL, 1, &n));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_tokenize(model, AWQUA_CSTR("a"), 0, &id, 1, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_tokenize(model, AWQUA_CSTR("a"), 64, &id, 1, &n));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_render_chat(model, &message, 1, 0, NULL, 0, &n));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_render_chat(model, &message, UINT64_MAX, 0, NULL, 0, &n));
    CHECK(n == 77);
    session = new_session(model, 128);
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_poll(session, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_tokens(session, NULL, 5, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_tokens(session, NULL, 0, NULL));
    request.temperature = -1.0f;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    request = greedy(4);
    request.n_stops = 2;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    id = 0x7fffffff;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_tokens(session, &id, 1, NULL));
    event.text = NULL;
    event.text_capacity = 8;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_poll(session, &event));
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

static void messages(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = new_model(engine, "/nowhere/at/all");
    char text[256], cut[9];
    uint64_t length = 0;
    EXPECT(AWQUA_ERR_IO, awqua_model_tick(model, NULL, NULL));
    OK(awqua_model_last_error(model, text, sizeof text, &length));
    CHECK(strstr(text, "/nowhere/at/all") != NULL && strlen(text) == length);
    EXPECT(AWQUA_ERR_BUFFER_TOO_SMALL, awqua_model_last_error(model, cut, sizeof cut, &length));
    CHECK(strncmp(cut, text, 8) == 0 && cut[8] == 0 && length > 8);
    OK(awqua_engine_last_error(engine, text, sizeof text, &length));
    CHECK(length == 0 && text[0] == 0);
    /* The object is as it was: it fails again, and it can be freed. */
    EXPECT(AWQUA_ERR_IO, awqua_model_tick(model, NULL, NULL));
    OK(awqua_model_free(model));
    (void)path;
    OK(awqua_engine_free(engine));
}

static void texts(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = loaded_model(engine, path);
    uint32_t ids[64];
    uint64_t n = 0, length = 0;
    char text[128];
    EXPECT(AWQUA_ERR_BUFFER_TOO_SMALL, awqua_model_tokenize(model, AWQUA_CSTR(PROMPT), 0, NULL, 0, &n));
    CHECK(n > 0 && n < 64);
    OK(awqua_model_tokenize(model, AWQUA_CSTR(PROMPT), 0, ids, 64, &n));
    EXPECT(AWQUA_ERR_BUFFER_TOO_SMALL, awqua_model_detokenize(model, ids, n, 0, text, sizeof PROMPT - 1, &length));
    CHECK(length == sizeof PROMPT - 1);
    OK(awqua_model_detokenize(model, ids, n, 0, text, sizeof PROMPT, &length));
    CHECK(strcmp(text, PROMPT) == 0);
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

/* The whole answer, polled through a buffer of `size` bytes after every tick. */
static void answer(const awqua_model *model, uint64_t cpu_us, size_t size, char *text, size_t capacity) {
    awqua_session *session = new_session(model, 256);
    awqua_request request = greedy(24);
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    awqua_status status;
    uint32_t reason = 0, made = 0;
    budget.cpu_us = cpu_us;
    text[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    do {
        status = awqua_session_tick(session, &budget, &result);
        CHECK(status == AWQUA_PENDING || status == AWQUA_OK);
        made += result.new_tokens;
        reason |= drain(session, text, capacity, size);
    } while (status == AWQUA_PENDING);
    CHECK(reason == AWQUA_STOP_MAX_TOKENS && made == 24);
    CHECK(result.phase == AWQUA_PHASE_IDLE && result.answer_tokens == 24);
    OK(awqua_session_free(session));
}

static void buffers(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = loaded_model(engine, path);
    char whole[1024], pieces[1024];
    size_t size;
    answer(model, 1000000, sizeof whole, whole, sizeof whole);
    CHECK(strlen(whole) > 20);
    for (size = 4; size < 8; size++) {
        answer(model, 0, size, pieces, sizeof pieces);
        CHECK(strcmp(whole, pieces) == 0);
    }
    {
        /* A buffer without room keeps the event. */
        awqua_session *session = new_session(model, 256);
        awqua_request request = greedy(24);
        awqua_event event = AWQUA_EVENT_INIT;
        OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
        OK(awqua_session_run(session));
        OK(awqua_session_poll(session, &event));
        CHECK(event.kind == AWQUA_EVENT_PROGRESS && event.done == event.total && event.total > 3);
        EXPECT(AWQUA_ERR_BUFFER_TOO_SMALL, awqua_session_poll(session, &event));
        CHECK(event.text_waiting == strlen(whole));
        pieces[0] = 0;
        CHECK(drain(session, pieces, sizeof pieces, 16) == AWQUA_STOP_MAX_TOKENS);
        CHECK(strcmp(whole, pieces) == 0);
        EXPECT(AWQUA_EMPTY, awqua_session_poll(session, &event));
        OK(awqua_session_free(session));
    }
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

/* Objects are freed in every order, and the children go on. */
static void orders(const char *path) {
    static const int order[6][3] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    int i, j;
    for (i = 0; i < 6; i++) {
        awqua_engine *engine = cpu_engine();
        awqua_model *model = loaded_model(engine, path);
        awqua_session *session = new_session(model, 64);
        awqua_request request = greedy(4);
        char text[128];
        OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
        for (j = 0; j < 3; j++) {
            if (order[i][j] == 0) {
                OK(awqua_engine_free(engine));
            } else if (order[i][j] == 1) {
                OK(awqua_model_free(model));
            } else {
                OK(awqua_session_run(session));
                text[0] = 0;
                CHECK(drain(session, text, sizeof text, 32) == AWQUA_STOP_MAX_TOKENS && text[0] != 0);
                OK(awqua_session_free(session));
            }
        }
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    statuses();
    sizes(argv[1]);
    nulls(argv[1]);
    messages(argv[1]);
    texts(argv[1]);
    buffers(argv[1]);
    orders(argv[1]);
    return 0;
}
