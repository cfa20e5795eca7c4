//! libFuzzer's program for [`fence_fuzz::request`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fence_fuzz::request::check(bytes));
