/*
 * A conversation in the terminal, in C99: chat MODEL_FOLDER [cpu|gpu]
 *
 * Everything happens on this thread: the model loads and answers in ticks, and between two of them a game would draw
 * its frame. A model without a chat template simply continues the text.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "awqua.h"

#define MAX_MESSAGES 64

static void fail(const char *what, awqua_status status) {
    char text[512];
    awqua_last_error(text, sizeof text, NULL);
    fprintf(stderr, "%s: %s: %s\n", what, awqua_status_name(status), text);
    exit(1);
}

static void check(const char *what, awqua_status status) {
    if ((int)status < 0) {
        fail(what, status);
    }
}

/* A text that grows. */
struct text {
    char *bytes;
    size_t length;
};

static void append(struct text *text, const char *bytes, size_t length) {
    char *grown = realloc(text->bytes, text->length + length + 1);
    if (!grown) {
        fputs("out of memory\n", stderr);
        exit(1);
    }
    memcpy(grown + text->length, bytes, length);
    text->bytes = grown;
    text->length += length;
    grown[text->length] = 0;
}

static void load(awqua_model *model) {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_load_progress progress = AWQUA_LOAD_PROGRESS_INIT;
    awqua_status status;
    budget.cpu_us = 5000;
    while ((status = awqua_model_tick(model, &budget, &progress)) == AWQUA_PENDING) {
        /* A frame would be drawn here. */
        fprintf(stderr, "\rloading %3u%%", (unsigned)(progress.total ? 100 * progress.done / progress.total : 0));
    }
    check("loading the model", status);
    fprintf(stderr, "\rloaded       \n");
}

/* Ticks until the answer is complete, printing it as it comes and keeping it in `answer`. */
static void answer(awqua_session *session, struct text *answer) {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_status status;
    do {
        char buffer[256];
        awqua_event event = AWQUA_EVENT_INIT;
        awqua_status polled;
        status = awqua_session_tick(session, &budget, NULL);
        check("answering", status);
        event.text = buffer;
        event.text_capacity = sizeof buffer;
        while ((polled = awqua_session_poll(session, &event)) == AWQUA_OK) {
            if (event.kind == AWQUA_EVENT_TEXT) {
                fwrite(buffer, 1, (size_t)event.text_len, stdout);
                append(answer, buffer, (size_t)event.text_len);
            }
        }
        check("polling", polled);
        fflush(stdout);
    } while (status == AWQUA_PENDING);
    putchar('\n');
}

int main(int argc, char **argv) {
    awqua_engine_desc engine_desc = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model_desc = AWQUA_MODEL_DESC_INIT;
    awqua_model_info info = AWQUA_MODEL_INFO_INIT;
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model = NULL;
    awqua_session *session = NULL;
    struct text texts[MAX_MESSAGES];
    awqua_message messages[MAX_MESSAGES];
    size_t n = 0, i;
    char line[1024];

    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL_FOLDER [cpu|gpu]\n", argv[0]);
        return 2;
    }
    if (argc > 2) {
        engine_desc.backend = strcmp(argv[2], "gpu") == 0 ? AWQUA_BACKEND_GPU : AWQUA_BACKEND_CPU;
    }
    check("making an engine", awqua_engine_create(&engine_desc, &engine));
    model_desc.path = AWQUA_CSTR(argv[1]);
    check("opening the model", awqua_model_create(engine, &model_desc, &model));
    load(model);
    check("asking the model", awqua_model_get_info(model, &info));
    check("making a session", awqua_session_create(model, NULL, &session));
    request.flags = AWQUA_REQUEST_MODEL_SAMPLING;
    request.max_tokens = 128;

    memset(texts, 0, sizeof texts);
    while (n + 2 <= MAX_MESSAGES && fgets(line, sizeof line, stdin)) {
        size_t length = strcspn(line, "\r\n");
        if (length == 0) {
            break;
        }
        if (info.flags & AWQUA_MODEL_CHAT_TEMPLATE) {
            append(&texts[n], line, length);
            for (i = 0; i <= n; i++) {
                messages[i].role = AWQUA_CSTR(i % 2 ? "assistant" : "user");
                messages[i].content.data = texts[i].bytes;
                messages[i].content.len = texts[i].length;
            }
            check("asking", awqua_session_begin_chat(session, messages, n + 1, &request));
            append(&texts[n + 1], "", 0);
            answer(session, &texts[n + 1]);
            n += 2;
        } else {
            awqua_str all;
            append(&texts[0], line, length);
            all.data = texts[0].bytes;
            all.len = texts[0].length;
            check("asking", awqua_session_begin_text(session, all, &request));
            answer(session, &texts[0]);
        }
    }

    for (i = 0; i < MAX_MESSAGES; i++) {
        free(texts[i].bytes);
    }
    awqua_session_free(session);
    awqua_model_free(model);
    awqua_engine_free(engine);
    return 0;
}
