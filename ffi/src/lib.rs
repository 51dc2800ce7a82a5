//! The C ABI of Awqua: `include/awqua.h` is generated from this crate, which is the only one that sees C types.
//!
//! | module | subject |
//! |---|---|
//! | `status` | what calls return |
//! | `boundary`, `handle` | panics, failures, who may use an object when |
//! | `layout`, `text` | structures with a size, text and arrays of the caller |
//! | `alloc`, `log` | the host's memory and log |
//! | `engine`, `model`, `session` | the objects |
//! | `vulkan` | the host's Vulkan device |
//! | `source`, `jobs` | the host's files and threads |
//! | `answer` | what sessions make, tick by tick |
//! | `batch` | several sessions in one tick |
//! | `api` | the same functions as a table |
//!
//! Exported functions keep one order of arguments: object, inputs, outputs; and write outputs only on success.
#![allow(non_camel_case_types, reason = "C names")]
#![allow(clippy::missing_safety_doc, reason = "the header states the contract of all pointers once")]

mod alloc;
mod answer;
mod api;
mod batch;
mod boundary;
mod engine;
mod handle;
mod jobs;
mod layout;
mod log;
mod model;
mod session;
mod source;
mod status;
mod table;
mod text;
mod version;
mod vulkan;
