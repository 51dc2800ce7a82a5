/*
 * Awqua for C++17: all of awqua.h with owners, exceptions and standard strings. Header only; the rules of awqua.h hold
 * (threads above all). Structures are those of C, with their AWQUA_..._INIT; get() gives the C object.
 */
#ifndef AWQUA_HPP
#define AWQUA_HPP

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "awqua.h"

namespace awqua {

/* A failed call: its status, and the text behind it as what(). */
class error : public std::runtime_error {
  public:
    error(awqua_status status, const std::string &text)
        : std::runtime_error(std::string(awqua_status_name(status)) + ": " + text), status_(status) {}
    awqua_status status() const noexcept { return status_; }

  private:
    awqua_status status_;
};

/* Passes success through (0 or positive) and throws the rest. */
inline awqua_status check(awqua_status status) {
    if (static_cast<int>(status) < 0) {
        char text[1024] = "";
        awqua_last_error(text, sizeof text, nullptr);
        throw error(status, text);
    }
    return status;
}

inline awqua_str str(std::string_view text) noexcept { return awqua_str{text.data(), text.size()}; }

using bytes = std::vector<std::uint8_t>;

/* ABI and version of the library that is loaded. */
inline std::uint32_t abi_version() noexcept { return awqua_abi_version(); }
inline std::string version() { return awqua_version(); }

/* Messages up to `level` go to `callback`, which must not throw; nullptr turns them off. */
inline void set_log(awqua_log_fn callback, void *user, awqua_log_level level) {
    check(awqua_set_log(callback, user, level));
}

/* The first call into the library or never; the functions must not throw. */
inline void set_allocator(const awqua_allocator &allocator) { check(awqua_set_allocator(&allocator)); }

/* Host memory of the library. */
inline awqua_memory_stats memory() {
    awqua_memory_stats stats = AWQUA_MEMORY_STATS_INIT;
    check(awqua_memory(&stats));
    return stats;
}

/* The adapters of the machine, the preferred one first; empty without a driver. Slow: asks every driver. */
inline std::vector<awqua_device_info> devices() {
    std::uint32_t count = 0;
    check(awqua_device_count(&count));
    std::vector<awqua_device_info> found(count, awqua_device_info AWQUA_DEVICE_INFO_INIT);
    for (std::uint32_t i = 0; i < count; i++) {
        check(awqua_device_get(i, &found[i]));
    }
    return found;
}

namespace detail {
/* What `get(data, capacity, &count)` copies, with as much room as it asks for. */
template <class Container, class Get> Container fetched(Get get, std::size_t guess = 0) {
    Container values(guess, typename Container::value_type{});
    std::uint64_t count = 0;
    awqua_status status = get(values.data(), values.size(), &count);
    if (status == AWQUA_ERR_BUFFER_TOO_SMALL) {
        values.resize(static_cast<std::size_t>(count));
        status = get(values.data(), values.size(), &count);
    }
    check(status);
    values.resize(static_cast<std::size_t>(count));
    return values;
}

/* The same for a text, behind which there is room for the NUL. */
template <class Get> std::string fetched_text(Get get, std::size_t guess) {
    const auto with_nul = [&get](char *data, std::size_t size, std::uint64_t *length) {
        return get(data, size + 1, length);
    };
    return fetched<std::string>(with_nul, guess);
}

/* The text of the last failed call on an object. */
template <class T>
std::string last_error(const T *object, awqua_status (*get)(const T *, char *, std::uint64_t, std::uint64_t *)) {
    std::string text(255, '\0');
    std::uint64_t length = 0;
    if (get(object, &text[0], text.size() + 1, &length) == AWQUA_ERR_BUFFER_TOO_SMALL) {
        text.resize(static_cast<std::size_t>(length));
        check(get(object, &text[0], text.size() + 1, &length));
    }
    text.resize(static_cast<std::size_t>(length));
    return text;
}

template <class T, awqua_status (*Free)(T *)> struct deleter {
    void operator()(T *object) const noexcept { Free(object); }
};
template <class T, awqua_status (*Free)(T *)> using owner = std::unique_ptr<T, deleter<T, Free>>;
} // namespace detail

/* Microseconds of the calling thread, and of the GPU. */
inline awqua_budget budget(std::uint64_t cpu_us, std::uint64_t gpu_us = 4000) noexcept {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    budget.cpu_us = cpu_us;
    budget.gpu_us = gpu_us;
    return budget;
}

/* Where models run. */
class engine {
  public:
    explicit engine(awqua_backend backend = AWQUA_BACKEND_AUTO) {
        awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
        desc.backend = backend;
        create(desc);
    }
    explicit engine(const awqua_engine_desc &desc) { create(desc); }

