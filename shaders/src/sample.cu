// Token choice: biases, penalties of recent tokens and the mask of allowed ones, then the largest score, or the top_k largest, their softmax cut by top_p and
// min_p, and a draw. The chosen token goes where the next step looks for it, and to the host.
//
// The request and the number of choices are those of kernels that ended before the previous one began, except for the
// first round, so the others read them ahead. Kernels with `each` choose for several sessions, y of the grid.
//
// Mapping: blocks sort 2048 scores each in shared memory and keep the largest; a second round where many are kept; one
// block sorts what is left and draws. Scores with their ids are 64-bit numbers whose order is that of the sampler.
// Traffic: scores once, and little else.
#include "prelude/device.cuh"

// A choice, 16 words in memory of the host.
struct SampleRequest {
    u32 top_k;     // 0: the largest score
    u32 n_recent;  // pairs of id and count in `recent`
    float temperature, top_p, min_p;
    float uniform;
    float repetition, presence, frequency;
    u32 position;  // of the step that follows
    u32 n_biases;  // pairs of id and bits of the bias in `biases`
    u32 has_mask;  // whether only tokens of `mask` may be chosen, and its words
    u32 mask_words;
    u32 pad[3];
};

struct SampleArgs {
    const float* scores;            // (vocab)
    const SampleRequest* requests;  // (SLOTS), taken in turn
    const U2* recent;               // (n_recent)
    const U2* biases;               // (n_biases), of distinct ids
    const u32* mask;                // (mask_words): bit id % 32 of word id / 32
    u64* candidates;                // of the first round, then of the second one
    u32* turn;                      // choices made so far
    u32* tokens;                    // [0]: the chosen one
    u32* position;                  // of the step that follows
    u64* results;                   // (SLOTS) in memory of the host: choices made in the high half, token in the low one
    u32 vocab;
    u32 second;                     // first candidate of the second round
};

// Choices of the members of a pass.
struct SampleEachArgs {
    const SampleArgs* members;  // (members); scores are null for one that makes no choice
};

// Rows for the sessions that they belong to.
struct HandOutArgs {
    const float* from;  // (rows, stride)
    float* const* to;   // (rows)
    u32 width;
    u32 stride;
};

constexpr u32 SLOTS = 16;
constexpr u32 SLICE = 2048;
constexpr u32 MOST_LEFT = 4096;

DEVICE float infinity() { return as_f32(0x7f800000); }

// The request of a choice, for the block: one warp reads it at once, as reads from the host are few and slow.
DEVICE SampleRequest request_of(const SampleArgs& args, u32 turn, u32* scratch) {
    constexpr u32 WORDS = sizeof(SampleRequest) / 4;
    const u32* const words = reinterpret_cast<const u32*>(args.requests + turn % SLOTS);
    if (threadIdx.x < WORDS) scratch[threadIdx.x] = load_host(words + threadIdx.x);
    block_sync();
    SampleRequest request;
    u32* const to = reinterpret_cast<u32*>(&request);
    UNROLL for (u32 i = 0; i < WORDS; i++) to[i] = scratch[i];
    block_sync();
    return request;
}

