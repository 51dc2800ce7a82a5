//! SentencePiece BPE models as merge lists.

use std::collections::HashMap;

/// The merges that make byte-pair encoding choose like SentencePiece does by scores.
///
/// SentencePiece merges the adjacent pair whose concatenation is the best-scored piece. A merge list has an order
/// instead: every split of every piece into two pieces, best score first; among equal scores pieces stay in their
/// order, and splits of one piece come in the order of their parts' ids. Published `tokenizer.json` files of such
/// models have this order.
///
/// `pieces` are (text, score) of the pieces that text may be merged to, by id; `vocab` all texts with their ids.
pub(super) fn merges_from_scores<'a>(pieces: &[(&'a str, f64)], vocab: &HashMap<&str, u32>) -> Vec<(&'a str, &'a str)> {
    let mut merges = Vec::new();
    for (piece, score) in pieces {
        let mut splits: Vec<_> = piece
            .char_indices()
            .skip(1)
            .map(|(at, _)| piece.split_at(at))
            .filter_map(|(left, right)| Some(((*vocab.get(left)?, *vocab.get(right)?), left, right)))
            .collect();
        splits.sort_by_key(|(ids, _, _)| *ids);
        merges.extend(splits.into_iter().map(|(_, left, right)| (*score, left, right)));
    }
    // Stable: equal merges stay in the order of their pieces.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    merges.into_iter().map(|(_, left, right)| (left, right)).collect()
}
