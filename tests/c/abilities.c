/* What the C ABI reaches beyond plain answers: sources, host threads, memory, forks, snapshots, embeddings, biases:
 * abilities MODEL */
#define _POSIX_C_SOURCE 200112L
#include <pthread.h>

#include "check.h"

static const char PROMPT[] =
    "It was a fine morning, and Emma walked along the river to the old mill. The wheel stood still, and a small "
    "grey cat sat on the step and looked at her.";

/* ---- what an answer is ---- */

static void finish(awqua_session *session, uint64_t cpu_us, char *text, size_t capacity) {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_status status;
    uint32_t reason = 0;
    budget.cpu_us = cpu_us;
    do {
        status = awqua_session_tick(session, &budget, NULL);
        CHECK((int)status >= 0);
        reason |= drain(session, text, capacity, 64);
    } while (status == AWQUA_PENDING);
    CHECK(reason == AWQUA_STOP_MAX_TOKENS);
}

static void answer_to(awqua_session *session, const char *prompt, uint32_t tokens, char *text, size_t capacity) {
    awqua_request request = AWQUA_REQUEST_INIT;
    request.max_tokens = tokens;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    request.seed = 11;
    text[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(prompt), &request));
    finish(session, 700, text, capacity);
}

static awqua_session *deterministic(const awqua_model *model) {
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    awqua_session *session = NULL;
    desc.context = 256;
    desc.chunk = 16;
    desc.flags = AWQUA_SESSION_DETERMINISTIC;
    OK(awqua_session_create(model, &desc, &session));
    return session;
}

/* ---- files of a host ---- */

struct pak {
    const char *folder;
    int opened, closed, mapped, released, fails;
};

struct entry {
    FILE *file;
    unsigned char *bytes;
    uint64_t size;
};

static int32_t pak_open(void *user, awqua_str name, void **file, uint64_t *size) {
    struct pak *pak = user;
    struct entry *entry;
    char path[512];
    FILE *opened;
    CHECK(name.data[name.len] == 0 && strlen(name.data) == name.len);
    snprintf(path, sizeof path, "%s/%s", pak->folder, name.data);
    opened = fopen(path, "rb");
    if (!opened) {
        return AWQUA_EMPTY;
    }
    entry = calloc(1, sizeof *entry);
    entry->file = opened;
    fseek(opened, 0, SEEK_END);
    entry->size = (uint64_t)ftell(opened);
    pak->opened++;
    *file = entry;
    *size = entry->size;
    return AWQUA_OK;
}

static int32_t pak_read(void *user, void *file, uint64_t offset, void *buffer, uint64_t size) {
    struct pak *pak = user;
    struct entry *entry = file;
    if (pak->fails) {
        return AWQUA_ERR_IO;
    }
    CHECK(offset + size <= entry->size);
    fseek(entry->file, (long)offset, SEEK_SET);
    return fread(buffer, 1, (size_t)size, entry->file) == size ? AWQUA_OK : AWQUA_ERR_IO;
}

static const void *pak_map(void *user, void *file, uint64_t offset, uint64_t size) {
    struct pak *pak = user;
    struct entry *entry = file;
    CHECK(offset + size <= entry->size);
    if (!entry->bytes) {
        entry->bytes = malloc((size_t)entry->size + 1);
        fseek(entry->file, 0, SEEK_SET);
        CHECK(fread(entry->bytes, 1, (size_t)entry->size, entry->file) == entry->size);
    }
    pak->mapped++;
    return entry->bytes + offset;
}

static void pak_close(void *user, void *file) {
    struct pak *pak = user;
    struct entry *entry = file;
    pak->closed++;
    fclose(entry->file);
    free(entry->bytes);
    free(entry);
}

static void pak_release(void *user) {
    ((struct pak *)user)->released++;
}

