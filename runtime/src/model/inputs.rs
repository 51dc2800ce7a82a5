//! Inputs of matrices that take them in another order or scaled: an operation in front of the linear layer.

use std::collections::{HashMap, HashSet};

use super::weights::InputIds;
use crate::backend::{BufferDesc, BufferId, Op, Program, Rows, WeightId};
use crate::error::{Error, ErrorKind, Result};

/// Puts an [`Op::Arrange`] in front of every linear layer of `program` whose weight is in `inputs`; layers in a row that
/// do the same to the same buffer share one.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if another operation than a linear layer reads such a weight.
pub(super) fn arrange(program: &mut Program, inputs: &HashMap<WeightId, InputIds>) -> Result<()> {
    if inputs.is_empty() {
        return Ok(());
    }
    let mut buffers = HashMap::new();
    let mut arranged = HashSet::new();
    let mut ops: Vec<Op> = Vec::with_capacity(program.ops.len());
    // The transform whose result is still in its buffer.
    let mut held: Option<(BufferId, InputIds, Rows, BufferId)> = None;
    for mut op in std::mem::take(&mut program.ops) {
        if let Op::Linear { x, weight, rows, .. } = &mut op
            && let Some(&ids) = inputs.get(weight)
        {
            arranged.insert(*weight);
            // Rows of logits are read from token rows by the linear layer itself.
            let moved = if *rows == Rows::Logits { Rows::All } else { *rows };
            let out = match held {
                Some((from, same, kept, out)) if (from, same, kept) == (*x, ids, moved) => out,
                _ => {
                    let desc = &program.buffers[x.0 as usize];
                    let desc = BufferDesc { name: "arranged", ..desc.clone() };
                    let out = *buffers.entry((desc.width, desc.logits_rows)).or_insert_with(|| {
                        program.buffers.push(desc);
                        BufferId(program.buffers.len() as u32 - 1)
                    });
                    ops.push(Op::Arrange { x: *x, order: ids.order, factors: ids.factors, out, rows: moved });
                    out
                }
            };
            held = Some((*x, ids, moved, out));
            *x = out;
        }
        // Only linear layers are known to leave the buffer alone, if it is not theirs.
        held = held.filter(|(from, ..)| matches!(&op, Op::Linear { out, .. } if out.buffer != *from));
        ops.push(op);
    }
    program.ops = ops;
    if arranged.len() < inputs.len() {
        let message = "a matrix that reorders its inputs outside of a linear layer";
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(())
}
