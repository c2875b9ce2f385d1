//! The input of a QMP connection: JSON values, one after the other, framed by their structure.
//!
//! ```text
//! bytes, however they were cut ──► Framer ──► whole messages ──► parse ──► Value, or an error
//! ```
//!
//! Lines mean nothing: two values on one line and one value on two lines are the same as elsewhere.
//! The dialect is QEMU's: JSON with strings in single quotes, too. So are the words of the errors.
//!
//! Garbage costs one error and no more. After a byte that no JSON has, everything up to a likely
//! start of something new is skipped; clients that want to be sure send 0xFF to get there.
//!
//! Invariants: a message holds at most [`MAX_MESSAGE`] bytes and [`MAX_DEPTH`] levels, and what is
//! beyond that is dropped as it arrives; each byte is looked at a bounded number of times.

use serde_json::{Map, Number, Value};

/// The most bytes of one message.
pub const MAX_MESSAGE: usize = 4 << 20;
/// The deepest nesting of arrays and objects.
pub const MAX_DEPTH: usize = 1024;

/// How much of a token that cannot be errors show.
const MAX_SHOWN: usize = 100;

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Framer {
    /// The message so far.
    message: Vec<u8>,
    /// Open brackets, each by the byte that opened it.
    depth: usize,
    state: State,
    /// Where in the message the token begins that is being read.
    token: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Between tokens.
    #[default]
    Between,
    /// In a string that ends with this quote.
    Text(u8),
    /// Behind a backslash in a string.
    Escape(u8),
    /// In a keyword.
    Keyword,
    /// In a number.
    Number,
    /// After an error: skip to a likely start of something new.
    Recovery,
}

/// What the framer finds.
pub type Message = Result<Value, String>;

impl Framer {
    /// Looks at bytes until a message is complete. Returns how many bytes were used, and the
    /// message if there is one.
    pub fn push(&mut self, bytes: &[u8]) -> (usize, Option<Message>) {
        for (index, &byte) in bytes.iter().enumerate() {
            let (used, message) = self.byte(byte);
            if message.is_some() {
                return (index + usize::from(used), message);
            }
            if !used {
                // Seen again from another state: never unused twice.
                if let (_, Some(message)) = self.byte(byte) {
                    return (index + 1, Some(message));
                }
            }
        }
        (bytes.len(), None)
    }

    /// The stream has ended: what is left in the middle of a message, if it is worth a word.
    pub fn finish(&mut self) -> Option<Message> {
        let message = match self.state {
            State::Keyword => self.end_token(),
            State::Number => self.end_number(None).1,
            _ => None,
        };
        if message.is_some() {
            return message;
        }
        let left = !self.message.is_empty();
        self.reset(State::Between);
        left.then(|| Err("JSON parse error, premature EOI".to_string()))
    }

    /// Whether a message has begun.
    pub fn is_inside(&self) -> bool {
        !self.message.is_empty()
    }

    /// Takes one byte; false if it has to be looked at again from the new state.
    fn byte(&mut self, byte: u8) -> (bool, Option<Message>) {
        match self.state {
            State::Between => (true, self.between(byte)),
            State::Text(quote) => (true, self.text(byte, quote)),
            State::Escape(quote) => {
                self.state = State::Text(quote);
                (true, if is_text(byte) { self.keep(byte) } else { self.stray(byte) })
            }
            State::Keyword if byte.is_ascii_lowercase() => (true, self.keep(byte)),
            State::Keyword => (false, self.end_token()),
            State::Number if byte.is_ascii_digit() && self.is_zero() => (true, self.stray(byte)),
            State::Number if is_number(byte) => (true, self.keep(byte)),
            State::Number => self.end_number(Some(byte)),
            State::Recovery => match byte {
                0..=0x1f | 0xfe | 0xff | b'{' | b'}' | b'[' | b']' | b':' | b',' => {
                    self.state = State::Between;
                    (false, None)
                }
                _ => (true, None),
            },
        }
    }