static void load(awqua_model *model) {
    awqua_load_progress progress = AWQUA_LOAD_PROGRESS_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_status status;
    uint64_t done = 0;
    uint32_t stage = 0;
    budget.load_bytes = 10000;
    while ((status = awqua_model_tick(model, &budget, &progress)) == AWQUA_PENDING) {
        CHECK(progress.done >= done && progress.stage >= stage && progress.done <= progress.total + 1);
        done = progress.done;
        stage = progress.stage;
    }
    OK(status);
    OK(awqua_model_tick(model, &budget, &progress));
    CHECK(progress.stage == AWQUA_LOAD_READY && done > 0);
}

static void sources(const char *path, const char *expected) {
    static const char *const NAMES[] = { "config.json", "generation_config.json", "model.safetensors",
                                         "tokenizer.json", "tokenizer_config.json" };
    awqua_engine *engine = cpu_engine();
    awqua_model_desc desc = AWQUA_MODEL_DESC_INIT;
    awqua_io io = AWQUA_IO_INIT;
    awqua_file files[5];
    awqua_model *model = NULL;
    awqua_session *session;
    char text[512];
    int way;
    size_t i, n = 0;
    /* Through functions, with and without maps. */
    for (way = 0; way < 2; way++) {
        struct pak pak;
        memset(&pak, 0, sizeof pak);
        pak.folder = path;
        io.user = &pak;
        io.open = pak_open;
        io.read_at = pak_read;
        io.map = way ? pak_map : NULL;
        io.close = pak_close;
        io.release = pak_release;
        desc.path = AWQUA_CSTR("the pak");
        desc.io = &io;
        OK(awqua_model_create(engine, &desc, &model));
        /* What the host can not read is a failure with the file's name, and the model can be tried again. */
        pak.fails = 1;
        EXPECT(AWQUA_ERR_IO, awqua_model_run(model));
        OK(awqua_model_last_error(model, text, sizeof text, NULL));
        CHECK(strstr(text, "the pak") != NULL && strstr(text, "config.json") != NULL);
        pak.fails = 0;
        load(model);
        session = deterministic(model);
        OK(awqua_model_free(model));
        answer_to(session, PROMPT, 12, text, sizeof text);
        CHECK(strcmp(text, expected) == 0 && pak.released == 0);
        OK(awqua_session_free(session));
        CHECK(pak.opened > 3 && pak.opened == pak.closed && pak.released == 1 && (pak.mapped > 0) == way);
    }
    io.read_at = NULL;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_create(engine, &desc, &model));
    io.read_at = pak_read;
    /* From memory: borrowed, then copied and the original destroyed at once. */
    for (i = 0; i < 5; i++) {
        char name[512];
        FILE *file;
        snprintf(name, sizeof name, "%s/%s", path, NAMES[i]);
        file = fopen(name, "rb");
        if (file) {
            fseek(file, 0, SEEK_END);
            files[n].name = AWQUA_CSTR(NAMES[i]);
            files[n].len = (uint64_t)ftell(file);
            files[n].data = malloc((size_t)files[n].len);
            fseek(file, 0, SEEK_SET);
            CHECK(fread((void *)(uintptr_t)files[n].data, 1, (size_t)files[n].len, file) == files[n].len);
            fclose(file);
            n++;
        }
    }
    CHECK(n >= 3);
    desc.files = files;
    desc.n_files = n;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_create(engine, &desc, &model));
    desc.io = NULL;
    for (way = 0; way < 2; way++) {
        desc.flags = way ? AWQUA_MODEL_COPY_FILES : 0;
        OK(awqua_model_create(engine, &desc, &model));
        for (i = 0; way && i < n; i++) {
            free((void *)(uintptr_t)files[i].data);
        }
        OK(awqua_model_run(model));
        session = deterministic(model);
        answer_to(session, PROMPT, 12, text, sizeof text);
        CHECK(strcmp(text, expected) == 0);
        OK(awqua_session_free(session));
        OK(awqua_model_free(model));
    }
    OK(awqua_engine_free(engine));
}

