/* What the C tests share. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "awqua.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

#define EXPECT(status, call)                                                        \
    do {                                                                            \
        awqua_status expect_found = (call);                                         \
        if (expect_found != (status)) {                                             \
            char expect_text[512];                                                  \
            awqua_last_error(expect_text, sizeof expect_text, NULL);                \
            fprintf(stderr, "%s:%d: %s gave %s, expected %s: %s\n", __FILE__, __LINE__, #call, \
                    awqua_status_name(expect_found), #status, expect_text);         \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

#define OK(call) EXPECT(AWQUA_OK, call)

static inline awqua_engine *cpu_engine(void) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    desc.backend = AWQUA_BACKEND_CPU;
    OK(awqua_engine_create(&desc, &engine));
    return engine;
}

static inline awqua_model *new_model(const awqua_engine *engine, const char *path) {
    awqua_model_desc desc = AWQUA_MODEL_DESC_INIT;
    awqua_model *model = NULL;
    desc.path = AWQUA_CSTR(path);
    OK(awqua_model_create(engine, &desc, &model));
    return model;
}

static inline awqua_model *loaded_model(const awqua_engine *engine, const char *path) {
    awqua_model *model = new_model(engine, path);
    awqua_status status;
    while ((status = awqua_model_tick(model, NULL, NULL)) == AWQUA_PENDING) {
    }
    OK(status);
    return model;
}

static inline awqua_session *new_session(const awqua_model *model, uint32_t context) {
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    awqua_session *session = NULL;
    desc.context = context;
    OK(awqua_session_create(model, &desc, &session));
    return session;
}

static inline awqua_request greedy(uint32_t max_tokens) {
    awqua_request request = AWQUA_REQUEST_INIT;
    request.temperature = 0.0f;
    request.max_tokens = max_tokens;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    return request;
}

/* Polls everything through a buffer of `size` bytes into `text`; returns the reason of the end, 0 if there was none. */
static inline uint32_t drain(awqua_session *session, char *text, size_t capacity, size_t size) {
    size_t length = strlen(text);
    uint32_t reason = 0;
    char *buffer = (char *)malloc(size ? size : 1);
    for (;;) {
        awqua_event event = AWQUA_EVENT_INIT;
        awqua_status status;
        event.text = buffer;
        event.text_capacity = size;
        status = awqua_session_poll(session, &event);
        if (status == AWQUA_EMPTY) {
            break;
        }
        OK(status);
        if (event.kind == AWQUA_EVENT_TEXT) {
            CHECK(event.text_len > 0 && event.text_len <= size);
            CHECK(length + event.text_len < capacity);
            memcpy(text + length, buffer, event.text_len);
            length += event.text_len;
            text[length] = 0;
        } else if (event.kind == AWQUA_EVENT_DONE) {
            CHECK(reason == 0);
            reason = event.reason;
        }
    }
    free(buffer);
    return reason;
}

#endif
