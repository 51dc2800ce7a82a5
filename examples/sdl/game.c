/*
 * A game loop that draws and thinks in every frame, with SDL2: game MODEL_FOLDER [-frames N] [-screenshot FILE.bmp]
 *
 * Two characters talk in turn. The graph at the bottom shows the last frames: blue is the game, orange is Awqua, the
 * white line is the frame's 16.7 ms. With -frames it ends by itself and prints the frame times.
 */
#include <SDL.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "awqua.h"

#define WIDTH 640
#define HEIGHT 360
#define BARS 200
#define FRAME_MS 16.667
#define BUDGET_US 4000
#define SAID 400

/* Glyphs of 3 x 5 pixels: five octal digits from top to bottom, each a row. */
static const char LETTERS[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'\"!?-:;%/()";
static const unsigned GLYPHS[] = {
    025755, 065656, 034443, 065556, 074647, 074644, 034553, 055755, 072227, 011152, 055655, 044447, 057755,
    065555, 025552, 065644, 025563, 065655, 034216, 072222, 055557, 055552, 055775, 055255, 055222, 071247,
    075557, 026227, 061247, 061216, 055711, 074616, 034757, 071222, 075757, 075716, 000002, 000024, 022000,
    055000, 022202, 061202, 000700, 002020, 002024, 051245, 011244, 012221, 042224,
};

struct frame {
    float game_ms, awqua_ms;
};

struct game {
    SDL_Window *window;
    SDL_Renderer *renderer;
    awqua_engine *engine;
    awqua_model *model;
    awqua_session *speakers[2];
    int speaker, loaded, answering, answers;
    float progress;
    char said[SAID];
    struct frame frames[BARS];
    int frame;
};

static const char *const NAMES[2] = { "MILLER", "EMMA" };
static const char *const PROMPTS[2] = { "The old miller looked at the river and said,", "Emma smiled and said," };

static void check(const char *what, awqua_status status) {
    if ((int)status < 0) {
        char text[512];
        awqua_last_error(text, sizeof text, NULL);
        fprintf(stderr, "%s: %s: %s\n", what, awqua_status_name(status), text);
        exit(1);
    }
}

static void check_sdl(const char *what, int good) {
    if (!good) {
        fprintf(stderr, "%s: %s\n", what, SDL_GetError());
        exit(1);
    }
}

static void draw_text(SDL_Renderer *renderer, int x, int y, int scale, int width, const char *text) {
    int left = x;
    for (; *text; text++) {
        int letter = *text >= 'a' && *text <= 'z' ? *text - 'a' + 'A' : *text;
        const char *found = strchr(LETTERS, letter);
        int row, column;
        if (found) {
            for (row = 0; row < 5; row++) {
                for (column = 0; column < 3; column++) {
                    if (GLYPHS[found - LETTERS] >> (3 * (4 - row) + 2 - column) & 1) {
                        SDL_Rect pixel = { x + column * scale, y + row * scale, scale, scale };
                        SDL_RenderFillRect(renderer, &pixel);
                    }
                }
            }
        }
        x += 4 * scale;
        if (letter == '\n' || x > left + width || (letter == ' ' && x > left + width - 24 * scale)) {
            x = left;
            y += 8 * scale;
        }
    }
}

static void say(struct game *game, const char *text, size_t length) {
    size_t at = strlen(game->said);
    if (length > SAID - 1 - at) {
        length = SAID - 1 - at;
    }
    memcpy(game->said + at, text, length);
    game->said[at + length] = 0;
}

/* One frame's share of thinking. */
static void think(struct game *game) {
    awqua_budget budget = AWQUA_BUDGET_INIT;
    budget.cpu_us = BUDGET_US;
    if (!game->loaded) {
        awqua_load_progress progress = AWQUA_LOAD_PROGRESS_INIT;
        awqua_status status = awqua_model_tick(game->model, &budget, &progress);
        check("loading", status);
        game->progress = progress.total ? (float)progress.done / (float)progress.total : 0.0f;
        if (status == AWQUA_OK) {
            check("making a session", awqua_session_create(game->model, NULL, &game->speakers[0]));
            check("making a session", awqua_session_create(game->model, NULL, &game->speakers[1]));
            game->loaded = 1;
        }
    } else if (!game->answering) {
        awqua_request request = AWQUA_REQUEST_INIT;
        awqua_str prompt = AWQUA_CSTR(PROMPTS[game->speaker]);
        request.max_tokens = 60;
        request.seed = (uint64_t)game->answers;
        check("asking", awqua_session_begin_text(game->speakers[game->speaker], prompt, &request));
        game->said[0] = 0;
        say(game, PROMPTS[game->speaker], strlen(PROMPTS[game->speaker]));
        game->answering = 1;
    } else {
        awqua_session *session = game->speakers[game->speaker];
        char text[128];
        awqua_event event = AWQUA_EVENT_INIT;
        awqua_status status;
        check("answering", awqua_session_tick(session, &budget, NULL));
        event.text = text;
        event.text_capacity = sizeof text;
        while ((status = awqua_session_poll(session, &event)) == AWQUA_OK) {
            if (event.kind == AWQUA_EVENT_TEXT) {
                say(game, text, (size_t)event.text_len);
            } else if (event.kind == AWQUA_EVENT_DONE) {
                game->answering = 0;
                game->answers++;
                game->speaker = !game->speaker;
            }
        }
        check("polling", status);
    }
}

static void draw(struct game *game) {
    SDL_Renderer *r = game->renderer;
    int i;
    SDL_SetRenderDrawColor(r, 24, 26, 38, 255);
    SDL_RenderClear(r);
    /* A river that moves, so that a hitch would be seen. */
    for (i = 0; i < WIDTH; i += 8) {
        int wave = (int)(10.0 * SDL_sin((i + game->frame * 3) * 0.03));
        SDL_Rect water = { i, 190 + wave, 7, 60 };
        SDL_SetRenderDrawColor(r, 40, (Uint8)(90 + 2 * wave), 150, 255);
        SDL_RenderFillRect(r, &water);
    }
    for (i = 0; i < 2; i++) {
        SDL_Rect body = { 150 + i * 300, 140, 26, 50 };
        int lit = game->loaded && game->speaker == i;
        SDL_SetRenderDrawColor(r, lit ? 250 : 120, lit ? 210 : 120, lit ? 120 : 130, 255);
        SDL_RenderFillRect(r, &body);
        draw_text(r, body.x - 4, 125, 2, 200, NAMES[i]);
    }
    SDL_SetRenderDrawColor(r, 240, 240, 230, 255);
    if (game->loaded) {
        draw_text(r, 20, 16, 2, WIDTH - 60, game->said);
    } else {
        SDL_Rect bar = { 20, 16, (int)(game->progress * (WIDTH - 40)), 8 };
        SDL_RenderFillRect(r, &bar);
    }
    /* The graph: 4 pixels a millisecond. */
    for (i = 0; i < BARS; i++) {
        const struct frame *f = &game->frames[(game->frame + i) % BARS];
        int game_px = (int)(f->game_ms * 4.0f), awqua_px = (int)(f->awqua_ms * 4.0f);
        SDL_Rect game_bar = { 20 + i * 3, HEIGHT - 10 - game_px, 2, game_px };
        SDL_Rect awqua_bar = { 20 + i * 3, HEIGHT - 10 - game_px - awqua_px, 2, awqua_px };
        SDL_SetRenderDrawColor(r, 90, 150, 250, 255);
        SDL_RenderFillRect(r, &game_bar);
        SDL_SetRenderDrawColor(r, 250, 150, 60, 255);
        SDL_RenderFillRect(r, &awqua_bar);
    }
    SDL_SetRenderDrawColor(r, 255, 255, 255, 255);
    SDL_RenderDrawLine(r, 20, HEIGHT - 10 - (int)(FRAME_MS * 4), 20 + BARS * 3, HEIGHT - 10 - (int)(FRAME_MS * 4));
    draw_text(r, 22, HEIGHT - 24 - (int)(FRAME_MS * 4), 2, 300, "16.7 MS");
}

static void screenshot(SDL_Renderer *renderer, const char *path) {
    SDL_Surface *surface = SDL_CreateRGBSurfaceWithFormat(0, WIDTH, HEIGHT, 32, SDL_PIXELFORMAT_ARGB8888);
    check_sdl("screenshot", surface != NULL);
    check_sdl("screenshot", SDL_RenderReadPixels(renderer, NULL, surface->format->format, surface->pixels,
                                                 surface->pitch) == 0);
    check_sdl("screenshot", SDL_SaveBMP(surface, path) == 0);
    SDL_FreeSurface(surface);
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    static struct game game;
    awqua_engine_desc engine_desc = AWQUA_ENGINE_DESC_INIT;
    awqua_model_desc model_desc = AWQUA_MODEL_DESC_INIT;
    const char *shot = NULL;
    float *awqua_ms;
    int frames = 0, running = 1, i;
    double per_ms = (double)SDL_GetPerformanceFrequency() / 1000.0;
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL_FOLDER [-frames N] [-screenshot FILE.bmp]\n", argv[0]);
        return 2;
    }
    for (i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "-frames") == 0) {
            frames = atoi(argv[i + 1]);
        } else if (strcmp(argv[i], "-screenshot") == 0) {
            shot = argv[i + 1];
        }
    }
    check_sdl("SDL", SDL_Init(SDL_INIT_VIDEO) == 0);
    game.window = SDL_CreateWindow("Awqua", SDL_WINDOWPOS_CENTERED, SDL_WINDOWPOS_CENTERED, WIDTH, HEIGHT, 0);
    check_sdl("window", game.window != NULL);
    game.renderer = SDL_CreateRenderer(game.window, -1, 0);
    check_sdl("renderer", game.renderer != NULL);

    engine_desc.backend = AWQUA_BACKEND_CPU;
    check("making an engine", awqua_engine_create(&engine_desc, &game.engine));
    model_desc.path = AWQUA_CSTR(argv[1]);
    check("opening the model", awqua_model_create(game.engine, &model_desc, &game.model));
    awqua_ms = calloc((size_t)(frames ? frames : 1), sizeof *awqua_ms);
    check_sdl("memory", awqua_ms != NULL);

    for (game.frame = 0; running && (frames == 0 || game.frame < frames); game.frame++) {
        Uint64 start = SDL_GetPerformanceCounter(), thought, end;
        struct frame *f = &game.frames[game.frame % BARS];
        SDL_Event event;
        while (SDL_PollEvent(&event)) {
            running = event.type != SDL_QUIT;
        }
        think(&game);
        thought = SDL_GetPerformanceCounter();
        draw(&game);
        if (shot && game.frame == frames - 1) {
            screenshot(game.renderer, shot);
        }
        SDL_RenderPresent(game.renderer);
        end = SDL_GetPerformanceCounter();
        f->awqua_ms = (float)((double)(thought - start) / per_ms);
        f->game_ms = (float)((double)(end - thought) / per_ms);
        if (frames) {
            awqua_ms[game.frame] = f->awqua_ms;
        }
        if ((double)(end - start) / per_ms < FRAME_MS) {
            SDL_Delay((Uint32)(FRAME_MS - (double)(end - start) / per_ms));
        }
    }
    if (frames > 0) {
        qsort(awqua_ms, (size_t)frames, sizeof *awqua_ms, by_value);
        printf("%d frames, %d answers, Awqua ms a frame: median %.2f, 99%% %.2f, most %.2f\n", frames, game.answers,
               (double)awqua_ms[frames / 2], (double)awqua_ms[frames * 99 / 100], (double)awqua_ms[frames - 1]);
    }
    free(awqua_ms);
    for (i = 0; i < 2; i++) {
        awqua_session_free(game.speakers[i]);
    }
    awqua_model_free(game.model);
    awqua_engine_free(game.engine);
    SDL_DestroyRenderer(game.renderer);
    SDL_DestroyWindow(game.window);
    SDL_Quit();
    return 0;
}