    fn between(&mut self, byte: u8) -> Option<Message> {
        self.token = self.message.len();
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {
                // Kept inside of a message only: it may part what would be one word.
                if self.message.is_empty() { None } else { self.keep(byte) }
            }
            b'{' | b'[' => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return self.fail(State::Between, "JSON nesting depth limit exceeded".into());
                }
                self.keep(byte)
            }
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                self.keep(byte).or_else(|| self.end_token())
            }
            b':' | b',' => self.keep(byte).or_else(|| self.end_token()),
            b'"' | b'\'' => {
                self.state = State::Text(byte);
                self.keep(byte)
            }
            b'a'..=b'z' => {
                self.state = State::Keyword;
                self.keep(byte)
            }
            b'0'..=b'9' | b'-' => {
                self.state = State::Number;
                self.keep(byte)
            }
            _ => self.stray(byte),
        }
    }

    fn text(&mut self, byte: u8, quote: u8) -> Option<Message> {
        if byte == quote {
            self.state = State::Between;
            return self.keep(byte).or_else(|| self.end_token());
        }
        if !is_text(byte) {
            return self.stray(byte);
        }
        if byte == b'\\' {
            self.state = State::Escape(quote);
        }
        self.keep(byte)
    }

    /// Whether the number so far is a zero, which no digit may follow.
    fn is_zero(&self) -> bool {
        matches!(&self.message[self.token..], b"0" | b"-0")
    }

    /// The byte after a number, or the end of the stream; it is used up if the number is none.
    fn end_number(&mut self, byte: Option<u8>) -> (bool, Option<Message>) {
        if number(&self.message[self.token..]).is_some() {
            return (false, self.end_token());
        }
        let message = match byte {
            Some(byte) => self.stray(byte),
            None => self.stray_token(),
        };
        (true, message)
    }

    /// A token has ended; outside of all brackets that makes a message.
    fn end_token(&mut self) -> Option<Message> {
        self.state = State::Between;
        if self.depth > 0 {
            return None;
        }
        let message = parse(&self.message);
        self.reset(State::Between);
        Some(message)
    }

    fn keep(&mut self, byte: u8) -> Option<Message> {
        if self.message.len() >= MAX_MESSAGE {
            return self.fail(State::Recovery, "JSON token size limit exceeded".into());
        }
        self.message.push(byte);
        None
    }

    /// A byte that cannot be here, for whatever the token is.
    fn stray(&mut self, byte: u8) -> Option<Message> {
        // What is to be shown ends before it, as in C.
        if byte != 0 {
            self.message.push(byte);
        }
        self.stray_token()
    }

    fn stray_token(&mut self) -> Option<Message> {
        let token = &self.message[self.token..];
        let shown = String::from_utf8_lossy(&token[..token.len().min(MAX_SHOWN)]).into_owned();
        self.fail(State::Recovery, format!("JSON parse error, stray '{shown}'"))
    }

    fn fail(&mut self, next: State, text: String) -> Option<Message> {
        self.reset(next);
        Some(Err(text))
    }

    fn reset(&mut self, next: State) {
        self.message.clear();
        // One large message does not keep its memory for ever.
        self.message.shrink_to(1 << 12);
        self.depth = 0;
        self.state = next;
    }
}

/// Whether numbers may have the byte in them.
fn is_number(byte: u8) -> bool {
    byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'.' | b'e' | b'E')
}

/// Whether a string may hold the byte as it is. Bytes from 0x80 on are looked at as UTF-8 later.
fn is_text(byte: u8) -> bool {
    (0x20..0xfe).contains(&byte)
}

