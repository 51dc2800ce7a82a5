/* Many characters on one start on a GPU: deterministic forks that share its memory say what a session says that computed
 * it: forks MODEL. Prints "no GPU" and does nothing where there is none. */
#include "check.h"

#define NPCS 3

#define PARAGRAPH                                                                                                    \
    "It was a fine morning, and Emma walked along the river to the old mill. The grey cat sat on the wall and looked " \
    "at the water, and the miller stood in his door and looked at the cat. There had been no rain for a week, the "    \
    "wheel stood still, and nobody in the village had anything to do but to wait and to talk about the weather. "

static const char START[] = PARAGRAPH PARAGRAPH;

static const char *const QUESTIONS[NPCS] = { "The miller said,", "Emma said,", "The grey cat thought" };

static awqua_session *session_of(const awqua_model *model) {
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    awqua_session *session = NULL;
    desc.context = 448;
    desc.chunk = 64;
    desc.flags = AWQUA_SESSION_DETERMINISTIC | AWQUA_SESSION_SHARE_FORKS;
    OK(awqua_session_create(model, &desc, &session));
    return session;
}

static void ask(awqua_session *session, const char *question, char *text, size_t capacity) {
    awqua_request request = greedy(12);
    char prompt[1024];
    snprintf(prompt, sizeof prompt, "%s%s", START, question);
    OK(awqua_session_begin_text(session, AWQUA_CSTR(prompt), &request));
    OK(awqua_session_run(session));
    text[0] = 0;
    CHECK(drain(session, text, capacity, 64) == AWQUA_STOP_MAX_TOKENS && text[0] != 0);
}

int main(int argc, char **argv) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_session *root, *npcs[NPCS];
    awqua_session_info whole = AWQUA_SESSION_INFO_INIT, shared = AWQUA_SESSION_INFO_INIT;
    awqua_status status;
    char expected[512], text[512];
    int i;
    CHECK(argc == 2);
    desc.backend = AWQUA_BACKEND_GPU;
    OK(awqua_engine_create(&desc, &engine));
    model = new_model(engine, argv[1]);
    status = awqua_model_run(model);
    if (status == AWQUA_ERR_NO_DEVICE) {
        puts("no GPU");
        OK(awqua_model_free(model));
        OK(awqua_engine_free(engine));
        return 0;
    }
    OK(status);
    root = session_of(model);
    ask(root, "", text, sizeof text);
    OK(awqua_session_get_info(root, &whole));
    CHECK(whole.n_tokens >= 128);
    for (i = 0; i < NPCS; i++) {
        npcs[i] = NULL;
        OK(awqua_session_fork(root, &npcs[i]));
        OK(awqua_session_get_info(npcs[i], &shared));
        CHECK(shared.n_tokens == whole.n_tokens && shared.bytes < whole.bytes);
    }
    for (i = 0; i < NPCS; i++) {
        awqua_session *alone = session_of(model);
        ask(alone, QUESTIONS[i], expected, sizeof expected);
        ask(npcs[i], QUESTIONS[i], text, sizeof text);
        CHECK(strcmp(text, expected) == 0);
        OK(awqua_session_free(alone));
    }
    printf("%u tokens, a session of %llu bytes, a fork of %llu\n", whole.n_tokens, (unsigned long long)whole.bytes,
           (unsigned long long)shared.bytes);
    for (i = 0; i < NPCS; i++) {
        OK(awqua_session_free(npcs[i]));
    }
    OK(awqua_session_free(root));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    return 0;
}
