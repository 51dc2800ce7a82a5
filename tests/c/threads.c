/* Rules of threads: calls on const objects run at once, cancels come from anywhere, and a wrong call is refused:
 * threads MODEL */
#define _POSIX_C_SOURCE 200112L
#include <pthread.h>

#include "check.h"

static awqua_model *model;
static awqua_session *session;
static volatile int stop;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned busy, served, heard;

static int stopped(void) {
    int value;
    pthread_mutex_lock(&lock);
    value = stop;
    pthread_mutex_unlock(&lock);
    return value;
}

static void add(unsigned *counter) {
    pthread_mutex_lock(&lock);
    ++*counter;
    pthread_mutex_unlock(&lock);
}

/* Reads the model while others do. */
static void *reader(void *unused) {
    while (!stopped()) {
        awqua_model_info info = AWQUA_MODEL_INFO_INIT;
        uint32_t ids[32];
        uint64_t n = 0;
        OK(awqua_model_get_info(model, &info));
        OK(awqua_model_tokenize(model, AWQUA_CSTR("It was a fine morning"), 0, ids, 32, &n));
        CHECK(info.vocab_size > 0 && n > 0);
        add(&served);
    }
    return unused;
}

/* Asks for the session while the other thread may have it: refused or served, never harmful. */
static void *intruder(void *unused) {
    while (!stopped()) {
        awqua_session_info info = AWQUA_SESSION_INFO_INIT;
        awqua_status status = awqua_session_get_info(session, &info);
        CHECK(status == AWQUA_OK || status == AWQUA_ERR_BUSY);
        if (status == AWQUA_ERR_BUSY) {
            add(&busy);
        }
    }
    return unused;
}

static void *canceller(void *unused) {
    while (!stopped()) {
        OK(awqua_session_cancel(session));
    }
    return unused;
}

static void listen(void *user, uint32_t level, awqua_str text) {
    (void)level;
    CHECK(text.data != NULL);
    add((unsigned *)user);
}

int main(int argc, char **argv) {
    awqua_engine *engine = cpu_engine();
    awqua_request request = greedy(6);
    pthread_t threads[4];
    char text[256];
    int i, cancelled = 0;
    CHECK(argc == 2);
    OK(awqua_set_log(listen, &heard, AWQUA_LOG_DEBUG));
    model = loaded_model(engine, argv[1]);
    session = new_session(model, 128);
    CHECK(pthread_create(&threads[0], NULL, reader, NULL) == 0);
    CHECK(pthread_create(&threads[1], NULL, reader, NULL) == 0);
    CHECK(pthread_create(&threads[2], NULL, intruder, NULL) == 0);
    CHECK(pthread_create(&threads[3], NULL, canceller, NULL) == 0);
    for (i = 0; i < 60; i++) {
        awqua_status status;
        do {
            status = awqua_session_begin_text(session, AWQUA_CSTR("It was a fine morning"), &request);
        } while (status == AWQUA_ERR_BUSY);
        OK(status);
        do {
            status = awqua_session_tick(session, NULL, NULL);
        } while (status == AWQUA_PENDING || status == AWQUA_ERR_BUSY);
        OK(status);
        for (;;) {
            awqua_event event = AWQUA_EVENT_INIT;
            event.text = text;
            event.text_capacity = sizeof text;
            status = awqua_session_poll(session, &event);
            if (status == AWQUA_EMPTY) {
                break;
            }
            CHECK(status == AWQUA_OK || status == AWQUA_ERR_BUSY);
            cancelled += status == AWQUA_OK && event.kind == AWQUA_EVENT_DONE && event.reason == AWQUA_STOP_CANCELLED;
        }
    }
    pthread_mutex_lock(&lock);
    stop = 1;
    pthread_mutex_unlock(&lock);
    for (i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK(cancelled > 0 && served > 0 && heard > 0);
    OK(awqua_session_free(session));
    OK(awqua_model_free(model));
    OK(awqua_engine_free(engine));
    OK(awqua_set_log(NULL, NULL, AWQUA_LOG_OFF));
    return 0;
}
