//! What a session has to tell: text first, then how it ended. Bounded, and without allocation once its text fits.

use crate::status::awqua_status;
use crate::text::whole_chars;

/// The end of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Complete, for an awqua_stop_reason.
    Done(u32),
    /// Failed.
    Error(awqua_status),
}

/// One event as it is handed out.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// This many bytes were written, and so many wait.
    Text { written: usize, waiting: usize },
    /// The end.
    End(End),
    /// The buffer does not hold the next character; `waiting` bytes wait.
    TooSmall { waiting: usize },
    /// Nothing.
    None,
}

/// Text that was not polled yet, and the end behind it.
#[derive(Debug, Default)]
pub struct Events {
    text: String,
    read: usize,
    end: Option<End>,
}

impl Events {
    /// Forgets everything and makes room for `bytes` of text.
    pub fn restart(&mut self, bytes: usize) {
        self.text.clear();
        self.text.reserve(bytes);
        self.read = 0;
        self.end = None;
    }

    pub fn push_text(&mut self, text: &str) {
        if self.read == self.text.len() {
            self.text.clear();
            self.read = 0;
        }
        self.text.push_str(text);
    }

    pub fn push_end(&mut self, end: End) {
        self.end = Some(end);
    }

    /// Takes the next event, its text into `buffer`.
    pub fn poll(&mut self, buffer: &mut [u8]) -> Event {
        let text = &self.text[self.read..];
        if text.is_empty() {
            return self.end.take().map_or(Event::None, Event::End);
        }
        let cut = whole_chars(text, buffer.len());
        if cut == 0 {
            return Event::TooSmall { waiting: text.len() };
        }
        buffer[..cut].copy_from_slice(&text.as_bytes()[..cut]);
        let waiting = text.len() - cut;
        self.read += cut;
        Event::Text { written: cut, waiting }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_whole_lossless_and_before_the_end() {
        for size in 4..9 {
            let mut events = Events::default();
            events.push_text("aé漢");
            events.push_text("🎲z");
            events.push_end(End::Done(1));
            let (mut text, mut buffer) = (String::new(), vec![0; size]);
            while text.len() < "aé漢🎲z".len() {
                let Event::Text { written, waiting } = events.poll(&mut buffer) else { panic!("text is waiting") };
                text.push_str(std::str::from_utf8(&buffer[..written]).unwrap());
                assert_eq!(text.len() + waiting, "aé漢🎲z".len());
            }
            assert_eq!(text, "aé漢🎲z");
            assert_eq!(events.poll(&mut buffer), Event::End(End::Done(1)));
            assert_eq!(events.poll(&mut buffer), Event::None);
        }
    }

    #[test]
    fn a_buffer_below_one_character_loses_nothing() {
        let mut events = Events::default();
        events.push_text("漢");
        assert_eq!(events.poll(&mut []), Event::TooSmall { waiting: 3 });
        assert_eq!(events.poll(&mut [0; 2]), Event::TooSmall { waiting: 3 });
        assert_eq!(events.poll(&mut [0; 3]), Event::Text { written: 3, waiting: 0 });
        assert_eq!(events.poll(&mut [0; 3]), Event::None);
    }
}
