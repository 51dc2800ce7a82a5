//! An evaluation as one HTML page that needs nothing else.

use std::fmt::Write;

use awqua::session::tokenizer::Tokenizer;

use super::{Comparison, Evaluation};
use crate::plot::{Chart, Mark, Series, escape};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}\
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .75rem;text-align:right;border-bottom:1px solid #ddd}\
td:first-child,th:first-child{text-align:left}svg{max-width:100%;margin:.5rem 0}\
.passage{background:#f6f6f6;padding:.5rem 1rem;margin:.5rem 0;white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:13px}\
mark{background:#ffd54d}";

/// The page; passages are shown as text if there is a tokenizer, else as ids.
pub fn html(evaluation: &Evaluation, tokenizer: Option<&Tokenizer>) -> String {
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title><style>{STYLE}</style></head>\
         <body><h1>{0}</h1><p>Compared with {1}.</p>",
        escape(&evaluation.candidate_dir),
        escape(&evaluation.reference_dir)
    );
    if let Some(found) = &evaluation.comparison {
        comparison(&mut out, found);
        passages(&mut out, found, tokenizer);
    }
    if !evaluation.tasks.is_empty() {
        out += "<h2>Tasks</h2><table><tr><th>task</th><th>model</th><th>questions</th><th>bits a byte</th>\
                <th>all first choice</th><th>accuracy</th><th>by byte</th><th>unconditional</th></tr>";
        for (model, task) in &evaluation.tasks {
            let share = |v: Option<f64>| v.map_or("–".into(), |v| format!("{:.2} %", 100.0 * v));
            let _ = write!(
                out,
                "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.4}</td><td>{:.2} %</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&task.name),
                escape(model),
                task.questions,
                task.bits_per_byte,
                100.0 * task.greedy,
                share(task.accuracy),
                share(task.accuracy_per_byte),
                share(task.accuracy_unconditional)
            );
        }
        out += "</table>";
    }
    out += "</body></html>\n";
    out
}

fn comparison(out: &mut String, c: &Comparison) {
    let _ = write!(
        out,
        "<table><tr><th></th><th>reference</th><th>this</th><th>difference</th></tr>\
         <tr><td>NLL, nats a token</td><td>{:.4}</td><td>{:.4}</td><td>{:+.4}</td></tr>\
         <tr><td>perplexity</td><td>{:.3}</td><td>{:.3}</td><td>{:+.3}</td></tr></table>\
         <table><tr><th>over {} tokens</th><th></th></tr>\
         <tr><td>KL(reference || this), mean</td><td>{:.5}</td></tr>\
         <tr><td>99th percentile</td><td>{:.4}</td></tr><tr><td>largest</td><td>{:.4}</td></tr>\
         <tr><td>same first choice</td><td>{:.2} %</td></tr>\
         <tr><td>right becomes wrong</td><td>{}</td></tr><tr><td>wrong becomes right</td><td>{}</td></tr></table>",
        c.reference.nll,
        c.candidate.nll,
        c.candidate.nll - c.reference.nll,
        c.reference.perplexity,
        c.candidate.perplexity,
        c.candidate.perplexity - c.reference.perplexity,
        c.tokens,
        c.kl_mean,
        c.kl_p99,
        c.kl_max,
        100.0 * c.agreement,
        c.flips_to_wrong,
        c.flips_to_right
    );
    let chart = |title: &str, x: &str, y: &str, log_y, mark, series: Vec<(&str, Vec<(f64, f64)>)>| {
        let series = series.into_iter().map(|(name, points)| Series { name: name.into(), points }).collect();
        Chart { title: title.into(), x_label: x.into(), y_label: y.into(), log_y, mark, series }.svg()
    };
    let indexed = |values: Vec<f64>| values.into_iter().enumerate().map(|(i, v)| (i as f64, v)).collect::<Vec<_>>();
    if let Some(layers) = &c.layers {
        let points = layers.iter().map(|l| (l.layer as f64, l.relative_error)).collect();
        *out += &chart(
            "Error of the residual stream behind each layer",
            "layer",
            "relative",
            false,
            Mark::Line,
            vec![("", points)],
        );
    }
    let bins = c.histogram.iter().map(|bin| (bin.log10_kl, bin.tokens as f64)).collect();
    *out += &chart("How divergences are spread", "log10 of KL, nats", "tokens", false, Mark::Bar, vec![("", bins)]);
    let windows = vec![
        ("reference", indexed(c.windows.iter().map(|w| w.reference_nll).collect())),
        ("this", indexed(c.windows.iter().map(|w| w.candidate_nll).collect())),
    ];
    *out += &chart("Likelihood of each window", "window", "NLL, nats a token", false, Mark::Bar, windows);
    let kl = indexed(c.windows.iter().map(|w| w.kl_mean).collect());
    *out += &chart("Divergence of each window", "window", "mean KL, nats", false, Mark::Bar, vec![("", kl)]);
    let positions = c.by_position.iter().map(|p| (p.position as f64, p.kl_mean)).collect();
    *out += &chart(
        "Divergence by position in the window",
        "position",
        "mean KL, nats",
        false,
        Mark::Line,
        vec![("", positions)],
    );
}

fn passages(out: &mut String, c: &Comparison, tokenizer: Option<&Tokenizer>) {
    if c.worst.is_empty() {
        return;
    }
    *out += "<h2>Where they differ most</h2>";
    let decode = |ids: &[u32]| tokenizer.and_then(|t| t.decode(ids, false).ok()).unwrap_or_else(|| format!("{ids:?}"));
    for passage in &c.worst {
        let (before, next) = passage.ids.split_at(passage.ids.len().saturating_sub(1));
        let _ = write!(
            out,
            "<p>KL {:.3}, window {}, position {}: the reference expects <b>{:?}</b>, this <b>{:?}</b></p>\
             <div class=\"passage\">{}<mark>{}</mark></div>",
            passage.kl,
            passage.window,
            passage.position,
            escape(&decode(&[passage.reference_top])),
            escape(&decode(&[passage.candidate_top])),
            escape(&decode(before)),
            escape(&decode(next))
        );
    }
}
