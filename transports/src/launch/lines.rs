//! Cutting a stream of bytes into lines, in bounded memory.

/// A longer line is handed on in pieces of this many bytes.
pub(super) const MAX_LINE: usize = 64 * 1024;

/// The start of a line whose end has not come yet.
#[derive(Default)]
pub(super) struct LineBuffer {
    pending: Vec<u8>,
}

impl LineBuffer {
    /// Takes the next bytes of the stream and calls `line` for each line that they complete, without its
    /// newline.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut line: impl FnMut(&[u8])) {
        while !bytes.is_empty() {
            let room = MAX_LINE - self.pending.len();
            let window = &bytes[..bytes.len().min(room)];
            let newline = window.iter().position(|&b| b == b'\n');
            let taken = newline.unwrap_or(window.len());
            let rest = &bytes[taken + usize::from(newline.is_some())..];
            let complete = newline.is_some() || taken == room;
            if complete && self.pending.is_empty() {
                line(&window[..taken]);
            } else {
                self.pending.extend_from_slice(&window[..taken]);
                if complete {
                    line(&self.pending);
                    self.pending.clear();
                }
            }
            bytes = rest;
        }
    }

    /// The stream has ended: what is left is a line although no newline ends it.
    pub(super) fn finish(&mut self, line: impl FnOnce(&[u8])) {
        if !self.pending.is_empty() {
            line(&self.pending);
            self.pending = Vec::new();
        }
    }
}

/// The last lines of a rank's standard error that aren't blank: what its failure is told with.
#[derive(Default)]
pub(super) struct Tail {
    lines: std::collections::VecDeque<String>,
}

impl Tail {
    const LINES: usize = 8;
    const BYTES: usize = 1024;

    pub(super) fn push(&mut self, line: &[u8]) {
        let cut = &line[..line.len().min(Self::BYTES)];
        let text = String::from_utf8_lossy(cut);
        let text = text.trim();
        if text.is_empty() {
            return;
        }
        if self.lines.len() == Self::LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(text.to_owned());
    }

    pub(super) fn into_lines(self) -> Vec<String> {
        self.lines.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(chunks: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut lines = Vec::new();
        let mut buffer = LineBuffer::default();
        for chunk in chunks {
            buffer.feed(chunk, |line| lines.push(line.to_vec()));
        }
        buffer.finish(|line| lines.push(line.to_vec()));
        lines
    }

    #[test]
    fn lines_come_out_whole_however_they_arrive() {
        let text = b"one\n\ntwo\r\nthree";
        let want = [&b"one"[..], b"", b"two\r", b"three"];
        for size in 1..=text.len() {
            assert_eq!(cut(&text.chunks(size).collect::<Vec<_>>()), want, "chunks of {size}");
        }
        assert_eq!(cut(&[b"ends\n"]), [b"ends"]);
        assert!(cut(&[]).is_empty());
    }

    #[test]
    fn an_endless_line_is_cut_into_pieces_and_loses_nothing() {
        let long = vec![b'x'; 2 * MAX_LINE + 10];
        for size in [7, 4096, MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, long.len()] {
            let lines = cut(&long.chunks(size).collect::<Vec<_>>());
            assert_eq!(lines.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_LINE, MAX_LINE, 10], "{size}");
        }
        let mut buffer = LineBuffer::default();
        for chunk in long.chunks(1000) {
            buffer.feed(chunk, |_| {});
            assert!(buffer.pending.len() < MAX_LINE);
        }
    }

    #[test]
    fn the_tail_keeps_the_last_lines_that_say_something() {
        let mut tail = Tail::default();
        for i in 0..20 {
            tail.push(format!("  line {i}").as_bytes());
            tail.push(b" \t");
        }
        tail.push(b"not \xff utf-8");
        let lines = tail.into_lines();
        assert_eq!(lines.len(), Tail::LINES);
        assert_eq!(lines[0], "line 13");
        assert_eq!(lines[7], "not \u{fffd} utf-8");
    }
}
