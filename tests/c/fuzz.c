/* Random sequences of calls over the whole API, right and wrong ones, from a seed: fuzz MODEL SEQUENCES SEED
 *
 * Nothing is expected of a single call but a known status; the sanitizer and the checks of what must always hold are
 * the judges. Wrong orders of frees, garbage sizes, small buffers, cancels and NULL are all in the deck. */
#include "check.h"

#define SLOTS 3

static uint64_t state;

static uint32_t random_below(uint32_t n) {
    /* SplitMix64. */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (uint32_t)((z ^ (z >> 31)) >> 32) % n;
}

static int chance(uint32_t one_in) {
    return random_below(one_in) == 0;
}

static const char *const TEXTS[] = { "", "a", "It was a fine morning", "\xc3\xa9\xe6\xbc\xa2", "\xff", "Emma said:\n" };

static awqua_str random_text(void) {
    awqua_str text;
    text.data = TEXTS[random_below(6)];
    text.len = chance(3) ? strlen(text.data) : AWQUA_STRLEN;
    if (chance(20)) {
        text.data = NULL;
        text.len = chance(2) ? 0 : random_below(9);
    }
    return text;
}

/* A size that is mostly right. */
static uint32_t random_size(uint32_t right) {
    static const uint32_t sizes[] = { 0, 1, 3, 4, 7, 8, 12, 65, 2048, 0x80000000u, 0xffffffffu };
    return chance(12) ? sizes[random_below(11)] : right;
}

static uint32_t random_flags(void) {
    return chance(12) ? (uint32_t)1 << random_below(32) : 0;
}

static int known(awqua_status status) {
    return (int)status <= 2 && (int)status >= -23 && status != AWQUA_ERR_PANIC && status != AWQUA_ERR_POISONED;
}

/* Loaded once, because loading takes longer than all other calls of a sequence. */
static awqua_model *shared_model;

struct objects {
    awqua_engine *engines[SLOTS];
    awqua_model *models[SLOTS];
    awqua_session *sessions[SLOTS];
};

static awqua_model *random_model(const struct objects *o) {
    return chance(2) ? shared_model : o->models[random_below(SLOTS)];
}

static void create(struct objects *o, const char *path) {
    uint32_t slot = random_below(SLOTS);
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model = AWQUA_MODEL_DESC_INIT;
    awqua_session_desc session = AWQUA_SESSION_DESC_INIT;
    switch (random_below(4)) {
    case 0:
        if (!o->engines[slot]) {
            desc.struct_size = random_size(sizeof desc);
            desc.flags = random_flags();
            desc.backend = chance(10) ? 3 + random_below(100) : AWQUA_BACKEND_CPU;
            desc.host_budget_bytes = chance(6) ? 1 + random_below(1 << 22) : 0;
            desc.pipeline_cache_len = chance(20) ? random_below(9) : 0;
            CHECK(known(awqua_engine_create(&desc, chance(30) ? NULL : &o->engines[slot])));
        }
        break;
    case 1:
        if (!o->models[slot]) {
            model.struct_size = random_size(sizeof model);
            model.flags = random_flags();
            model.path = chance(8) ? random_text() : AWQUA_CSTR(path);
            CHECK(known(awqua_model_create(o->engines[random_below(SLOTS)], chance(30) ? NULL : &model, &o->models[slot])));
        }
        break;
    default:
        if (!o->sessions[slot]) {
            session.struct_size = random_size(sizeof session);
            session.flags = random_flags();
            session.context = 8 + random_below(56);
            session.kv_type = chance(10) ? random_below(9) : random_below(4);
            session.chunk = random_below(40);
            session.flags |= chance(3) ? AWQUA_SESSION_DETERMINISTIC : 0;
            session.flags |= chance(3) ? AWQUA_SESSION_EXACT : 0;
            CHECK(known(awqua_session_create(random_model(o), &session, &o->sessions[slot])));
        }
    }
}

static void destroy(struct objects *o) {
    uint32_t slot = random_below(SLOTS);
    switch (random_below(5)) {
    case 0:
        OK(awqua_engine_free(o->engines[slot]));
        o->engines[slot] = NULL;
        break;
    case 1:
        OK(awqua_model_free(o->models[slot]));
        o->models[slot] = NULL;
        break;
    default:
        OK(awqua_session_free(o->sessions[slot]));
        o->sessions[slot] = NULL;
    }
}

