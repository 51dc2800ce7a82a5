-- A dialogue with a character in LÖVE 11: love examples/love MODEL_FOLDER [frames]
-- Space asks for another line. With a number of frames it ends by itself and prints how long its frames took.
package.path = love.filesystem.getSource() .. "/?.lua;" .. package.path
local awqua = require("awqua")

local BUDGET_US = 4000
local PROMPTS = { "The old miller looked at Emma and said,", "Emma laughed and said,", "The grey cat thought that" }
local path, engine, model, session
local said, share, ready, talking, lines = "", 0, false, false, 0
local frames, frame, slowest = nil, 0, 0

local function ask()
    local prompt = PROMPTS[lines % #PROMPTS + 1]
    awqua.begin(session, prompt, { max_tokens = 40, seed = lines })
    said, talking = prompt, true
end

-- What a game needs around a dialogue, once at the end of a run with a number of frames.
local function remember()
    local options = { max_tokens = 8, temperature = 0, flags = 1 }
    local function answer(of)
        awqua.begin(of, PROMPTS[1], options)
        local text, done = "", false
        while not done do
            local more
            more, done = awqua.tick(of, BUDGET_US)
            text = text .. more
        end
        return text
    end
    local first = awqua.session(model, { context = 64, flags = awqua.DETERMINISTIC + awqua.EXACT })
    local expected = answer(first)
    local second = awqua.fork(first)
    assert(answer(second) == expected, "a fork goes on differently")
    local saved = awqua.save(second)
    awqua.trim(second)
    awqua.restore(second, saved)
    awqua.evict(model)
    awqua.reload(model)
    while not awqua.load(model, BUDGET_US) do end
    assert(answer(second) == expected, "a restored session goes on differently")
    awqua.embed(second, "The grey cat slept.")
    repeat
        local _, done = awqua.tick(second, BUDGET_US)
    until done
    local values, count = awqua.embedding(second)
    assert(count > 0 and values[0] == values[0])
    print(string.format("remembered:%s, embedded %d numbers", expected, count))
end

-- A checkpoint from strings, with an estimate, and two characters that decode together.
local function host(path)
    local files, computed = {}, 0
    for _, name in ipairs({ "config.json", "model.safetensors", "tokenizer.json" }) do
        local file = assert(io.open(path .. "/" .. name, "rb"))
        files[name] = file:read("*a")
        file:close()
    end
    local on = awqua.engine(awqua.BACKEND_CPU)
    local from = awqua.model_of_files(on, files)
    local options = { context = 64 }
    local estimate = awqua.estimate(from, options)
    while not awqua.load(from, BUDGET_US) do end
    assert(awqua.used(on) == estimate.weights_host and estimate.session_host > 0)
    local batch, npcs = awqua.batch(from, 2, options), {}
    for i = 1, 2 do
        npcs[i] = awqua.session(from, options)
        awqua.begin(npcs[i], PROMPTS[i], { max_tokens = 8, flags = 1 })
    end
    while awqua.tick_all(batch, npcs, BUDGET_US) do end
    for i = 1, 2 do
        local text, done = awqua.poll(npcs[i], function(kind, n) computed = kind == awqua.PROGRESS and n or computed end)
        assert(done and #text > 0 and computed > 0)
    end
    print(string.format("hosted: %d bytes of weights", estimate.weights_host))
end

function love.load(arguments)
    path = assert(arguments[1], "usage: love examples/love MODEL_FOLDER [frames]")
    frames = tonumber(arguments[2])
    engine = awqua.engine(awqua.BACKEND_CPU)
    model = awqua.model(engine, path)
end

function love.update(dt)
    frame = frame + 1
    -- The first frames hold LÖVE's own start.
    if frame > 5 then
        slowest = math.max(slowest, dt)
    end
    if not ready then
        ready, share = awqua.load(model, BUDGET_US)
        if ready then
            session = awqua.session(model)
            ask()
        end
    elseif talking then
        local text, done = awqua.tick(session, BUDGET_US)
        said = said .. text
        if done then
            talking, lines = false, lines + 1
            if frames then
                print(said)
                ask()
            end
        end
    end
    if frames and frame >= frames then
        remember()
        host(path)
        print(string.format("%d frames, %d lines, slowest frame %.1f ms", frame, lines, slowest * 1000))
        love.event.quit(lines > 0 and 0 or 1)
    end
end

function love.keypressed(key)
    if key == "space" and ready and not talking then
        ask()
    elseif key == "escape" and talking then
        awqua.cancel(session)
    end
end

function love.draw()
    love.graphics.clear(0.09, 0.10, 0.15)
    love.graphics.setColor(0.95, 0.80, 0.45)
    love.graphics.circle("fill", 80, 180 + 8 * math.sin(frame * 0.05), 30)
    love.graphics.setColor(1, 1, 1)
    if ready then
        love.graphics.printf(said, 140, 100, 460)
        love.graphics.print(talking and "" or "space: another line", 140, 320)
    else
        love.graphics.rectangle("fill", 140, 100, 460 * share, 8)
    end
end
