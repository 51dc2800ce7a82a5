/* GENERATED from the layouts in ffi/src by AWQUA_BLESS=1 cargo test -p awqua-tests --test header. */
#include <stddef.h>

#include "awqua.h"

#if UINTPTR_MAX == UINT64_MAX
#define CHECK(name, condition) typedef char check_##name[(condition) ? 1 : -1]

CHECK(awqua_str, sizeof(awqua_str) == 16);
CHECK(awqua_str_data, offsetof(awqua_str, data) == 0);
CHECK(awqua_str_len, offsetof(awqua_str, len) == 8);

CHECK(awqua_allocator, sizeof(awqua_allocator) == 32);
CHECK(awqua_allocator_struct_size, offsetof(awqua_allocator, struct_size) == 0);
CHECK(awqua_allocator_flags, offsetof(awqua_allocator, flags) == 4);
CHECK(awqua_allocator_user, offsetof(awqua_allocator, user) == 8);
CHECK(awqua_allocator_alloc, offsetof(awqua_allocator, alloc) == 16);
CHECK(awqua_allocator_free, offsetof(awqua_allocator, free) == 24);

CHECK(awqua_memory_stats, sizeof(awqua_memory_stats) == 32);
CHECK(awqua_memory_stats_struct_size, offsetof(awqua_memory_stats, struct_size) == 0);
CHECK(awqua_memory_stats_flags, offsetof(awqua_memory_stats, flags) == 4);
CHECK(awqua_memory_stats_bytes, offsetof(awqua_memory_stats, bytes) == 8);
CHECK(awqua_memory_stats_peak_bytes, offsetof(awqua_memory_stats, peak_bytes) == 16);
CHECK(awqua_memory_stats_allocations, offsetof(awqua_memory_stats, allocations) == 24);

CHECK(awqua_vulkan, sizeof(awqua_vulkan) == 88);
CHECK(awqua_vulkan_struct_size, offsetof(awqua_vulkan, struct_size) == 0);
CHECK(awqua_vulkan_flags, offsetof(awqua_vulkan, flags) == 4);
CHECK(awqua_vulkan_api_version, offsetof(awqua_vulkan, api_version) == 8);
CHECK(awqua_vulkan_queue_family, offsetof(awqua_vulkan, queue_family) == 12);
CHECK(awqua_vulkan_queue_index, offsetof(awqua_vulkan, queue_index) == 16);
CHECK(awqua_vulkan_reserved, offsetof(awqua_vulkan, reserved) == 20);
CHECK(awqua_vulkan_get_instance_proc_addr, offsetof(awqua_vulkan, get_instance_proc_addr) == 24);
CHECK(awqua_vulkan_instance, offsetof(awqua_vulkan, instance) == 32);
CHECK(awqua_vulkan_physical_device, offsetof(awqua_vulkan, physical_device) == 40);
CHECK(awqua_vulkan_device, offsetof(awqua_vulkan, device) == 48);
CHECK(awqua_vulkan_lock_queue, offsetof(awqua_vulkan, lock_queue) == 56);
CHECK(awqua_vulkan_unlock_queue, offsetof(awqua_vulkan, unlock_queue) == 64);
CHECK(awqua_vulkan_released, offsetof(awqua_vulkan, released) == 72);
CHECK(awqua_vulkan_user, offsetof(awqua_vulkan, user) == 80);

CHECK(awqua_engine_desc, sizeof(awqua_engine_desc) == 112);
CHECK(awqua_engine_desc_struct_size, offsetof(awqua_engine_desc, struct_size) == 0);
CHECK(awqua_engine_desc_flags, offsetof(awqua_engine_desc, flags) == 4);
CHECK(awqua_engine_desc_backend, offsetof(awqua_engine_desc, backend) == 8);
CHECK(awqua_engine_desc_threads, offsetof(awqua_engine_desc, threads) == 12);
CHECK(awqua_engine_desc_device, offsetof(awqua_engine_desc, device) == 16);
CHECK(awqua_engine_desc_host_budget_bytes, offsetof(awqua_engine_desc, host_budget_bytes) == 32);
CHECK(awqua_engine_desc_device_budget_bytes, offsetof(awqua_engine_desc, device_budget_bytes) == 40);
CHECK(awqua_engine_desc_pipeline_cache, offsetof(awqua_engine_desc, pipeline_cache) == 48);
CHECK(awqua_engine_desc_pipeline_cache_len, offsetof(awqua_engine_desc, pipeline_cache_len) == 56);
CHECK(awqua_engine_desc_device_uuid, offsetof(awqua_engine_desc, device_uuid) == 64);
CHECK(awqua_engine_desc_device_luid, offsetof(awqua_engine_desc, device_luid) == 80);
CHECK(awqua_engine_desc_parallel_for, offsetof(awqua_engine_desc, parallel_for) == 88);
CHECK(awqua_engine_desc_parallel_for_user, offsetof(awqua_engine_desc, parallel_for_user) == 96);
CHECK(awqua_engine_desc_vulkan, offsetof(awqua_engine_desc, vulkan) == 104);

