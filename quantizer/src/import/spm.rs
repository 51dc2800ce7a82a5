//! SentencePiece BPE models as merge lists.

use std::collections::HashMap;

/// The merges that make byte-pair encoding choose like SentencePiece does by scores.
///
/// SentencePiece merges the adjacent pair whose concatenation is the best-scored piece. A merge list has an order
/// instead: every split of every piece into two pieces, best score first; among equal scores the longer left part
/// first, then the order of pieces. This is the order of the published `tokenizer.json` files of such models.
///
/// `pieces` are (id, text, score) of the pieces that text may be merged to, `vocab` all texts with their ids.
pub(super) fn merges_from_scores<'a>(
    pieces: &[(u32, &'a str, f64)],
    vocab: &HashMap<&str, u32>,
) -> Vec<(&'a str, &'a str)> {
    struct Merge<'a> {
        left: &'a str,
        right: &'a str,
        score: f64,
        lengths: (usize, usize),
    }
    let mut merges = Vec::new();
    for (_, piece, score) in pieces {
        let mut splits: Vec<_> = piece
            .char_indices()
            .skip(1)
            .map(|(at, _)| piece.split_at(at))
            .filter_map(|(left, right)| Some(((*vocab.get(left)?, *vocab.get(right)?), left, right)))
            .collect();
        splits.sort_by_key(|(ids, _, _)| *ids);
        merges.extend(splits.into_iter().map(|(_, left, right)| Merge {
            left,
            right,
            score: *score,
            lengths: (left.chars().count(), right.chars().count()),
        }));
    }
    // Stable: equal merges stay in the order of their pieces.
    merges.sort_by(|a, b| b.score.total_cmp(&a.score).then(b.lengths.cmp(&a.lengths)));
    merges.into_iter().map(|m| (m.left, m.right)).collect()
}
