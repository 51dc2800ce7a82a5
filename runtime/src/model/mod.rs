//! What is computed: a checkpoint's configuration turned into a program.
