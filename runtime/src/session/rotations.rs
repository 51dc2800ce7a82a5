//! The rotary tables of a session: which rows its runner has, and writing those it lacks.

use std::ops::Range;

use crate::backend::Runner;
use crate::error::Result;
use crate::model::{ModelConfig, append_rows};

/// Rows written at a time, so that the decode loop writes once in a while and not for every token.
const BLOCK: usize = 64;

/// What the tables hold.
#[derive(Debug, Clone, Default)]
pub(super) struct Rotations {
    /// Rows written so far.
    rows: usize,
    /// Length of the sequence they are for.
    pub(super) length: usize,
    /// Frequencies and magnitude of each table for that length, and memory for a block of rows.
    frequencies: Vec<(Vec<f32>, f32)>,
    block: Vec<f32>,
}

impl Rotations {
    /// After keys that were rotated for a sequence of `length` tokens came from elsewhere: the tables are still empty.
    pub(super) fn of_length(length: usize) -> Self {
        Self { length, ..Self::default() }
    }

    /// Sees to the rows of `positions` of a sequence of `length` tokens, those before them being there.
    ///
    /// # Errors
    /// Those of the runner.
    pub(super) fn write(
        &mut self,
        config: &ModelConfig,
        runner: &mut dyn Runner,
        positions: Range<usize>,
        length: usize,
        context: usize,
    ) -> Result<()> {
        let first = self.frequencies.is_empty();
        let changed = self.length != 0 && !config.same_rope_rows(self.length, length);
        if first || changed {
            self.frequencies.clear();
            self.frequencies.extend(config.ropes.iter().map(|rope| rope.frequencies(length)));
        }
        if changed {
            self.rows = positions.start;
        }
        self.length = length;
        while self.rows < positions.end {
            // Rows that change with the length are not worth writing in advance.
            let wanted = if changed { positions.end } else { usize::MAX };
            let end = wanted.min(self.rows + BLOCK).min(context);
            for (table, (frequencies, magnitude)) in self.frequencies.iter().enumerate() {
                self.block.clear();
                append_rows(frequencies, *magnitude, self.rows..end, &mut self.block);
                runner.write_rope(table as u32, self.rows as u32, &self.block)?;
            }
            self.rows = end;
        }
        Ok(())
    }
}
