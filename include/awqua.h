/*
 * Awqua: packed 4-bit language models inside your program.
 *
 * GENERATED from ffi/src by AWQUA_BLESS=1 cargo test -p awqua-tests --test header.
 *
 * Objects. An engine says where models run, a model is weights on a device, a session is one conversation. Each
 * pointer that a create function hands out is owned by the caller until it goes to its free function; frees may come
 * in any order, children keep what they need of their parents, and freeing NULL does nothing.
 *
 * Threads. No call makes a thread unless the engine was asked for some (GPU drivers may have their own; CUDA's has). A
 * function that takes `const T *` may run on any number of threads at once; one that takes `T *` needs the object for
 * itself. A call that breaks this rule fails with AWQUA_ERR_BUSY and does nothing. awqua_model_cancel and
 * awqua_session_cancel may be called at any time. Freeing an object that another thread is using is the one mistake that
 * can't be caught.
 *
 * Calls. Every function returns an awqua_status; the text behind a failure is kept per object (awqua_..._last_error)
 * and per thread (awqua_last_error). Outputs are written on success only, except needed sizes. Failures leave objects
 * as they were, unless their documentation says otherwise. Arguments are checked: NULL, unknown flags and absurd sizes
 * are AWQUA_ERR_INVALID_ARGUMENT. What is inside the library can fail, but it does not end the process: a panic
 * becomes AWQUA_ERR_PANIC and the object it happened in accepts only its free function.
 *
 * Structures start with their size, so that programs and libraries of different age understand each other: start from
 * AWQUA_..._INIT; or, where there are no macros, set struct_size and call awqua_..._init. Later versions append members,
 * and take a member that a program does not have for its default. Texts are UTF-8, a pointer with a length.
 *
 * The library writes nothing to standard output or error, opens no network connection, and writes no file; GPU drivers
 * are not under its control.
 */


#ifndef AWQUA_H
#define AWQUA_H


#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(AWQUA_STATIC)
#define AWQUA_API __declspec(dllimport)
#else
#define AWQUA_API
#endif

/** ABI of this header, to compare with awqua_abi_version() and to hand to awqua_get_api(). */
#define AWQUA_ABI_VERSION ((uint32_t)(AWQUA_ABI_MAJOR << 16 | AWQUA_ABI_MINOR))

/** Initialiser of an awqua_str from a string literal. */
#define AWQUA_STR(literal) { literal, sizeof(literal) - 1 }
/** An awqua_str from a NUL-terminated string. */
#ifdef __cplusplus
#define AWQUA_CSTR(string) (awqua_str{ (string), AWQUA_STRLEN })
#else
#define AWQUA_CSTR(string) ((awqua_str){ (string), AWQUA_STRLEN })
#endif

/* Initialisers: the same values as the functions awqua_..._init write. */
#define AWQUA_ALLOCATOR_INIT { (uint32_t)sizeof(awqua_allocator), 0, NULL, NULL, NULL }
#define AWQUA_MEMORY_STATS_INIT { (uint32_t)sizeof(awqua_memory_stats), 0, 0, 0, 0 }
#define AWQUA_DEVICE_INFO_INIT { (uint32_t)sizeof(awqua_device_info), 0, 0, 0, 0, 0, { 0 }, { 0 }, { 0 }, { 0 }, { 0 } }
#define AWQUA_ENGINE_DESC_INIT { (uint32_t)sizeof(awqua_engine_desc), 0, 0, 0, { NULL, 0 }, 0, 0, NULL, 0, { 0 }, \
                                 { 0 }, NULL, NULL, NULL }
#define AWQUA_VULKAN_INIT { (uint32_t)sizeof(awqua_vulkan), 0, 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL }
#define AWQUA_ENGINE_INFO_INIT { (uint32_t)sizeof(awqua_engine_info), 0, 0, 0 }
#define AWQUA_BUDGET_INIT { (uint32_t)sizeof(awqua_budget), 0, 2000, 4000, AWQUA_NO_LIMIT, 1, 0 }
#define AWQUA_IO_INIT { (uint32_t)sizeof(awqua_io), 0, NULL, NULL, NULL, NULL, NULL, NULL }
#define AWQUA_MODEL_DESC_INIT { (uint32_t)sizeof(awqua_model_desc), 0, { NULL, 0 }, NULL, 0, NULL }
#define AWQUA_LOAD_PROGRESS_INIT { (uint32_t)sizeof(awqua_load_progress), 0, 0, 0, 0, 0 }
#define AWQUA_ESTIMATE_INIT { (uint32_t)sizeof(awqua_estimate), 0, 0, 0, 0, 0 }
#define AWQUA_MODEL_INFO_INIT { (uint32_t)sizeof(awqua_model_info), 0, 0, 0, 0, 0, 0, { 0 }, { 0 }, 0 }
#define AWQUA_SESSION_DESC_INIT { (uint32_t)sizeof(awqua_session_desc), 0, 0, 0, 0, 0 }
#define AWQUA_REQUEST_INIT { (uint32_t)sizeof(awqua_request), 0, 512, 40, 0.95f, 0.0f, 0.7f, 1.0f, 0.0f, 0.0f, 256, \
                             0, 0, NULL, NULL, 0, 0, NULL, NULL, 0, 0, 0, 0, { NULL, 0 } }
#define AWQUA_TICK_RESULT_INIT { (uint32_t)sizeof(awqua_tick_result), 0, 0, 0, 0, 0, 0, 0, 0, 0 }
#define AWQUA_EVENT_INIT { (uint32_t)sizeof(awqua_event), 0, 0, 0, 0, 0, NULL, 0, 0, 0, 0, 0 }
#define AWQUA_SESSION_INFO_INIT { (uint32_t)sizeof(awqua_session_info), 0, 0, 0, 0, 0, 0 }


/**
 * Raised when a function or structure changes incompatibly; part of the SONAME.
 */
#define AWQUA_ABI_MAJOR 1

/**
 * Raised when functions or fields are appended.
 */
#define AWQUA_ABI_MINOR 2

/**
 * Length of an `awqua_str` whose end is its NUL.
 */
#define AWQUA_STRLEN UINT64_MAX

/**
 * The device was made with shaderFloat16, storageBuffer16BitAccess and uniformAndStorageBuffer16BitAccess: arithmetic
 * in half precision.
 */
#define AWQUA_VULKAN_F16 1

/**
 * The device was made with subgroupSizeControl: subgroup operations.
 */
#define AWQUA_VULKAN_SUBGROUPS 2

/**
 * The device was made with timelineSemaphore: cheaper submissions.
 */
#define AWQUA_VULKAN_TIMELINE_SEMAPHORES 4

/**
 * The device was made with VK_KHR_cooperative_matrix and cooperativeMatrix, vulkanMemoryModel and
 * vulkanMemoryModelDeviceScope: matrix units for prompts.
 */
#define AWQUA_VULKAN_COOPERATIVE_MATRICES 8

/**
 * On a GPU, never use half-precision arithmetic or subgroup operations, whatever the adapter offers; on the CPU, never
 * use wide instructions, so that every processor of one family computes the same bits.
 */
#define AWQUA_ENGINE_PORTABLE_KERNELS 1

/**
 * Recover from the loss of a device in the next tick, without awqua_engine_recover.
 */
#define AWQUA_ENGINE_AUTO_RECOVER 2

/**
 * On CUDA, queue work with the device's highest priority. Without it the lowest is taken, so that the host's own CUDA
 * work goes first; the work of graphics interfaces is not ordered by it. Ignored elsewhere.
 */
#define AWQUA_ENGINE_HIGH_PRIORITY 4

/**
 * The device was lost and not recovered yet.
 */
#define AWQUA_ENGINE_LOST 1

/**
 * The adapter can be used.
 */
#define AWQUA_DEVICE_USABLE 1

/**
 * Its shaders compute in half precision.
 */
#define AWQUA_DEVICE_F16 2

/**
 * Its shaders have subgroup operations.
 */
#define AWQUA_DEVICE_SUBGROUPS 4

/**
 * As a time or a number of bytes: as much as there is.
 */
#define AWQUA_NO_LIMIT UINT64_MAX

/**
 * The bytes of `files` are copied when the model is made, instead of read where they are.
 */
#define AWQUA_MODEL_COPY_FILES 1

/**
 * An output head that is stored in half or single precision is rounded to 8 bits while it is loaded: less memory to
 * read for every token, and less of it, for a change of the logits below one in a thousand.
 */
#define AWQUA_MODEL_HEAD_8 2

/**
 * The same to 4 bits, which changes what some models say.
 */
#define AWQUA_MODEL_HEAD_4 4

/**
 * The model has a tokenizer.
 */
#define AWQUA_MODEL_TOKENIZER 1

/**
 * The model has a chat template.
 */
#define AWQUA_MODEL_CHAT_TEMPLATE 2

/**
 * Add what the tokenizer puts around a text, usually a begin-of-text id: right for plain text, wrong for a rendered
 * conversation, which already contains it.
 */
#define AWQUA_TOKENIZE_SPECIAL 1

/**
 * Leave out special tokens, such as the one that ends a turn.
 */
#define AWQUA_DETOKENIZE_SKIP_SPECIAL 1

/**
 * End with the opening of the assistant's turn.
 */
