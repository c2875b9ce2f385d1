//! Damage to a small VHDX image.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk::formats::vhdx::fuzzing::run(data));
