/* Every initialiser macro gives what its function gives; compiled as C and as C++. */
#include <string.h>

#include "check.h"

#define SAME(type, function, ...)                    \
    do {                                             \
        type from_macro = __VA_ARGS__;               \
        type from_function;                          \
        memset(&from_function, 0xa5, sizeof from_function); \
        EXPECT(AWQUA_ERR_STRUCT_SIZE, function(&from_function)); \
        from_function.struct_size = sizeof from_function; \
        OK(function(&from_function));                \
        CHECK(memcmp(&from_macro, &from_function, sizeof from_macro) == 0); \
        CHECK(from_macro.struct_size == sizeof from_macro); \
        EXPECT(AWQUA_ERR_INVALID_ARGUMENT, function(NULL)); \
    } while (0)

int main(void) {
    awqua_str literal = AWQUA_STR("npc");
    awqua_str string = AWQUA_CSTR("npc");
    awqua_memory_stats stats = AWQUA_MEMORY_STATS_INIT;
    awqua_allocator allocator = AWQUA_ALLOCATOR_INIT;
    awqua_device_info device = AWQUA_DEVICE_INFO_INIT;
    awqua_load_progress progress = AWQUA_LOAD_PROGRESS_INIT;
    awqua_model_info model = AWQUA_MODEL_INFO_INIT;
    awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
    awqua_event event = AWQUA_EVENT_INIT;
    awqua_session_info session = AWQUA_SESSION_INFO_INIT;
    awqua_engine_info engine = AWQUA_ENGINE_INFO_INIT;
    awqua_estimate estimate = AWQUA_ESTIMATE_INIT;
    awqua_io io = AWQUA_IO_INIT;
    awqua_vulkan vulkan = AWQUA_VULKAN_INIT;
    CHECK(literal.len == 3 && string.len == AWQUA_STRLEN && strcmp(string.data, literal.data) == 0);
    CHECK(stats.struct_size == sizeof stats && allocator.struct_size == sizeof allocator);
    CHECK(device.struct_size == sizeof device && progress.struct_size == sizeof progress);
    CHECK(model.struct_size == sizeof model && result.struct_size == sizeof result);
    CHECK(event.struct_size == sizeof event && session.struct_size == sizeof session);
    CHECK(engine.struct_size == sizeof engine && estimate.struct_size == sizeof estimate);
    CHECK(io.struct_size == sizeof io && vulkan.struct_size == sizeof vulkan);
    SAME(awqua_engine_desc, awqua_engine_desc_init, AWQUA_ENGINE_DESC_INIT);
    SAME(awqua_budget, awqua_budget_init, AWQUA_BUDGET_INIT);
    SAME(awqua_model_desc, awqua_model_desc_init, AWQUA_MODEL_DESC_INIT);
    SAME(awqua_session_desc, awqua_session_desc_init, AWQUA_SESSION_DESC_INIT);
    SAME(awqua_request, awqua_request_init, AWQUA_REQUEST_INIT);
    {
        /* A program of an older header: what lies behind its structure is not touched. */
        awqua_engine_desc older;
        memset(&older, 0xa5, sizeof older);
        older.struct_size = (uint32_t)offsetof(awqua_engine_desc, host_budget_bytes);
        OK(awqua_engine_desc_init(&older));
        CHECK(older.threads == 0 && older.device.len == 0 && older.host_budget_bytes == 0xa5a5a5a5a5a5a5a5u);
        CHECK(older.struct_size == offsetof(awqua_engine_desc, host_budget_bytes));
    }
    CHECK(awqua_abi_version() == AWQUA_ABI_VERSION);
    OK(awqua_memory(&stats));
    return 0;
}