CHECK(awqua_engine_info, sizeof(awqua_engine_info) == 24);
CHECK(awqua_engine_info_struct_size, offsetof(awqua_engine_info, struct_size) == 0);
CHECK(awqua_engine_info_flags, offsetof(awqua_engine_info, flags) == 4);
CHECK(awqua_engine_info_host_bytes, offsetof(awqua_engine_info, host_bytes) == 8);
CHECK(awqua_engine_info_device_bytes, offsetof(awqua_engine_info, device_bytes) == 16);

CHECK(awqua_device_info, sizeof(awqua_device_info) == 312);
CHECK(awqua_device_info_struct_size, offsetof(awqua_device_info, struct_size) == 0);
CHECK(awqua_device_info_flags, offsetof(awqua_device_info, flags) == 4);
CHECK(awqua_device_info_kind, offsetof(awqua_device_info, kind) == 8);
CHECK(awqua_device_info_reserved, offsetof(awqua_device_info, reserved) == 12);
CHECK(awqua_device_info_max_buffer_bytes, offsetof(awqua_device_info, max_buffer_bytes) == 16);
CHECK(awqua_device_info_max_binding_bytes, offsetof(awqua_device_info, max_binding_bytes) == 24);
CHECK(awqua_device_info_name, offsetof(awqua_device_info, name) == 32);
CHECK(awqua_device_info_api, offsetof(awqua_device_info, api) == 160);
CHECK(awqua_device_info_driver, offsetof(awqua_device_info, driver) == 176);
CHECK(awqua_device_info_uuid, offsetof(awqua_device_info, uuid) == 288);
CHECK(awqua_device_info_luid, offsetof(awqua_device_info, luid) == 304);

CHECK(awqua_file, sizeof(awqua_file) == 32);
CHECK(awqua_file_name, offsetof(awqua_file, name) == 0);
CHECK(awqua_file_data, offsetof(awqua_file, data) == 16);
CHECK(awqua_file_len, offsetof(awqua_file, len) == 24);

CHECK(awqua_io, sizeof(awqua_io) == 56);
CHECK(awqua_io_struct_size, offsetof(awqua_io, struct_size) == 0);
CHECK(awqua_io_flags, offsetof(awqua_io, flags) == 4);
CHECK(awqua_io_user, offsetof(awqua_io, user) == 8);
CHECK(awqua_io_open, offsetof(awqua_io, open) == 16);
CHECK(awqua_io_read_at, offsetof(awqua_io, read_at) == 24);
CHECK(awqua_io_map, offsetof(awqua_io, map) == 32);
CHECK(awqua_io_close, offsetof(awqua_io, close) == 40);
CHECK(awqua_io_release, offsetof(awqua_io, release) == 48);

CHECK(awqua_budget, sizeof(awqua_budget) == 40);
CHECK(awqua_budget_struct_size, offsetof(awqua_budget, struct_size) == 0);
CHECK(awqua_budget_flags, offsetof(awqua_budget, flags) == 4);
CHECK(awqua_budget_cpu_us, offsetof(awqua_budget, cpu_us) == 8);
CHECK(awqua_budget_gpu_us, offsetof(awqua_budget, gpu_us) == 16);
CHECK(awqua_budget_load_bytes, offsetof(awqua_budget, load_bytes) == 24);
CHECK(awqua_budget_load_kernels, offsetof(awqua_budget, load_kernels) == 32);
CHECK(awqua_budget_reserved, offsetof(awqua_budget, reserved) == 36);