/// Parses one message.
///
/// # Errors
/// QEMU's sentence about what is wrong.
pub fn parse(bytes: &[u8]) -> Message {
    let mut parser = Parser { bytes, at: 0 };
    let value = parser.value(0).map_err(|what| format!("JSON parse error, {what}"))?;
    match parser.peek() {
        None => Ok(value),
        Some(_) => Err("JSON parse error, expecting value".to_string()),
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    /// The next byte that is not a blank.
    fn peek(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\t' | b'\r' | b'\n') = self.bytes.get(self.at) {
            self.at += 1;
        }
        self.bytes.get(self.at).copied()
    }

    fn value(&mut self, depth: usize) -> Result<Value, String> {
        if depth > MAX_DEPTH {
            return Err("nesting is too deep".into());
        }
        match self.peek() {
            None => Err("premature EOI".into()),
            Some(b'{') => self.object(depth),
            Some(b'[') => self.array(depth),
            Some(b'"' | b'\'') => self.text().map(Value::String),
            Some(b'a'..=b'z' | b'0'..=b'9' | b'-') => self.word(),
            Some(_) => Err("expecting value".into()),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Value, String> {
        self.at += 1;
        let mut object = Map::new();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Value::Object(object));
        }
        loop {
            let Value::String(key) = self.value(depth + 1)? else {
                return Err("key is not a string in object".into());
            };
            if self.peek() != Some(b':') {
                return Err("missing : in object pair".into());
            }
            self.at += 1;
            let value = self.value(depth + 1)?;
            if object.insert(key, value).is_some() {
                return Err("duplicate key".into());
            }
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(Value::Object(object));
                }
                _ => return Err("expected separator in dict".into()),
            }
        }
    }

    fn array(&mut self, depth: usize) -> Result<Value, String> {
        self.at += 1;
        let mut array = Vec::new();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Value::Array(array));
        }
        loop {
            array.push(self.value(depth + 1)?);
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(Value::Array(array));
                }
                _ => return Err("expected separator in list".into()),
            }
        }
    }

    fn word(&mut self) -> Result<Value, String> {
        let rest = &self.bytes[self.at..];
        let is_part = match rest.first() {
            Some(b'a'..=b'z') => |byte: &u8| byte.is_ascii_lowercase(),
            _ => |byte: &u8| is_number(*byte),
        };
        let len = rest.iter().position(|byte| !is_part(byte)).unwrap_or(rest.len());
        let word = &rest[..len];
        self.at += len;
        match word {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            _ => number(word)
                .map(Value::Number)
                .ok_or_else(|| format!("invalid keyword '{}'", String::from_utf8_lossy(word))),
        }
    }

    /// A string in either kind of quotes.
    fn text(&mut self) -> Result<String, String> {
        let quote = self.bytes[self.at];
        self.at += 1;
        let mut text = Vec::new();
        loop {
            let byte = *self.bytes.get(self.at).ok_or("premature EOI")?;
            self.at += 1;
            match byte {
                b'\\' => self.escape(&mut text)?,
                byte if byte == quote => break,
                byte => text.push(byte),
            }
        }
        String::from_utf8(text).map_err(|_| "invalid UTF-8 sequence in string".into())
    }

    fn escape(&mut self, text: &mut Vec<u8>) -> Result<(), String> {
        let byte = *self.bytes.get(self.at).ok_or("premature EOI")?;
        self.at += 1;
        let plain = match byte {
            b'"' | b'\'' | b'\\' | b'/' => byte,
            b'b' => 8,
            b'f' => 12,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                let c = self.unicode()?;
                text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err("invalid escape sequence in string".into()),
        };
        text.push(plain);
        Ok(())
    }

    /// What `\u` stands for, with the second half of a surrogate pair.
    fn unicode(&mut self) -> Result<char, String> {
        let first = self.hex4()?;
        let mut code = u32::from(first);
        if (0xd800..0xdc00).contains(&first) && self.bytes[self.at..].starts_with(b"\\u") {
            self.at += 2;
            let second = self.hex4()?;
            if (0xdc00..0xe000).contains(&second) {
                code = 0x10000 + ((code - 0xd800) << 10) + (u32::from(second) - 0xdc00);
            }
        }
        // No name and no path has a NUL; QEMU takes it, in an encoding that is not UTF-8.
        let c = char::from_u32(code).filter(|c| *c != '\0');
        c.ok_or_else(|| format!("\\u{first:04x} is not a valid Unicode character"))
    }

    fn hex4(&mut self) -> Result<u16, String> {
        let digits = self.bytes.get(self.at..self.at + 4).ok_or("premature EOI")?;
        self.at += 4;
        let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
        let text = std::str::from_utf8(digits).ok().filter(|_| is_hex);
        let code = text.and_then(|text| u16::from_str_radix(text, 16).ok());
        code.ok_or_else(|| format!("\\u{} is not a valid Unicode character", digits.escape_ascii()))
    }
}

