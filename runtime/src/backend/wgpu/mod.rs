//! Any GPU through wgpu.