CHECK(awqua_model_desc, sizeof(awqua_model_desc) == 48);
CHECK(awqua_model_desc_struct_size, offsetof(awqua_model_desc, struct_size) == 0);
CHECK(awqua_model_desc_flags, offsetof(awqua_model_desc, flags) == 4);
CHECK(awqua_model_desc_path, offsetof(awqua_model_desc, path) == 8);
CHECK(awqua_model_desc_files, offsetof(awqua_model_desc, files) == 24);
CHECK(awqua_model_desc_n_files, offsetof(awqua_model_desc, n_files) == 32);
CHECK(awqua_model_desc_io, offsetof(awqua_model_desc, io) == 40);

CHECK(awqua_load_progress, sizeof(awqua_load_progress) == 32);
CHECK(awqua_load_progress_struct_size, offsetof(awqua_load_progress, struct_size) == 0);
CHECK(awqua_load_progress_flags, offsetof(awqua_load_progress, flags) == 4);
CHECK(awqua_load_progress_done, offsetof(awqua_load_progress, done) == 8);
CHECK(awqua_load_progress_total, offsetof(awqua_load_progress, total) == 16);
CHECK(awqua_load_progress_stage, offsetof(awqua_load_progress, stage) == 24);
CHECK(awqua_load_progress_reserved, offsetof(awqua_load_progress, reserved) == 28);

CHECK(awqua_estimate, sizeof(awqua_estimate) == 40);
CHECK(awqua_estimate_struct_size, offsetof(awqua_estimate, struct_size) == 0);
CHECK(awqua_estimate_flags, offsetof(awqua_estimate, flags) == 4);
CHECK(awqua_estimate_weights_host_bytes, offsetof(awqua_estimate, weights_host_bytes) == 8);
CHECK(awqua_estimate_weights_device_bytes, offsetof(awqua_estimate, weights_device_bytes) == 16);
CHECK(awqua_estimate_session_host_bytes, offsetof(awqua_estimate, session_host_bytes) == 24);
CHECK(awqua_estimate_session_device_bytes, offsetof(awqua_estimate, session_device_bytes) == 32);

CHECK(awqua_model_info, sizeof(awqua_model_info) == 184);
CHECK(awqua_model_info_struct_size, offsetof(awqua_model_info, struct_size) == 0);
CHECK(awqua_model_info_flags, offsetof(awqua_model_info, flags) == 4);
CHECK(awqua_model_info_vocab_size, offsetof(awqua_model_info, vocab_size) == 8);
CHECK(awqua_model_info_n_layers, offsetof(awqua_model_info, n_layers) == 12);
CHECK(awqua_model_info_hidden_size, offsetof(awqua_model_info, hidden_size) == 16);
CHECK(awqua_model_info_max_context, offsetof(awqua_model_info, max_context) == 20);
CHECK(awqua_model_info_weight_bytes, offsetof(awqua_model_info, weight_bytes) == 24);
CHECK(awqua_model_info_backend, offsetof(awqua_model_info, backend) == 32);
CHECK(awqua_model_info_device, offsetof(awqua_model_info, device) == 48);
CHECK(awqua_model_info_identity, offsetof(awqua_model_info, identity) == 176);

CHECK(awqua_message, sizeof(awqua_message) == 32);
CHECK(awqua_message_role, offsetof(awqua_message, role) == 0);
CHECK(awqua_message_content, offsetof(awqua_message, content) == 16);

CHECK(awqua_session_desc, sizeof(awqua_session_desc) == 24);
CHECK(awqua_session_desc_struct_size, offsetof(awqua_session_desc, struct_size) == 0);
CHECK(awqua_session_desc_flags, offsetof(awqua_session_desc, flags) == 4);
CHECK(awqua_session_desc_context, offsetof(awqua_session_desc, context) == 8);
CHECK(awqua_session_desc_kv_type, offsetof(awqua_session_desc, kv_type) == 12);
CHECK(awqua_session_desc_chunk, offsetof(awqua_session_desc, chunk) == 16);
CHECK(awqua_session_desc_reserved, offsetof(awqua_session_desc, reserved) == 20);

