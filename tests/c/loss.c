/* A GPU that is chosen by its UUID, and one that is lost in the middle of an answer: an event, nothing until the engine
 * recovers, and then the same text: loss MODEL. Prints "no GPU" and does nothing where there is none. */
#include "check.h"

static const char PROMPT[] = "It was a fine morning, and Emma walked along the river to the old mill.";

static awqua_engine *gpu_engine(uint32_t flags) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    desc.backend = AWQUA_BACKEND_GPU;
    desc.flags = flags;
    OK(awqua_engine_create(&desc, &engine));
    return engine;
}

/* An adapter by its UUID, in one way only, and none by a UUID that nobody has. */
static void choices(const char *path) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_device_info info = AWQUA_DEVICE_INFO_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_model_info loaded = AWQUA_MODEL_INFO_INIT;
    static const uint8_t unknown[16];
    OK(awqua_device_get(0, &info));
    if (memcmp(info.uuid, unknown, sizeof unknown) == 0) {
        return;
    }
    memcpy(desc.device_uuid, info.uuid, sizeof info.uuid);
    desc.device = AWQUA_CSTR("0");
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_engine_create(&desc, &engine));
    desc.device.len = 0;
    OK(awqua_engine_create(&desc, &engine));
    model = loaded_model(engine, path);
    OK(awqua_model_get_info(model, &loaded));
    CHECK(strcmp(loaded.backend, "wgpu") == 0 && strncmp(loaded.device, info.name, strlen(info.name)) == 0);
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    desc.device_uuid[0] ^= 0xff;
    OK(awqua_engine_create(&desc, &engine));
    model = new_model(engine, path);
    EXPECT(AWQUA_ERR_NO_DEVICE, awqua_model_run(model));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

static awqua_session *deterministic(const awqua_model *model) {
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    awqua_session *session = NULL;
    desc.context = 128;
    desc.chunk = 16;
    desc.flags = AWQUA_SESSION_DETERMINISTIC;
    OK(awqua_session_create(model, &desc, &session));
    return session;
}

static void begin(awqua_session *session) {
    awqua_request request = AWQUA_REQUEST_INIT;
    request.max_tokens = 10;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    request.seed = 5;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
}

/* Adds what is to be heard to `text`; the number of losses among it. */
static int listen(awqua_session *session, char *text, size_t capacity, uint32_t *reason) {
    int losses = 0;
    for (;;) {
        char buffer[64];
        awqua_event event = AWQUA_EVENT_INIT;
        awqua_status status;
        event.text = buffer;
        event.text_capacity = sizeof buffer;
        status = awqua_session_poll(session, &event);
        if (status == AWQUA_EMPTY) {
            return losses;
        }
        OK(status);
        losses += event.kind == AWQUA_EVENT_DEVICE_LOST;
        if (event.kind == AWQUA_EVENT_TEXT) {
            size_t length = strlen(text);
            CHECK(length + event.text_len < capacity);
            memcpy(text + length, buffer, (size_t)event.text_len);
            text[length + event.text_len] = 0;
        } else if (event.kind == AWQUA_EVENT_DONE) {
            *reason = event.reason;
        }
    }
}

/* Loses the device after `tokens` tokens of the answer, recovers by hand or not, and returns how often that was heard. */
static int lose(awqua_engine *engine, awqua_session *session, uint32_t tokens, int by_hand, char *text, size_t capacity) {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    awqua_engine_info info = AWQUA_ENGINE_INFO_INIT;
    awqua_status status;
    uint32_t reason = 0;
    int losses = 0, lost = 0;
    budget.cpu_us = 200;
    text[0] = 0;
    OK(awqua_session_truncate(session, 0));
    begin(session);
    for (;;) {
        status = awqua_session_tick(session, &budget, &result);
        CHECK(status == AWQUA_OK || status == AWQUA_PENDING);
        losses += listen(session, text, capacity, &reason);
        if (status == AWQUA_OK) {
            CHECK(reason == AWQUA_STOP_MAX_TOKENS);
            return losses;
        }
        if (!lost && result.answer_tokens >= tokens && (tokens > 0 || result.prompt_done > 0)) {
            lost = 1;
            OK(awqua_engine_debug_lose_device(engine));
        }
        if (by_hand && result.phase == AWQUA_PHASE_LOST) {
            OK(awqua_engine_get_info(engine, &info));
            CHECK((info.flags & AWQUA_ENGINE_LOST) != 0);
            EXPECT(AWQUA_ERR_DEVICE_LOST, awqua_session_run(session));
            OK(awqua_engine_recover(engine));
            OK(awqua_engine_recover(engine));
            OK(awqua_engine_get_info(engine, &info));
            CHECK(info.flags == 0);
        }
    }
}

int main(int argc, char **argv) {
    awqua_engine *engine;
    awqua_model *model;
    awqua_session *session;
    char expected[512], text[512];
    uint32_t count = 0, reason = 0;
    CHECK(argc == 2);
    OK(awqua_device_count(&count));
    if (count == 0) {
        puts("no GPU");
        return 0;
    }
    choices(argv[1]);
    engine = gpu_engine(0);
    model = loaded_model(engine, argv[1]);
    session = deterministic(model);
    begin(session);
    OK(awqua_session_run(session));
    expected[0] = 0;
    CHECK(listen(session, expected, sizeof expected, &reason) == 0 && reason == AWQUA_STOP_MAX_TOKENS);
    CHECK(strlen(expected) > 8);
    /* In the prompt, and in the answer. */
    CHECK(lose(engine, session, 0, 1, text, sizeof text) == 1 && strcmp(text, expected) == 0);
    CHECK(lose(engine, session, 4, 1, text, sizeof text) == 1 && strcmp(text, expected) == 0);
    /* Between answers: the next one finds out. */
    OK(awqua_engine_debug_lose_device(engine));
    OK(awqua_engine_recover(engine));
    begin(session);
    OK(awqua_session_run(session));
    text[0] = 0;
    listen(session, text, sizeof text, &reason);
    CHECK(strcmp(text, expected) == 0);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    /* An engine that is to recover by itself. */
    engine = gpu_engine(AWQUA_ENGINE_AUTO_RECOVER);
    model = loaded_model(engine, argv[1]);
    session = deterministic(model);
    CHECK(lose(engine, session, 3, 0, text, sizeof text) == 1 && strcmp(text, expected) == 0);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    return 0;
}
