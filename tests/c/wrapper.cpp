/* Every class of awqua.hpp at work: wrapper MODEL */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "awqua.hpp"

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);  \
            std::exit(1);                                                                       \
        }                                                                                       \
    } while (0)

namespace {

const char prompt[] = "It was a fine morning, and Emma";

template <class Call> awqua_status thrown(Call call) {
    try {
        call();
    } catch (const awqua::error &failure) {
        CHECK(std::strstr(failure.what(), awqua_status_name(failure.status())) == failure.what());
        return failure.status();
    }
    return AWQUA_OK;
}

std::string answer(awqua::session &session, bool ticked) {
    awqua_request request = awqua::request();
    request.max_tokens = 8;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    request.temperature = 0;
    std::string text;
    std::uint32_t computed = 0;
    session.begin(prompt, request);
    if (ticked) {
        awqua_tick_result result = AWQUA_TICK_RESULT_INIT;
        while (session.tick(300, &result)) {
        }
        CHECK(result.answer_tokens == 8);
    } else {
        session.run();
    }
    const auto reason = session.poll([&](std::string_view piece) { text += piece; },
                                     [&](const awqua_event &event) {
                                         CHECK(event.kind == AWQUA_EVENT_PROGRESS);
                                         computed = event.done;
                                     });
    CHECK(reason == AWQUA_STOP_MAX_TOKENS && computed > 0);
    return text;
}

/* The files of a folder in memory, as from a pak file. */
struct files {
    std::vector<std::string> names, contents;
    std::vector<awqua_file> list;

    explicit files(const std::string &folder) {
        for (const char *name : {"config.json", "model.safetensors", "tokenizer.json"}) {
            std::ifstream file(folder + "/" + name, std::ios::binary);
            names.emplace_back(name);
            contents.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        }
        for (std::size_t i = 0; i < names.size(); i++) {
            list.push_back(awqua_file{awqua::str(names[i]), contents[i].data(), contents[i].size()});
        }
    }
};

void listen(void *user, std::uint32_t level, awqua_str text) {
    CHECK(level > AWQUA_LOG_OFF && text.len > 0);
    ++*static_cast<int *>(user);
}

void models(const char *path) {
    const awqua::engine engine(AWQUA_BACKEND_CPU);
    const files pak(path);
    awqua_model_desc desc = AWQUA_MODEL_DESC_INIT;
    desc.files = pak.list.data();
    desc.n_files = pak.list.size();
    awqua::model model(engine, desc);
    const awqua_estimate estimate = model.estimate();
    CHECK(estimate.weights_host_bytes > 0 && estimate.session_host_bytes > 0);
    awqua_load_progress progress = AWQUA_LOAD_PROGRESS_INIT;
    model.tick(0, &progress);
    model.cancel();
    CHECK(thrown([&] { model.tick(0); }) == AWQUA_ERR_CANCELLED && model.last_error().size() > 4);
    model.load();
    CHECK(engine.info().host_bytes == estimate.weights_host_bytes && engine.pipeline_cache().empty());
    CHECK(std::string(model.info().backend) == "cpu");
    const auto ids = model.tokenize(prompt, false);
    CHECK(model.detokenize(ids) == prompt);
    /* More room than was guessed. */
    CHECK(model.tokenize(std::string(300, '\n')).size() > 4);
    const std::vector<awqua::message> conversation = {{"user", std::string(2000, 'a')}};
    if ((model.info().flags & AWQUA_MODEL_CHAT_TEMPLATE) != 0) {
        CHECK(model.render_chat(conversation).size() > 2000);
    } else {
        CHECK(thrown([&] { model.render_chat(conversation); }) == AWQUA_ERR_TEMPLATE);
    }
    model.evict();
    CHECK(std::string(model.info().backend) == "none");
    model.restore();
    model.load();
    engine.trim(AWQUA_TRIM_PAGES);
    engine.debug_lose_device();
    engine.recover();
    awqua_vulkan vulkan = AWQUA_VULKAN_INIT;
    CHECK(thrown([&] { engine.recover(vulkan); }) == AWQUA_ERR_STATE && !engine.last_error().empty());
}

void sessions(const char *path) {
    const awqua::engine engine(AWQUA_BACKEND_CPU);
    awqua::model model(engine, path);
    model.load();
    const awqua_session_desc desc = awqua::session_desc(AWQUA_SESSION_DETERMINISTIC);
    awqua::session first(model, desc);
    const std::string expected = answer(first, true);
    CHECK(expected.size() > 8 && answer(first, false) == expected);
    awqua::session second = first.fork();
    CHECK(answer(second, true) == expected);
    const awqua::bytes saved = second.save();
    second.truncate(0);
    CHECK(second.info().n_tokens == 0);
    second.restore(saved);
    CHECK(second.info().n_tokens > 8);
    second.trim();
    CHECK(second.info().bytes == 0 && answer(second, true) == expected);
    first = std::move(second);
    first.begin_embedding(prompt);
    first.run();
    CHECK(first.poll([](std::string_view) {}) == AWQUA_STOP_COMPLETE);
    const auto of_text = first.embedding();
    first.begin_embedding(model.tokenize(prompt));
    first.run();
    CHECK(of_text.size() == model.info().hidden_size && of_text == first.embedding());
    first.begin(model.tokenize(prompt));
    CHECK(thrown([&] { first.truncate(0); }) == AWQUA_ERR_STATE && first.last_error().size() > 4);
    first.cancel();
    CHECK(!first.tick(0) && first.poll([](std::string_view) {}) == AWQUA_STOP_CANCELLED);

    awqua::batch batch(model, 2);
    awqua::session other(model);
    CHECK(batch.shares());
    awqua_request request = awqua::request();
    request.max_tokens = 6;
    request.flags = AWQUA_REQUEST_IGNORE_EOS;
    for (const bool ticked : {true, false}) {
        first.begin(prompt, request);
        other.begin("The cat", request);
        if (ticked) {
            while (batch.tick({first.get(), other.get()}, 500)) {
            }
        } else {
            batch.run({first.get(), other.get()});
        }
        CHECK(other.poll([](std::string_view) {}) == AWQUA_STOP_MAX_TOKENS);
    }
    CHECK(thrown([&] { batch.run({first.get(), first.get()}); }) == AWQUA_ERR_BUSY && !batch.last_error().empty());
}

} // namespace

int main(int argc, char **argv) {
    CHECK(argc == 2);
    CHECK(awqua::abi_version() == AWQUA_ABI_VERSION && !awqua::version().empty());
    awqua_allocator allocator = AWQUA_ALLOCATOR_INIT;
    CHECK(thrown([&] { awqua::set_allocator(allocator); }) == AWQUA_ERR_INVALID_ARGUMENT);
    int heard = 0;
    awqua::set_log(listen, &heard, AWQUA_LOG_DEBUG);
    models(argv[1]);
    sessions(argv[1]);
    for (const awqua_device_info &device : awqua::devices()) {
        CHECK(device.name[0] != '\0');
    }
    awqua::set_log(nullptr, nullptr, AWQUA_LOG_OFF);
    CHECK(awqua::memory().allocations > 0);
    CHECK(thrown([] { awqua::model(awqua::engine(AWQUA_BACKEND_CPU), "/nowhere").load(); }) == AWQUA_ERR_IO);
    return 0;
}