// Number whose order is that of the scores, the lowest id first among equals; 0 for what can not be chosen.
DEVICE u64 key_of(float score, u32 id) {
    const u32 bits = as_u32(score + 0.f);
    if (!(score > -infinity())) return 0;
    const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return u64(ordered) << 32 | (0xffffffffu - id);
}
DEVICE float score_of(u64 key) {
    const u32 ordered = u32(key >> 32);
    return as_f32(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}
DEVICE u32 id_of(u64 key) { return 0xffffffffu - u32(key); }

// Sorts `n` keys, a power of two, the largest first.
DEVICE void sort_keys(u64* keys, u32 n) {
    UNROLL_1 for (u32 size = 2; size <= n; size *= 2) {
        UNROLL_1 for (u32 stride = size / 2; stride > 0; stride /= 2) {
            block_sync();
            for (u32 i = threadIdx.x; i < n / 2; i += blockDim.x) {
                const u32 a = i / stride * stride * 2 + i % stride, b = a + stride;
                const bool falling = (a & size) == 0;
                const u64 x = keys[a], y = keys[b];
                if ((x < y) == falling) {
                    keys[a] = y;
                    keys[b] = x;
                }
            }
        }
    }
    block_sync();
}

// The largest of `n` keys in keys[0].
DEVICE void largest_key(u64* keys, u32 n) {
    UNROLL_1 for (u32 stride = n / 2; stride > 0; stride /= 2) {
        block_sync();
        for (u32 i = threadIdx.x; i < stride; i += blockDim.x) {
            if (keys[i] < keys[i + stride]) keys[i] = keys[i + stride];
        }
    }
    block_sync();
}

// Whether the mask of a choice, if it has one, leaves the token.
DEVICE bool is_allowed(const SampleArgs& args, const SampleRequest& request, u32 id) {
    if (request.has_mask == 0) return true;
    return id / 32 < request.mask_words && (load_fresh(args.mask + id / 32) >> id % 32 & 1) != 0;
}

DEVICE u32 kept(const SampleRequest& request) { return request.top_k == 0 ? 1 : request.top_k; }
DEVICE u32 slices(u32 n) { return (n + SLICE - 1) / SLICE; }

DEVICE void sample_slices_of(const SampleArgs& args) {
    wait_for_previous();
    u64* const keys = reinterpret_cast<u64*>(shared_memory());
    const SampleRequest request = request_of(args, load_fresh(args.turn), reinterpret_cast<u32*>(keys));
    float* const scores = reinterpret_cast<float*>(keys + SLICE);
    const u32 first = blockIdx.x * SLICE;
    for (u32 i = threadIdx.x; i < SLICE; i += blockDim.x) {
        scores[i] = first + i < args.vocab ? load_fresh(args.scores + first + i) : -infinity();
    }
    block_sync();
    // Ids are distinct, here and below.
    for (u32 i = threadIdx.x; i < request.n_biases; i += blockDim.x) {
        const U2 bias = load_fresh(args.biases + i);
        if (bias.x >= first && bias.x < first + SLICE) scores[bias.x - first] += as_f32(bias.y);
    }
    block_sync();
    for (u32 i = threadIdx.x; i < request.n_recent; i += blockDim.x) {
        const U2 recent = load_fresh(args.recent + i);
        if (recent.x >= first && recent.x < first + SLICE) {
            float& score = scores[recent.x - first];
            score = score > 0 ? score / request.repetition : score * request.repetition;
            score -= request.presence + request.frequency * recent.y;
        }
    }
    block_sync();
    for (u32 i = threadIdx.x; i < SLICE; i += blockDim.x) {
        keys[i] = is_allowed(args, request, first + i) ? key_of(scores[i], first + i) : 0;
    }
    if (request.top_k == 0) {
        largest_key(keys, SLICE);
    } else {
        sort_keys(keys, SLICE);
    }
    const u32 keep = kept(request);
    for (u32 i = threadIdx.x; i < keep; i += blockDim.x) args.candidates[blockIdx.x * keep + i] = keys[i];
}

DEVICE void sample_narrow_of(const SampleArgs& args) {
    u64* const keys = reinterpret_cast<u64*>(shared_memory());
    const SampleRequest request = request_of(args, load_fresh(args.turn), reinterpret_cast<u32*>(keys));
    wait_for_previous();
    const u32 keep = kept(request), n = slices(args.vocab) * keep, first = blockIdx.x * SLICE;
    if (n <= MOST_LEFT || first >= n) return;
    for (u32 i = threadIdx.x; i < SLICE; i += blockDim.x) {
        keys[i] = first + i < n ? load_fresh(args.candidates + first + i) : 0;
    }
    sort_keys(keys, SLICE);
    for (u32 i = threadIdx.x; i < keep; i += blockDim.x) args.candidates[args.second + blockIdx.x * keep + i] = keys[i];
}

DEVICE void sample_draw_of(const SampleArgs& args) {
    u64* const keys = reinterpret_cast<u64*>(shared_memory());
    const u32 turn = load_fresh(args.turn);
    const SampleRequest request = request_of(args, turn, reinterpret_cast<u32*>(keys));
    wait_for_previous();
    const u32 keep = kept(request);
    u32 n = slices(args.vocab) * keep, from = 0;
    if (n > MOST_LEFT) {
        n = slices(n) * keep;
        from = args.second;
    }
    u32 size = 2;
    while (size < n) size *= 2;
    float* const weights = reinterpret_cast<float*>(keys + MOST_LEFT);
    for (u32 i = threadIdx.x; i < size; i += blockDim.x) keys[i] = i < n ? load_fresh(args.candidates + from + i) : 0;
    if (request.top_k == 0) {
        largest_key(keys, size);
    } else {
        sort_keys(keys, size);
        const float largest = score_of(keys[0]);
        for (u32 i = threadIdx.x; i < keep; i += blockDim.x) {
            const float difference = i < n && keys[i] ? (score_of(keys[i]) - largest) / request.temperature : -1e30f;
            weights[i] = keys[i] && i < n ? expf(difference) : 0.f;
        }
        block_sync();
    }
    if (threadIdx.x > 0) return;
    u32 at = 0;
    // A softmax over infinities is not defined; the order still is.
    if (request.top_k > 0 && score_of(keys[0]) < infinity()) {
        float total = 0, mass = 0, sum = 0;
        for (u32 i = 0; i < keep; i++) total += weights[i];
        u32 count = 0;
        while (count < keep && count < n && keys[count]) {
            if (count > 0 && (mass >= request.top_p * total || weights[count] < request.min_p)) break;
            mass += weights[count];
            count++;
        }
        const float target = request.uniform * mass;
        for (at = 0; at + 1 < count; at++) {
            sum += weights[at];
            if (sum > target) break;
        }
    }
    // Nothing to choose from: the first token.
    const u32 id = keys[at] ? id_of(keys[at]) : 0;
    args.tokens[0] = id;
    *args.position = request.position;
    *args.turn = turn + 1;
    store_host(args.results + turn % SLOTS, u64(turn + 1) << 32 | id);
}

KERNEL(sample_slices, SampleArgs, 512, 1) { sample_slices_of(args); }
KERNEL(sample_narrow, SampleArgs, 512, 1) { sample_narrow_of(args); }
KERNEL(sample_draw, SampleArgs, 1024, 1) { sample_draw_of(args); }

KERNEL(sample_slices_each, SampleEachArgs, 512, 1) {
    const SampleArgs mine = args.members[blockIdx.y];
    mine.scores ? sample_slices_of(mine) : wait_for_previous();
}
KERNEL(sample_narrow_each, SampleEachArgs, 512, 1) {
    const SampleArgs mine = args.members[blockIdx.y];
    mine.scores ? sample_narrow_of(mine) : wait_for_previous();
}
KERNEL(sample_draw_each, SampleEachArgs, 1024, 1) {
    const SampleArgs mine = args.members[blockIdx.y];
    mine.scores ? sample_draw_of(mine) : wait_for_previous();
}

KERNEL(hand_out, HandOutArgs, 256, 1) {
    wait_for_previous();
    const float* const from = args.from + u64(blockIdx.y) * args.stride;
    float* const to = args.to[blockIdx.y];
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.width) to[i] = load_fresh(from + i);
}
