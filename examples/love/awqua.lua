-- Awqua for LuaJIT: the part of awqua.h that a dialogue needs, with collected objects and Lua strings.
-- Structures are declared as in the header; the library refuses them by their size should they ever differ.
--
-- No callbacks: LuaJIT takes no structures by value in them, as the log and files come, and can only be called back on
-- the thread that called. Files come as strings instead, which love.filesystem reads from wherever they are.
local ffi = require("ffi")

ffi.cdef [[
typedef struct awqua_engine awqua_engine;
typedef struct awqua_model awqua_model;
typedef struct awqua_session awqua_session;
typedef struct awqua_batch awqua_batch;
typedef struct { const char *data; uint64_t len; } awqua_str;
typedef struct {
    uint32_t struct_size, flags, backend, threads;
    awqua_str device;
} awqua_engine_desc;
typedef struct { awqua_str name; const void *data; uint64_t len; } awqua_file;
typedef struct {
    uint32_t struct_size, flags;
    awqua_str path;
    const awqua_file *files;
    uint64_t n_files;
} awqua_model_desc;
typedef struct { uint32_t struct_size, flags; uint64_t host_bytes, device_bytes; } awqua_engine_info;
typedef struct {
    uint32_t struct_size, flags;
    uint64_t weights_host_bytes, weights_device_bytes, session_host_bytes, session_device_bytes;
} awqua_estimate;
typedef struct { uint32_t struct_size, flags, context, kv_type, chunk, reserved; } awqua_session_desc;
typedef struct { uint32_t struct_size, flags; uint64_t cpu_us; } awqua_budget;
typedef struct { uint32_t struct_size, flags; uint64_t done, total; } awqua_load_progress;
typedef struct {
    uint32_t struct_size, flags, max_tokens, top_k;
    float top_p, min_p, temperature, repetition_penalty, presence_penalty, frequency_penalty;
    uint32_t penalty_window, n_stops;
    uint64_t seed;
    const awqua_str *stops;
    const uint32_t *stop_ids;
    uint32_t n_stop_ids, reserved;
} awqua_request;
typedef struct {
    uint32_t struct_size, flags, kind, reason;
    int32_t status;
    uint32_t reserved;
    char *text;
    uint64_t text_capacity, text_len, text_waiting;
    uint32_t done, total;
} awqua_event;

const char *awqua_status_name(int32_t status);
int32_t awqua_last_error(char *buffer, uint64_t capacity, uint64_t *length);
int32_t awqua_engine_desc_init(awqua_engine_desc *desc);
int32_t awqua_engine_create(const awqua_engine_desc *desc, awqua_engine **engine);
int32_t awqua_engine_free(awqua_engine *engine);
int32_t awqua_engine_get_info(const awqua_engine *engine, awqua_engine_info *info);
int32_t awqua_engine_recover(const awqua_engine *engine);
int32_t awqua_model_desc_init(awqua_model_desc *desc);
int32_t awqua_model_create(const awqua_engine *engine, const awqua_model_desc *desc, awqua_model **model);
int32_t awqua_model_tick(awqua_model *model, const awqua_budget *budget, awqua_load_progress *progress);
int32_t awqua_model_free(awqua_model *model);
int32_t awqua_budget_init(awqua_budget *budget);
int32_t awqua_request_init(awqua_request *request);
int32_t awqua_model_estimate(const awqua_model *model, const awqua_session_desc *desc, awqua_estimate *estimate);
int32_t awqua_model_evict(const awqua_model *model);
int32_t awqua_model_restore(const awqua_model *model);
int32_t awqua_session_desc_init(awqua_session_desc *desc);
int32_t awqua_session_last_error(const awqua_session *session, char *buffer, uint64_t capacity, uint64_t *length);
int32_t awqua_session_create(const awqua_model *model, const awqua_session_desc *desc, awqua_session **session);
int32_t awqua_session_fork(awqua_session *session, awqua_session **forked);
int32_t awqua_session_save(awqua_session *session, void *buffer, uint64_t capacity, uint64_t *length);
int32_t awqua_session_restore(awqua_session *session, const void *snapshot, uint64_t length);
int32_t awqua_session_trim(awqua_session *session);
int32_t awqua_session_begin_embedding_text(awqua_session *session, awqua_str text);
int32_t awqua_session_get_embedding(const awqua_session *session, float *values, uint64_t capacity, uint64_t *count);
int32_t awqua_session_begin_text(awqua_session *session, awqua_str prompt, const awqua_request *request);
int32_t awqua_session_tick(awqua_session *session, const awqua_budget *budget, void *result);
int32_t awqua_session_poll(awqua_session *session, awqua_event *event);
int32_t awqua_session_cancel(const awqua_session *session);
int32_t awqua_session_free(awqua_session *session);
int32_t awqua_batch_create(const awqua_model *model, const awqua_session_desc *desc, uint32_t n_sessions,
                           awqua_batch **batch);
int32_t awqua_batch_tick(awqua_batch *batch, awqua_session *const *sessions, uint32_t count,
                         const awqua_budget *budget, void *results);
int32_t awqua_batch_free(awqua_batch *batch);
]]

