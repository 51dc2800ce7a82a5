/* Loads the library at run time, as engines do, and works through the table alone: table LIBRARY MODEL */
#include <dlfcn.h>
#include <stdint.h>

#include "check.h"

typedef awqua_status (*get_api_fn)(uint32_t, uint32_t, const awqua_api **);

int main(int argc, char **argv) {
    void *library;
    get_api_fn get_api;
    const awqua_api *api = NULL;
    awqua_engine_desc engine_desc = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model_desc = AWQUA_MODEL_DESC_INIT;
    awqua_request request = AWQUA_REQUEST_INIT;
    awqua_event event = AWQUA_EVENT_INIT;
    awqua_engine *engine = NULL;
    awqua_model *model = NULL;
    awqua_session *session = NULL;
    char text[64];
    int status;
    if (argc != 3) {
        return 2;
    }
    library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    *(void **)&get_api = dlsym(library, "awqua_get_api");
    if (!get_api) {
        return 1;
    }
#define REQUIRE(condition)                                          \
    do {                                                            \
        if (!(condition)) {                                         \
            fprintf(stderr, "%d: %s\n", __LINE__, #condition);      \
            return 1;                                               \
        }                                                           \
    } while (0)
    REQUIRE(get_api(AWQUA_ABI_VERSION + (1u << 16), sizeof *api, &api) == AWQUA_ERR_ABI && !api);
    REQUIRE(get_api(AWQUA_ABI_VERSION + 1, sizeof *api, &api) == AWQUA_ERR_ABI && !api);
    REQUIRE(get_api(AWQUA_ABI_VERSION, sizeof *api + 8, &api) == AWQUA_ERR_ABI && !api);
    REQUIRE(get_api(AWQUA_ABI_VERSION, sizeof *api, &api) == AWQUA_OK && api);
    REQUIRE(api->struct_size >= sizeof *api && api->abi == AWQUA_ABI_VERSION);
    REQUIRE(api->abi_version() == AWQUA_ABI_VERSION);
    engine_desc.backend = AWQUA_BACKEND_CPU;
    REQUIRE(api->engine_create(&engine_desc, &engine) == AWQUA_OK);
    model_desc.path = AWQUA_CSTR(argv[2]);
    REQUIRE(api->model_create(engine, &model_desc, &model) == AWQUA_OK);
    while ((status = api->model_tick(model, NULL, NULL)) == AWQUA_PENDING) {
    }
    REQUIRE(status == AWQUA_OK);
    REQUIRE(api->session_create(model, NULL, &session) == AWQUA_OK);
    request.max_tokens = 4;
    REQUIRE(api->session_begin_text(session, AWQUA_CSTR("Once"), &request) == AWQUA_OK);
    REQUIRE(api->session_run(session) == AWQUA_OK);
    event.text = text;
    event.text_capacity = sizeof text;
    do {
        REQUIRE(api->session_poll(session, &event) == AWQUA_OK);
    } while (event.kind == AWQUA_EVENT_PROGRESS);
    REQUIRE(event.kind == AWQUA_EVENT_TEXT);
    REQUIRE(api->session_free(session) == AWQUA_OK);
    REQUIRE(api->model_free(model) == AWQUA_OK);
    REQUIRE(api->engine_free(engine) == AWQUA_OK);
    REQUIRE(dlclose(library) == 0);
    return 0;
}
