//! Stands in for `grammar.rs` in a build without it.

use super::generate::Grammar;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;

#[derive(Default)]
pub(super) struct Grammars {}

/// There is none.
pub(super) enum Constraint {}

impl Constraint {
    pub(super) fn new(model: &Model, _: &Grammar) -> Result<Self> {
        // A model without a tokenizer is refused for that, as in a build with grammars.
        let Grammars {} = model.tokenizer()?.grammars();
        Err(Error::new(ErrorKind::Unsupported, "this build has no grammars (feature `grammar`)"))
    }

    pub(super) fn prepare(&mut self) -> Result<()> {
        match *self {}
    }

    pub(super) fn mask(&self) -> Option<&[u32]> {
        match *self {}
    }

    pub(super) fn accept(&mut self, _: u32) -> Result<bool> {
        match *self {}
    }
}
