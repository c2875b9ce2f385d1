//! The body of the fuzz target `control`: what a client may send, up to where a command would run.
//!
//! It is in the library, so that plain tests run it, too.

use serde_json::Value;

use super::commands::COMMANDS;
use super::json::{Framer, MAX_MESSAGE, Message, parse};
use super::keyval;
use super::request::Request;

/// Any bytes as the input of a connection. The first byte says how the rest is cut.
///
/// # Panics
/// If how the stream is cut makes a difference, if we read something else than `serde_json` does,
/// or if arguments that were accepted are not accepted again when they are written.
pub fn stream(input: &[u8]) {
    let Some((cut, bytes)) = input.split_first() else { return };
    let whole = messages(bytes, usize::MAX);
    assert_eq!(whole, messages(bytes, usize::from(*cut) % 64 + 1), "cutting changes what is read");
    for message in whole {
        if let Ok(call) = Request::new(message, true).call {
            let _ = call.command(true);
            for command in COMMANDS {
                if let Ok(written) = command.reread(call.arguments.clone()) {
                    let again = command.reread(written.clone());
                    assert_eq!(again.as_ref(), Ok(&written), "{}", command.name);
                }
            }
        }
    }
    compare_with_serde(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = keyval::to_value(text, Some("driver"));
    }
}

/// All that a stream holds.
fn messages(stream: &[u8], piece: usize) -> Vec<Message> {
    let mut framer = Framer::default();
    let mut found = Vec::new();
    for mut bytes in stream.chunks(piece) {
        while !bytes.is_empty() {
            let (used, message) = framer.push(bytes);
            // Nothing is looked at for ever without a result.
            assert!(used > 0 || message.is_some());
            found.extend(message);
            bytes = &bytes[used..];
        }
    }
    found.extend(framer.finish());
    found
}

/// What `serde_json` takes for JSON we take for the same, but for what we refuse on purpose.
fn compare_with_serde(bytes: &[u8]) {
    let Ok(theirs) = serde_json::from_slice::<Value>(bytes) else { return };
    if bytes.len() > MAX_MESSAGE {
        return;
    }
    match parse(bytes) {
        Ok(ours) => assert_eq!(ours, theirs),
        Err(text) => assert!(
            text.ends_with("duplicate key") || text.ends_with("is not a valid Unicode character"),
            "{text}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a fuzzer would, only shorter: seeds with bytes changed, put in, taken out, put together.
    #[test]
    fn changed_seeds() {
        let seeds: [&[u8]; 5] = [
            b"\x05{\"execute\": \"blockdev-add\", \"arguments\": {\"driver\": \"raw\", \
              \"node-name\": \"n\", \"file\": {\"driver\": \"file\", \"filename\": \"/x\"}}}",
            b"\x01{'execute':'transaction','arguments':{'actions':[{'type':'abort','data':{}}]}}",
            b"\x02{\"execute\":\"block_resize\",\"arguments\":{\"node-name\":\"n\",\"size\":1e3}}",
            b"\x00driver=qcow2,file.driver=file,file.filename=a,,b,list.0=x,list.1=y",
            b"\x3f[1,-0.5e-7,true,null,\"\\ud83d\\ude00\\n\",{\"a\":{}}] bad \xff {}",
        ];
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        for seed in seeds {
            stream(seed);
            for _ in 0..300 {
                let mut bytes = seed.to_vec();
                for _ in 0..=random(6) {
                    let at = random(bytes.len());
                    match random(4) {
                        0 => bytes[at] = random(256) as u8,
                        1 => bytes.insert(at, b"{}[]\",:'\\\x01 0e-"[random(14)]),
                        2 => drop(bytes.drain(at..(at + random(9)).min(bytes.len()))),
                        _ => bytes.extend_from_slice(&seeds[random(5)][1..]),
                    }
                    if bytes.is_empty() {
                        break;
                    }
                }
                stream(&bytes);
            }
        }
    }
}