#define AWQUA_CHAT_OPEN_ANSWER 1

/**
 * The same library, adapter, session description and request give the same tokens, whatever the budgets of the ticks
 * are, whatever the session did before, and also across the loss of a device. Prompts are computed in chunks that end
 * at multiples of `chunk`, and only whole ones are used again.
 */
#define AWQUA_SESSION_DETERMINISTIC 1

/**
 * On the CPU, multiply in single precision, with weights as their formats define them. Without it, where 4-bit weights
 * have groups of 32 or its multiples, activations are rounded to 16 bits, and a half-precision output layer of 8 MiB or
 * more beside such weights to 8, once for all sessions; both are faster. GPUs ignore it.
 */
#define AWQUA_SESSION_EXACT 2

/**
 * Have forks keep the memory of their common start once even if the session is deterministic and the GPU, through wgpu,
 * has matrix units or subgroups: attention is then computed by kernels that read the start apart, which are slower. See
 * awqua_session_fork. The CPU and CUDA, where they share in any case, ignore it.
 */
#define AWQUA_SESSION_SHARE_FORKS 4

/**
 * Go on after the model's end-of-turn ids.
 */
#define AWQUA_REQUEST_IGNORE_EOS 1

/**
 * Take sampling values from the model's authors where they recommend some, instead of from the request.
 */
#define AWQUA_REQUEST_MODEL_SAMPLING 2

/**
 * When the context is full, forget the older half of what follows the first `shift_keep` tokens, compute the rest again
 * at its new positions and go on, instead of stopping.
 */
#define AWQUA_REQUEST_SHIFT 4

/**
 * There is nothing to do until the GPU finishes something, so ticking again at once is in vain.
 */
#define AWQUA_TICK_WAITING 1

/**
 * What every call returns: 0 is success, negative is a failure, positive is success with something to know.
 *
 * Values are never renumbered and never reused; later versions only add some, so treat an unknown negative value as a
 * failure and an unknown positive one as success.
 */
enum awqua_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Done.
   */
  AWQUA_OK = 0,
  /**
   * Not finished: tick again.
   */
  AWQUA_PENDING = 1,
  /**
   * There is no event.
   */
  AWQUA_EMPTY = 2,
  /**
   * An argument is NULL, out of range or malformed.
   */
  AWQUA_ERR_INVALID_ARGUMENT = -1,
  /**
   * `struct_size` is too small, absurd, or the structure is newer than the library and uses what it does not know.
   */
  AWQUA_ERR_STRUCT_SIZE = -2,
  /**
   * The caller's buffer is too small; the needed size was written, nothing is lost.
   */
  AWQUA_ERR_BUFFER_TOO_SMALL = -3,
  /**
   * The object is not in a state that allows the call.
   */
  AWQUA_ERR_STATE = -4,
  /**
   * Another call on the object is running, in another thread or further up this one's stack.
   */
  AWQUA_ERR_BUSY = -5,
  /**
   * The library failed inside (a defect of it). The object accepts only its free and last_error functions.
   */
  AWQUA_ERR_PANIC = -6,
  /**
   * An earlier call on the object returned AWQUA_ERR_PANIC.
   */
  AWQUA_ERR_POISONED = -7,
  /**
   * The caller cancelled.
   */
  AWQUA_ERR_CANCELLED = -8,
  /**
   * A file could not be opened, mapped or read, or the host's callback failed.
   */
  AWQUA_ERR_IO = -9,
  /**
   * A file's bytes break the rules of its format.
   */
  AWQUA_ERR_INVALID_FILE = -10,
  /**
   * A configuration value is missing, out of range or contradicts another one.
   */
  AWQUA_ERR_INVALID_CONFIG = -11,
  /**
   * A tensor is missing, or has the wrong dtype, shape or values.
   */
  AWQUA_ERR_INVALID_TENSOR = -12,
  /**
   * Well formed, but this build does not do it.
   */
  AWQUA_ERR_UNSUPPORTED = -13,
  /**
   * The tokenizer could not be loaded, or failed on the text.
   */
  AWQUA_ERR_TOKENIZER = -14,
  /**
   * The chat template is missing, does not compile or refused the conversation.
   */
  AWQUA_ERR_TEMPLATE = -15,
  /**
   * The tokens do not fit the session's context.
   */
  AWQUA_ERR_CONTEXT_FULL = -16,
  /**
   * Memory is not enough, or a budget forbids it; the message names the needed bytes.
   */
  AWQUA_ERR_OUT_OF_MEMORY = -17,
  /**
   * There is no usable device or driver.
   */
  AWQUA_ERR_NO_DEVICE = -18,
  /**
   * The device failed an operation.
   */
  AWQUA_ERR_DEVICE = -19,
  /**
   * The device was lost (driver reset, removal).
   */
  AWQUA_ERR_DEVICE_LOST = -20,
  /**
   * The library's ABI is not the one asked for.
   */
  AWQUA_ERR_ABI = -21,
  /**
   * A failure that this ABI has no code for.
   */
  AWQUA_ERR_OTHER = -22,
  /**
   * The weights were evicted; awqua_model_restore brings them back.
   */
  AWQUA_ERR_EVICTED = -23,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_status awqua_status;
#else
typedef int32_t awqua_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Where a model runs.
 */
enum awqua_backend
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * A GPU if there is a usable one, else the CPU. A software GPU is not chosen on its own.
   */
  AWQUA_BACKEND_AUTO = 0,
  /**
   * The CPU.
   */
  AWQUA_BACKEND_CPU = 1,
  /**
   * A GPU through Vulkan, Metal or Direct3D 12, software ones included; no fall-back.
   */
  AWQUA_BACKEND_GPU = 2,
  /**
   * An NVIDIA GPU through CUDA, with AWQUA_ERR_NO_DEVICE where there is none or the library was built without it.
   * AWQUA_BACKEND_AUTO prefers it where it is there and can compute the model.
   */
  AWQUA_BACKEND_CUDA = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_backend awqua_backend;
#else
typedef uint32_t awqua_backend;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What kind of device an adapter is.
 */
enum awqua_device_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Unknown.
   */
  AWQUA_DEVICE_OTHER = 0,
  /**
   * A graphics card.
   */
  AWQUA_DEVICE_DISCRETE = 1,
  /**
   * Shares the memory of the processor.
   */
  AWQUA_DEVICE_INTEGRATED = 2,
  /**
   * A share of a card in a virtual machine.
   */
  AWQUA_DEVICE_VIRTUAL = 3,
  /**
   * Software on the processor.
   */
  AWQUA_DEVICE_CPU = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_device_kind awqua_device_kind;
#else
typedef uint32_t awqua_device_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * How much is logged; each level includes those before it.
 */
enum awqua_log_level
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Nothing.
   */
  AWQUA_LOG_OFF = 0,
  /**
   * Failures inside the library or a driver.
   */
  AWQUA_LOG_ERROR = 1,
  /**
   * Things that work, but not as they should.
   */
  AWQUA_LOG_WARN = 2,
  /**
   * What was opened, loaded and lost.
   */
  AWQUA_LOG_INFO = 3,
  /**
   * Everything the device layer says.
   */
  AWQUA_LOG_DEBUG = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_log_level awqua_log_level;
#else
typedef uint32_t awqua_log_level;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Element type of the KV cache.
 */
enum awqua_kv_type
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * What suits the device.
   */
  AWQUA_KV_DEFAULT = 0,
  /**
   * 2 bytes.
   */
  AWQUA_KV_F16 = 1,
  /**
   * 4 bytes; adds no rounding.
   */
  AWQUA_KV_F32 = 2,
  /**
   * A byte, and a half-precision scale for every 32 elements of a key or a value: about half the memory of
   * AWQUA_KV_F16. Models whose keys have a few elements far larger than the others, such as Qwen2, lose much accuracy.
   */
  AWQUA_KV_Q8 = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_kv_type awqua_kv_type;
#else
typedef uint32_t awqua_kv_type;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What a session is doing.
 */
enum awqua_phase
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Nothing; it waits for a prompt.
   */
  AWQUA_PHASE_IDLE = 0,
  /**
   * It computes the prompt.
   */
  AWQUA_PHASE_PREFILL = 1,
  /**
   * It makes tokens.
   */
  AWQUA_PHASE_DECODE = 2,
  /**
   * The weights are on their way back.
   */
  AWQUA_PHASE_LOADING = 3,
  /**
   * The device was lost; nothing happens until awqua_engine_recover.
   */
  AWQUA_PHASE_LOST = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_phase awqua_phase;
#else
typedef uint32_t awqua_phase;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What an event says. Later versions may add kinds; pass over those you do not know.
 */
enum awqua_event_kind
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * No event.
   */
  AWQUA_EVENT_NONE = 0,
  /**
   * More text of the answer, in `text`.
   */
  AWQUA_EVENT_TEXT = 1,
  /**
   * The answer is complete, for `reason`.
   */
  AWQUA_EVENT_DONE = 2,
  /**
   * The answer failed with `status`; awqua_session_last_error has the text. The session can be prompted again.
   */
  AWQUA_EVENT_ERROR = 3,
  /**
   * More of the prompt was computed: `done` of `total` tokens, those found in the cache included.
   */
  AWQUA_EVENT_PROGRESS = 4,
  /**
   * The device was lost. The answer is kept and goes on after awqua_engine_recover.
   */
  AWQUA_EVENT_DEVICE_LOST = 5,
  /**
   * Memory is short: something did not fit, or awqua_engine_trim was called. What could be given back was.
   */
  AWQUA_EVENT_MEMORY_PRESSURE = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_event_kind awqua_event_kind;