/* ---- threads of a host ---- */

struct job {
    awqua_task_fn task;
    void *context;
    uint32_t count, next;
    pthread_mutex_t lock;
};

struct hand {
    struct job *job;
    uint32_t worker;
};

static unsigned jobs_run;

static void *help(void *user) {
    struct hand *hand = user;
    for (;;) {
        uint32_t mine;
        pthread_mutex_lock(&hand->job->lock);
        mine = hand->job->next++;
        pthread_mutex_unlock(&hand->job->lock);
        if (mine >= hand->job->count) {
            return NULL;
        }
        hand->job->task(hand->job->context, mine, hand->worker);
    }
}

static void parallel_for(void *user, uint32_t count, awqua_task_fn task, void *context) {
    struct job job;
    struct hand hands[2];
    pthread_t thread;
    CHECK(user == &jobs_run);
    jobs_run++;
    job.task = task;
    job.context = context;
    job.count = count;
    job.next = 0;
    pthread_mutex_init(&job.lock, NULL);
    hands[0].job = hands[1].job = &job;
    hands[0].worker = 0;
    hands[1].worker = 1;
    CHECK(pthread_create(&thread, NULL, help, &hands[1]) == 0);
    help(&hands[0]);
    pthread_join(thread, NULL);
    pthread_mutex_destroy(&job.lock);
}

static void host_threads(const char *path, const char *expected) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model;
    awqua_session *session;
    char text[512];
    desc.backend = AWQUA_BACKEND_CPU;
    desc.threads = 2;
    desc.parallel_for = parallel_for;
    desc.parallel_for_user = &jobs_run;
    OK(awqua_engine_create(&desc, &engine));
    model = loaded_model(engine, path);
    session = deterministic(model);
    answer_to(session, PROMPT, 12, text, sizeof text);
    CHECK(strcmp(text, expected) == 0 && jobs_run > 0);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
}

/* ---- memory ---- */