static void ask(struct objects *o) {
    awqua_model *model = random_model(o);
    awqua_session *session = o->sessions[random_below(SLOTS)];
    awqua_model_info info = AWQUA_MODEL_INFO_INIT;
    awqua_session_info session_info = AWQUA_SESSION_INFO_INIT;
    awqua_memory_stats stats = AWQUA_MEMORY_STATS_INIT;
    awqua_message messages[2];
    uint32_t ids[16];
    awqua_engine_info engine_info = AWQUA_ENGINE_INFO_INIT;
    awqua_estimate estimate = AWQUA_ESTIMATE_INIT;
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    float values[512];
    char text[64];
    uint64_t n = 0, capacity = random_below(17);
    size_t i;
    for (i = 0; i < 16; i++) {
        ids[i] = chance(8) ? random_below(0xffffffffu) : random_below(300);
    }
    for (i = 0; i < 2; i++) {
        messages[i].role = chance(2) ? AWQUA_CSTR("user") : random_text();
        messages[i].content = random_text();
    }
    switch (random_below(12)) {
    case 9:
        engine_info.struct_size = random_size(sizeof engine_info);
        CHECK(known(awqua_engine_get_info(o->engines[random_below(SLOTS)], &engine_info)));
        CHECK(known(awqua_engine_get_pipeline_cache(o->engines[random_below(SLOTS)], text, capacity, &n)));
        break;
    case 10:
        estimate.struct_size = random_size(sizeof estimate);
        desc.context = random_below(3) * 1000;
        CHECK(known(awqua_model_estimate(model, chance(3) ? NULL : &desc, &estimate)));
        break;
    case 11:
        CHECK(known(awqua_session_get_embedding(session, values, chance(3) ? random_below(512) : 512, &n)));
        break;
    case 0:
        info.struct_size = random_size(sizeof info);
        CHECK(known(awqua_model_get_info(model, &info)));
        break;
    case 1:
        session_info.struct_size = random_size(sizeof session_info);
        CHECK(known(awqua_session_get_info(session, &session_info)));
        break;
    case 2:
        CHECK(known(awqua_model_tokenize(model, random_text(), random_flags(), ids, capacity, chance(30) ? NULL : &n)));
        break;
    case 3:
        CHECK(known(awqua_model_detokenize(model, ids, capacity, random_flags(), text, random_below(65), &n)));
        break;
    case 4:
        CHECK(known(awqua_model_render_chat(model, messages, random_below(3), random_flags(), text, random_below(65), &n)));
        break;
    case 5:
        CHECK(known(awqua_last_error(text, capacity, &n)));
        CHECK(known(awqua_engine_last_error(o->engines[random_below(SLOTS)], text, capacity, NULL)));
        break;
    case 6:
        CHECK(known(awqua_model_last_error(model, text, capacity, &n)));
        CHECK(known(awqua_session_last_error(session, text, capacity, chance(9) ? NULL : &n)));
        break;
    case 7:
        stats.struct_size = random_size(sizeof stats);
        CHECK(known(awqua_memory(&stats)));
        break;
    default:
        CHECK(known(awqua_model_cancel(model)));
        CHECK(known(awqua_session_cancel(session)));
    }
}

static void begin(struct objects *o) {
    awqua_session *session = o->sessions[random_below(SLOTS)];
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_message message;
    awqua_str stops[2];
    awqua_logit_bias biases[3];
    uint32_t ids[24];
    size_t i;
    request.struct_size = random_size(sizeof request);
    request.flags = random_flags();
    request.max_tokens = random_below(6);
    request.temperature = chance(20) ? -1.0f : (float)random_below(3);
    request.top_k = random_below(50);
    request.seed = random_below(1000);
    if (chance(4)) {
        stops[0] = random_text();
        stops[1] = random_text();
        request.stops = stops;
        request.n_stops = random_below(3);
        request.repetition_penalty = (float)random_below(3);
    }
    if (chance(4)) {
        request.stop_ids = ids;
        request.n_stop_ids = random_below(24);
    }
    for (i = 0; i < 24; i++) {
        ids[i] = chance(40) ? random_below(0xffffffffu) : random_below(300);
    }
    for (i = 0; i < 3; i++) {
        biases[i].id = ids[i];
        biases[i].bias = (float)random_below(9) - 4.0f;
    }
    if (chance(4)) {
        request.biases = biases;
        request.n_biases = random_below(4);
        request.banned_ids = ids;
        request.n_banned_ids = random_below(24);
    }
    if (chance(4)) {
        request.flags |= AWQUA_REQUEST_SHIFT;
        request.shift_keep = random_below(60);
        request.max_tokens = random_below(80);
    }
    if (chance(8)) {
        static const char *const grammars[] = { "", "{}", "[a-c]{2,4}", "start: \"a\" | \"b\"", "{\"type\":\"integer\"}", "(" };
        request.grammar_kind = random_below(5);
        request.grammar = AWQUA_CSTR(grammars[random_below(6)]);
    }
    message.role = AWQUA_CSTR("user");
    message.content = random_text();
    switch (random_below(4)) {
    case 3:
        if (chance(2)) {
            CHECK(known(awqua_session_begin_embedding_tokens(session, ids, random_below(25))));
        } else {
            CHECK(known(awqua_session_begin_embedding_text(session, random_text())));
        }
        break;
    case 0:
        CHECK(known(awqua_session_begin_text(session, random_text(), chance(9) ? NULL : &request)));
        break;
    case 1:
        CHECK(known(awqua_session_begin_tokens(session, ids, random_below(25), &request)));
        break;
    default:
        CHECK(known(awqua_session_begin_chat(session, &message, random_below(2), &request)));
    }
}

/* A snapshot that a session gave, whole or damaged. */
static unsigned char snapshot[1 << 16];
static uint64_t snapshot_len;

