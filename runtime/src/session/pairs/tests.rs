use serde_json::{Value, json};

use super::*;

fn definition(model: &str) -> String {
    format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{{"id":5,"content":"<s>",
            "single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}],"normalizer":null,
            "pre_tokenizer":null,"post_processor":null,"decoder":{{"type":"ByteFallback"}},"model":{model}}}"#
    )
}

/// Compares tokens, texts and vocabularies with what the library makes of the same definition.
fn compare(json: &str, words: &[String]) {
    let expected = tokenizers::Tokenizer::from_bytes(json).unwrap();
    let found = parse(json.as_bytes()).unwrap();
    assert_eq!(found.get_vocab(true), expected.get_vocab(true));
    assert_eq!(found.get_vocab_size(true), expected.get_vocab_size(true));
    for id in 0..expected.get_vocab_size(true) as u32 + 2 {
        assert_eq!(found.id_to_token(id), expected.id_to_token(id));
    }
    for word in words {
        let [expected, found] = [expected.encode(&**word, true), found.encode(&**word, true)].map(|e| e.unwrap());
        assert_eq!(found, expected, "{word:?} by {json}");
    }
}

#[test]
fn both_forms_of_merges_are_read() {
    let parts = r#""dropout":null,"unk_token":"<unk>","continuing_subword_prefix":null,"end_of_word_suffix":"",
        "fuse_unk":true,"byte_fallback":false,"vocab":{"<unk>":0,"a":1,"\u00e9":2,"a\u00e9":3,"b":4}"#;
    for merges in [r#"["a \u00e9"]"#, r#"[["a","\u00e9"]]"#, "[]"] {
        for kind in [r#""type":"BPE","#, ""] {
            let json = definition(&format!(r#"{{{kind}{parts},"merges":{merges}}}"#));
            compare(&json, &["a\u{e9}b<s>".into(), "xya\u{e9}".into(), String::new()]);
        }
    }
}

/// Random vocabularies with ids in any order, random merges, some of them twice, and words with characters that have no
/// token.
#[test]
fn words_become_the_tokens_of_the_library() {
    let mut state = 1_u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let alphabet = ["a", "b", "c", "\u{e9}", "\u{4e2d}", " ", "\u{1f600}", "z", "\u{7f}"];
    for _ in 0..300 {
        let mut tokens: Vec<String> = alphabet[..4 + random(3)].iter().map(|&c| c.into()).collect();
        tokens.push("<unk>".into());
        let bytes = random(3);
        // The bytes of all characters, of some, or of none.
        tokens.extend((0..=255_u8).filter(|b| bytes == 0 || bytes == 1 && b % 7 != 0).map(|b| format!("<0x{b:02X}>")));
        let mut mergeable: Vec<String> = tokens.iter().filter(|t| !t.starts_with('<')).cloned().collect();
        let mut merges = Vec::new();
        for _ in 0..random(60) {
            let [first, second] = [(); 2].map(|()| mergeable[random(mergeable.len())].clone());
            let merged = format!("{first}{second}");
            if !tokens.contains(&merged) {
                tokens.push(merged.clone());
                mergeable.push(merged);
            }
            merges.push(json!([first, second]));
        }
        for at in (1..tokens.len()).rev() {
            tokens.swap(at, random(at + 1));
        }
        let vocab: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
        let model = json!({
            "type": "BPE",
            "unk_token": if random(3) == 0 { Value::Null } else { "<unk>".into() },
            "fuse_unk": random(2) == 0,
            "byte_fallback": random(2) == 0,
            "ignore_merges": random(3) == 0,
            "vocab": vocab,
            "merges": merges,
        });
        let mut word = || (0..random(14)).map(|_| alphabet[random(alphabet.len())]).collect::<String>();
        let words: Vec<String> = (0..40).map(|_| word()).chain(mergeable.iter().cloned()).collect();
        let json = definition(&model.to_string()).replace("\"id\":5", &format!("\"id\":{}", tokens.len()));
        compare(&json, &words);
    }
}

#[test]
fn what_is_unusual_is_left_to_the_library() {
    let vocab = r#""vocab":{"a":0,"b":1}"#;
    for model in [
        format!(r#"{{"type":"WordLevel",{vocab},"unk_token":"a"}}"#),
        format!(r#"{{"type":"BPE",{vocab}}}"#),
        format!(r#"{{"type":"BPE",{vocab},"merges":["ab"]}}"#),
        format!(r#"{{"type":"BPE",{vocab},"merges":[["a","b","a"]]}}"#),
        format!(r#"{{"type":"BPE",{vocab},"merges":["a b"]}}"#),
        format!(r##"{{"type":"BPE",{vocab},"merges":["#version: 0.2"]}}"##),
        format!(r#"{{"type":"BPE",{vocab},"merges":[],"more":1}}"#),
        format!(r#"{{"type":"BPE",{vocab},"merges":[],"dropout":0.1}}"#),
        format!(r#"{{"type":"BPE",{vocab},"merges":[],"end_of_word_suffix":"</w>"}}"#),
        format!(r#"{{"type":"BPE",{vocab},"merges":[],"unk_token":"c"}}"#),
        r#"{"type":"BPE","vocab":{"a":0,"b":2},"merges":[]}"#.into(),
        r#"{"type":"BPE","vocab":{"a":0,"b":0},"merges":[]}"#.into(),
        r#"{"type":"BPE","vocab":{"a":0,"a":1},"merges":[]}"#.into(),
        "[]".into(),
    ] {
        assert!(parse(definition(&model).as_bytes()).is_err(), "{model}");
    }
}
