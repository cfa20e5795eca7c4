//! libFuzzer's program for [`fence_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fence_fuzz::config::check(bytes));