static void budgets(const char *path, const char *expected) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    awqua_estimate estimate = AWQUA_ESTIMATE_INIT;
    awqua_engine_info info = AWQUA_ENGINE_INFO_INIT;
    awqua_session_desc small = AWQUA_SESSION_DESC_INIT;
    awqua_engine *engine = cpu_engine(), *capped = NULL;
    awqua_model *model = new_model(engine, path);
    awqua_session *session = NULL, *second = NULL;
    char text[512], number[32];
    small.context = 256;
    small.chunk = 16;
    /* Before anything is loaded, and what loading then takes. */
    OK(awqua_model_estimate(model, &small, &estimate));
    CHECK(estimate.weights_host_bytes > 0 && estimate.session_host_bytes > 0 && estimate.weights_device_bytes == 0);
    OK(awqua_model_run(model));
    OK(awqua_engine_get_info(engine, &info));
    CHECK(info.host_bytes == estimate.weights_host_bytes && info.device_bytes == 0 && info.flags == 0);
    session = deterministic(model);
    OK(awqua_engine_get_info(engine, &info));
    CHECK(info.host_bytes > estimate.weights_host_bytes);
    CHECK(info.host_bytes <= estimate.weights_host_bytes + estimate.session_host_bytes);
    /* Gone and back, in the middle of an answer. */
    {
        awqua_request request = AWQUA_REQUEST_INIT;
        awqua_budget budget = AWQUA_BUDGET_INIT;
        int i;
        request.max_tokens = 12;
        request.flags = AWQUA_REQUEST_IGNORE_EOS;
        request.seed = 11;
        budget.cpu_us = 0;
        text[0] = 0;
        OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
        for (i = 0; i < 30; i++) {
            EXPECT(AWQUA_PENDING, awqua_session_tick(session, &budget, NULL));
            drain(session, text, sizeof text, 64);
        }
        OK(awqua_model_evict(model));
        EXPECT(AWQUA_ERR_EVICTED, awqua_session_tick(session, &budget, NULL));
        EXPECT(AWQUA_ERR_EVICTED, awqua_session_create(model, NULL, &second));
        OK(awqua_model_restore(model));
        finish(session, 0, text, sizeof text);
        CHECK(strcmp(text, expected) == 0);
    }
    /* On request. */
    {
        awqua_event event = AWQUA_EVENT_INIT;
        OK(awqua_engine_trim(engine, AWQUA_TRIM_WEIGHTS));
        EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_engine_trim(engine, 3));
        OK(awqua_session_tick(session, NULL, NULL));
        OK(awqua_session_poll(session, &event));
        CHECK(event.kind == AWQUA_EVENT_MEMORY_PRESSURE);
        OK(awqua_engine_get_info(engine, &info));
        CHECK(info.host_bytes == 0);
        OK(awqua_model_restore(model));
        answer_to(session, PROMPT, 12, text, sizeof text);
        CHECK(strcmp(text, expected) == 0);
        OK(awqua_session_trim(session));
        OK(awqua_engine_get_info(engine, &info));
        CHECK(info.host_bytes == estimate.weights_host_bytes);
    }
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    /* A cap: refused with the needed number, and what fits is served. */
    desc.backend = AWQUA_BACKEND_CPU;
    desc.host_budget_bytes = estimate.weights_host_bytes + estimate.session_host_bytes;
    OK(awqua_engine_create(&desc, &capped));
    model = loaded_model(capped, path);
    session = deterministic(model);
    second = NULL;
    EXPECT(AWQUA_ERR_OUT_OF_MEMORY, awqua_session_create(model, &small, &second));
    EXPECT(AWQUA_ERR_OUT_OF_MEMORY, awqua_session_fork(session, &second));
    CHECK(second == NULL);
    OK(awqua_session_last_error(session, text, sizeof text, NULL));
    snprintf(number, sizeof number, " %lu ", (unsigned long)desc.host_budget_bytes);
    CHECK(strstr(text, number) != NULL);
    answer_to(session, PROMPT, 12, text, sizeof text);
    CHECK(strcmp(text, expected) == 0);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(capped));
    desc.host_budget_bytes = 1000;
    OK(awqua_engine_create(&desc, &capped));
    model = new_model(capped, path);
    EXPECT(AWQUA_ERR_OUT_OF_MEMORY, awqua_model_run(model));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(capped));
}

/* ---- forks and snapshots ---- */

static void forks(const awqua_model *model, const char *expected) {
    awqua_session *root = deterministic(model), *npc[3] = { NULL, NULL, NULL }, *later;
    awqua_session_info info = AWQUA_SESSION_INFO_INIT;
    unsigned char *saved;
    uint64_t length = 0, again = 0;
    char text[512];
    int i;
    answer_to(root, PROMPT, 12, text, sizeof text);
    for (i = 0; i < 3; i++) {
        awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
        awqua_request request = greedy(1);
        OK(awqua_session_fork(root, &npc[i]));
        OK(awqua_session_begin_text(npc[i], AWQUA_CSTR(PROMPT), &request));
        /* The prefix is there before the first tick. */
        EXPECT(AWQUA_ERR_STATE, awqua_session_fork(npc[i], &later));
        EXPECT(AWQUA_ERR_STATE, awqua_session_trim(npc[i]));
        OK(awqua_session_cancel(npc[i]));
        OK(awqua_session_tick(npc[i], NULL, &result));
        CHECK(result.prompt_done >= 16 && result.prompt_done < result.prompt_total);
        text[0] = 0;
        drain(npc[i], text, sizeof text, 64);
    }
    OK(awqua_session_free(root));
    for (i = 0; i < 3; i++) {
        answer_to(npc[i], PROMPT, 12, text, sizeof text);
        CHECK(strcmp(text, expected) == 0);
    }
    EXPECT(AWQUA_ERR_BUFFER_TOO_SMALL, awqua_session_save(npc[0], NULL, 0, &length));
    CHECK(length > 1000);
    saved = malloc((size_t)length);
    OK(awqua_session_save(npc[0], saved, length, &again));
    CHECK(again == length);
    OK(awqua_session_get_info(npc[0], &info));
    later = deterministic(model);
    OK(awqua_session_restore(later, saved, length));
    again = info.n_tokens;
    OK(awqua_session_get_info(later, &info));
    CHECK(info.n_tokens == again);
    answer_to(later, PROMPT, 12, text, sizeof text);
    CHECK(strcmp(text, expected) == 0);
    saved[length / 2] ^= 1;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_restore(later, saved, length));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_restore(later, saved, 5));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_restore(later, NULL, length));
    free(saved);
    OK(awqua_session_free(later));
    for (i = 0; i < 3; i++) {
        OK(awqua_session_free(npc[i]));
    }
}

