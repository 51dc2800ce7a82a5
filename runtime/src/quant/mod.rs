//! What the bits mean: every weight dialect on disk, to and from the canonical form.
