//! Answers of a given form: which tokens may come next, by llguidance.

use std::sync::{Arc, OnceLock};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};

use super::generate::Grammar;
use super::tokenizer::Vocabulary;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;

/// What all grammars over one vocabulary share, made when the first one is used.
#[derive(Default)]
pub(super) struct Grammars(OnceLock<std::result::Result<ParserFactory, String>>);

impl Grammars {
    fn factory(&self, vocabulary: &Vocabulary, eos: &[u32]) -> Result<&ParserFactory> {
        self.0.get_or_init(|| factory(vocabulary, eos)).as_ref().map_err(invalid)
    }
}

fn factory(vocabulary: &Vocabulary, eos: &[u32]) -> std::result::Result<ParserFactory, String> {
    let words: Vec<Vec<u8>> = (0..vocabulary.len() as u32)
        .map(|id| match vocabulary.is_special(id) {
            false => vocabulary.bytes(id).to_vec(),
            // A byte that no text has keeps what only steers apart from text that looks the same.
            true => [&[TokTrie::SPECIAL_TOKEN_MARKER], vocabulary.bytes(id)].concat(),
        })
        .collect();
    let info = TokRxInfo::new(words.len() as u32, eos[0]);
    let trie = TokTrie::from(&info, &words).with_eos_tokens(eos);
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let mut factory = ParserFactory::new_simple(&env).map_err(|e| e.to_string())?;
    // It would print to standard error otherwise.
    factory.quiet();
    Ok(factory)
}

fn invalid(message: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("the grammar: {message}"))
}

/// A grammar and how much of an answer it has seen.
pub(super) struct Constraint {
    matcher: Matcher,
    /// Tokens that may come next, if that is known already.
    allowed: Option<SimpleVob>,
}

impl Constraint {
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a grammar that does not compile, [`ErrorKind::Unsupported`] for a model whose tokens
    /// are not known as bytes.
    pub(super) fn new(model: &Model, grammar: &Grammar) -> Result<Self> {
        let tokenizer = model.tokenizer()?;
        let unsupported = |message: &str| Error::new(ErrorKind::Unsupported, message);
        let vocabulary = tokenizer
            .vocabulary()
            .ok_or_else(|| unsupported("a grammar needs a tokenizer whose tokens stand for bytes one by one"))?;
        let eos: Vec<u32> =
            model.generation().eos_token_ids.iter().copied().filter(|&id| (id as usize) < vocabulary.len()).collect();
        if eos.is_empty() {
            return Err(unsupported("a grammar needs a model with an end-of-turn id"));
        }
        let factory = tokenizer.grammars().factory(vocabulary, &eos)?;
        let grammar = match grammar {
            Grammar::JsonSchema(schema) => {
                TopLevelGrammar::from_json_schema(serde_json::from_str(schema).map_err(invalid)?)
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
        };
        let matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            Some(message) => Err(invalid(message)),
            None => Ok(Self { matcher, allowed: None }),
        }
    }

    /// Finds out which tokens may come next.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the grammar is too complex for that.
    pub(super) fn prepare(&mut self) -> Result<()> {
        if self.allowed.is_none() {
            self.allowed = Some(self.matcher.compute_mask().map_err(invalid)?);
        }
        Ok(())
    }

    /// What [`Self::prepare`] found, as [`super::sampler::SampleRequest::mask`].
    pub(super) fn mask(&self) -> Option<&[u32]> {
        self.allowed.as_ref().map(SimpleVob::as_slice)
    }

    /// Takes the next token of the answer; true if nothing may follow.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a token that was not allowed.
    pub(super) fn accept(&mut self, id: u32) -> Result<bool> {
        self.allowed = None;
        self.matcher.consume_token(id).map_err(invalid)?;
        Ok(self.matcher.is_stopped())
    }
}