/* ---- embeddings, biases, shifts ---- */

static void embeddings(const awqua_model *model) {
    awqua_session *session = deterministic(model);
    awqua_model_info info = AWQUA_MODEL_INFO_INIT;
    awqua_budget budget = AWQUA_BUDGET_INIT;
    float first[2048], second[2048];
    uint64_t n = 0;
    uint32_t ids[64];
    char text[64];
    OK(awqua_model_get_info(model, &info));
    CHECK(info.hidden_size <= 2048 && info.identity != 0);
    EXPECT(AWQUA_ERR_STATE, awqua_session_get_embedding(session, first, 2048, &n));
    OK(awqua_session_begin_embedding_text(session, AWQUA_CSTR(PROMPT)));
    EXPECT(AWQUA_ERR_STATE, awqua_session_begin_embedding_text(session, AWQUA_CSTR(PROMPT)));
    budget.cpu_us = 0;
    while (awqua_session_tick(session, &budget, NULL) == AWQUA_PENDING) {
    }
    text[0] = 0;
    CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_COMPLETE && text[0] == 0);
    EXPECT(AWQUA_ERR_BUFFER_TOO_SMALL, awqua_session_get_embedding(session, first, 1, &n));
    CHECK(n == info.hidden_size);
    OK(awqua_session_get_embedding(session, first, 2048, &n));
    OK(awqua_model_tokenize(model, AWQUA_CSTR(PROMPT), AWQUA_TOKENIZE_SPECIAL, ids, 64, &n));
    OK(awqua_session_begin_embedding_tokens(session, ids, n));
    OK(awqua_session_run(session));
    OK(awqua_session_get_embedding(session, second, 2048, &n));
    CHECK(memcmp(first, second, n * sizeof *first) == 0);
    OK(awqua_session_begin_embedding_text(session, AWQUA_CSTR("The cat")));
    OK(awqua_session_run(session));
    OK(awqua_session_get_embedding(session, second, 2048, &n));
    CHECK(memcmp(first, second, n * sizeof *first) != 0);
    OK(awqua_session_free(session));
}