#else
typedef uint32_t awqua_event_kind;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Why an answer is complete.
 */
enum awqua_stop_reason
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * It is not.
   */
  AWQUA_STOP_NONE = 0,
  /**
   * The model ended its turn, or made one of the request's stop ids.
   */
  AWQUA_STOP_EOS = 1,
  /**
   * One of the request's stop texts appeared.
   */
  AWQUA_STOP_TEXT = 2,
  /**
   * The request's number of tokens was made.
   */
  AWQUA_STOP_MAX_TOKENS = 3,
  /**
   * The context is full.
   */
  AWQUA_STOP_CONTEXT_FULL = 4,
  /**
   * The caller cancelled.
   */
  AWQUA_STOP_CANCELLED = 5,
  /**
   * The grammar allows nothing more, or an embedding is complete.
   */
  AWQUA_STOP_COMPLETE = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_stop_reason awqua_stop_reason;
#else
typedef uint32_t awqua_stop_reason;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What loading is busy with.
 */
enum awqua_load_stage
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Configuration, headers, tokenizer.
   */
  AWQUA_LOAD_FILES = 0,
  /**
   * Driver, and trials of the kernels.
   */
  AWQUA_LOAD_DEVICE = 1,
  /**
   * Weights on their way to the device.
   */
  AWQUA_LOAD_WEIGHTS = 2,
  /**
   * Kernels being compiled.
   */
  AWQUA_LOAD_KERNELS = 3,
  /**
   * Nothing: the model is ready.
   */
  AWQUA_LOAD_READY = 4,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_load_stage awqua_load_stage;
#else
typedef uint32_t awqua_load_stage;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * How much memory to give back; each level includes those before it.
 */
enum awqua_trim
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Mapped pages of files: read again when needed.
   */
  AWQUA_TRIM_PAGES = 0,
  /**
   * Caches of idle sessions: computed again when needed.
   */
  AWQUA_TRIM_SESSIONS = 1,
  /**
   * Weights of models whose sessions are idle: awqua_model_restore brings them back.
   */
  AWQUA_TRIM_WEIGHTS = 2,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_trim awqua_trim;
#else
typedef uint32_t awqua_trim;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * What an answer has to look like. Only tokens that can still lead there are chosen, so an answer that comes to its end
 * has this form, and one that is cut off is the start of such an answer. End-of-turn ids count, even with
 * AWQUA_REQUEST_IGNORE_EOS. A library that was built without grammars, and a model whose tokenizer does not work token
 * by token, refuse them with AWQUA_ERR_UNSUPPORTED. The first grammar of a model takes longer to begin with.
 */
enum awqua_grammar
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : uint32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  /**
   * Anything.
   */
  AWQUA_GRAMMAR_NONE = 0,
  /**
   * A JSON value that fits the JSON schema in `grammar`. What of JSON Schema is not enforced is refused.
   */
  AWQUA_GRAMMAR_JSON_SCHEMA = 1,
  /**
   * A text that the regular expression in `grammar` matches as a whole.
   */
  AWQUA_GRAMMAR_REGEX = 2,
  /**
   * A text of the grammar in `grammar`, in llguidance's Lark format.
   */
  AWQUA_GRAMMAR_LARK = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum awqua_grammar awqua_grammar;
#else
typedef uint32_t awqua_grammar;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Sessions of one model that decode together: their next tokens go through the model in one pass, which reads the
 * weights once for all of them, so that eight characters take little longer than one.
 *
 * A batch has no members: every tick names the sessions it works on, which are prompted, polled, cancelled, ticked by
 * themselves and freed as ever between ticks. It keeps memory for its passes, and its model's.
 *
 * Each session gets the tokens that it would get by itself, as far as numbers do not depend on how many are computed at
 * once: the CPU computes each by itself; GPUs round differently, which can tip a choice between two tokens that are
 * almost equally likely. Sessions with AWQUA_SESSION_DETERMINISTIC promise more and are stepped one by one, as are those
 * whose description differs from the batch's, and all sessions where passes are not shared: see awqua_batch_shares.
 */
typedef struct awqua_batch awqua_batch;

/**
 * A place where models run: a device, budgets, and what they hold. Models keep what they need of it, so it may be freed
 * first.
 */
typedef struct awqua_engine awqua_engine;

/**
 * Weights on a device with a tokenizer. Sessions keep what they need of it, so it may be freed first.
 */
typedef struct awqua_model awqua_model;

/**
 * One conversation with a model: its KV cache and the answer in the making.
 *
 * A session makes no thread unless the engine was asked for some; everything happens inside awqua_session_tick, on
 * the thread that calls it.
 */
typedef struct awqua_session awqua_session;

/**
 * Memory functions of the host. They are called from every thread that calls the library (and from its own ones, if
 * the engine was asked for some), must not call the library, and must not throw. Device drivers allocate their own
 * memory and are not covered.
 */
typedef struct awqua_allocator {
  /**
   * sizeof(awqua_allocator).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Handed to the functions.
   */
  void *user;
  /**
   * `size` bytes (never 0) at a multiple of `align` (a power of two), or NULL.
   */
  void *(*alloc)(void *user, uint64_t size, uint64_t align);
  /**
   * Takes back what `alloc` gave, with the same `size` and `align`.
   */
  void (*free)(void *user, void *memory, uint64_t size, uint64_t align);
} awqua_allocator;

/**
 * Host memory of the library, over all engines.
 */
typedef struct awqua_memory_stats {
  /**
   * sizeof(awqua_memory_stats).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Bytes allocated now. Mapped files are not among them.
   */
  uint64_t bytes;
  /**
   * Most bytes ever allocated at once.
   */
  uint64_t peak_bytes;
  /**
   * Allocations made since the library was loaded. Stands still while a session decodes on the CPU.
   */
  uint64_t allocations;
} awqua_memory_stats;

/**
 * UTF-8 text: `len` bytes at `data`, or up to the NUL if `len` is AWQUA_STRLEN. NULL is the empty text. It is read
 * during the call only.
 */
typedef struct awqua_str {
  /**
   * First byte.
   */
  const char *data;
  /**
   * Bytes, or AWQUA_STRLEN.
   */
  uint64_t len;
} awqua_str;

/**
 * Receives one message; `text` lives for the call. It may come from any thread that is inside the library, must not
 * call the library, and must not throw.
 */
typedef void (*awqua_log_fn)(void *user, uint32_t level, struct awqua_str text);

/**
 * A piece of work. Call it from any thread, with the `context` it came with; it does not wait and does not throw.
 * `worker` tells the calls apart that run at once: below the engine's `threads`, and never used by two of them.
 */
typedef void (*awqua_task_fn)(void *context, uint32_t index, uint32_t worker);

/**
 * Calls `task` once for every index below `count`, in any order, on any threads, the calling one included or not, and
 * returns once all calls have returned. It comes from inside a tick, must not call the library, and must not throw.
 */
typedef void (*awqua_parallel_for_fn)(void *user, uint32_t count, awqua_task_fn task, void *context);

/**
 * Any function, as PFN_vkVoidFunction.
 */
typedef void (*awqua_vulkan_function)(void);

/**
 * PFN_vkGetInstanceProcAddr, with the handle as a pointer.
 */
typedef awqua_vulkan_function (*awqua_vulkan_get_proc_fn)(void *instance, const char *name);

/**
 * A function of the host that takes only `user`.
 */
typedef void (*awqua_vulkan_notify_fn)(void *user);

/**
 * A Vulkan device of the host, for `vulkan` of awqua_engine_desc. Any device of Vulkan 1.1 or later will do; what the
 * flags name makes the kernels faster, from an extension or as a part of Vulkan itself.
 *
 * Ownership. Instance, device and queue stay the host's: the library makes its own buffers, pipelines and command
 * pools on the device and destroys nothing else. Instance and device must live until `released` is called, which
 * happens once nothing of the library uses them any more: when the engine that they were given to, its models and their
 * sessions are freed, or have gone over to another device. Then they may be destroyed, in `released` itself or later.
 *
 * The queue. Vulkan lets one thread at a time work on a queue. Without `lock_queue` and `unlock_queue` the library
 * works on it only inside of calls on models and sessions of the engine, and on the engine itself, so a host whose
 * ticks and submissions come from one thread has nothing to do; one that submits from other threads gives the two
 * functions, which the library calls around every call on the queue, or gives a second queue of the device that only the
 * library uses. Two queues also let the GPU work on both at once, where one takes turns; submissions of the library are
 * as short as the ticks' budgets. The host's own vkDeviceWaitIdle counts as work on all queues.
 */
