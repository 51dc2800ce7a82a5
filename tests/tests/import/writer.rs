//! Makes GGUF files and zip archives in memory.

use std::io::{Cursor, Write};

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// A GGUF file to be; every field may be made wrong on purpose.
#[derive(Clone)]
pub struct GgufFile {
    pub version: u32,
    pub entries: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
    pub alignment: usize,
}

#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub ggml_type: u32,
    pub data: Vec<u8>,
    /// Instead of the next free aligned place.
    pub offset: Option<u64>,
}

pub fn text(value: &str) -> Vec<u8> {
    [&8u32.to_le_bytes()[..], &sized(value)].concat()
}

pub fn uint(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn float(value: f32) -> Vec<u8> {
    [6u32.to_le_bytes(), value.to_le_bytes()].concat()
}

pub fn flag(value: bool) -> Vec<u8> {
    [&7u32.to_le_bytes()[..], &[u8::from(value)]].concat()
}

pub fn array(element_type: u32, len: u64, elements: &[u8]) -> Vec<u8> {
    [&9u32.to_le_bytes()[..], &element_type.to_le_bytes(), &len.to_le_bytes(), elements].concat()
}

pub fn texts<S: AsRef<str>>(values: &[S]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|value| sized(value.as_ref())).collect();
    array(8, values.len() as u64, &elements)
}

pub fn ints(values: &[i32]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    array(5, values.len() as u64, &elements)
}

pub fn floats(values: &[f32]) -> Vec<u8> {
    let elements: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    array(6, values.len() as u64, &elements)
}

fn sized(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

impl GgufFile {
    pub fn set(&mut self, key: &str, value: Vec<u8>) {
        self.entries.retain(|(existing, _)| existing != key);
        self.entries.push((key.to_owned(), value));
    }

    pub fn remove(&mut self, key: &str) {
        self.entries.retain(|(existing, _)| existing != key);
    }

    /// An f32 tensor of `shape`, outermost first, with the value `of(row, column)`.
    pub fn add(&mut self, name: &str, shape: &[usize], of: impl Fn(usize, usize) -> f32) {
        let columns = *shape.last().unwrap();
        let rows: usize = shape[..shape.len() - 1].iter().product();
        let data = (0..rows)
            .flat_map(|r| (0..columns).map(move |c| (r, c)))
            .flat_map(|(r, c)| of(r, c).to_le_bytes())
            .collect();
        self.tensors.push(Tensor {
            name: name.to_owned(),
            dims: shape.iter().rev().map(|d| *d as u64).collect(),
            ggml_type: 0,
            data,
            offset: None,
        });
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            out.extend(sized(key));
            out.extend(value);
        }
        let mut place = 0;
        for tensor in &self.tensors {
            out.extend(sized(&tensor.name));
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(tensor.ggml_type.to_le_bytes());
            out.extend(tensor.offset.unwrap_or(place as u64).to_le_bytes());
            place = (place + tensor.data.len()).next_multiple_of(self.alignment);
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
            out.extend(&tensor.data);
        }
        out
    }
}

pub const LAYERS: usize = 2;
pub const HIDDEN: usize = 32;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const INNER: usize = 64;
/// Bytes, three merged tokens, two control tokens, one user-defined.
pub const VOCAB: usize = 256 + 6;

/// Distinct for each row and column, exact in half precision.
pub fn weight(row: usize, column: usize) -> f32 {
    (row % 64) as f32 + column as f32 / 64.0 * 0.5
}

/// The characters that stand for the 256 bytes in byte-level BPE.
pub fn byte_alphabet() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    (0..256)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

/// A complete model of architecture "llama" with tied embeddings and a byte-level vocabulary.
pub fn tiny_llama() -> GgufFile {
    let mut file = GgufFile { version: 3, entries: Vec::new(), tensors: Vec::new(), alignment: 32 };
    file.set("general.architecture", text("llama"));
    file.set("general.name", text("Tiny"));
    file.set("llama.block_count", uint(LAYERS as u32));
    file.set("llama.context_length", uint(128));
    file.set("llama.embedding_length", uint(HIDDEN as u32));
    file.set("llama.feed_forward_length", uint(INNER as u32));
    file.set("llama.attention.head_count", uint(HEADS as u32));
    file.set("llama.attention.head_count_kv", uint(KV_HEADS as u32));
    file.set("llama.attention.layer_norm_rms_epsilon", float(1e-5));
    file.set("llama.rope.freq_base", float(100_000.0));
    let mut tokens: Vec<String> = byte_alphabet().iter().map(char::to_string).collect();
    tokens.extend(["th", "the", "Ġthe", "<|end|>", "<|start|>", "<tool>"].map(str::to_owned));
    let mut types = vec![1; VOCAB];
    types[259..].copy_from_slice(&[3, 3, 4]);
    file.set("tokenizer.ggml.model", text("gpt2"));
    file.set("tokenizer.ggml.pre", text("smollm"));
    file.set("tokenizer.ggml.tokens", texts(&tokens));
    file.set("tokenizer.ggml.token_type", ints(&types));
    file.set("tokenizer.ggml.merges", texts(&["t h", "th e", "Ġ the"]));
    file.set("tokenizer.ggml.bos_token_id", uint(260));
    file.set("tokenizer.ggml.eos_token_id", uint(259));
    file.set("tokenizer.chat_template", text("{{ messages[0].content }}"));
    file.add("token_embd.weight", &[VOCAB, HIDDEN], weight);
    file.add("output_norm.weight", &[HIDDEN], weight);
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| file.add(&format!("blk.{layer}.{name}.weight"), shape, weight);
        add("attn_norm", &[HIDDEN]);
        add("attn_q", &[HEADS * HEAD_DIM, HIDDEN]);
        add("attn_k", &[KV_HEADS * HEAD_DIM, HIDDEN]);
        add("attn_v", &[KV_HEADS * HEAD_DIM, HIDDEN]);
        add("attn_output", &[HIDDEN, HEADS * HEAD_DIM]);
        add("ffn_norm", &[HIDDEN]);
        add("ffn_gate", &[INNER, HIDDEN]);
        add("ffn_up", &[INNER, HIDDEN]);
        add("ffn_down", &[HIDDEN, INNER]);
    }
    file
}

/// A zip archive of `members`.
pub fn zip_of(members: &[(&str, &[u8])], compression: CompressionMethod) -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(compression);
    for (name, content) in members {
        writer.start_file(*name, options).unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}