    /* Lets go of a lost device; models and sessions find another one in their next ticks. */
    void recover() const { check(awqua_engine_recover(object_.get())); }
    /* Goes on with another Vulkan device of the host. */
    void recover(const awqua_vulkan &vulkan) const { check(awqua_engine_recover_vulkan(object_.get(), &vulkan)); }
    /* Loses the device on purpose, to test what the program does then. */
    void debug_lose_device() const { check(awqua_engine_debug_lose_device(object_.get())); }
    void trim(awqua_trim level) const { check(awqua_engine_trim(object_.get(), level)); }
    /* Compiled GPU kernels, for `pipeline_cache` of a later start; empty where there is nothing to keep. */
    bytes pipeline_cache() const {
        return detail::fetched<bytes>([this](void *data, std::uint64_t size, std::uint64_t *length) {
            return awqua_engine_get_pipeline_cache(object_.get(), data, size, length);
        });
    }
    std::string last_error() const { return detail::last_error(get(), awqua_engine_last_error); }
    awqua_engine_info info() const {
        awqua_engine_info info = AWQUA_ENGINE_INFO_INIT;
        check(awqua_engine_get_info(object_.get(), &info));
        return info;
    }
    awqua_engine *get() const noexcept { return object_.get(); }

  private:
    void create(const awqua_engine_desc &desc) {
        awqua_engine *object = nullptr;
        check(awqua_engine_create(&desc, &object));
        object_.reset(object);
    }
    detail::owner<awqua_engine, awqua_engine_free> object_;
};

/* One turn of a conversation. */
struct message {
    std::string role;
    std::string content;
};

namespace detail {
/* Valid as long as the conversation. */
inline std::vector<awqua_message> messages(const std::vector<message> &conversation) {
    std::vector<awqua_message> messages;
    messages.reserve(conversation.size());
    for (const message &m : conversation) {
        messages.push_back(awqua_message{str(m.role), str(m.content)});
    }
    return messages;
}
} // namespace detail

/* Weights on a device with a tokenizer. */
class model {
  public:
    /* Begins to load the checkpoint in the folder `path`; tick() or load() goes on. */
    model(const engine &on, std::string_view path) {
        awqua_model_desc desc = AWQUA_MODEL_DESC_INIT;
        desc.path = str(path);
        create(on, desc);
    }
    model(const engine &on, const awqua_model_desc &desc) { create(on, desc); }

    /* Loads within `how`; true once the model is ready. */
    bool tick(const awqua_budget &how, awqua_load_progress *progress = nullptr) {
        return check(awqua_model_tick(object_.get(), &how, progress)) == AWQUA_OK;
    }
    bool tick(std::uint64_t cpu_us, awqua_load_progress *progress = nullptr) { return tick(budget(cpu_us), progress); }
    /* Loads to the end. */
    void load() { check(awqua_model_run(object_.get())); }
    void cancel() const { check(awqua_model_cancel(object_.get())); }

    awqua_estimate estimate(const awqua_session_desc *desc = nullptr) const {
        awqua_estimate estimate = AWQUA_ESTIMATE_INIT;
        check(awqua_model_estimate(object_.get(), desc, &estimate));
        return estimate;
    }
    void evict() const { check(awqua_model_evict(object_.get())); }
    void restore() const { check(awqua_model_restore(object_.get())); }

