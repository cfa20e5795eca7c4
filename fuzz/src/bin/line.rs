//! libFuzzer's program for [`fence_fuzz::line`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fence_fuzz::line::check(bytes));
