/* Cancels at the ticks of a load, a prefill and a decode, and after each the object works at once: cancels MODEL
 *
 * The ticks are the smallest there are, some hundreds. The first ones are all cancelled at; behind them those that are a
 * stride apart, from another start for each kind of work, because getting to a tick takes all those before it. */
#include "check.h"

#define ALL 24
#define STRIDES 40

static const char PROMPT[] =
    "It was a fine morning, and Emma walked along the river to the old mill. The wheel stood still, and a small "
    "grey cat sat on the step and looked at her. Emma had never seen a cat at the mill before.";

static void load(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = new_model(engine, path);
    awqua_budget budget = AWQUA_BUDGET_INIT;
    int at, total = 0;
    budget.cpu_us = 0;
    while (awqua_model_tick(model, &budget, NULL) == AWQUA_PENDING) {
        total++;
    }
    OK(awqua_model_free(model));
    model = new_model(engine, path);
    CHECK(total > 8);
    for (at = 0;; at += at < ALL ? 1 : 1 + total / STRIDES) {
        awqua_status status = AWQUA_PENDING;
        int i;
        for (i = 0; i < at && status == AWQUA_PENDING; i++) {
            status = awqua_model_tick(model, &budget, NULL);
        }
        if (status == AWQUA_OK) {
            break;
        }
        CHECK(status == AWQUA_PENDING);
        OK(awqua_model_cancel(model));
        EXPECT(AWQUA_ERR_CANCELLED, awqua_model_tick(model, &budget, NULL));
    }
    {
        awqua_session *session = new_session(model, 64);
        OK(awqua_session_free(session));
    }
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

static void answer(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = loaded_model(engine, path);
    awqua_session *session = new_session(model, 128);
    awqua_request request = greedy(8);
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    char expected[512], text[512];
    int at, cancels = 0, total = 0;
    budget.cpu_us = 0;
    expected[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    while (awqua_session_tick(session, &budget, &result) == AWQUA_PENDING) {
        total++;
    }
    CHECK(drain(session, expected, sizeof expected, 64) == AWQUA_STOP_MAX_TOKENS);
    for (at = 0;; at += at < ALL ? 1 : 1 + total / STRIDES) {
        awqua_status status = AWQUA_PENDING;
        uint32_t reason;
        int i;
        /* Anew, so that every prefill starts at the first token. */
        OK(awqua_session_truncate(session, 0));
        OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
        for (i = 0; i < at && status == AWQUA_PENDING; i++) {
            status = awqua_session_tick(session, &budget, &result);
        }
        if (status == AWQUA_OK) {
            break;
        }
        EXPECT(AWQUA_ERR_STATE, awqua_session_truncate(session, 0));
        EXPECT(AWQUA_ERR_STATE, awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
        OK(awqua_session_cancel(session));
        /* One tick, and it is over. */
        OK(awqua_session_tick(session, &budget, &result));
        CHECK(result.phase == AWQUA_PHASE_IDLE && result.new_tokens == 0);
        text[0] = 0;
        reason = drain(session, text, sizeof text, 64);
        CHECK(reason == AWQUA_STOP_CANCELLED && strncmp(text, expected, strlen(text)) == 0);
        if (cancels++ % 8 == 0) {
            OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
            OK(awqua_session_run(session));
            text[0] = 0;
            CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS && strcmp(text, expected) == 0);
        }
    }
    CHECK(cancels > ALL);
    /* A cancel without an answer does not hit the next one. */
    text[0] = 0;
    drain(session, text, sizeof text, 64);
    OK(awqua_session_cancel(session));
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_run(session));
    text[0] = 0;
    CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS && strcmp(text, expected) == 0);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    load(argv[1]);
    answer(argv[1]);
    return 0;
}
