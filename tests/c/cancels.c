/* Cancels at every tick of a load, a prefill, a decode and a batch, and after each the object works at once:
 * cancels MODEL [load|answer|batch]
 *
 * The ticks are the smallest there are, some thousands. Getting to one takes all those before it, so the model should be
 * small; prompt and answer are short. */
#include "check.h"

static const char PROMPT[] = "It was";

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
    CHECK(at > 8);
    printf("load: cancelled at each of %d ticks\n", at);
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
    awqua_request request = greedy(2);
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    char expected[512], text[512];
    int at, prefill = 0;
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
        prefill += at == 0 || result.phase == AWQUA_PHASE_PREFILL;
        EXPECT(AWQUA_ERR_STATE, awqua_session_truncate(session, 0));
        EXPECT(AWQUA_ERR_STATE, awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
        OK(awqua_session_cancel(session));
        /* One tick, and it is over. */
        OK(awqua_session_tick(session, &budget, &result));
        CHECK(result.phase == AWQUA_PHASE_IDLE && result.new_tokens == 0);
        text[0] = 0;
        reason = drain(session, text, sizeof text, 64);
        CHECK(reason == AWQUA_STOP_CANCELLED && strncmp(text, expected, strlen(text)) == 0);
        if (at % 8 == 0) {
            OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
            OK(awqua_session_run(session));
            text[0] = 0;
            CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS && strcmp(text, expected) == 0);
        }
    }
    CHECK(prefill > 8 && at > prefill + 8);
    printf("answer: cancelled at each of %d ticks of a prefill and %d of a decode\n", prefill, at - prefill);
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

/* One of two sessions of a batch is cancelled at each of its ticks; it ends in the next one, and the other says what it
 * always says. */
static void together(const char *path) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model = loaded_model(engine, path);
    awqua_session *sessions[2];
    awqua_batch *batch = NULL;
    awqua_request request = greedy(3);
    awqua_budget budget = AWQUA_BUDGET_INIT;
    char expected[512], text[512];
    int at = 0, i, cancelled = 1;
    budget.cpu_us = 0;
    OK(awqua_batch_create(model, NULL, 2, &batch));
    for (i = 0; i < 2; i++) {
        sessions[i] = new_session(model, 128);
    }
    expected[0] = 0;
    OK(awqua_session_begin_text(sessions[1], AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_run(sessions[1]));
    CHECK(drain(sessions[1], expected, sizeof expected, 64) == AWQUA_STOP_MAX_TOKENS);
    for (at = 0; cancelled; at++) {
        awqua_tick_result results[2] = { AWQUA_TICK_RESULT_INIT, AWQUA_TICK_RESULT_INIT };
        awqua_status status = AWQUA_PENDING;
        uint32_t reason = 0;
        for (i = 0; i < 2; i++) {
            OK(awqua_session_truncate(sessions[i], 0));
            OK(awqua_session_begin_text(sessions[i], AWQUA_CSTR(PROMPT), &request));
        }
        for (i = 0; i < at && status == AWQUA_PENDING; i++) {
            status = awqua_batch_tick(batch, sessions, 2, &budget, results);
        }
        text[0] = 0;
        reason = drain(sessions[0], text, sizeof text, 64);
        cancelled = reason == AWQUA_STOP_NONE;
        if (cancelled) {
            OK(awqua_session_cancel(sessions[0]));
            status = awqua_batch_tick(batch, sessions, 2, &budget, results);
            CHECK(results[0].phase == AWQUA_PHASE_IDLE && results[0].new_tokens == 0);
            CHECK(drain(sessions[0], text, sizeof text, 64) == AWQUA_STOP_CANCELLED);
            CHECK(strncmp(text, expected, strlen(text)) == 0);
        }
        CHECK(status == AWQUA_OK || status == AWQUA_PENDING);
        OK(awqua_batch_run(batch, sessions, 2));
        text[0] = 0;
        CHECK(drain(sessions[1], text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS && strcmp(text, expected) == 0);
    }
    CHECK(at > 100);
    printf("batch: cancelled at each of %d ticks\n", at - 1);
    OK(awqua_batch_free(batch));
    OK(awqua_session_free(sessions[0]));
    OK(awqua_session_free(sessions[1]));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

int main(int argc, char **argv) {
    const char *only = argc == 3 ? argv[2] : NULL;
    CHECK(argc == 2 || argc == 3);
    if (only == NULL || strcmp(only, "load") == 0) {
        load(argv[1]);
    }
    if (only == NULL || strcmp(only, "answer") == 0) {
        answer(argv[1]);
    }
    if (only == NULL || strcmp(only, "batch") == 0) {
        together(argv[1]);
    }
    return 0;
}