CHECK(awqua_session_info, sizeof(awqua_session_info) == 32);
CHECK(awqua_session_info_struct_size, offsetof(awqua_session_info, struct_size) == 0);
CHECK(awqua_session_info_flags, offsetof(awqua_session_info, flags) == 4);
CHECK(awqua_session_info_n_tokens, offsetof(awqua_session_info, n_tokens) == 8);
CHECK(awqua_session_info_context, offsetof(awqua_session_info, context) == 12);
CHECK(awqua_session_info_kv_type, offsetof(awqua_session_info, kv_type) == 16);
CHECK(awqua_session_info_phase, offsetof(awqua_session_info, phase) == 20);
CHECK(awqua_session_info_bytes, offsetof(awqua_session_info, bytes) == 24);

CHECK(awqua_logit_bias, sizeof(awqua_logit_bias) == 8);
CHECK(awqua_logit_bias_id, offsetof(awqua_logit_bias, id) == 0);
CHECK(awqua_logit_bias_bias, offsetof(awqua_logit_bias, bias) == 4);

CHECK(awqua_request, sizeof(awqua_request) == 128);
CHECK(awqua_request_struct_size, offsetof(awqua_request, struct_size) == 0);
CHECK(awqua_request_flags, offsetof(awqua_request, flags) == 4);
CHECK(awqua_request_max_tokens, offsetof(awqua_request, max_tokens) == 8);
CHECK(awqua_request_top_k, offsetof(awqua_request, top_k) == 12);
CHECK(awqua_request_top_p, offsetof(awqua_request, top_p) == 16);
CHECK(awqua_request_min_p, offsetof(awqua_request, min_p) == 20);
CHECK(awqua_request_temperature, offsetof(awqua_request, temperature) == 24);
CHECK(awqua_request_repetition_penalty, offsetof(awqua_request, repetition_penalty) == 28);
CHECK(awqua_request_presence_penalty, offsetof(awqua_request, presence_penalty) == 32);
CHECK(awqua_request_frequency_penalty, offsetof(awqua_request, frequency_penalty) == 36);
CHECK(awqua_request_penalty_window, offsetof(awqua_request, penalty_window) == 40);
CHECK(awqua_request_n_stops, offsetof(awqua_request, n_stops) == 44);
CHECK(awqua_request_seed, offsetof(awqua_request, seed) == 48);
CHECK(awqua_request_stops, offsetof(awqua_request, stops) == 56);
CHECK(awqua_request_stop_ids, offsetof(awqua_request, stop_ids) == 64);
CHECK(awqua_request_n_stop_ids, offsetof(awqua_request, n_stop_ids) == 72);
CHECK(awqua_request_reserved, offsetof(awqua_request, reserved) == 76);
CHECK(awqua_request_biases, offsetof(awqua_request, biases) == 80);
CHECK(awqua_request_banned_ids, offsetof(awqua_request, banned_ids) == 88);
CHECK(awqua_request_n_biases, offsetof(awqua_request, n_biases) == 96);
CHECK(awqua_request_n_banned_ids, offsetof(awqua_request, n_banned_ids) == 100);
CHECK(awqua_request_shift_keep, offsetof(awqua_request, shift_keep) == 104);
CHECK(awqua_request_grammar_kind, offsetof(awqua_request, grammar_kind) == 108);
CHECK(awqua_request_grammar, offsetof(awqua_request, grammar) == 112);

CHECK(awqua_tick_result, sizeof(awqua_tick_result) == 48);
CHECK(awqua_tick_result_struct_size, offsetof(awqua_tick_result, struct_size) == 0);
CHECK(awqua_tick_result_flags, offsetof(awqua_tick_result, flags) == 4);
CHECK(awqua_tick_result_phase, offsetof(awqua_tick_result, phase) == 8);
CHECK(awqua_tick_result_new_tokens, offsetof(awqua_tick_result, new_tokens) == 12);
CHECK(awqua_tick_result_prompt_done, offsetof(awqua_tick_result, prompt_done) == 16);
CHECK(awqua_tick_result_prompt_total, offsetof(awqua_tick_result, prompt_total) == 20);
CHECK(awqua_tick_result_answer_tokens, offsetof(awqua_tick_result, answer_tokens) == 24);
CHECK(awqua_tick_result_reserved, offsetof(awqua_tick_result, reserved) == 28);
CHECK(awqua_tick_result_cpu_us, offsetof(awqua_tick_result, cpu_us) == 32);
CHECK(awqua_tick_result_gpu_queued_us, offsetof(awqua_tick_result, gpu_queued_us) == 40);