static void memory(struct objects *o) {
    awqua_vulkan vulkan = AWQUA_VULKAN_INIT;
    awqua_session *session = o->sessions[random_below(SLOTS)];
    awqua_session **free_slot = &o->sessions[random_below(SLOTS)];
    awqua_model *model = o->models[random_below(SLOTS)];
    uint64_t n = 0;
    awqua_status status;
    switch (random_below(8)) {
    case 0:
    case 1:
        if (!*free_slot) {
            CHECK(known(awqua_session_fork(session, chance(20) ? NULL : free_slot)));
        }
        break;
    case 2:
        status = awqua_session_save(session, snapshot, chance(4) ? random_below(200) : sizeof snapshot, &n);
        CHECK(known(status));
        if (status == AWQUA_OK) {
            snapshot_len = n;
        }
        break;
    case 3:
        if (chance(3) && snapshot_len > 0) {
            snapshot[random_below((uint32_t)snapshot_len)] ^= 1u << random_below(8);
        }
        CHECK(known(awqua_session_restore(session, snapshot, chance(6) ? random_below(80) : snapshot_len)));
        break;
    case 4:
        CHECK(known(awqua_session_trim(session)));
        break;
    case 5:
        CHECK(known(awqua_engine_trim(o->engines[random_below(SLOTS)], random_below(4))));
        break;
    case 6:
        CHECK(known(awqua_engine_debug_lose_device(o->engines[random_below(SLOTS)])));
        CHECK(known(awqua_engine_recover(o->engines[random_below(SLOTS)])));
        vulkan.struct_size = random_size(sizeof vulkan);
        vulkan.flags = random_flags();
        CHECK(known(awqua_engine_recover_vulkan(o->engines[random_below(SLOTS)], chance(9) ? NULL : &vulkan)));
        break;
    default:
        if (chance(2)) {
            CHECK(known(awqua_model_evict(model)));
        }
        CHECK(known(awqua_model_restore(model)));
    }
}

static void work(struct objects *o) {
    awqua_session *session = o->sessions[random_below(SLOTS)];
    awqua_model *model = o->models[random_below(SLOTS)];
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    awqua_load_progress progress = AWQUA_LOAD_PROGRESS_INIT;
    awqua_event event = AWQUA_EVENT_INIT;
    char text[24];
    awqua_status status;
    budget.struct_size = random_size(sizeof budget);
    budget.cpu_us = chance(3) ? 0 : random_below(1500);
    budget.load_bytes = chance(3) ? random_below(1 << 20) : AWQUA_NO_LIMIT;
    switch (random_below(6)) {
    case 0:
        progress.struct_size = random_size(sizeof progress);
        CHECK(known(awqua_model_tick(model, chance(3) ? NULL : &budget, chance(3) ? NULL : &progress)));
        break;
    case 1:
        event.struct_size = random_size(sizeof event);
        event.text = text;
        event.text_capacity = random_below(25);
        status = awqua_session_poll(session, &event);
        CHECK(known(status));
        if (status == AWQUA_OK && event.kind == AWQUA_EVENT_TEXT) {
            CHECK(event.text_len > 0 && event.text_len <= event.text_capacity);
            /* Whole characters: the first byte is no continuation. */
            CHECK(((unsigned char)text[0] & 0xc0) != 0x80);
        }
        break;
    case 2:
        CHECK(known(awqua_session_truncate(session, random_below(40))));
        break;
    default:
        result.struct_size = random_size(sizeof result);
        CHECK(known(awqua_session_tick(session, chance(3) ? NULL : &budget, chance(3) ? NULL : &result)));
    }
}

int main(int argc, char **argv) {
    int sequences, i;
    awqua_engine *engine = cpu_engine();
    CHECK(argc == 4);
    shared_model = loaded_model(engine, argv[1]);
    sequences = atoi(argv[2]);
    for (i = 0; i < sequences; i++) {
        struct objects o;
        int calls, call;
        state = strtoull(argv[3], NULL, 10) + (uint64_t)i * 7919;
        memset(&o, 0, sizeof o);
        /* Most sequences start with something to work on. */
        if (!chance(8)) {
            o.sessions[0] = new_session(shared_model, 48);
        }
        if (chance(4)) {
            o.engines[0] = cpu_engine();
            o.models[0] = new_model(o.engines[0], argv[1]);
        }
        calls = (int)random_below(30);
        for (call = 0; call < calls; call++) {
            switch (random_below(14)) {
            case 12:
            case 13:
                memory(&o);
                break;
            case 0:
                create(&o, argv[1]);
                break;
            case 1:
                destroy(&o);
                break;
            case 2:
            case 3:
                ask(&o);
                break;
            case 4:
            case 5:
            case 6:
                begin(&o);
                break;
            default:
                work(&o);
            }
        }
        /* What is left goes in any order. */
        while (o.engines[0] || o.engines[1] || o.engines[2] || o.models[0] || o.models[1] || o.models[2] ||
               o.sessions[0] || o.sessions[1] || o.sessions[2]) {
            destroy(&o);
        }
    }
    OK(awqua_model_free(shared_model));
    OK(awqua_engine_free(engine));
    return 0;
}
