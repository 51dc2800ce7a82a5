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
    awqua_batch *batches[SLOTS];
};

static awqua_model *random_model(const struct objects *o) {
    return chance(2) ? shared_model : o->models[random_below(SLOTS)];
}

/* The files of the model in memory, some of which may be missing, or cut off. */
static awqua_file files[3];

static void read_files(const char *path) {
    static const char *const names[] = { "config.json", "model.safetensors", "tokenizer.json" };
    size_t i;
    for (i = 0; i < 3; i++) {
        char name[512];
        FILE *file;
        snprintf(name, sizeof name, "%s/%s", path, names[i]);
        file = fopen(name, "rb");
        CHECK(file != NULL && fseek(file, 0, SEEK_END) == 0);
        files[i].name = AWQUA_CSTR(names[i]);
        files[i].len = (uint64_t)ftell(file);
        files[i].data = malloc((size_t)files[i].len);
        rewind(file);
        CHECK(fread((void *)(uintptr_t)files[i].data, 1, (size_t)files[i].len, file) == files[i].len);
        fclose(file);
    }
}

static void free_files(void) {
    size_t i;
    for (i = 0; i < 3; i++) {
        free((void *)(uintptr_t)files[i].data);
    }
}

/* A host's functions over the same memory, which fail now and then. */
static int32_t io_open(void *user, awqua_str name, void **file, uint64_t *size) {
    size_t i;
    CHECK(user == files && name.data[name.len] == 0);
    if (chance(12)) {
        return chance(2) ? AWQUA_ERR_IO : 12345;
    }
    for (i = 0; i < 3; i++) {
        if (strcmp(files[i].name.data, name.data) == 0) {
            *file = &files[i];
            *size = chance(12) ? random_below((uint32_t)files[i].len + 1) : files[i].len;
            return AWQUA_OK;
        }
    }
    return AWQUA_EMPTY;
}

static int32_t io_read_at(void *user, void *file, uint64_t offset, void *buffer, uint64_t size) {
    const awqua_file *from = file;
    CHECK(user == files && size <= from->len && offset <= from->len - size);
    if (chance(40)) {
        return AWQUA_ERR_IO;
    }
    memcpy(buffer, (const char *)from->data + offset, (size_t)size);
    return AWQUA_OK;
}

static const void *io_map(void *user, void *file, uint64_t offset, uint64_t size) {
    const awqua_file *from = file;
    CHECK(user == files && size <= from->len && offset <= from->len - size);
    return chance(4) ? NULL : (const char *)from->data + offset;
}

/* From memory or through functions, right or wrong. */
static void random_source(awqua_model_desc *desc, awqua_file *some, awqua_io *io) {
    if (chance(2)) {
        memcpy(some, files, sizeof files);
        desc->files = some;
        desc->n_files = chance(6) ? random_below(4) : 3;
        if (chance(6)) {
            awqua_file *cut = &some[random_below(3)];
            cut->len = random_below((uint32_t)cut->len + 1);
        }
        if (chance(4)) {
            desc->flags |= AWQUA_MODEL_COPY_FILES;
        }
    }
    if (!desc->files || chance(12)) {
        io->struct_size = random_size(sizeof *io);
        io->user = files;
        io->open = chance(12) ? NULL : io_open;
        io->read_at = chance(12) ? NULL : io_read_at;
        io->map = chance(2) ? NULL : io_map;
        desc->io = io;
    }
}

static void create(struct objects *o, const char *path) {
    uint32_t slot = random_below(SLOTS);
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model = AWQUA_MODEL_DESC_INIT;
    awqua_session_desc session = AWQUA_SESSION_DESC_INIT;
    awqua_file some[3];
    awqua_io io = AWQUA_IO_INIT;
    switch (random_below(6)) {
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
            if (chance(3)) {
                random_source(&model, some, &io);
            }
            CHECK(known(awqua_model_create(o->engines[random_below(SLOTS)], chance(30) ? NULL : &model, &o->models[slot])));
        }
        break;
    case 2:
        if (!o->batches[slot]) {
            session.struct_size = random_size(sizeof session);
            session.context = 8 + random_below(56);
            session.flags |= chance(6) ? AWQUA_SESSION_EXACT : random_flags();
            CHECK(known(awqua_batch_create(random_model(o), chance(20) ? NULL : &session,
                                           chance(12) ? random_below(0xffffffffu) : 1 + random_below(4),
                                           chance(30) ? NULL : &o->batches[slot])));
        }
        break;
    default:
        if (!o->sessions[slot]) {
            session.struct_size = random_size(sizeof session);
            session.flags = random_flags();
            session.context = 8 + random_below(56);
            session.kv_type = chance(10) ? random_below(9) : random_below(3);
            session.chunk = random_below(40);
            session.flags |= chance(3) ? AWQUA_SESSION_DETERMINISTIC : 0;
            session.flags |= chance(3) ? AWQUA_SESSION_EXACT : 0;
            session.flags |= chance(3) ? AWQUA_SESSION_SHARE_FORKS : 0;
            CHECK(known(awqua_session_create(random_model(o), &session, &o->sessions[slot])));
        }
    }
}