CHECK(awqua_event, sizeof(awqua_event) == 64);
CHECK(awqua_event_struct_size, offsetof(awqua_event, struct_size) == 0);
CHECK(awqua_event_flags, offsetof(awqua_event, flags) == 4);
CHECK(awqua_event_kind, offsetof(awqua_event, kind) == 8);
CHECK(awqua_event_reason, offsetof(awqua_event, reason) == 12);
CHECK(awqua_event_status, offsetof(awqua_event, status) == 16);
CHECK(awqua_event_reserved, offsetof(awqua_event, reserved) == 20);
CHECK(awqua_event_text, offsetof(awqua_event, text) == 24);
CHECK(awqua_event_text_capacity, offsetof(awqua_event, text_capacity) == 32);
CHECK(awqua_event_text_len, offsetof(awqua_event, text_len) == 40);
CHECK(awqua_event_text_waiting, offsetof(awqua_event, text_waiting) == 48);
CHECK(awqua_event_done, offsetof(awqua_event, done) == 56);
CHECK(awqua_event_total, offsetof(awqua_event, total) == 60);
#endif

/* The table has the types of the functions. */
void awqua_check_table(awqua_api *table);
void awqua_check_table(awqua_api *table) {
    table->abi_version = awqua_abi_version;
    table->version = awqua_version;
    table->status_name = awqua_status_name;
    table->last_error = awqua_last_error;
    table->get_api = awqua_get_api;
    table->set_allocator = awqua_set_allocator;
    table->memory = awqua_memory;
    table->set_log = awqua_set_log;
    table->engine_desc_init = awqua_engine_desc_init;
    table->engine_free = awqua_engine_free;
    table->engine_last_error = awqua_engine_last_error;
    table->device_count = awqua_device_count;
    table->device_get = awqua_device_get;
    table->budget_init = awqua_budget_init;
    table->model_desc_init = awqua_model_desc_init;
    table->model_create = awqua_model_create;
    table->model_tick = awqua_model_tick;
    table->model_cancel = awqua_model_cancel;
    table->model_free = awqua_model_free;
    table->model_last_error = awqua_model_last_error;
    table->model_get_info = awqua_model_get_info;
    table->model_tokenize = awqua_model_tokenize;
    table->model_detokenize = awqua_model_detokenize;
    table->model_render_chat = awqua_model_render_chat;
    table->session_desc_init = awqua_session_desc_init;
    table->request_init = awqua_request_init;
    table->session_create = awqua_session_create;
    table->session_free = awqua_session_free;
    table->session_last_error = awqua_session_last_error;
    table->session_begin_tokens = awqua_session_begin_tokens;
    table->session_begin_text = awqua_session_begin_text;
    table->session_begin_chat = awqua_session_begin_chat;
    table->session_tick = awqua_session_tick;
    table->session_poll = awqua_session_poll;
    table->session_cancel = awqua_session_cancel;
    table->session_run = awqua_session_run;
    table->session_truncate = awqua_session_truncate;
    table->engine_recover = awqua_engine_recover;
    table->engine_debug_lose_device = awqua_engine_debug_lose_device;
    table->engine_trim = awqua_engine_trim;
    table->engine_get_pipeline_cache = awqua_engine_get_pipeline_cache;
    table->model_run = awqua_model_run;
    table->model_estimate = awqua_model_estimate;
    table->model_evict = awqua_model_evict;
    table->model_restore = awqua_model_restore;
    table->session_save = awqua_session_save;
    table->session_trim = awqua_session_trim;
    table->session_get_embedding = awqua_session_get_embedding;
    table->engine_create = awqua_engine_create;
    table->engine_get_info = awqua_engine_get_info;
    table->engine_recover_vulkan = awqua_engine_recover_vulkan;
    table->session_get_info = awqua_session_get_info;
    table->session_fork = awqua_session_fork;
    table->session_restore = awqua_session_restore;
    table->session_begin_embedding_tokens = awqua_session_begin_embedding_tokens;
    table->session_begin_embedding_text = awqua_session_begin_embedding_text;
    table->batch_create = awqua_batch_create;
    table->batch_free = awqua_batch_free;
    table->batch_last_error = awqua_batch_last_error;
    table->batch_shares = awqua_batch_shares;
    table->batch_tick = awqua_batch_tick;
    table->batch_run = awqua_batch_run;
}
