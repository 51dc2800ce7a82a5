/* Cancels at every tick of a load, a prefill and a decode, and after each the object works at once: cancels MODEL */
#include "check.h"

static const char PROMPT[] =
    "It was a fine morning, and Emma walked along the river to the old mill. The wheel stood still, and a small "
    "grey cat sat on the step and looked at her. Emma had never seen a cat at the mill before.";

static void load(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = new_model(engine, path);
    awqua_budget budget = AWQUA_BUDGET_INIT;
    int at;
    budget.cpu_us = 0;
    for (at = 0;; at++) {
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
    CHECK(at > 0);
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
    int at;
    budget.cpu_us = 0;
    expected[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_run(session));
    CHECK(drain(session, expected, sizeof expected, 64) == AWQUA_STOP_MAX_TOKENS);
    for (at = 0;; at++) {
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
        if (at % 4 == 0) {
            OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
            OK(awqua_session_run(session));
            text[0] = 0;
            CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS && strcmp(text, expected) == 0);
        }
    }
    CHECK(at > 8);
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