local PENDING, EMPTY = 1, 2
local TEXT, DONE, ERROR = 1, 2, 3

local C = ffi.load(os.getenv("AWQUA_LIBRARY") or "awqua")
local awqua = {
    BACKEND_AUTO = 0, BACKEND_CPU = 1, BACKEND_GPU = 2, BACKEND_CUDA = 3,
    DETERMINISTIC = 1, EXACT = 2, SHARE_FORKS = 4,
    PROGRESS = 4, DEVICE_LOST = 5, MEMORY_PRESSURE = 6,
}

-- Raises a failed status with its text, the thread's or that of the answer of a session.
local function check(status, session)
    if status < 0 then
        local buffer = ffi.new("char[512]")
        if session then
            C.awqua_session_last_error(session, buffer, 512, nil)
        else
            C.awqua_last_error(buffer, 512, nil)
        end
        error(ffi.string(C.awqua_status_name(status)) .. ": " .. ffi.string(buffer), 2)
    end
    return status
end

local function str(text)
    return ffi.new("awqua_str", text, #text)
end

-- A finished out-parameter as an object that the collector frees.
local function own(out, free)
    return ffi.gc(out[0], free)
end

-- A structure with its defaults, made by the library's function `init`, and with the members of the table `options`.
local function new(name, init, options)
    local struct = ffi.new(name)
    struct.struct_size = ffi.sizeof(struct)
    check(init(struct))
    for member, value in pairs(options or {}) do
        struct[member] = value
    end
    return struct
end

local budget = new("awqua_budget", C.awqua_budget_init)

function awqua.engine(backend)
    local desc, out = new("awqua_engine_desc", C.awqua_engine_desc_init), ffi.new("awqua_engine *[1]")
    desc.backend = backend or awqua.BACKEND_AUTO
    check(C.awqua_engine_create(desc, out))
    return own(out, C.awqua_engine_free)
end

-- Bytes of host and of device memory that the engine's models and sessions hold.
function awqua.used(engine)
    local info = ffi.new("awqua_engine_info")
    info.struct_size = ffi.sizeof(info)
    check(C.awqua_engine_get_info(engine, info))
    return tonumber(info.host_bytes), tonumber(info.device_bytes)
end

-- Lets go of a lost device; models and sessions find another one in their next ticks.
function awqua.recover(engine)
    check(C.awqua_engine_recover(engine))
end

-- Files of a checkpoint as strings by their names, which the library copies.
function awqua.model_of_files(engine, files, name)
    local list, n = ffi.new("awqua_file[16]"), 0
    for file, content in pairs(files) do
        assert(n < 16, "a checkpoint of more than 16 files")
        list[n].name, list[n].data, list[n].len = str(file), content, #content
        n = n + 1
    end
    local desc, out = new("awqua_model_desc", C.awqua_model_desc_init), ffi.new("awqua_model *[1]")
    desc.flags, desc.path, desc.files, desc.n_files = 1, str(name or "files"), list, n
    check(C.awqua_model_create(engine, desc, out))
    return own(out, C.awqua_model_free)
end

-- Bytes that the model and a session with these options take, also before it is loaded.
function awqua.estimate(model, options)
    local desc = new("awqua_session_desc", C.awqua_session_desc_init, options)
    local estimate = ffi.new("awqua_estimate")
    estimate.struct_size = ffi.sizeof(estimate)
    check(C.awqua_model_estimate(model, desc, estimate))
    return {
        weights_host = tonumber(estimate.weights_host_bytes), weights_device = tonumber(estimate.weights_device_bytes),
        session_host = tonumber(estimate.session_host_bytes), session_device = tonumber(estimate.session_device_bytes),
    }
end

function awqua.model(engine, path)
    local desc, out = new("awqua_model_desc", C.awqua_model_desc_init), ffi.new("awqua_model *[1]")
    desc.path = str(path)
    check(C.awqua_model_create(engine, desc, out))
    return own(out, C.awqua_model_free)
end

-- Loads for about `us` microseconds; true once the model is ready, else false and the share that is loaded.
function awqua.load(model, us)
    local progress = ffi.new("awqua_load_progress")
    progress.struct_size = ffi.sizeof(progress)
    budget.cpu_us = us
    if check(C.awqua_model_tick(model, budget, progress)) == PENDING then
        return false, progress.total > 0 and tonumber(progress.done) / tonumber(progress.total) or 0
    end
    return true, 1
end

-- `options` are members of awqua_session_desc.
function awqua.session(model, options)
    local desc, out = new("awqua_session_desc", C.awqua_session_desc_init, options), ffi.new("awqua_session *[1]")
    check(C.awqua_session_create(model, desc, out))
    return own(out, C.awqua_session_free)
end

-- A session that holds what this one does, without computing it again.
function awqua.fork(session)
    local out = ffi.new("awqua_session *[1]")
    check(C.awqua_session_fork(session, out))
    return own(out, C.awqua_session_free)
end

-- What the session holds as a string, for restore in this run or a later one.
function awqua.save(session)
    local length = ffi.new("uint64_t[1]")
    C.awqua_session_save(session, nil, 0, length)
    local bytes = ffi.new("uint8_t[?]", length[0])
    check(C.awqua_session_save(session, bytes, length[0], length))
    return ffi.string(bytes, length[0])
end

function awqua.restore(session, snapshot)
    check(C.awqua_session_restore(session, snapshot, #snapshot))
end

-- Gives the memory of an idle session back; it is computed again when it is needed.
function awqua.trim(session)
    check(C.awqua_session_trim(session))
end

-- Gives the memory of the weights back; `load` brings them back after `reload`.
function awqua.evict(model)
    check(C.awqua_model_evict(model))
end

function awqua.reload(model)
    check(C.awqua_model_restore(model))
end

-- Begins to embed a text; tick to its end, then `embedding` has the vector.
function awqua.embed(session, text)
    check(C.awqua_session_begin_embedding_text(session, str(text)))
end

function awqua.embedding(session)
    local count = ffi.new("uint64_t[1]")
    C.awqua_session_get_embedding(session, nil, 0, count)
    local values = ffi.new("float[?]", count[0])
    check(C.awqua_session_get_embedding(session, values, count[0], count))
    return values, tonumber(count[0])
end

-- Begins to continue `prompt`; `options` are members of awqua_request.
function awqua.begin(session, prompt, options)
    local request = new("awqua_request", C.awqua_request_init, options)
    check(C.awqua_session_begin_text(session, str(prompt), request))
end

local buffer = ffi.new("char[256]")
local event = ffi.new("awqua_event")

-- Takes what a tick left; returns the new text and whether the answer is complete. `heard(kind, done, total)` gets what
-- else happened: progress of the prompt, a lost device, short memory.
function awqua.poll(session, heard)
    local pieces, done = {}, false
    while true do
        event.struct_size, event.flags = ffi.sizeof(event), 0
        event.text, event.text_capacity = buffer, 256
        if check(C.awqua_session_poll(session, event)) == EMPTY then
            break
        elseif event.kind == TEXT then
            pieces[#pieces + 1] = ffi.string(buffer, event.text_len)
        elseif event.kind == DONE then
            done = true
        elseif event.kind == ERROR then
            check(event.status, session)
        elseif heard then
            heard(tonumber(event.kind), event.done, event.total)
        end
    end
    return table.concat(pieces), done
end

-- Works for about `us` microseconds; then as `poll`.
function awqua.tick(session, us, heard)
    budget.cpu_us = us
    check(C.awqua_session_tick(session, budget, nil))
    return awqua.poll(session, heard)
end

-- Sessions made with `options` that decode together, `n` at a time: the weights are read once for all of them.
function awqua.batch(model, n, options)
    local desc, out = new("awqua_session_desc", C.awqua_session_desc_init, options), ffi.new("awqua_batch *[1]")
    check(C.awqua_batch_create(model, desc, n, out))
    return own(out, C.awqua_batch_free)
end

-- Works on all of `sessions` for about `us` microseconds; whether there is more to do. `poll` each of them.
function awqua.tick_all(batch, sessions, us)
    local list = ffi.new("awqua_session *[?]", #sessions, sessions)
    budget.cpu_us = us
    return check(C.awqua_batch_tick(batch, list, #sessions, budget, nil)) == PENDING
end

function awqua.cancel(session)
    check(C.awqua_session_cancel(session))
end

return awqua