typedef struct awqua_vulkan {
  /**
   * sizeof(awqua_vulkan).
   */
  uint32_t struct_size;
  /**
   * AWQUA_VULKAN_* flags: what the device was made with. What was not enabled must not be named.
   */
  uint32_t flags;
  /**
   * VkApplicationInfo::apiVersion of the instance, at least VK_API_VERSION_1_1.
   */
  uint32_t api_version;
  /**
   * Family of the queue, which has graphics and compute.
   */
  uint32_t queue_family;
  /**
   * Number of the queue in its family.
   */
  uint32_t queue_index;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * vkGetInstanceProcAddr, cast.
   */
  awqua_vulkan_get_proc_fn get_instance_proc_addr;
  /**
   * VkInstance.
   */
  void *instance;
  /**
   * VkPhysicalDevice.
   */
  void *physical_device;
  /**
   * VkDevice.
   */
  void *device;
  /**
   * Blocks until the calling thread has the queue for itself, or NULL; both or neither. Never called twice without
   * `unlock_queue` between. Must not call the library.
   */
  awqua_vulkan_notify_fn lock_queue;
  /**
   * Ends that.
   */
  awqua_vulkan_notify_fn unlock_queue;
  /**
   * Tells that the library has let go of the device, once and from inside the last call that frees what used it, or
   * NULL. Not called if the call that handed the device over fails. Must not call the library.
   */
  awqua_vulkan_notify_fn released;
  /**
   * Handed to the functions.
   */
  void *user;
} awqua_vulkan;

/**
 * What an engine is made from; all zero behind `struct_size` is the default.
 */
typedef struct awqua_engine_desc {
  /**
   * sizeof(awqua_engine_desc).
   */
  uint32_t struct_size;
  /**
   * AWQUA_ENGINE_* flags.
   */
  uint32_t flags;
  /**
   * An awqua_backend.
   */
  uint32_t backend;
  /**
   * CPU threads a session computes with, the caller's included: 0 and 1 make no thread, n makes n - 1 that belong
   * to the session, sleep between its ticks and end with it. With `parallel_for` it is how many threads of the host
   * take part, and none is made. Ignored on a GPU.
   */
  uint32_t threads;
  /**
   * Part of the adapter's name in any letter case, or its index in awqua_device_get; empty takes the best one.
   */
  struct awqua_str device;
  /**
   * Most bytes of host memory for weights, caches and activations of all models and sessions; 0 is no cap. What does
   * not fit is refused with AWQUA_ERR_OUT_OF_MEMORY and the needed number.
   */
  uint64_t host_budget_bytes;
  /**
   * The same of device memory.
   */
  uint64_t device_budget_bytes;
  /**
   * What awqua_engine_get_pipeline_cache gave at an earlier start, or NULL; shortens the first load. Copied. Trusted
   * to come from there: damage is noticed, forgery is not.
   */
  const void *pipeline_cache;
  /**
   * Bytes at `pipeline_cache`.
   */
  uint64_t pipeline_cache_len;
  /**
   * Takes the adapter with this UUID (VkPhysicalDeviceIDProperties), unless it is all zero.
   */
  uint8_t device_uuid[16];
  /**
   * Takes the adapter with this LUID (of DXGI or Vulkan), unless it is all zero.
   */
  uint8_t device_luid[8];
  /**
   * The host's own threads for the CPU, or NULL.
   */
  awqua_parallel_for_fn parallel_for;
  /**
   * Handed to `parallel_for`.
   */
  void *parallel_for_user;
  /**
   * The host's own Vulkan device, or NULL; no other device is chosen then. Read during the call only.
   */
  const struct awqua_vulkan *vulkan;
} awqua_engine_desc;

/**
 * What an engine holds.
 */
typedef struct awqua_engine_info {
  /**
   * sizeof(awqua_engine_info).
   */
  uint32_t struct_size;
  /**
   * AWQUA_ENGINE_LOST, or 0.
   */
  uint32_t flags;
  /**
   * Bytes of host memory that its models and sessions hold for weights, caches and activations.
   */
  uint64_t host_bytes;
  /**
   * The same of device memory.
   */
  uint64_t device_bytes;
} awqua_engine_info;

/**
 * An adapter of the machine.
 */
typedef struct awqua_device_info {
  /**
   * sizeof(awqua_device_info).
   */
  uint32_t struct_size;
  /**
   * AWQUA_DEVICE_* flags.
   */
  uint32_t flags;
  /**
   * An awqua_device_kind.
   */
  uint32_t kind;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Largest buffer, in bytes.
   */
  uint64_t max_buffer_bytes;
  /**
   * Largest part of a buffer that a kernel sees, in bytes; larger weights are split.
   */
  uint64_t max_binding_bytes;
  /**
   * Name the driver gives it, NUL-terminated, cut if it is longer.
   */
  char name[128];
  /**
   * Graphics interface in use: "vulkan", "metal" or "dx12".
   */
  char api[16];
  /**
   * Driver and its version.
   */
  char driver[112];
  /**
   * By which other interfaces name the same device, all zero if unknown.
   */
  uint8_t uuid[16];
  /**
   * The same on Windows until it restarts, all zero if unknown.
   */
  uint8_t luid[8];
} awqua_device_info;

/**
 * How much one tick may do. At least one piece of work is done, however small the budget is.
 */
typedef struct awqua_budget {
  /**
   * sizeof(awqua_budget).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Microseconds of the calling thread, looked at between pieces of well under a millisecond. 0 does one piece,
   * AWQUA_NO_LIMIT all there is until the GPU has to be waited for. 2000.
   */
  uint64_t cpu_us;
  /**
   * Microseconds of work that the GPU may have queued when the call returns, what earlier ticks left included, as
   * far as measurements of earlier work tell. Prompts are cut into chunks accordingly. 4000.
   */
  uint64_t gpu_us;
  /**
   * For a model: bytes of weights handed over. AWQUA_NO_LIMIT.
   */
  uint64_t load_bytes;
  /**
   * For a model: GPU kernels compiled; each may take some milliseconds that nobody can cut. 1.
   */
  uint32_t load_kernels;
  /**
   * 0.
   */
  uint32_t reserved;
} awqua_budget;

/**
 * A file in memory.
 */
typedef struct awqua_file {
  /**
   * Its name in the checkpoint's folder, such as "config.json" or "model.safetensors".
   */
  struct awqua_str name;
  /**
   * First byte.
   */
  const void *data;
  /**
   * Bytes.
   */
  uint64_t len;
} awqua_file;

/**
 * Functions of the host that read a checkpoint from wherever it is: a pak file, an Android asset, an archive. They are
 * called from the threads that tick the model or estimate it, from several at once if several do, and must not call
 * the library with an object that is in use, nor throw. Any offset may be asked for at any time, also after loading:
 * weights that were evicted, or lost with a device, are read again.
 */
typedef struct awqua_io {
  /**
   * sizeof(awqua_io).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Handed to the functions.
   */
  void *user;
  /**
   * Opens the file `name` (a plain name, with a NUL behind it) and sets `file` and `size`. Returns AWQUA_OK,
   * AWQUA_EMPTY if there is no such file, or AWQUA_ERR_IO.
   */
  int32_t (*open)(void *user, struct awqua_str name, void **file, uint64_t *size);
  /**
   * Reads `size` bytes from `offset` on into `buffer`: all of them and AWQUA_OK, or AWQUA_ERR_IO.
   */
  int32_t (*read_at)(void *user, void *file, uint64_t offset, void *buffer, uint64_t size);
  /**
   * `size` bytes from `offset` on where they are in memory, valid until the file is closed, or NULL. NULL if no file
   * can be mapped. Dense weights of the CPU are computed with where they are mapped.
   */
  const void *(*map)(void *user, void *file, uint64_t offset, uint64_t size);
  /**
   * Closes a file. May be NULL.
   */
  void (*close)(void *user, void *file);
  /**
   * Called once when `user` is not needed any more: the model was freed, and so were its sessions. Not called if
   * awqua_model_create fails. May be NULL.
   */
  void (*release)(void *user);
} awqua_io;

/**
 * Which model to load.
 */
typedef struct awqua_model_desc {
  /**
   * sizeof(awqua_model_desc).
   */
  uint32_t struct_size;
  /**
   * AWQUA_MODEL_* flags.
   */
  uint32_t flags;
  /**
   * Folder of the checkpoint; with `files` or `io` what messages call it.
   */
  struct awqua_str path;
  /**
   * The files of the checkpoint, if they are in memory. They stay where and as they are until the model and its
   * sessions are freed, unless AWQUA_MODEL_COPY_FILES is set.
   */
  const struct awqua_file *files;
  /**
   * Number of `files`.
   */
  uint64_t n_files;
  /**
   * Functions that read the files, if they are neither in a folder nor in memory. Copied.
   */
  const struct awqua_io *io;
} awqua_model_desc;

/**
 * How far loading is; done / total is the share of the weights.
 */
typedef struct awqua_load_progress {
  /**
   * sizeof(awqua_load_progress).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Bytes of weights handed over.
   */
  uint64_t done;
  /**
   * Bytes of all weights; 0 before they are known.
   */
  uint64_t total;
  /**
   * An awqua_load_stage.
   */
  uint32_t stage;
  /**
   * 0.
   */
  uint32_t reserved;
} awqua_load_progress;

/**
 * Capacities of a session, fixed when it is made; all zero behind `struct_size` is the default.
 */
