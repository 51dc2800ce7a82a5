//! Any bytes as a `tokenizer.json` or as a chat template: loading and using them is a result, never a panic or a hang.

#![no_main]

use awqua::session::chat::{ChatMessage, ChatTemplate};
use awqua::session::tokenizer::{TextStream, Tokenizer};
use libfuzzer_sys::fuzz_target;

// The library catches panics of the tokenizer crate; the fuzzer's own hook would abort before that.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| {})), |data: &[u8]| {
    let Some((&kind, bytes)) = data.split_first() else { return };
    if kind % 2 == 0 {
        let Ok(tokenizer) = Tokenizer::from_json(bytes) else { return };
        let Ok(ids) = tokenizer.encode("Héllo, 🙂 world\n\n 123", true) else { return };
        let (mut stream, mut text) = (TextStream::default(), String::new());
        for id in ids {
            if stream.push(&tokenizer, id, &mut text).is_err() {
                return;
            }
        }
        let _ = stream.finish(&tokenizer, &mut text);
    } else {
        let Ok(source) = std::str::from_utf8(bytes) else { return };
        let Ok(template) = ChatTemplate::new(source, serde_json::Map::new()) else { return };
        let messages = [ChatMessage::new("system", "Be brief."), ChatMessage::new("user", " What is 2 + 2? ")];
        let _ = template.render_messages(&messages, true);
    }
});
