//! Guest memory and a ring of any bytes: nothing may leave guest memory, complete twice or panic.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| vublk::device::fuzzing::chains(input));