typedef struct awqua_session_desc {
  /**
   * sizeof(awqua_session_desc).
   */
  uint32_t struct_size;
  /**
   * AWQUA_SESSION_* flags.
   */
  uint32_t flags;
  /**
   * Tokens the KV cache holds; 0 takes the model's length, at most 4096.
   */
  uint32_t context;
  /**
   * An awqua_kv_type.
   */
  uint32_t kv_type;
  /**
   * Most prompt tokens computed at a time; 0 takes 256. A tick takes fewer when its budget is short.
   */
  uint32_t chunk;
  /**
   * 0.
   */
  uint32_t reserved;
} awqua_session_desc;

/**
 * Memory that a model and a session on it take, in bytes.
 */
typedef struct awqua_estimate {
  /**
   * sizeof(awqua_estimate).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Weights in host memory: all of them on the CPU, but for dense ones that are computed with where a file is mapped.
   */
  uint64_t weights_host_bytes;
  /**
   * Weights in device memory.
   */
  uint64_t weights_device_bytes;
  /**
   * A session in host memory, at most: its KV cache and what a step needs.
   */
  uint64_t session_host_bytes;
  /**
   * A session in device memory, at most.
   */
  uint64_t session_device_bytes;
} awqua_estimate;

/**
 * What a loaded model is.
 */
typedef struct awqua_model_info {
  /**
   * sizeof(awqua_model_info).
   */
  uint32_t struct_size;
  /**
   * AWQUA_MODEL_* flags.
   */
  uint32_t flags;
  /**
   * Entries of the embedding table; token ids are below it.
   */
  uint32_t vocab_size;
  /**
   * Decoder layers.
   */
  uint32_t n_layers;
  /**
   * Width of the hidden state.
   */
  uint32_t hidden_size;
  /**
   * Tokens the model was trained to see at once.
   */
  uint32_t max_context;
  /**
   * Bytes of weights on the device.
   */
  uint64_t weight_bytes;
  /**
   * "cpu", "wgpu" or "cuda", NUL-terminated; "none" while the weights are away.
   */
  char backend[16];
  /**
   * Adapter or processor, cut if it is longer.
   */
  char device[128];
  /**
   * Tells these weights from others: of names, shapes and a part of the values of all tensors.
   */
  uint64_t identity;
} awqua_model_info;

/**
 * One turn of a conversation.
 */
typedef struct awqua_message {
  /**
   * "system", "user", "assistant" or what else the model's template knows.
   */
  struct awqua_str role;
  /**
   * The text.
   */
  struct awqua_str content;
} awqua_message;

/**
 * What a session holds.
 */
typedef struct awqua_session_info {
  /**
   * sizeof(awqua_session_info).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Tokens in the KV cache.
   */
  uint32_t n_tokens;
  /**
   * Most tokens it holds.
   */
  uint32_t context;
  /**
   * An awqua_kv_type.
   */
  uint32_t kv_type;
  /**
   * An awqua_phase.
   */
  uint32_t phase;
  /**
   * Bytes held for the session on the device, without those that it shares with others.
   */
  uint64_t bytes;
} awqua_session_info;

/**
 * What is added to the logit of a token.
 */
typedef struct awqua_logit_bias {
  /**
   * Token id.
   */
  uint32_t id;
  /**
   * Added before anything else; negative infinity bans the token.
   */
  float bias;
} awqua_logit_bias;

/**
 * How to answer. Not all defaults are zero: start from AWQUA_REQUEST_INIT or awqua_request_init.
 */
typedef struct awqua_request {
  /**
   * sizeof(awqua_request).
   */
  uint32_t struct_size;
  /**
   * AWQUA_REQUEST_* flags.
   */
  uint32_t flags;
  /**
   * Most new tokens. 512.
   */
  uint32_t max_tokens;
  /**
   * Keep the k most likely tokens; 0 keeps all. 40.
   */
  uint32_t top_k;
  /**
   * Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all. 0.95.
   */
  float top_p;
  /**
   * Drop tokens less likely than this times the most likely one; 0 keeps all. 0.
   */
  float min_p;
  /**
   * 0 takes the most likely token; otherwise logits are divided by it. 0.7.
   */
  float temperature;
  /**
   * Positive logits of recent tokens are divided by it, negative ones multiplied; 1 changes nothing. 1.
   */
  float repetition_penalty;
  /**
   * Subtracted from the logit of every recent token. 0.
   */
  float presence_penalty;
  /**
   * Subtracted from a recent token's logit once per occurrence. 0.
   */
  float frequency_penalty;
  /**
   * How many of the last tokens count as recent. 256.
   */
  uint32_t penalty_window;
  /**
   * Number of `stops`.
   */
  uint32_t n_stops;
  /**
   * Seed of PCG-32 (XSH RR 64/32), from which one number is drawn a token. 0.
   */
  uint64_t seed;
  /**
   * Texts that end the answer; neither they nor anything behind them is part of it. Copied.
   */
  const struct awqua_str *stops;
  /**
   * Further ids that end the answer. Copied.
   */
  const uint32_t *stop_ids;
  /**
   * Number of `stop_ids`.
   */
  uint32_t n_stop_ids;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Biases of tokens. Copied.
   */
  const struct awqua_logit_bias *biases;
  /**
   * Ids that are never chosen. Copied.
   */
  const uint32_t *banned_ids;
  /**
   * Number of `biases`.
   */
  uint32_t n_biases;
  /**
   * Number of `banned_ids`.
   */
  uint32_t n_banned_ids;
  /**
   * For AWQUA_REQUEST_SHIFT: leading tokens that are never forgotten, such as a system prompt.
   */
  uint32_t shift_keep;
  /**
   * An awqua_grammar.
   */
  uint32_t grammar_kind;
  /**
   * The schema, expression or grammar. Copied.
   */
  struct awqua_str grammar;
} awqua_request;

/**
 * What a tick did.
 */
typedef struct awqua_tick_result {
  /**
   * sizeof(awqua_tick_result).
   */
  uint32_t struct_size;
  /**
   * AWQUA_TICK_WAITING, or 0.
   */
  uint32_t flags;
  /**
   * The awqua_phase behind the tick.
   */
  uint32_t phase;
  /**
   * New tokens this tick made.
   */
  uint32_t new_tokens;
  /**
   * Prompt tokens computed so far, those found in the cache included.
   */
  uint32_t prompt_done;
  /**
   * Tokens of the prompt.
   */
  uint32_t prompt_total;
  /**
   * New tokens since the prompt.
   */
  uint32_t answer_tokens;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Microseconds the call took.
   */
  uint64_t cpu_us;
  /**
   * Estimated microseconds of work that the GPU has queued.
   */
  uint64_t gpu_queued_us;
} awqua_tick_result;

/**
 * An event, and the caller's memory for its text.
 */
typedef struct awqua_event {
  /**
   * sizeof(awqua_event).
   */
  uint32_t struct_size;
  /**
   * 0.
   */
  uint32_t flags;
  /**
   * Out: an awqua_event_kind.
   */
  uint32_t kind;
  /**
   * Out: an awqua_stop_reason.
   */
  uint32_t reason;
  /**
   * Out: an awqua_status.
   */
  int32_t status;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * In: where text goes; may be NULL with a capacity of 0.
   */
  char *text;
  /**
   * In: bytes at `text`. No NUL is written.
   */
  uint64_t text_capacity;
  /**
   * Out: bytes written, always whole characters. Text that does not fit comes with the next event.
   */
  uint64_t text_len;
  /**
   * Out: bytes of text that wait for the next event.
   */
  uint64_t text_waiting;
  /**
   * Out: prompt tokens computed.
   */
  uint32_t done;
  /**
   * Out: tokens of the prompt.
   */
  uint32_t total;
} awqua_event;

/**
 * Every function of this header, for programs that load the library at run time; see awqua_get_api. Members are
 * only ever appended.
 */