static void destroy(struct objects *o) {
    uint32_t slot = random_below(SLOTS);
    switch (random_below(6)) {
    case 5:
        OK(awqua_batch_free(o->batches[slot]));
        o->batches[slot] = NULL;
        break;
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

/* Sessions in one pass: the same one twice, none, one of another model and garbage sizes included. */
static void together(struct objects *o) {
    awqua_batch *batch = o->batches[random_below(SLOTS)];
    awqua_session *sessions[4];
    awqua_tick_result results[4];
    awqua_budget budget = AWQUA_BUDGET_INIT;
    uint32_t count = random_below(5), shares = 0, first = random_below(SLOTS), i;
    char text[32];
    budget.struct_size = random_size(sizeof budget);
    budget.cpu_us = chance(2) ? 0 : random_below(1500);
    for (i = 0; i < 4; i++) {
        awqua_tick_result empty = AWQUA_TICK_RESULT_INIT;
        results[i] = empty;
        results[i].struct_size = random_size(sizeof empty);
        sessions[i] = o->sessions[chance(6) ? random_below(SLOTS) : (first + i) % SLOTS];
    }
    /* Mostly those that are there, once each. */
    for (i = 0; i < count && i < SLOTS; i++) {
        if (!sessions[i] && !chance(6)) {
            count = i;
        }
    }
    if (count > SLOTS && !chance(6)) {
        count = SLOTS;
    }
    switch (random_below(8)) {
    case 0:
        CHECK(known(awqua_batch_shares(batch, chance(9) ? NULL : &shares)) && shares <= 1);
        break;
    case 1:
        CHECK(known(awqua_batch_last_error(batch, text, random_below(33), NULL)));
        break;
    case 2:
        CHECK(known(awqua_batch_run(batch, sessions, count)));
        break;
    default:
        CHECK(known(awqua_batch_tick(batch, chance(20) ? NULL : sessions, count, chance(3) ? NULL : &budget,
                                     chance(2) ? NULL : results)));
    }
}

/* Calls that need no object, with sizes of every kind. */
static void without_objects(void) {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_engine_desc engine = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model = AWQUA_MODEL_DESC_INIT;
    awqua_session_desc session = AWQUA_SESSION_DESC_INIT;
    awqua_request request = AWQUA_REQUEST_INIT;
    const awqua_api *api = NULL;
    budget.struct_size = random_size(sizeof budget);
    engine.struct_size = random_size(sizeof engine);
    model.struct_size = random_size(sizeof model);
    session.struct_size = random_size(sizeof session);
    request.struct_size = random_size(sizeof request);
    CHECK(known(awqua_budget_init(chance(9) ? NULL : &budget)));
    CHECK(known(awqua_engine_desc_init(&engine)));
    CHECK(known(awqua_model_desc_init(&model)));
    CHECK(known(awqua_session_desc_init(&session)));
    CHECK(known(awqua_request_init(&request)));
    CHECK(known(awqua_get_api(chance(3) ? random_below(0xffffffffu) : AWQUA_ABI_VERSION, random_size(sizeof *api), &api)));
    CHECK(known(awqua_set_log(NULL, NULL, random_below(7))));
    CHECK(awqua_status_name((int32_t)random_below(0xffffffffu))[0] == 'A');
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
    switch (random_below(14)) {
    case 11:
        CHECK(known(awqua_session_run(session)));
        break;
    case 12:
        without_objects();
        break;
    case 13:
        /* Of most models nothing is loaded yet, which takes longest. */
        if (chance(8)) {
            CHECK(known(awqua_model_run(model)));
        }
        break;
    case 0:
    case 3:
        progress.struct_size = random_size(sizeof progress);
        CHECK(known(awqua_model_tick(model, chance(3) ? NULL : &budget, chance(3) ? NULL : &progress)));
        break;
    case 1:
    case 4:
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
    case 5:
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
    read_files(argv[1]);
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
        if (chance(4)) {
            awqua_session_desc small = AWQUA_SESSION_DESC_INIT;
            small.context = 48;
            o.sessions[1] = new_session(shared_model, 48);
            OK(awqua_batch_create(shared_model, &small, 2, &o.batches[0]));
        }
        calls = (int)random_below(30);
        for (call = 0; call < calls; call++) {
            switch (random_below(16)) {
            case 14:
            case 15:
                together(&o);
                break;
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
               o.sessions[0] || o.sessions[1] || o.sessions[2] || o.batches[0] || o.batches[1] || o.batches[2]) {
            destroy(&o);
        }
    }
    OK(awqua_model_free(shared_model));
    OK(awqua_engine_free(engine));
    free_files();
    return 0;
}
