//! Drives the real `awqua` binary: the machine-readable contract, errors, exit codes, pipes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const SUBCOMMANDS: [&str; 12] = [
    "demo",
    "chat",
    "run",
    "inspect",
    "devices",
    "logits",
    "perplexity",
    "bench",
    "tune",
    "verify",
    "import",
    "quantize",
];

fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name).to_str().unwrap().to_owned()
}

fn packed() -> String {
    fixture("formats/autoawq-gemm-g64")
}

fn reference() -> Value {
    let file = format!("{}/reference/reference.json", packed());
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// An empty folder of its own for one test.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn awqua(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_awqua"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // As a user without a desktop session: the command itself keeps the drivers quiet.
    command.env_remove("NODEVICE_SELECT").env_remove("XDG_RUNTIME_DIR");
    command
}

fn output(args: &[&str]) -> Output {
    awqua(args).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Standard output of a run that must succeed and, in a pipe, say nothing else.
fn stdout(args: &[&str]) -> String {
    let output = output(args);
    assert_eq!(text(&output.stderr), "", "awqua {args:?}");
    assert_eq!(output.status.code(), Some(0), "awqua {args:?}");
    text(&output.stdout).to_owned()
}

fn json(args: &[&str]) -> Value {
    let stdout = stdout(args);
    assert_eq!(stdout.lines().count(), 1, "JSON is one line");
    serde_json::from_str(&stdout).unwrap()
}

/// Exit code and the `error` object of a run that must fail.
fn failure(args: &[&str]) -> (i32, Value) {
    let output = output(args);
    assert_eq!(text(&output.stdout), "", "awqua {args:?}");
    let stderr = text(&output.stderr);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let report: Value = serde_json::from_str(stderr).unwrap();
    let keys: Vec<_> = report["error"].as_object().unwrap().keys().cloned().collect();
    assert_eq!(keys, ["kind", "message", "file", "tensor"]);
    (output.status.code().unwrap(), report["error"].clone())
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn join(ids: &Value) -> String {
    let ids: Vec<_> = ids.as_array().unwrap().iter().map(ToString::to_string).collect();
    ids.join(",")
}

#[test]
fn help_names_every_subcommand_and_the_exit_codes() {
    let help = stdout(&["--help"]);
    for name in SUBCOMMANDS {
        assert!(help.lines().any(|l| l.trim_start().starts_with(&format!("{name} "))), "{name} is not in\n{help}");
        assert!(stdout(&["help", name]).contains("Usage:"), "{name}");
    }
    for code in ["0  ", "1  ", "2  ", "3  ", "4  ", "130  "] {
        assert!(help.lines().any(|l| l.trim_start().starts_with(code)), "{code} is not in\n{help}");
    }
}

#[test]
fn logits_are_those_of_the_reference() {
    let prompt = &reference()["prompts"][0];
    let ids = join(&prompt["input_ids"]);
    let got = json(&["logits", &packed(), "--ids", &ids, "--json", "--backend", "cpu", "--threads", "2"]);
    let (got, expected) = (numbers(&got["logits"]), numbers(&prompt["last_logits"]));
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, l| m.max(l.abs()));
    let off = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0f32, f32::max);
    assert!(off <= 2e-3 * largest, "off by {off}, largest {largest}");

    let all = json(&["logits", &packed(), "--ids", &ids, "--all", "--json", "--backend", "cpu"]);
    let rows = all["logits"].as_array().unwrap();
    assert_eq!(rows.len(), prompt["input_ids"].as_array().unwrap().len());
    let last = numbers(rows.last().unwrap());
    assert!(last.iter().zip(&got).all(|(a, b)| (a - b).abs() <= 1e-4 * largest));

    let table = stdout(&["logits", &packed(), "--ids", &ids, "--backend", "cpu"]);
    assert_eq!(table.lines().count(), 1 + 10, "{table}");
}