typedef struct awqua_api {
  /**
   * sizeof(awqua_api) of the library.
   */
  uint32_t struct_size;
  /**
   * awqua_abi_version of the library.
   */
  uint32_t abi;
  /**
   * awqua_abi_version
   */
  uint32_t (*abi_version)(void);
  /**
   * awqua_version
   */
  const char *(*version)(void);
  /**
   * awqua_status_name
   */
  const char *(*status_name)(int32_t status);
  /**
   * awqua_last_error
   */
  awqua_status (*last_error)(char *buffer, uint64_t capacity, uint64_t *length);
  /**
   * awqua_get_api
   */
  awqua_status (*get_api)(uint32_t abi_version, uint32_t table_size, const struct awqua_api **api);
  /**
   * awqua_set_allocator
   */
  awqua_status (*set_allocator)(const struct awqua_allocator *allocator);
  /**
   * awqua_memory
   */
  awqua_status (*memory)(struct awqua_memory_stats *stats);
  /**
   * awqua_set_log
   */
  awqua_status (*set_log)(awqua_log_fn callback, void *user, uint32_t level);
  /**
   * awqua_engine_desc_init
   */
  awqua_status (*engine_desc_init)(struct awqua_engine_desc *desc);
  /**
   * awqua_engine_free
   */
  awqua_status (*engine_free)(struct awqua_engine *engine);
  /**
   * awqua_engine_last_error
   */
  awqua_status (*engine_last_error)(const struct awqua_engine *engine,
                                    char *buffer,
                                    uint64_t capacity,
                                    uint64_t *length);
  /**
   * awqua_device_count
   */
  awqua_status (*device_count)(uint32_t *count);
  /**
   * awqua_device_get
   */
  awqua_status (*device_get)(uint32_t index, struct awqua_device_info *info);
  /**
   * awqua_budget_init
   */
  awqua_status (*budget_init)(struct awqua_budget *budget);
  /**
   * awqua_model_desc_init
   */
  awqua_status (*model_desc_init)(struct awqua_model_desc *desc);
  /**
   * awqua_model_create
   */
  awqua_status (*model_create)(const struct awqua_engine *engine,
                               const struct awqua_model_desc *desc,
                               struct awqua_model **model);
  /**
   * awqua_model_tick
   */
  awqua_status (*model_tick)(struct awqua_model *model,
                             const struct awqua_budget *budget,
                             struct awqua_load_progress *progress);
  /**
   * awqua_model_cancel
   */
  awqua_status (*model_cancel)(const struct awqua_model *model);
  /**
   * awqua_model_free
   */
  awqua_status (*model_free)(struct awqua_model *model);
  /**
   * awqua_model_last_error
   */
  awqua_status (*model_last_error)(const struct awqua_model *model,
                                   char *buffer,
                                   uint64_t capacity,
                                   uint64_t *length);
  /**
   * awqua_model_get_info
   */
  awqua_status (*model_get_info)(const struct awqua_model *model, struct awqua_model_info *info);
  /**
   * awqua_model_tokenize
   */
  awqua_status (*model_tokenize)(const struct awqua_model *model,
                                 struct awqua_str text,
                                 uint32_t flags,
                                 uint32_t *ids,
                                 uint64_t capacity,
                                 uint64_t *count);
  /**
   * awqua_model_detokenize
   */
  awqua_status (*model_detokenize)(const struct awqua_model *model,
                                   const uint32_t *ids,
                                   uint64_t count,
                                   uint32_t flags,
                                   char *buffer,
                                   uint64_t capacity,
                                   uint64_t *length);
  /**
   * awqua_model_render_chat
   */
  awqua_status (*model_render_chat)(const struct awqua_model *model,
                                    const struct awqua_message *messages,
                                    uint64_t count,
                                    uint32_t flags,
                                    char *buffer,
                                    uint64_t capacity,
                                    uint64_t *length);
  /**
   * awqua_session_desc_init
   */
  awqua_status (*session_desc_init)(struct awqua_session_desc *desc);
  /**
   * awqua_request_init
   */
  awqua_status (*request_init)(struct awqua_request *request);
  /**
   * awqua_session_create
   */
  awqua_status (*session_create)(const struct awqua_model *model,
                                 const struct awqua_session_desc *desc,
                                 struct awqua_session **session);
  /**
   * awqua_session_free
   */
  awqua_status (*session_free)(struct awqua_session *session);
  /**
   * awqua_session_last_error
   */
  awqua_status (*session_last_error)(const struct awqua_session *session,
                                     char *buffer,
                                     uint64_t capacity,
                                     uint64_t *length);
  /**
   * awqua_session_begin_tokens
   */
  awqua_status (*session_begin_tokens)(struct awqua_session *session,
                                       const uint32_t *ids,
                                       uint64_t count,
                                       const struct awqua_request *request);
  /**
   * awqua_session_begin_text
   */
  awqua_status (*session_begin_text)(struct awqua_session *session,
                                     struct awqua_str prompt,
                                     const struct awqua_request *request);
  /**
   * awqua_session_begin_chat
   */
  awqua_status (*session_begin_chat)(struct awqua_session *session,
                                     const struct awqua_message *messages,
                                     uint64_t count,
                                     const struct awqua_request *request);
  /**
   * awqua_session_tick
   */
  awqua_status (*session_tick)(struct awqua_session *session,
                               const struct awqua_budget *budget,
                               struct awqua_tick_result *result);
  /**
   * awqua_session_poll
   */
  awqua_status (*session_poll)(struct awqua_session *session, struct awqua_event *event);
  /**
   * awqua_session_cancel
   */
  awqua_status (*session_cancel)(const struct awqua_session *session);
  /**
   * awqua_session_run
   */
  awqua_status (*session_run)(struct awqua_session *session);
  /**
   * awqua_session_truncate
   */
  awqua_status (*session_truncate)(struct awqua_session *session, uint32_t n_tokens);
  /**
   * awqua_engine_recover
   */
  awqua_status (*engine_recover)(const struct awqua_engine *engine);
  /**
   * awqua_engine_debug_lose_device
   */
  awqua_status (*engine_debug_lose_device)(const struct awqua_engine *engine);
  /**
   * awqua_engine_trim
   */
  awqua_status (*engine_trim)(const struct awqua_engine *engine, uint32_t level);
  /**
   * awqua_engine_get_pipeline_cache
   */
  awqua_status (*engine_get_pipeline_cache)(const struct awqua_engine *engine,
                                            void *buffer,
                                            uint64_t capacity,
                                            uint64_t *length);
  /**
   * awqua_model_run
   */
  awqua_status (*model_run)(struct awqua_model *model);
  /**
   * awqua_model_estimate
   */
  awqua_status (*model_estimate)(const struct awqua_model *model,
                                 const struct awqua_session_desc *desc,
                                 struct awqua_estimate *estimate);
  /**
   * awqua_model_evict
   */
  awqua_status (*model_evict)(const struct awqua_model *model);
  /**
   * awqua_model_restore
   */
  awqua_status (*model_restore)(const struct awqua_model *model);
  /**
   * awqua_session_save
   */
  awqua_status (*session_save)(struct awqua_session *session,
                               void *buffer,
                               uint64_t capacity,
                               uint64_t *length);
  /**
   * awqua_session_trim
   */
  awqua_status (*session_trim)(struct awqua_session *session);
  /**
   * awqua_session_get_embedding
   */
  awqua_status (*session_get_embedding)(const struct awqua_session *session,
                                        float *values,
                                        uint64_t capacity,
                                        uint64_t *count);
  /**
   * awqua_engine_create
   */
  awqua_status (*engine_create)(const struct awqua_engine_desc *desc, struct awqua_engine **engine);
  /**
   * awqua_engine_get_info
   */
  awqua_status (*engine_get_info)(const struct awqua_engine *engine, struct awqua_engine_info *info);
  /**
   * awqua_engine_recover_vulkan
   */
  awqua_status (*engine_recover_vulkan)(const struct awqua_engine *engine, const struct awqua_vulkan *vulkan);
  /**
   * awqua_session_get_info
   */
  awqua_status (*session_get_info)(const struct awqua_session *session, struct awqua_session_info *info);
  /**
   * awqua_session_fork
   */
  awqua_status (*session_fork)(struct awqua_session *session, struct awqua_session **forked);
  /**
   * awqua_session_restore
   */
  awqua_status (*session_restore)(struct awqua_session *session, const void *snapshot, uint64_t length);
  /**
   * awqua_session_begin_embedding_tokens
   */
  awqua_status (*session_begin_embedding_tokens)(struct awqua_session *session,
                                                 const uint32_t *ids,
                                                 uint64_t count);
  /**
   * awqua_session_begin_embedding_text
   */
  awqua_status (*session_begin_embedding_text)(struct awqua_session *session, struct awqua_str text);
  /**
   * awqua_batch_create
   */
  awqua_status (*batch_create)(const struct awqua_model *model,
                               const struct awqua_session_desc *desc,
                               uint32_t n_sessions,
                               struct awqua_batch **batch);
  /**
   * awqua_batch_free
   */
  awqua_status (*batch_free)(struct awqua_batch *batch);
  /**
   * awqua_batch_last_error
   */
  awqua_status (*batch_last_error)(const struct awqua_batch *batch,
                                   char *buffer,
                                   uint64_t capacity,
                                   uint64_t *length);
  /**
   * awqua_batch_shares
   */
  awqua_status (*batch_shares)(const struct awqua_batch *batch, uint32_t *shares);
  /**
   * awqua_batch_tick
   */
  awqua_status (*batch_tick)(struct awqua_batch *batch,
                             struct awqua_session *const *sessions,
                             uint32_t count,
                             const struct awqua_budget *budget,
                             struct awqua_tick_result *results);
  /**
   * awqua_batch_run
   */
  awqua_status (*batch_run)(struct awqua_batch *batch, struct awqua_session *const *sessions, uint32_t count);
} awqua_api;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Makes the library take its memory from the host. The first call into the library or never: fails with
 * AWQUA_ERR_STATE once anything was allocated. The functions must stay valid until the process ends.
 */
AWQUA_API awqua_status awqua_set_allocator(const struct awqua_allocator *allocator);

/**
 * Host memory the library holds, whoever provides it.
 */
AWQUA_API awqua_status awqua_memory(struct awqua_memory_stats *stats);

/**
 * Sends messages up to `level` (an awqua_log_level) to `callback`; NULL turns them off. Any thread, any time; a
 * message already on its way may still arrive at the old callback while this returns.
 */
AWQUA_API
awqua_status awqua_set_log(awqua_log_fn callback,
                           void *user,
                           uint32_t level);

/**
 * Fills a description with its defaults, as far as its `struct_size` goes, which has to be set before.
 */
