//! Streams of vhost-user messages, well-formed and not, with files of all kinds attached.

#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vublk::device::message_fuzzing::messages(input);
});
