//! A log of writes, or its sidecar, of any bytes: nothing is read outside of the file, and all ways
//! to read it agree.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vublk::write_log::fuzzing::log(input));