    awqua_model_info info() const {
        awqua_model_info info = AWQUA_MODEL_INFO_INIT;
        check(awqua_model_get_info(object_.get(), &info));
        return info;
    }
    std::vector<std::uint32_t> tokenize(std::string_view text, bool add_special = true) const {
        const std::uint32_t flags = add_special ? AWQUA_TOKENIZE_SPECIAL : 0;
        return detail::fetched<std::vector<std::uint32_t>>(
            [&](std::uint32_t *ids, std::uint64_t capacity, std::uint64_t *count) {
                return awqua_model_tokenize(object_.get(), str(text), flags, ids, capacity, count);
            },
            text.size() + 8);
    }
    std::string detokenize(const std::vector<std::uint32_t> &ids, bool skip_special = true) const {
        const std::uint32_t flags = skip_special ? AWQUA_DETOKENIZE_SKIP_SPECIAL : 0;
        return detail::fetched_text(
            [&](char *text, std::uint64_t capacity, std::uint64_t *length) {
                return awqua_model_detokenize(object_.get(), ids.data(), ids.size(), flags, text, capacity, length);
            },
            ids.size() * 8 + 16);
    }
    /* The conversation as the model's own template writes it. */
    std::string render_chat(const std::vector<message> &conversation, bool open_answer = true) const {
        const std::uint32_t flags = open_answer ? AWQUA_CHAT_OPEN_ANSWER : 0;
        const std::vector<awqua_message> turns = detail::messages(conversation);
        return detail::fetched_text(
            [&](char *text, std::uint64_t capacity, std::uint64_t *length) {
                return awqua_model_render_chat(object_.get(), turns.data(), turns.size(), flags, text, capacity,
                                               length);
            },
            1024);
    }
    std::string last_error() const { return detail::last_error(get(), awqua_model_last_error); }
    awqua_model *get() const noexcept { return object_.get(); }

  private:
    void create(const engine &on, const awqua_model_desc &desc) {
        awqua_model *object = nullptr;
        check(awqua_model_create(on.get(), &desc, &object));
        object_.reset(object);
    }
    detail::owner<awqua_model, awqua_model_free> object_;
};

inline awqua_request request() noexcept { return awqua_request AWQUA_REQUEST_INIT; }

/* The defaults of a session with AWQUA_SESSION_* flags. */
inline awqua_session_desc session_desc(std::uint32_t flags = 0) noexcept {
    awqua_session_desc desc = AWQUA_SESSION_DESC_INIT;
    desc.flags = flags;
    return desc;
}

/* One conversation with a model. */
class session {
  public:
    explicit session(const model &with, const awqua_session_desc *desc = nullptr) {
        awqua_session *object = nullptr;
        check(awqua_session_create(with.get(), desc, &object));
        object_.reset(object);
    }
    session(const model &with, const awqua_session_desc &desc) : session(with, &desc) {}

    void begin(std::string_view prompt, const awqua_request &how = request()) {
        check(awqua_session_begin_text(object_.get(), str(prompt), &how));
    }
    void begin(const std::vector<std::uint32_t> &ids, const awqua_request &how = request()) {
        check(awqua_session_begin_tokens(object_.get(), ids.data(), ids.size(), &how));
    }
    void begin(const std::vector<message> &conversation, const awqua_request &how = request()) {
        const std::vector<awqua_message> turns = detail::messages(conversation);
        check(awqua_session_begin_chat(object_.get(), turns.data(), turns.size(), &how));
    }

    /* Works within `how`; true while there is more to do. */
    bool tick(const awqua_budget &how, awqua_tick_result *result = nullptr) {
        return check(awqua_session_tick(object_.get(), &how, result)) == AWQUA_PENDING;
    }
    bool tick(std::uint64_t cpu_us, awqua_tick_result *result = nullptr) { return tick(budget(cpu_us), result); }

    /* Works to the end, waiting for the GPU. */
    void run() { check(awqua_session_run(object_.get())); }