AWQUA_API awqua_status awqua_engine_desc_init(struct awqua_engine_desc *desc);

/**
 * Makes an engine. No device is opened before the first model is loaded. `desc` may be NULL for the defaults.
 */
AWQUA_API
awqua_status awqua_engine_create(const struct awqua_engine_desc *desc,
                                 struct awqua_engine **engine);

/**
 * Frees an engine; NULL is fine. Its models live on.
 */
AWQUA_API awqua_status awqua_engine_free(struct awqua_engine *engine);

/**
 * Copies the text of the last failed call on `engine`, as awqua_last_error does.
 */
AWQUA_API
awqua_status awqua_engine_last_error(const struct awqua_engine *engine,
                                     char *buffer,
                                     uint64_t capacity,
                                     uint64_t *length);

/**
 * What the engine holds, over all its models and sessions.
 */
AWQUA_API
awqua_status awqua_engine_get_info(const struct awqua_engine *engine,
                                   struct awqua_engine_info *info);

/**
 * Lets go of a lost device, after AWQUA_EVENT_DEVICE_LOST: models find another one the next time they or their sessions
 * are ticked, upload their weights again from their files, and sessions compute their tokens again and go on with their
 * answers. Does nothing if no device is lost. After three losses within five minutes AWQUA_BACKEND_AUTO goes on with the
 * CPU, and AWQUA_BACKEND_GPU fails with AWQUA_ERR_DEVICE_LOST.
 */
AWQUA_API
awqua_status awqua_engine_recover(const struct awqua_engine *engine);

/**
 * Goes on with another Vulkan device of the host, whether the one in use is lost or not, as a renderer is made anew:
 * models and sessions go over to it in their next ticks as after awqua_engine_recover, and `released` of the former one
 * is called once the last of them has. AWQUA_BACKEND_CPU refuses it.
 */
AWQUA_API
awqua_status awqua_engine_recover_vulkan(const struct awqua_engine *engine,
                                         const struct awqua_vulkan *vulkan);

/**
 * Loses the device on purpose, to test what a program does then. The CPU can not be lost.
 */
AWQUA_API awqua_status awqua_engine_debug_lose_device(const struct awqua_engine *engine);

/**
 * Asks all sessions of the engine to give memory back, as far as an awqua_trim says. Each does so in its next tick, also
 * an idle one, and makes an AWQUA_EVENT_MEMORY_PRESSURE.
 */
AWQUA_API
awqua_status awqua_engine_trim(const struct awqua_engine *engine,
                               uint32_t level);

/**
 * Compiled GPU kernels, for `pipeline_cache` of a later start on the same device and driver. `length` gets its bytes,
 * also when `capacity` is too small; 0 where there is nothing to keep: no device is open, or it does not give them out.
 */
AWQUA_API
awqua_status awqua_engine_get_pipeline_cache(const struct awqua_engine *engine,
                                             void *buffer,
                                             uint64_t capacity,
                                             uint64_t *length);

/**
 * Number of adapters, the preferred one first. 0 without a driver, which is no failure. Slow: asks every driver.
 */
AWQUA_API
awqua_status awqua_device_count(uint32_t *count);

/**
 * Describes adapter number `index`. Slow: asks every driver.
 */
AWQUA_API awqua_status awqua_device_get(uint32_t index, struct awqua_device_info *info);

/**
 * Fills a budget with its defaults, as far as its `struct_size` goes, which has to be set before.
 */
AWQUA_API awqua_status awqua_budget_init(struct awqua_budget *budget);

/**
 * Fills a description with its defaults, as far as its `struct_size` goes, which has to be set before.
 */
AWQUA_API awqua_status awqua_model_desc_init(struct awqua_model_desc *desc);

/**
 * Begins to load a model; nothing is opened before the first tick.
 */
AWQUA_API
awqua_status awqua_model_create(const struct awqua_engine *engine,
                                const struct awqua_model_desc *desc,
                                struct awqua_model **model);

/**
 * Goes on loading: AWQUA_PENDING until it returns AWQUA_OK, then the model is ready. Never waits for the GPU. Once
 * awqua_model_cancel was called it returns AWQUA_ERR_CANCELLED one time and gives back what was loaded; the next tick
 * starts anew, as it does after any failure. A ready model whose weights are coming back (see awqua_model_restore and
 * awqua_engine_recover) goes on with that. `budget` may be NULL for its defaults, `progress` may be NULL.
 */
AWQUA_API
awqua_status awqua_model_tick(struct awqua_model *model,
                              const struct awqua_budget *budget,
                              struct awqua_load_progress *progress);

/**
 * Loads to the end, for tools that have nothing else to do. Cancelled as ticks are.
 */
AWQUA_API awqua_status awqua_model_run(struct awqua_model *model);

/**
 * Memory that the model and a session on it take, read from the headers of its files; also before loading. `desc` may
 * be NULL for a default session.
 */
AWQUA_API
awqua_status awqua_model_estimate(const struct awqua_model *model,
                                  const struct awqua_session_desc *desc,
                                  struct awqua_estimate *estimate);

/**
 * Gives the memory of a loaded model's weights back. Its sessions keep their caches, and their ticks fail with
 * AWQUA_ERR_EVICTED, keeping the answer, until awqua_model_restore. Its files stay open.
 */
AWQUA_API
awqua_status awqua_model_evict(const struct awqua_model *model);

/**
 * Begins to bring evicted weights back from the files; the ticks of the model or of its sessions go on with it. Does
 * nothing if they are there.
 */
AWQUA_API
awqua_status awqua_model_restore(const struct awqua_model *model);

/**
 * Stops loading at the next tick. Any thread, any time.
 */
AWQUA_API awqua_status awqua_model_cancel(const struct awqua_model *model);

/**
 * Frees a model; NULL is fine. Its sessions live on, and its weights with them.
 */
AWQUA_API awqua_status awqua_model_free(struct awqua_model *model);

/**
 * Copies the text of the last failed call on `model`, as awqua_last_error does.
 */
AWQUA_API
awqua_status awqua_model_last_error(const struct awqua_model *model,
                                    char *buffer,
                                    uint64_t capacity,
                                    uint64_t *length);

/**
 * What the loaded model is.
 */
AWQUA_API awqua_status awqua_model_get_info(const struct awqua_model *model, struct awqua_model_info *info);

/**
 * Token ids of `text`. `count` gets their number, also when `capacity` is too small.
 */
AWQUA_API
awqua_status awqua_model_tokenize(const struct awqua_model *model,
                                  struct awqua_str text,
                                  uint32_t flags,
                                  uint32_t *ids,
                                  uint64_t capacity,
                                  uint64_t *count);

/**
 * Text of `ids`, NUL-terminated. `length` gets its length, also when `capacity` (which includes the NUL) is too small.
 */
AWQUA_API
awqua_status awqua_model_detokenize(const struct awqua_model *model,
                                    const uint32_t *ids,
                                    uint64_t count,
                                    uint32_t flags,
                                    char *buffer,
                                    uint64_t capacity,
                                    uint64_t *length);

/**
 * The conversation as the model's own template writes it, NUL-terminated. `length` gets its length, also when
 * `capacity` (which includes the NUL) is too small.
 */
AWQUA_API
awqua_status awqua_model_render_chat(const struct awqua_model *model,
                                     const struct awqua_message *messages,
                                     uint64_t count,
                                     uint32_t flags,
                                     char *buffer,
                                     uint64_t capacity,
                                     uint64_t *length);

/**
 * Fills a description with its defaults, as far as its `struct_size` goes, which has to be set before.
 */
AWQUA_API awqua_status awqua_session_desc_init(struct awqua_session_desc *desc);

/**
 * Makes a session on a loaded model, with an empty cache. `desc` may be NULL for the defaults.
 */
AWQUA_API
awqua_status awqua_session_create(const struct awqua_model *model,
                                  const struct awqua_session_desc *desc,
                                  struct awqua_session **session);

/**
 * Frees a session; NULL is fine.
 */
AWQUA_API awqua_status awqua_session_free(struct awqua_session *session);

/**
 * Copies the text of the last failed call on `session`, as awqua_last_error does.
 */
AWQUA_API
awqua_status awqua_session_last_error(const struct awqua_session *session,
                                      char *buffer,
                                      uint64_t capacity,
                                      uint64_t *length);

/**
 * What the session holds.
 */
AWQUA_API
awqua_status awqua_session_get_info(const struct awqua_session *session,
                                    struct awqua_session_info *info);

/**
 * Forgets all but the first `n_tokens` tokens of the cache. Fails with AWQUA_ERR_STATE while an answer is being made.
 */
AWQUA_API
awqua_status awqua_session_truncate(struct awqua_session *session,
                                    uint32_t n_tokens);

/**
 * Makes a session of the same capacities that holds what this one does, without computing it again: many characters on
 * one system prompt compute it once, and keep its memory once. On the CPU what nobody writes to is shared; on a GPU all
 * forks of a session share one copy of their start, in multiples of 64 tokens or more, beside the session they came
 * from, and one that goes back behind it gets its own. Either goes on as if the other one did not exist.
 *
 * On CUDA and the CPU sums do not depend on where the start lies, so that deterministic sessions share it too. Where forks
 * copy instead, through wgpu: in deterministic sessions with matrix units or subgroups, whose kernels add up in another
 * order once the start lies apart, unless AWQUA_SESSION_SHARE_FORKS has them do without these kernels; and in
 * deterministic sessions of models with windows, whose sums begin anywhere. Fails with AWQUA_ERR_STATE while an answer is
 * being made.
 */