/* Three characters in one batch say what each says alone; a session belongs to one call at a time. */
static void together(const awqua_model *model) {
    const char *prompts[3] = { PROMPT, "The cat", "The old miller said," };
    awqua_session *sessions[3];
    awqua_tick_result results[3] = { AWQUA_TICK_RESULT_INIT, AWQUA_TICK_RESULT_INIT, AWQUA_TICK_RESULT_INIT };
    awqua_budget budget = AWQUA_BUDGET_INIT;
    awqua_batch *batch = NULL;
    awqua_status status;
    char alone[3][512], found[512];
    uint32_t i, shares = 2, made = 0;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_batch_create(model, NULL, 0, &batch));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_batch_create(NULL, NULL, 3, &batch));
    OK(awqua_batch_create(model, NULL, 3, &batch));
    OK(awqua_batch_shares(batch, &shares));
    CHECK(shares == 1);
    for (i = 0; i < 3; i++) {
        awqua_request request = greedy(8 + 5 * i);
        sessions[i] = new_session(model, 64);
        alone[i][0] = 0;
        OK(awqua_session_begin_text(sessions[i], AWQUA_CSTR(prompts[i]), &request));
        OK(awqua_session_run(sessions[i]));
        CHECK(drain(sessions[i], alone[i], sizeof alone[i], 64) == AWQUA_STOP_MAX_TOKENS);
    }
    for (i = 0; i < 3; i++) {
        awqua_request request = greedy(8 + 5 * i);
        OK(awqua_session_truncate(sessions[i], 0));
        OK(awqua_session_begin_text(sessions[i], AWQUA_CSTR(prompts[i]), &request));
    }
    budget.cpu_us = 100;
    do {
        status = awqua_batch_tick(batch, sessions, 3, &budget, results);
        CHECK(status == AWQUA_PENDING || status == AWQUA_OK);
        for (i = 0; i < 3; i++) {
            made += results[i].new_tokens;
        }
    } while (status == AWQUA_PENDING);
    CHECK(made == 8 + 13 + 18 && results[2].answer_tokens == 18);
    for (i = 0; i < 3; i++) {
        found[0] = 0;
        CHECK(drain(sessions[i], found, sizeof found, 64) == AWQUA_STOP_MAX_TOKENS);
        CHECK(strcmp(found, alone[i]) == 0);
    }
    for (i = 0; i < 2; i++) {
        awqua_request request = greedy(8 + 5 * i);
        OK(awqua_session_begin_text(sessions[i], AWQUA_CSTR(prompts[i]), &request));
    }
    OK(awqua_batch_run(batch, sessions, 2));
    found[0] = 0;
    CHECK(drain(sessions[1], found, sizeof found, 64) == AWQUA_STOP_MAX_TOKENS && strcmp(found, alone[1]) == 0);
    OK(awqua_batch_tick(batch, NULL, 0, NULL, NULL));
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_batch_tick(batch, NULL, 2, NULL, NULL));
    results[1].struct_size = 3;
    EXPECT(AWQUA_ERR_STRUCT_SIZE, awqua_batch_tick(batch, sessions, 3, NULL, results));
    OK(awqua_session_free(sessions[2]));
    sessions[2] = sessions[0];
    EXPECT(AWQUA_ERR_BUSY, awqua_batch_tick(batch, sessions, 3, NULL, NULL));
    sessions[2] = NULL;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_batch_run(batch, sessions, 3));
    OK(awqua_batch_free(batch));
    OK(awqua_session_free(sessions[0]));
    OK(awqua_session_free(sessions[1]));
}

/* Exact products are other numbers, not far away, and the same ones again. */
static void exactness(const awqua_model *model) {
    static const uint32_t FLAGS[] = { 0, AWQUA_SESSION_EXACT, AWQUA_SESSION_EXACT | AWQUA_SESSION_DETERMINISTIC };
    static float values[3][2048];
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    awqua_session *session = NULL;
    double error = 0, norm = 0;
    uint64_t n = 0, i;
    int way;
    for (way = 0; way < 3; way++) {
        desc.context = 256;
        desc.chunk = 16;
        desc.flags = FLAGS[way];
        OK(awqua_session_create(model, &desc, &session));
        OK(awqua_session_begin_embedding_text(session, AWQUA_CSTR(PROMPT)));
        OK(awqua_session_run(session));
        OK(awqua_session_get_embedding(session, values[way], 2048, &n));
        OK(awqua_session_free(session));
    }
    for (i = 0; i < n; i++) {
        double difference = (double)values[0][i] - (double)values[1][i];
        error += difference * difference;
        norm += (double)values[1][i] * (double)values[1][i];
    }
    CHECK(error > 0 && error < 1e-6 * norm);
    CHECK(memcmp(values[1], values[2], n * sizeof **values) == 0);
    desc.flags = 8;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_create(model, &desc, &session));
}

