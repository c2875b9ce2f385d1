//! A stream of vhost-user messages of any bytes: the rules between messages and rings hold.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    vublk::device::message_fuzzing::messages(input);
});
