//! Any bytes as an add-cow file.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk::formats::addcow::fuzzing::run(data));