AWQUA_API
awqua_status awqua_session_fork(struct awqua_session *session,
                                struct awqua_session **forked);

/**
 * Copies what the session holds, tokens with their keys and values, to `buffer`; waits for the GPU. `length` gets the
 * needed bytes, also when `capacity` is too small. What is saved tells its model and has a checksum. Fails with
 * AWQUA_ERR_STATE while an answer is being made.
 */
AWQUA_API
awqua_status awqua_session_save(struct awqua_session *session,
                                void *buffer,
                                uint64_t capacity,
                                uint64_t *length);

/**
 * Takes back what awqua_session_save gave, in this session or another one, in this run or a later one, on the same
 * model; it replaces what the session holds. Fails with AWQUA_ERR_INVALID_ARGUMENT, the session being as it was, for
 * bytes that are damaged or of another model, with AWQUA_ERR_CONTEXT_FULL if the tokens do not fit, and with
 * AWQUA_ERR_STATE while an answer is being made.
 */
AWQUA_API
awqua_status awqua_session_restore(struct awqua_session *session,
                                   const void *snapshot,
                                   uint64_t length);

/**
 * Gives the memory of an idle session back; its tokens are known, and computed again when they are needed. Fails with
 * AWQUA_ERR_STATE while an answer is being made.
 */
AWQUA_API
awqua_status awqua_session_trim(struct awqua_session *session);

/**
 * Fills a request with its defaults, as far as its `struct_size` goes, which has to be set before.
 */
AWQUA_API awqua_status awqua_request_init(struct awqua_request *request);

/**
 * Begins to answer the token ids `ids`, which replace what the session holds; the start they share with it is not
 * computed again. Drops events of an earlier answer. `request` may be NULL for its defaults. Fails with
 * AWQUA_ERR_STATE while an answer is being made: tick it to its end or cancel it first.
 */
AWQUA_API
awqua_status awqua_session_begin_tokens(struct awqua_session *session,
                                        const uint32_t *ids,
                                        uint64_t count,
                                        const struct awqua_request *request);

/**
 * As awqua_session_begin_tokens, for plain text to continue.
 */
AWQUA_API
awqua_status awqua_session_begin_text(struct awqua_session *session,
                                      struct awqua_str prompt,
                                      const struct awqua_request *request);

/**
 * As awqua_session_begin_tokens, for a conversation, which the model's own template renders.
 */
AWQUA_API
awqua_status awqua_session_begin_chat(struct awqua_session *session,
                                      const struct awqua_message *messages,
                                      uint64_t count,
                                      const struct awqua_request *request);

/**
 * Works on the answer within `budget`, without waiting for the GPU: AWQUA_PENDING while there is more to do, AWQUA_OK
 * once the answer is complete, failed or was never begun. Its text and its end are polled as events; a failure of the
 * answer is an event as well, and the status of this call. AWQUA_ERR_EVICTED keeps the answer, which goes on after
 * awqua_model_restore; a lost device is AWQUA_PENDING in AWQUA_PHASE_LOST, and goes on after awqua_engine_recover.
 * `budget` may be NULL for its defaults, `result` may be NULL.
 *
 * On the CPU nothing is allocated while tokens are made.
 */
AWQUA_API
awqua_status awqua_session_tick(struct awqua_session *session,
                                const struct awqua_budget *budget,
                                struct awqua_tick_result *result);

/**
 * Takes the next event: AWQUA_OK, or AWQUA_EMPTY if there is none. Text goes to the memory that `event` names; if
 * that does not hold even one character, fails with AWQUA_ERR_BUFFER_TOO_SMALL, `text_waiting` says how much there
 * is, and nothing is lost.
 */
AWQUA_API
awqua_status awqua_session_poll(struct awqua_session *session,
                                struct awqua_event *event);

/**
 * Ends the answer at the next tick, which makes its AWQUA_EVENT_DONE with AWQUA_STOP_CANCELLED. What the session
 * computed stays in its cache. Does nothing if no answer is being made. Any thread, any time.
 */
AWQUA_API
awqua_status awqua_session_cancel(const struct awqua_session *session);

/**
 * Ticks until the answer is complete, waiting for the GPU, for tools that have nothing else to do. Its text waits as
 * events. AWQUA_ERR_DEVICE_LOST if the device is lost; the answer is kept then.
 */
AWQUA_API
awqua_status awqua_session_run(struct awqua_session *session);

/**
 * Begins to embed the token ids `ids` as one vector: the mean of the last hidden states (behind the final norm) of all
 * of them. They replace what the session holds. awqua_session_tick does the work and makes an AWQUA_EVENT_DONE with
 * AWQUA_STOP_COMPLETE; then awqua_session_get_embedding has the result. Fails with AWQUA_ERR_STATE while an answer is
 * being made.
 */
AWQUA_API
awqua_status awqua_session_begin_embedding_tokens(struct awqua_session *session,
                                                  const uint32_t *ids,
                                                  uint64_t count);

/**
 * As awqua_session_begin_embedding_tokens, for a text.
 */
AWQUA_API
awqua_status awqua_session_begin_embedding_text(struct awqua_session *session,
                                                struct awqua_str text);

/**
 * Copies the last embedding, as many values as the model's hidden size. `count` gets their number, also when `capacity`
 * is too small. Fails with AWQUA_ERR_STATE if none was completed since something was begun.
 */
AWQUA_API
awqua_status awqua_session_get_embedding(const struct awqua_session *session,
                                         float *values,
                                         uint64_t capacity,
                                         uint64_t *count);

/**
 * Makes a batch for sessions of `model` that are made with `desc`, which may be NULL for the defaults, with room for
 * passes over `n_sessions` of them, 1 to 4096; more than that take turns.
 */
AWQUA_API
awqua_status awqua_batch_create(const struct awqua_model *model,
                                const struct awqua_session_desc *desc,
                                uint32_t n_sessions,
                                struct awqua_batch **batch);

/**
 * Frees a batch; NULL is fine. Its sessions go on by themselves, or in another batch.
 */
AWQUA_API awqua_status awqua_batch_free(struct awqua_batch *batch);

/**
 * Copies the text of the last failed call on `batch`, as awqua_last_error does.
 */
AWQUA_API
awqua_status awqua_batch_last_error(const struct awqua_batch *batch,
                                    char *buffer,
                                    uint64_t capacity,
                                    uint64_t *length);

/**
 * Whether passes are shared on this device, 1 or 0; where not, a tick works on the sessions in turn.
 */
AWQUA_API awqua_status awqua_batch_shares(const struct awqua_batch *batch, uint32_t *shares);

/**
 * Works on the answers of `count` sessions, whose pointers are in `sessions`, as awqua_session_tick does for one;
 * `budget` is that of all of them. AWQUA_PENDING while one of them has more to do, else AWQUA_OK. A failure of an
 * answer is an event of its session; the others go on. AWQUA_ERR_EVICTED keeps all answers.
 *
 * `results` may be NULL, or has room for `count` structures, one for each session, with `struct_size` set in all.
 * `cpu_us` is the time of the whole call in each.
 */
AWQUA_API
awqua_status awqua_batch_tick(struct awqua_batch *batch,
                              struct awqua_session *const *sessions,
                              uint32_t count,
                              const struct awqua_budget *budget,
                              struct awqua_tick_result *results);

/**
 * Ticks until all answers are complete, waiting for the GPU, for tools that have nothing else to do. Their text waits as
 * events. AWQUA_ERR_DEVICE_LOST if the device is lost; the answers are kept then.
 */
AWQUA_API
awqua_status awqua_batch_run(struct awqua_batch *batch,
                             struct awqua_session *const *sessions,
                             uint32_t count);

/**
 * ABI of the library that is loaded, as AWQUA_ABI_VERSION: major << 16 | minor. A program works with a library of the
 * same major and the same or a higher minor version.
 */
AWQUA_API
uint32_t awqua_abi_version(void);

/**
 * Version of the library, as "1.2.3".
 */
AWQUA_API const char *awqua_version(void);

/**
 * Name of a status, as "AWQUA_ERR_IO"; "AWQUA_UNKNOWN" for one this library does not know. Never NULL.
 */
AWQUA_API const char *awqua_status_name(int32_t status);

/**
 * Copies the text of the last failed call of this thread, on whatever object, cut to `capacity` and always ended by a
 * NUL. `length` may be NULL and gets the length of the whole text.
 */
AWQUA_API
awqua_status awqua_last_error(char *buffer,
                              uint64_t capacity,
                              uint64_t *length);

/**
 * Hands out the table of functions, for programs that load the library at run time and look up this symbol only.
 *
 * Pass AWQUA_ABI_VERSION and sizeof(awqua_api) of the header the program was compiled with: fails with AWQUA_ERR_ABI
 * if the library is older than that or of another major version. The table lives as long as the library is loaded.
 */
AWQUA_API
awqua_status awqua_get_api(uint32_t abi_version,
                           uint32_t table_size,
                           const struct awqua_api **api);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* AWQUA_H */
