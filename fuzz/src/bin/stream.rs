//! libFuzzer's program for [`fence_fuzz::stream`].
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fence_fuzz::stream::check(bytes));
