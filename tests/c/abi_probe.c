/* Everything the ABI consists of, as objects whose debug information abidw reads: the table has every function with its
 * types (layout.c proves that they are those of the plain functions), and each enumeration needs an object of its own. */
#include "awqua.h"

#ifdef __cplusplus
#define EXTERN extern "C"
#else
#define EXTERN
#endif

EXTERN const awqua_api *awqua_probe_table;
EXTERN enum awqua_status awqua_probe_status;
EXTERN enum awqua_backend awqua_probe_backend;
EXTERN enum awqua_device_kind awqua_probe_device_kind;
EXTERN enum awqua_log_level awqua_probe_log_level;
EXTERN enum awqua_kv_type awqua_probe_kv_type;
EXTERN enum awqua_phase awqua_probe_phase;
EXTERN enum awqua_event_kind awqua_probe_event_kind;
EXTERN enum awqua_stop_reason awqua_probe_stop_reason;
EXTERN enum awqua_load_stage awqua_probe_load_stage;
EXTERN enum awqua_trim awqua_probe_trim;
EXTERN enum awqua_grammar awqua_probe_grammar;

const awqua_api *awqua_probe_table;
enum awqua_status awqua_probe_status;
enum awqua_backend awqua_probe_backend;
enum awqua_device_kind awqua_probe_device_kind;
enum awqua_log_level awqua_probe_log_level;
enum awqua_kv_type awqua_probe_kv_type;
enum awqua_phase awqua_probe_phase;
enum awqua_event_kind awqua_probe_event_kind;
enum awqua_stop_reason awqua_probe_stop_reason;
enum awqua_load_stage awqua_probe_load_stage;
enum awqua_trim awqua_probe_trim;
enum awqua_grammar awqua_probe_grammar;
