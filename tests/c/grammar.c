/* Answers of a given form: grammar MODEL with|without */
#include <ctype.h>

#include "check.h"

static void answer(awqua_session *session, uint32_t kind, const char *grammar, uint64_t seed, char *text, size_t capacity) {
    awqua_request request = AWQUA_REQUEST_INIT;
    uint32_t reason;
    request.max_tokens = 100;
    request.temperature = 1.0f;
    request.seed = seed;
    request.grammar_kind = kind;
    request.grammar = AWQUA_CSTR(grammar);
    OK(awqua_session_begin_text(session, AWQUA_CSTR("The old miller said,"), &request));
    OK(awqua_session_run(session));
    text[0] = 0;
    reason = drain(session, text, capacity, 64);
    CHECK(reason == AWQUA_STOP_COMPLETE || reason == AWQUA_STOP_EOS);
}

int main(int argc, char **argv) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model;
    awqua_session *session;
    awqua_request request = AWQUA_REQUEST_INIT;
    char text[512];
    CHECK(argc == 3);
    model = loaded_model(engine, argv[1]);
    session = new_session(model, 256);
    request.grammar_kind = AWQUA_GRAMMAR_REGEX;
    request.grammar = AWQUA_CSTR("[0-9]{2}");
    if (strcmp(argv[2], "without") == 0) {
        EXPECT(AWQUA_ERR_UNSUPPORTED, awqua_session_begin_text(session, AWQUA_CSTR("a"), &request));
    } else {
        uint64_t seed;
        for (seed = 0; seed < 5; seed++) {
            answer(session, AWQUA_GRAMMAR_REGEX, "[0-9]{3}-[a-f]{2}", seed, text, sizeof text);
            CHECK(strlen(text) == 6 && isdigit((unsigned char)text[2]) && text[3] == '-' && text[5] <= 'f');
            answer(session, AWQUA_GRAMMAR_LARK, "start: \"yes\" | \"no\"", seed, text, sizeof text);
            CHECK(strcmp(text, "yes") == 0 || strcmp(text, "no") == 0);
            answer(session, AWQUA_GRAMMAR_JSON_SCHEMA, "{\"enum\": [\"north\", \"south\"]}", seed, text, sizeof text);
            CHECK(strcmp(text, "\"north\"") == 0 || strcmp(text, "\"south\"") == 0);
        }
        request.grammar = AWQUA_CSTR("(");
        EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR("a"), &request));
        request.grammar_kind = AWQUA_GRAMMAR_JSON_SCHEMA;
        EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR("a"), &request));
    }
    request.grammar_kind = 9;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR("a"), &request));
    request.grammar_kind = 0;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR("a"), &request));
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    return 0;
}