#[test]
fn run_prints_the_greedy_tokens_of_the_reference() {
    let prompt = &reference()["prompts"][0];
    let ids = join(&prompt["input_ids"]);
    let args = ["run", &packed(), "--ids", &ids, "-n", "32", "--temp", "0", "--ignore-eos", "--backend", "cpu"];
    let got = json(&[&args[..], &["--json"]].concat());
    assert_eq!(got["ids"], prompt["greedy32_ids"]);
    assert_eq!(got["stop"], "max_tokens");
    let answer = got["text"].as_str().unwrap();
    assert!(!answer.is_empty());
    assert_eq!(stdout(&args), format!("{answer}\n"), "streamed text differs from the whole");

    let words: String = answer.chars().skip(3).take(4).collect();
    let stopped = json(&[&args[..], &["--json", "--stop", &words]].concat());
    assert_eq!(stopped["stop"], "stop_string");
    assert_eq!(stopped["text"].as_str(), answer.split(&words).next());
}

#[test]
fn run_takes_prompts_from_arguments_and_standard_input_and_repeats_a_seed() {
    let args = ["-n", "12", "--temp", "0.9", "--seed", "7", "--backend", "cpu"];
    let run =
        |prompt: &str, more: &[&str]| [&["run", &packed(), "-p", prompt][..], &args, more].concat().join("\u{1f}");
    let call = |line: String, input: &str| {
        let args: Vec<&str> = line.split('\u{1f}').collect();
        let mut child = awqua(&args).stdin(Stdio::piped()).spawn().unwrap();
        // A run that does not read its input closes the pipe early.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout).to_owned()
    };
    let first = call(run("Ownership is", &[]), "");
    assert_eq!(first, call(run("Ownership is", &[]), ""), "one seed, two answers");
    assert_eq!(first, call(run("-", &[]), "Ownership is"), "standard input");
    assert_ne!(first, call(run("Ownership is", &["--raw"]), ""), "the chat template changes the prompt");
    assert_ne!(first, call(run("Ownership is", &["--system", "Be brief."]), ""), "so does a system message");
}

