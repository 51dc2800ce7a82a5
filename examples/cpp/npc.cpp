// Three characters of a game that talk while it runs, in C++17: npc MODEL_FOLDER [frames]
//
// Each character has a session of its own on the one model, and a batch makes the tokens of all of them in one pass. A
// frame has 16.7 ms; the characters share 4 ms of it, and the game never waits for them.
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "awqua.hpp"

namespace {

using steady = std::chrono::steady_clock;
constexpr std::chrono::microseconds frame_time{16667};
constexpr std::uint64_t budget_us = 4000;

struct npc {
    const char *name;
    const char *prompt;
    awqua::session session;
    std::string says;
    bool talking = false;

    npc(const char *name, const char *prompt, const awqua::model &model)
        : name(name), prompt(prompt), session(model) {}

    void greet(std::uint64_t seed) {
        awqua_request request = awqua::request();
        request.max_tokens = 40;
        request.seed = seed;
        says.clear();
        session.begin(prompt, request);
        talking = true;
    }

    void listen() {
        if (session.poll([this](std::string_view text) { says += text; }) != AWQUA_STOP_NONE) {
            talking = false;
            std::printf("%s: %s%s\n", name, prompt, says.c_str());
        }
    }
};

int run(const char *path, int frames) {
    awqua_engine_desc desc = AWQUA_ENGINE_DESC_INIT;
    desc.backend = AWQUA_BACKEND_CPU;
    const awqua::engine engine(desc);
    awqua::model model(engine, path);
    int frame = 0;
    while (!model.tick(budget_us)) {
        frame++; // the loading screen
    }
    std::printf("loaded in %d frames on %s\n", frame + 1, model.info().backend);

    std::array<npc, 3> npcs{npc("miller", "The old miller said,", model), npc("Emma", "Emma smiled and said,", model),
                            npc("cat", "The grey cat looked up and", model)};
    awqua::batch batch(model, static_cast<std::uint32_t>(npcs.size()));
    std::vector<awqua_session *> talking;
    std::uint64_t seed = 1;
    for (npc &n : npcs) {
        n.greet(seed++);
    }

    std::chrono::microseconds longest{0};
    int spoken = 0;
    for (frame = 0; frame < frames; frame++) {
        const auto start = steady::now();
        talking.clear();
        for (const npc &n : npcs) {
            if (n.talking) {
                talking.push_back(n.session.get());
            }
        }
        batch.tick(talking, budget_us);
        for (npc &n : npcs) {
            if (n.talking) {
                n.listen();
                spoken += !n.talking;
            }
        }
        // The game itself would update and draw here.
        longest = std::max(longest, std::chrono::duration_cast<std::chrono::microseconds>(steady::now() - start));
        if (spoken == static_cast<int>(npcs.size())) {
            break;
        }
        std::this_thread::sleep_until(start + frame_time);
    }
    std::printf("%d of 3 spoke within %d frames; longest update %.1f ms of 16.7\n", spoken, frame + 1,
                static_cast<double>(longest.count()) / 1000.0);
    return spoken == 3 ? 0 : 1;
}

} // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s MODEL_FOLDER [frames]\n", argv[0]);
        return 2;
    }
    try {
        return run(argv[1], argc > 2 ? std::atoi(argv[2]) : 2000);
    } catch (const awqua::error &error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
