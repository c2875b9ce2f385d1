//! What a client of the control socket sends, of any bytes: it is read the same however it is cut,
//! and nothing panics up to where a command would run.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vublk::control::fuzzing::stream(input));