#[test]
fn perplexity_takes_texts_ids_and_windows() {
    let folder = scratch("perplexity");
    let ids: Vec<u32> = (0..40).map(|i| (i * 13 + 5) % 256).collect();
    let write = |name: &str, value: Value| {
        let file = folder.join(name);
        std::fs::write(&file, value.to_string()).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let score = |more: &[&str]| json(&[&["perplexity", &packed(), "--backend", "cpu", "--json"][..], more].concat());

    let flat = score(&["--ids-file", &write("flat.json", ids.clone().into()), "--ctx", "10", "--windows", "3"]);
    assert_eq!(flat["tokens"], 3 * 9);
    let nll = flat["nll"].as_f64().unwrap();
    assert!((flat["perplexity"].as_f64().unwrap() - nll.exp()).abs() < 1e-9 * nll.exp());
    assert!(flat["tokens_s"].as_f64().unwrap() > 0.0);

    let named = write("named.json", serde_json::json!({ "ids": ids }));
    let windows = write("windows.json", serde_json::json!([ids[..10], ids[10..20], ids[20..30]]));
    assert_eq!(score(&["--ids-file", &named, "--ctx", "10", "--windows", "3"])["nll"], flat["nll"]);
    assert_eq!(score(&["--ids-file", &windows])["nll"], flat["nll"]);
    // Overlapping windows predict every token but the first.
    assert_eq!(score(&["--ids-file", &named, "--ctx", "20", "--stride", "10"])["tokens"], 39);

    // The same number from the logits themselves.
    let joined: Vec<_> = ids[..10].iter().map(ToString::to_string).collect();
    let all = json(&["logits", &packed(), "--ids", &joined.join(","), "--all", "--json", "--backend", "cpu"]);
    let mut sum = 0.0;
    for (row, &next) in all["logits"].as_array().unwrap().iter().zip(&ids[1..10]) {
        let row = numbers(row);
        let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        sum += total.ln() - f64::from(row[next as usize]);
    }
    let one = score(&["--ids-file", &named, "--ctx", "10", "--windows", "1"])["nll"].as_f64().unwrap();
    assert!((one - sum / 9.0).abs() < 1e-4, "{one} and {}", sum / 9.0);

    let words = folder.join("text.txt");
    std::fs::write(&words, "Ownership is Rust's most unique feature.").unwrap();
    assert!(score(&["--text", words.to_str().unwrap()])["tokens"].as_u64().unwrap() > 3);
}

#[test]
fn facts_come_as_json() {
    let asked = ["--json", "--backend", "cpu", "-p", "16", "-n", "8", "-r", "2", "--sessions", "3"];
    let bench = json(&[&["bench", &packed()][..], &asked].concat());
    for key in ["prefill_tok_s", "decode_tok_s", "load_s", "ttft_s"] {
        let [min, median, max] = ["min", "median", "max"].map(|part| bench[key][part].as_f64().unwrap());
        assert!(0.0 < min && min <= median && median <= max, "{key}: {}", bench[key]);
    }
    let batch = &bench["batch"];
    assert!(batch["sessions"] == 3 && batch["shared"] == true && batch["passes"].as_u64().unwrap() >= 3 * 7);
    assert!(batch["decode_tok_s"]["median"].as_f64().unwrap() > 0.0 && batch["speedup"].as_f64().unwrap() > 0.0);
    if cfg!(target_os = "linux") {
        assert!(bench["peak_rss_bytes"]["median"].as_f64().unwrap() > 1e6);
    } else {
        assert!(bench.get("peak_rss_bytes").is_some());
    }

    let facts = json(&["inspect", &packed(), "--json"]);
    assert_eq!(facts["architecture"], "LlamaForCausalLM");
    assert_eq!((&facts["bits"], &facts["group_size"]), (&4.into(), &64.into()));
    assert!(facts["dialect"].is_string());
    let names: Vec<_> = facts["tensors"].as_array().unwrap().iter().map(|t| t["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"model.layers.0.self_attn.q_proj.qweight"));

    let devices = json(&["devices", "--json"]);
    assert!(devices["cpu"]["device"].is_string() && devices["adapters"].is_array());
    assert_eq!(json(&["verify", &packed(), "--json"])["ok"], true);
}

#[test]
fn errors_have_kinds_and_exit_codes() {
    let (code, error) = failure(&["logits", "/nowhere/at/all", "--ids", "1", "--json"]);
    assert_eq!(code, 4);
    assert!(error["file"].as_str().unwrap().contains("nowhere"), "{error}");

    let (code, error) = failure(&["logits", &packed(), "--ids", "4000000000", "--json", "--backend", "cpu"]);
    assert_eq!((code, &error["kind"]), (1, &"invalid_input".into()));

    let (code, error) = failure(&["run", &packed(), "--ids", "1", "--temp", "-1", "--json", "--backend", "cpu"]);
    assert_eq!((code, &error["kind"]), (2, &"usage".into()));
    let (code, error) = failure(&["logits", &packed(), "--ids", "1,x", "--json"]);
    assert_eq!((code, &error["kind"]), (2, &"usage".into()));
    let (code, _) = failure(&["logits", "--json"]);
    assert_eq!(code, 2);

    let (code, error) =
        failure(&["logits", &packed(), "--ids", "1", "--json", "--backend", "wgpu", "--device", "no such adapter"]);
    assert_eq!((code, &error["kind"]), (3, &"no_device".into()));

    let (code, error) = failure(&["run", &packed(), "--ids", "1,2,3,4,5", "--ctx", "4", "--json", "--backend", "cpu"]);
    assert_eq!((code, &error["kind"]), (1, &"context_full".into()));

    let plain = output(&["logits", "/nowhere/at/all", "--ids", "1"]);
    assert!(text(&plain.stderr).starts_with("error: ") && text(&plain.stderr).lines().count() == 1);
    let plain = output(&["nonsense"]);
    assert_eq!(plain.status.code(), Some(2));
    assert!(text(&plain.stderr).starts_with("error: ") && text(&plain.stderr).lines().count() == 1);
}

#[test]
fn a_truncated_file_is_named() {
    let folder = scratch("truncated");
    for name in ["config.json", "model.safetensors"] {
        let bytes = std::fs::read(format!("{}/{name}", packed())).unwrap();
        let keep = if name == "config.json" { bytes.len() } else { bytes.len() - 100 };
        std::fs::write(folder.join(name), &bytes[..keep]).unwrap();
    }
    for command in ["inspect", "verify"] {
        let (code, error) = failure(&[command, folder.to_str().unwrap(), "--json"]);
        assert_eq!(code, 4);
        assert!(error["file"].as_str().unwrap().ends_with("model.safetensors"), "{error}");
    }
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    for args in [
        &["inspect", &packed()][..],
        &["run", &packed(), "-p", "x", "-n", "64", "--ignore-eos", "--backend", "cpu"],
        &["--help"],
    ] {
        let mut child = awqua(args).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "awqua {args:?}");
    }
}

#[test]
fn chat_reads_lines_until_the_input_ends() {
    let mut child = awqua(&["chat", &packed(), "-n", "4", "--temp", "0", "--backend", "cpu"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"Hello\nHello\n/reset\nHello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).matches("> ").count(), 5, "a prompt for each line and for the end");
    assert!(!text(&output.stderr).contains('\u{1b}'), "escape codes in a pipe");
}

#[test]
fn quantize_makes_a_checkpoint_that_verifies_and_runs() {
    let out = scratch("quantize").join("packed");
    let out = out.to_str().unwrap();
    let report = json(&["quantize", &fixture("formats/fp16"), "--out", out, "--group-size", "64", "--json"]);
    assert_eq!(report["group_size"], 64);
    assert_eq!(json(&["verify", out, "--json"])["ok"], true);
    let facts = json(&["inspect", out, "--json"]);
    assert_eq!((&facts["bits"], &facts["group_size"]), (&4.into(), &64.into()));
    let run = json(&["run", out, "--ids", "1,2,3", "-n", "4", "--ignore-eos", "--json", "--backend", "cpu"]);
    assert_eq!(run["ids"].as_array().unwrap().len(), 4);

    let (code, error) = failure(&["quantize", &fixture("formats/fp16"), "--out", out, "--json"]);
    assert_ne!(code, 0);
    assert!(error["file"].as_str().unwrap().contains("packed"), "an existing folder is kept: {error}");
}

#[test]
fn eval_scores_texts_and_tasks_and_writes_a_page() {
    let folder = scratch("eval");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let source = fixture("formats/fp16");
    let chats = concat!(
        r#"{"text": "Ownership is how a program knows who frees a value, and borrowing lends it out for a while."}"#,
        "\n\"A second text, which is as plain as the first one and a little longer, so that there is something to read.\"\n"
    );
    std::fs::write(path("calib.jsonl"), chats.repeat(8)).unwrap();
    let out = path("packed");
    let target = ["--target-bits", "3.5", "--curve", &path("curve.svg"), "--sensitivity", &path("loss.json")];
    let mut args = vec!["quantize", &source, "--out", &out, "--method", "awq-gptq", "--group-size", "64", "--json"];
    let calib = path("calib.jsonl");
    args.extend(["--calib", &calib, "--calib-length", "64"]);
    args.extend(target);
    let report = json(&args);
    let mean = report["allocation"]["mean_bits"].as_f64().unwrap();
    assert!(mean > 2.5 && mean <= 3.5 + 1e-6, "{mean}");
    assert!(std::fs::read_to_string(path("curve.svg")).unwrap().starts_with("<svg"));
    assert!(std::fs::read_to_string(path("loss.json")).unwrap().contains("losses"));
    // What was measured in groups of 64 says nothing of groups of 32.
    let other = ["quantize", &source, "--out", &path("x"), "--method", "awq-gptq", "--group-size", "32", "--json"];
    let same = ["--calib", &calib, "--calib-length", "64", "--target-bits", "3.5", "--sensitivity", &path("loss.json")];
    let (code, error) = failure(&[&other[..], &same].concat());
    assert_eq!((code, &error["kind"]), (1, &"invalid_input".into()), "{error}");

    let requests = concat!(
        r#"{"context": "Ownership is how", "continuation": " a program", "label": true}"#,
        "\n",
        r#"{"context": "Ownership is how", "continuation": " zzzzz", "label": false}"#,
    );
    std::fs::write(path("task.jsonl"), requests).unwrap();
    std::fs::write(path("text.txt"), "Ownership is how a program knows who frees a value. ".repeat(20)).unwrap();
    let (text, task, page) = (path("text.txt"), path("task.jsonl"), path("page.html"));
    let evaluate = ["eval", &out, "--reference", &source, "--text", &text, "--ctx", "64", "--task", &task];
    let found = json(&[&evaluate[..], &["--html", &page, "--json"]].concat());
    for key in ["kl_mean", "kl_p99", "kl_max", "agreement"] {
        assert!(found[key].as_f64().is_some_and(|v| v >= 0.0), "{key}: {found}");
    }
    assert_eq!(found["layers"].as_array().unwrap().len(), 2);
    assert_eq!(found["tasks"].as_array().unwrap().len(), 2, "both models");
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("task.jsonl") && page.contains("<svg"));
    let plain = output(&evaluate);
    assert!(text_of(&plain).contains("KL mean") && text_of(&plain).contains("bits a byte"));

    let shift = json(&["calib-check", &out, "--calib", &calib, "--calib-length", "64", "--json"]);
    assert_eq!(shift["differs"], false, "{}", shift["ratio"]);
    let (code, error) = failure(&["calib-check", &source, "--json"]);
    assert_eq!((code, &error["kind"]), (4, &"unsupported".into()));
    let (code, error) = failure(&["quantize", &source, "--out", &path("x"), "--target-size", "1kB", "--json"]);
    assert_eq!((code, &error["kind"]), (1, &"invalid_input".into()), "{error}");
    let (code, _) = failure(&["quantize", &source, "--out", &path("x"), "--calib-domain", "nonsense", "--json"]);
    assert_eq!(code, 1);
}

fn text_of(output: &std::process::Output) -> &str {
    text(&output.stdout)
}

#[test]
fn tune_keeps_what_later_runs_use() {
    let adapters = json(&["devices", "--json"])["adapters"].as_array().unwrap().clone();
    if !adapters.iter().any(|adapter| !adapter["variant"].as_str().unwrap().starts_with("none")) {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none_or(|v| v != "1"), "AWQUA_REQUIRE_GPU=1 and no adapter");
        return;
    }
    let folder = scratch("tune");
    let run = |args: &[&str]| {
        let output = awqua(args).env("AWQUA_CACHE", &folder).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        (serde_json::from_slice::<Value>(&output.stdout).unwrap(), text(&output.stderr).to_owned())
    };
    let (report, _) = run(&["tune", &packed(), "--json"]);
    let candidates = report["candidates"].as_array().unwrap();
    assert!(candidates.iter().any(|candidate| candidate["chosen"] == true && candidate["seconds"].is_f64()));
    let file = folder.join("tuning.txt");
    assert_eq!(report["file"].as_str(), file.to_str());

    let bench = ["bench", &packed(), "--backend", "wgpu", "-p", "8", "-n", "2", "-r", "1", "--ctx", "64", "--json"];
    let variant = |report: &Value| report["variant"].as_str().unwrap().to_owned();
    assert!(variant(&run(&bench).0).ends_with("; tuned"));
    assert!(!variant(&run(&[&bench[..], &["--untuned"]].concat()).0).contains("tuned"));
    // A damaged file is told of and does no harm.
    std::fs::write(&file, "awqua tuning 1\nnonsense").unwrap();
    assert!(variant(&run(&bench).0).contains("the tuning is ignored"));
}

#[test]
fn demo_tells_a_story_when_nothing_can_be_downloaded() {
    let cache = scratch("demo");
    let demo = |args: &[&str]| awqua(args).env("AWQUA_CACHE", &cache).output().unwrap();
    let args = ["demo", "--offline", "-p", "It was", "--backend", "cpu"];
    let first = demo(&args);
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    let story = text(&first.stdout);
    assert!(story.starts_with("It was") && story.split_whitespace().count() > 20, "{story}");
    assert!(text(&first.stderr).contains("offline") && text(&first.stderr).contains("tokens/s"));
    assert_eq!(text(&demo(&args).stdout), story, "the second run tells the same story");

    // A model that was named must be the expected one; nothing half-made stays behind.
    let wrong = fixture("gguf/blocks.gguf");
    let refused = demo(&["demo", "--from", &wrong, "--backend", "cpu"]);
    assert_eq!(refused.status.code(), Some(4), "{}", text(&refused.stderr));
    assert!(text(&refused.stderr).contains("SHA-256"), "{}", text(&refused.stderr));
    let left: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["tiny-story-w4"]);
}
