//! What a session has to tell: bounded, in order, and without allocation once its text fits.

use super::StopReason;
use crate::error::Error;

/// One thing that happened.
#[derive(Debug)]
pub enum Event {
    /// More of the answer.
    Text {
        /// Bytes written to the caller's memory, always whole characters.
        written: usize,
        /// Bytes that wait for the next call.
        waiting: usize,
    },
    /// The caller's memory does not hold even the next character; nothing was taken.
    TextTooLarge {
        /// Bytes that wait.
        waiting: usize,
    },
    /// More of the prompt was computed.
    Progress {
        /// Prompt tokens computed, those found in the cache included.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// The device was lost. What is being worked on is kept and goes on once the engine recovered.
    DeviceLost,
    /// Memory is short: something did not fit, or somebody asked to trim. What could be given back was.
    MemoryPressure,
    /// What was begun is complete.
    Done(StopReason),
    /// What was begun failed. The session can be used again.
    Failed(Error),
}

/// Events that were not taken yet.
#[derive(Debug, Default)]
pub(super) struct Events {
    device_lost: bool,
    memory_pressure: bool,
    progress: Option<(usize, usize)>,
    text: String,
    /// Bytes of `text` already taken.
    taken: usize,
    end: Option<Result<StopReason, Error>>,
}

impl Events {
    /// Forgets all but what concerns the device and memory, and makes room for `bytes` of text.
    pub(super) fn restart(&mut self, bytes: usize) {
        self.text.clear();
        self.text.reserve(bytes);
        self.taken = 0;
        self.progress = None;
        self.end = None;
    }

    pub(super) fn device_lost(&mut self) {
        self.device_lost = true;
    }

    pub(super) fn memory_pressure(&mut self) {
        self.memory_pressure = true;
    }

    /// Replaces progress that was not taken: only the latest counts.
    pub(super) fn progress(&mut self, done: usize, total: usize) {
        self.progress = Some((done, total));
    }

    /// Where the answer's text is appended.
    pub(super) fn text(&mut self) -> &mut String {
        if self.taken == self.text.len() {
            self.text.clear();
            self.taken = 0;
        } else if self.taken > self.text.capacity() / 2 {
            self.text.drain(..self.taken);
            self.taken = 0;
        }
        &mut self.text
    }

    pub(super) fn end(&mut self, end: Result<StopReason, Error>) {
        self.end = Some(end);
    }

    /// Text that was not taken yet; all of it counts as taken now.
    pub(super) fn take_text(&mut self) -> &str {
        let from = std::mem::replace(&mut self.taken, self.text.len());
        &self.text[from..]
    }

    pub(super) fn take_end(&mut self) -> Option<Result<StopReason, Error>> {
        self.end.take()
    }

    /// Takes the next event, text into `out`: first what concerns the device, then progress, text, and the end.
    pub(super) fn poll(&mut self, out: &mut [u8]) -> Option<Event> {
        if std::mem::take(&mut self.device_lost) {
            return Some(Event::DeviceLost);
        }
        if std::mem::take(&mut self.memory_pressure) {
            return Some(Event::MemoryPressure);
        }
        if let Some((done, total)) = self.progress.take() {
            return Some(Event::Progress { done, total });
        }
        let text = &self.text[self.taken..];
        if text.is_empty() {
            return self.end.take().map(|end| end.map_or_else(Event::Failed, Event::Done));
        }
        let mut cut = out.len().min(text.len());
        while !text.is_char_boundary(cut) {
            cut -= 1;
        }
        if cut == 0 {
            return Some(Event::TextTooLarge { waiting: text.len() });
        }
        out[..cut].copy_from_slice(&text.as_bytes()[..cut]);
        let waiting = text.len() - cut;
        self.taken += cut;
        Some(Event::Text { written: cut, waiting })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_whole_lossless_and_before_the_end() {
        for size in 4..9 {
            let mut events = Events::default();
            events.restart(0);
            events.text().push_str("aé漢");
            events.text().push_str("🎲z");
            events.progress(1, 2);
            events.end(Ok(StopReason::MaxTokens));
            events.device_lost();
            let (mut text, mut buffer) = (String::new(), vec![0; size]);
            assert!(matches!(events.poll(&mut buffer), Some(Event::DeviceLost)));
            assert!(matches!(events.poll(&mut buffer), Some(Event::Progress { done: 1, total: 2 })));
            while text.len() < "aé漢🎲z".len() {
                let Some(Event::Text { written, waiting }) = events.poll(&mut buffer) else {
                    panic!("text is waiting")
                };
                text.push_str(std::str::from_utf8(&buffer[..written]).unwrap());
                assert_eq!(text.len() + waiting, "aé漢🎲z".len());
            }
            assert_eq!(text, "aé漢🎲z");
            assert!(matches!(events.poll(&mut buffer), Some(Event::Done(StopReason::MaxTokens))));
            assert!(events.poll(&mut buffer).is_none());
        }
    }

    #[test]
    fn a_buffer_below_one_character_loses_nothing() {
        let mut events = Events::default();
        events.text().push('漢');
        for size in [0, 2] {
            let polled = events.poll(&mut vec![0; size]);
            assert!(matches!(polled, Some(Event::TextTooLarge { waiting: 3 })), "{polled:?}");
        }
        assert!(matches!(events.poll(&mut [0; 3]), Some(Event::Text { written: 3, waiting: 0 })));
        assert!(events.poll(&mut [0; 3]).is_none());
    }
}