static void choices(const awqua_model *model) {
    awqua_session *session = deterministic(model);
    awqua_request request = greedy(1);
    awqua_logit_bias bias = { 0, 1e4f };
    char first[64], other[64], again[64];
    uint32_t ids[8];
    uint64_t n = 0;
    first[0] = other[0] = again[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_run(session));
    drain(session, first, sizeof first, 64);
    OK(awqua_model_tokenize(model, AWQUA_CSTR(first), 0, ids, 8, &n));
    CHECK(n == 1);
    request.banned_ids = ids;
    request.n_banned_ids = 1;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_run(session));
    drain(session, other, sizeof other, 64);
    CHECK(strcmp(first, other) != 0);
    request.n_banned_ids = 0;
    OK(awqua_model_tokenize(model, AWQUA_CSTR(other), 0, &bias.id, 1, &n));
    request.biases = &bias;
    request.n_biases = 1;
    OK(awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_run(session));
    drain(session, again, sizeof again, 64);
    CHECK(strcmp(other, again) == 0);
    bias.id = 0x7fffffff;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_session_begin_text(session, AWQUA_CSTR(PROMPT), &request));
    OK(awqua_session_free(session));
}

static void shifts(const awqua_model *model) {
    awqua_session *session = new_session(model, 48);
    awqua_request request = greedy(100);
    char text[1024];
    text[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning, and Emma"), &request));
    OK(awqua_session_run(session));
    CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_CONTEXT_FULL);
    request.flags |= AWQUA_REQUEST_SHIFT;
    request.shift_keep = 4;
    text[0] = 0;
    OK(awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning, and Emma"), &request));
    OK(awqua_session_run(session));
    CHECK(drain(session, text, sizeof text, 64) == AWQUA_STOP_MAX_TOKENS);
    OK(awqua_session_free(session));
}

/* A head of fewer bits is another one, and not everything can be asked for. */
static void heads(const char *path) {
    static const uint32_t FLAGS[] = { AWQUA_MODEL_HEAD_8, AWQUA_MODEL_HEAD_4 };
    awqua_engine *engine = cpu_engine();
    awqua_model_desc desc = AWQUA_MODEL_DESC_INIT;
    awqua_model *model = NULL;
    int i;
    desc.path = AWQUA_CSTR(path);
    desc.flags = AWQUA_MODEL_HEAD_8 | AWQUA_MODEL_HEAD_4;
    EXPECT(AWQUA_ERR_INVALID_ARGUMENT, awqua_model_create(engine, &desc, &model));
    for (i = 0; i < 2; i++) {
        awqua_session *session;
        char text[512];
        desc.flags = FLAGS[i];
        OK(awqua_model_create(engine, &desc, &model));
        OK(awqua_model_run(model));
        session = deterministic(model);
        answer_to(session, PROMPT, 12, text, sizeof text);
        CHECK(strlen(text) > 12);
        OK(awqua_session_free(session));
        OK(awqua_model_free(model));
    }
    OK(awqua_engine_free(engine));
}

int main(int argc, char **argv) {
    awqua_engine *engine = cpu_engine();
    awqua_model *model;
    awqua_session *session;
    char expected[512];
    CHECK(argc == 2);
    model = loaded_model(engine, argv[1]);
    session = deterministic(model);
    answer_to(session, PROMPT, 12, expected, sizeof expected);
    CHECK(strlen(expected) > 12);
    OK(awqua_session_free(session));
    forks(model, expected);
    embeddings(model);
    together(model);
    exactness(model);
    choices(model);
    shifts(model);
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    heads(argv[1]);
    sources(argv[1], expected);
    host_threads(argv[1], expected);
    budgets(argv[1], expected);
    return 0;
}
