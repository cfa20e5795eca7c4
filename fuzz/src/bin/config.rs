//! libFuzzer's program for [`fence_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(init: fence_fuzz::write_seeds(), |bytes: &[u8]| fence_fuzz::config::check(bytes));
