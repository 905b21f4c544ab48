#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tensorwire_transports::fuzz::frame_header(bytes));