    /* Polls all events: `on_text(std::string_view)` for each piece of text, `on_event(const awqua_event &)` for
     * progress, a lost device, short memory and what later versions add; the reason if the answer ended, else
     * AWQUA_STOP_NONE. Throws if it failed. */
    template <class OnText, class OnEvent> awqua_stop_reason poll(OnText &&on_text, OnEvent &&on_event) {
        char buffer[512];
        for (;;) {
            awqua_event event = AWQUA_EVENT_INIT;
            event.text = buffer;
            event.text_capacity = sizeof buffer;
            if (check(awqua_session_poll(object_.get(), &event)) == AWQUA_EMPTY) {
                return AWQUA_STOP_NONE;
            }
            switch (event.kind) {
            case AWQUA_EVENT_TEXT:
                on_text(std::string_view(buffer, static_cast<std::size_t>(event.text_len)));
                break;
            case AWQUA_EVENT_DONE:
                return static_cast<awqua_stop_reason>(event.reason);
            case AWQUA_EVENT_ERROR:
                throw error(static_cast<awqua_status>(event.status), last_error());
            default:
                on_event(static_cast<const awqua_event &>(event));
                break;
            }
        }
    }
    template <class OnText> awqua_stop_reason poll(OnText &&on_text) {
        return poll(std::forward<OnText>(on_text), [](const awqua_event &) {});
    }

    void cancel() const { check(awqua_session_cancel(object_.get())); }
    void truncate(std::uint32_t n_tokens) { check(awqua_session_truncate(object_.get(), n_tokens)); }
    /* A session that holds what this one does, without computing it again. */
    session fork() {
        awqua_session *object = nullptr;
        check(awqua_session_fork(object_.get(), &object));
        return session(object);
    }
    bytes save() {
        return detail::fetched<bytes>([this](void *data, std::uint64_t size, std::uint64_t *length) {
            return awqua_session_save(object_.get(), data, size, length);
        });
    }
    void restore(const bytes &snapshot) {
        check(awqua_session_restore(object_.get(), snapshot.data(), snapshot.size()));
    }
    void trim() { check(awqua_session_trim(object_.get())); }

    /* Begins to embed a text; tick() it to its end, then embedding() has the vector. */
    void begin_embedding(std::string_view text) {
        check(awqua_session_begin_embedding_text(object_.get(), str(text)));
    }
    void begin_embedding(const std::vector<std::uint32_t> &ids) {
        check(awqua_session_begin_embedding_tokens(object_.get(), ids.data(), ids.size()));
    }
    std::vector<float> embedding() const {
        return detail::fetched<std::vector<float>>([this](float *data, std::uint64_t size, std::uint64_t *count) {
            return awqua_session_get_embedding(object_.get(), data, size, count);
        });
    }

    std::string last_error() const { return detail::last_error(get(), awqua_session_last_error); }
    awqua_session_info info() const {
        awqua_session_info info = AWQUA_SESSION_INFO_INIT;
        check(awqua_session_get_info(object_.get(), &info));
        return info;
    }
    awqua_session *get() const noexcept { return object_.get(); }

  private:
    explicit session(awqua_session *object) noexcept : object_(object) {}
    detail::owner<awqua_session, awqua_session_free> object_;
};

/* Sessions that decode together. */
class batch {
  public:
    /* For sessions made with `desc`, `n_sessions` at a time. */
    explicit batch(const model &with, std::uint32_t n_sessions, const awqua_session_desc *desc = nullptr) {
        awqua_batch *object = nullptr;
        check(awqua_batch_create(with.get(), desc, n_sessions, &object));
        object_.reset(object);
    }

    /* Works on `sessions`, each an awqua_session *, within `how`; true while one has more to do. */
    bool tick(const std::vector<awqua_session *> &sessions, const awqua_budget &how,
              awqua_tick_result *results = nullptr) {
        const auto count = static_cast<std::uint32_t>(sessions.size());
        return check(awqua_batch_tick(object_.get(), sessions.data(), count, &how, results)) == AWQUA_PENDING;
    }
    bool tick(const std::vector<awqua_session *> &sessions, std::uint64_t cpu_us) {
        return tick(sessions, budget(cpu_us));
    }
    /* Works on them to the end. */
    void run(const std::vector<awqua_session *> &sessions) {
        check(awqua_batch_run(object_.get(), sessions.data(), static_cast<std::uint32_t>(sessions.size())));
    }

    /* Whether passes are shared on this device. */
    bool shares() const {
        std::uint32_t shares = 0;
        check(awqua_batch_shares(object_.get(), &shares));
        return shares != 0;
    }
    std::string last_error() const { return detail::last_error(get(), awqua_batch_last_error); }
    awqua_batch *get() const noexcept { return object_.get(); }

  private:
    detail::owner<awqua_batch, awqua_batch_free> object_;
};

} // namespace awqua

#endif