/// The number that `word` is, if it is one as JSON writes them.
fn number(word: &[u8]) -> Option<Number> {
    let digits = word.strip_prefix(b"-").unwrap_or(word);
    let starts_right = match digits {
        [b'0'] => true,
        [b'0', next, ..] => !next.is_ascii_digit(),
        [first, ..] => first.is_ascii_digit(),
        [] => false,
    };
    if !starts_right {
        return None;
    }
    // Integers beyond 64 bits become floating-point, as in QEMU.
    serde_json::from_slice::<Number>(word).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// All messages of a stream that arrives in pieces of `piece` bytes.
    fn messages(stream: &[u8], piece: usize) -> Vec<Message> {
        let mut framer = Framer::default();
        let mut found = Vec::new();
        for mut bytes in stream.chunks(piece) {
            while !bytes.is_empty() {
                let (used, message) = framer.push(bytes);
                found.extend(message);
                bytes = &bytes[used..];
            }
        }
        found.extend(framer.finish());
        found
    }

    fn one(text: &str) -> Message {
        let found = messages(text.as_bytes(), usize::MAX);
        assert_eq!(found, messages(text.as_bytes(), 1), "cutting {text} changes it");
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        found.into_iter().next().unwrap()
    }

    #[test]
    fn values_are_framed_by_their_structure() {
        let stream = b" {\"a\": [1, -2.5e3, '}']}{'b':\n {} }\r\n true 12 \"x\"[]  ";
        let expected = [
            json!({"a": [1, -2500.0, "}"]}),
            json!({"b": {}}),
            json!(true),
            json!(12),
            json!("x"),
            json!([]),
        ];
        for piece in 1..stream.len() {
            let found: Vec<_> = messages(stream, piece).into_iter().map(Result::unwrap).collect();
            assert_eq!(found, expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn strings() {
        for (text, expected) in [
            (r#""a\"b\\\/\b\f\n\r\t""#, "a\"b\\/\u{8}\u{c}\n\r\t"),
            (r#"'it "is"'"#, "it \"is\""),
            (r#""\u00e4\ud83d\ude00""#, "ä😀"),
            ("\"ä😀'\"", "ä😀'"),
        ] {
            assert_eq!(one(text), Ok(json!(expected)), "{text}");
        }
    }

    #[test]
    fn errors_are_those_of_qemu() {
        for (text, expected) in [
            ("bad ", "invalid keyword 'bad'"),
            ("{bad}", "invalid keyword 'bad'"),
            ("{1:2}", "key is not a string in object"),
            ("{,}", "expecting value"),
            ("{'a':bad}", "invalid keyword 'bad'"),
            ("{'a' 1}", "missing : in object pair"),
            ("{'a':1 'b'}", "expected separator in dict"),
            ("[1 2]", "expected separator in list"),
            ("[1,]", "expecting value"),
            ("{'a':1,'a':2}", "duplicate key"),
            ("{'a':1]", "expected separator in dict"),
            ("]", "expecting value"),
            (",", "expecting value"),
            (r#""\x""#, "invalid escape sequence in string"),
            (r#""\u12g4""#, "\\u12g4 is not a valid Unicode character"),
            (r#""\ud800""#, "\\ud800 is not a valid Unicode character"),
            (r#""\u0000""#, "\\u0000 is not a valid Unicode character"),
            ("01\n", "stray '01'"),
            ("1.\n", "stray '1.\n'"),
            ("-", "stray '-'"),
            ("@", "stray '@'"),
            ("\"a\n", "stray '\"a\n'"),
            ("{'a'", "premature EOI"),
        ] {
            assert_eq!(one(text), Err(format!("JSON parse error, {expected}")), "{text}");
        }
        let found = messages(b"\"\xc3\x28\"", 1);
        assert_eq!(found, [Err("JSON parse error, invalid UTF-8 sequence in string".into())]);
    }

    #[test]
    fn garbage_costs_one_error_and_the_next_value_is_read() {
        for garbage in [&b"\xff"[..], b"@@@\n", b"\"abc\n", b"{'a':[\"x\xff", b"HELLO WORLD\r\n"] {
            for piece in [1, 3, 1000] {
                let stream = [garbage, b"{'a':1}"].concat();
                let found = messages(&stream, piece);
                assert_eq!(found.len(), 2, "{garbage:?}: {found:?}");
                assert!(found[0].is_err());
                assert_eq!(found[1], Ok(json!({"a": 1})));
            }
        }
        // An HTTP request is a lot of garbage, and yet nothing is left of it.
        let found = messages(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n{'a':1}", 7);
        assert_eq!(found.last(), Some(&Ok(json!({"a": 1}))));
    }

    #[test]
    fn messages_have_bounds() {
        let deep = |n: usize| [b"[".repeat(n), b"]".repeat(n)].concat();
        assert!(messages(&deep(MAX_DEPTH), 100)[0].is_ok());
        let found = messages(&deep(MAX_DEPTH + 1), 100);
        assert_eq!(found[0], Err("JSON nesting depth limit exceeded".into()));
        let mut framer = Framer::default();
        let long = [b'x'; 1 << 16];
        assert_eq!(framer.push(b"\""), (1, None));
        let mut errors = 0;
        for _ in 0..2 * MAX_MESSAGE / long.len() {
            let mut rest = &long[..];
            while !rest.is_empty() {
                let (used, message) = framer.push(rest);
                errors += usize::from(message.is_some());
                rest = &rest[used..];
            }
            assert!(framer.message.capacity() <= 2 * MAX_MESSAGE);
        }
        assert_eq!(errors, 1, "what follows is skipped");
        assert_eq!(framer.push(b"\n7 "), (2, Some(Ok(json!(7)))));
        assert!(framer.message.capacity() <= 1 << 12);
    }
}
